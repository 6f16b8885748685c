//! What other programs do on the machine.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs a program, which must succeed.
#[track_caller]
pub fn must(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

/// Loads a kernel module.
#[track_caller]
pub fn load(module: &str, parameters: &[&str]) {
    must("modprobe", &[&[module], parameters].concat());
}

/// Unloads a kernel module, where it is loaded.
#[track_caller]
pub fn unload(module: &str) {
    if Path::new("/sys/module").join(module).exists() {
        must("rmmod", &[module]);
    }
}

/// Mounts a file system of the kernel's own, unless it is mounted there.
#[track_caller]
pub fn mount(kind: &str, source: &str, directory: &Path) {
    fs::create_dir_all(directory).expect("a directory");
    let directory = directory.to_str().expect("text");
    let mounts = fs::read_to_string("/proc/mounts").expect("procfs");
    if !mounts.contains(&format!(" {directory} {kind} ")) {
        must("mount", &["-t", kind, source, directory]);
    }
}
