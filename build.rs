//! Links the unwinder into the program. As a library of its own (libgcc_s), it
//! has to be found, mapped and relocated again at every event of a udev rule.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let target = std::env::var("TARGET").unwrap_or_default();
    let is_native = std::env::var("HOST").is_ok_and(|host| host == target);
    if is_native && target.ends_with("-linux-gnu") && has_archive() {
        println!("cargo:rustc-link-lib=static:-bundle=gcc_eh");
    }
}

/// Whether the compiler has the unwinder as an archive. GCC does. If it has
/// none, its answer is the name alone.
fn has_archive() -> bool {
    let asked = Command::new("cc").arg("-print-file-name=libgcc_eh.a").output();
    asked.is_ok_and(|answer| {
        let path = String::from_utf8_lossy(&answer.stdout).trim_end().to_owned();
        answer.status.success() && Path::new(&path).is_absolute()
    })
}
