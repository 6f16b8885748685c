//! How the kernel is told what a gadget is (Linux, Documentation/usb/gadget_configfs.rst).

use crate::gadget::Gadget;
use crate::host::{mount, must};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::Path;

pub const GADGETS: &str = "/sys/kernel/config/usb_gadget";
/// The disks' images and the mount points of interfaces that this program plays.
pub const FILES: &str = "/run/gadgets";

pub fn prepare() {
    mount("configfs", "configfs", Path::new("/sys/kernel/config"));
}

/// Makes a gadget with this name and plugs it into a socket. What this program plays of it, it plays as long as the files
/// are open.
pub fn create(name: &str, gadget: &Gadget, socket: u32) -> io::Result<Vec<File>> {
    let directory = Path::new(GADGETS).join(name);
    let mut played = Vec::new();
    fs::create_dir(&directory)?;
    for (name, value) in &gadget.attributes {
        fs::write(directory.join(name), value)?;
    }
    if !gadget.strings.is_empty() {
        fs::create_dir(directory.join("strings/0x409"))?;
    }
    for (name, value) in &gadget.strings {
        fs::write(directory.join("strings/0x409").join(name), value)?;
    }
    let configuration = directory.join("configs/c.1");
    fs::create_dir(&configuration)?;
    for (number, function) in gadget.functions.iter().enumerate() {
        let instance = format!("{}.s{socket}n{number}", function.kind);
        let path = directory.join("functions").join(&instance);
        fs::create_dir(&path)?;
        for (name, value) in &function.attributes {
            fs::write(path.join(name), value)?;
        }
        for (lun, size) in function.luns.iter().enumerate() {
            add_lun(&path, lun, &format!("{instance}.{lun}"), *size)?;
        }
        if let Some(class) = function.played {
            played.push(play(&format!("s{socket}n{number}"), class)?);
        }
        symlink(&path, configuration.join(&instance))?;
    }
    fs::write(directory.join("UDC"), format!("dummy_udc.{socket}"))?;
    Ok(played)
}

fn add_lun(function: &Path, lun: usize, name: &str, size: u64) -> io::Result<()> {
    fs::create_dir_all(FILES)?;
    let image = Path::new(FILES).join(name);
    File::options().create(true).append(true).open(&image)?.set_len(size << 20)?;
    let directory = function.join(format!("lun.{lun}"));
    if lun > 0 {
        fs::create_dir(&directory)?;
    }
    fs::write(directory.join("removable"), "1")?;
    fs::write(directory.join("file"), image.as_os_str().as_encoded_bytes())
}

/// Says what the interface is (Linux, include/uapi/linux/usb/functionfs.h), which lasts as long as the file is open.
fn play(instance: &str, class: u8) -> io::Result<File> {
    let directory = Path::new(FILES).join(instance);
    mount("functionfs", instance, &directory);
    let interface = [9, 4, 0, 0, 1, class, 0, 0, 1];
    let endpoint = |size: u16| [7, 5, 0x81, 2, size.to_le_bytes()[0], size.to_le_bytes()[1], 0];
    let mut descriptors = Vec::new();
    for size in [64, 512] {
        descriptors.extend(interface);
        descriptors.extend(endpoint(size));
    }
    let (magic, both_speeds, each) = (3_u32, 3_u32, 2_u32);
    let length = 5 * 4 + descriptors.len() as u32;
    let head = [magic, length, both_speeds, each, each];
    let mut head: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
    head.append(&mut descriptors);
    let mut control = File::options().read(true).write(true).open(directory.join("ep0"))?;
    control.write_all(&head)?;
    // One language, and the interface's name in it.
    let name = b"\x09\x04played\0";
    let (magic, length) = (2_u32, 4 * 4 + name.len() as u32);
    let head = [magic, length, 1, 1];
    let mut strings: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
    strings.extend(name);
    control.write_all(&strings)?;
    Ok(control)
}

/// Pulls it out of its socket, where it is in one.
pub fn unplug(gadget: &Path) {
    let _ = fs::write(gadget.join("UDC"), "\n");
}

/// Takes a gadget apart, in the only order that configfs allows.
pub fn remove(gadget: &Path) {
    unplug(gadget);
    let configuration = gadget.join("configs/c.1");
    for entry in fs::read_dir(&configuration).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_symlink()) {
            fs::remove_file(entry.path()).expect("a function of a gadget");
        }
    }
    let _ = fs::remove_dir(configuration);
    for function in fs::read_dir(gadget.join("functions")).into_iter().flatten().flatten() {
        for lun in (1..8).map(|lun| function.path().join(format!("lun.{lun}"))) {
            let _ = fs::remove_dir(lun);
        }
        let instance = function.file_name().into_string().expect("text");
        fs::remove_dir(function.path()).expect("a function that is in no configuration");
        if let Some(instance) = instance.strip_prefix("ffs.") {
            must("umount", &[Path::new(FILES).join(instance).to_str().expect("text")]);
        }
    }
    let _ = fs::remove_dir(gadget.join("strings/0x409"));
    fs::remove_dir(gadget).expect("an empty gadget");
}
