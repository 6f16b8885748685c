//! Gadgets: devices that the kernel plays itself, with real drivers on either side (Linux,
//! Documentation/usb/gadget_configfs.rst). They sit in sockets of `dummy_hcd`, each a controller with one port.
//!
//! ```ignore
//! let mut gadgets = Gadgets::load(2);
//! let phone = Gadget::new(0x18d1, 0x4ee2).storage(&[8, 8]).network().serial_port();
//! let phone = gadgets.plug(phone, 0);
//! let second_disk = phone.lun(1);
//! gadgets.pull(&phone);
//! ```
//!
//! `dummy_hcd` has no isochronous endpoints, so no camera and no USB audio, but MIDI.

use crate::hardware::{Plugged, Socket};
use crate::host::{load, mount, must, unload};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

const CONFIGFS: &str = "/sys/kernel/config";
const GADGETS: &str = "/sys/kernel/config/usb_gadget";
const FILES: &str = "/run/gadgets";

/// What a device says of itself, and its functions: interface 0 and up, in the order in which they were added.
#[derive(Clone)]
pub struct Gadget {
    attributes: Vec<(&'static str, String)>,
    strings: Vec<(&'static str, Vec<u8>)>,
    functions: Vec<Function>,
}

#[derive(Clone)]
struct Function {
    kind: &'static str,
    attributes: Vec<(&'static str, Vec<u8>)>,
    /// The sizes of its disks in MiB.
    luns: Vec<u64>,
    /// The class of an interface that a program plays.
    played: Option<u8>,
}

impl Gadget {
    pub fn new(vendor: u16, product: u16) -> Gadget {
        let gadget = Gadget { attributes: Vec::new(), strings: Vec::new(), functions: Vec::new() };
        gadget.ids(vendor, product)
    }

    pub fn ids(self, vendor: u16, product: u16) -> Gadget {
        self.attribute("idVendor", vendor).attribute("idProduct", product)
    }

    /// The device's own class, which is 0 where its interfaces say theirs.
    pub fn class(self, class: u8, subclass: u8, protocol: u8) -> Gadget {
        self.attribute("bDeviceClass", class.into())
            .attribute("bDeviceSubClass", subclass.into())
            .attribute("bDeviceProtocol", protocol.into())
    }

    fn attribute(mut self, name: &'static str, value: u16) -> Gadget {
        self.attributes.push((name, format!("{value:#x}")));
        self
    }

    /// At most 126 bytes each, which the kernel takes for UTF-8 and sends as UTF-16. It sends no string at all in
    /// place of one that is no UTF-8, such as a lone surrogate; [`crate::usbip`] has those.
    pub fn strings(self, manufacturer: &str, product: &str, serial: &str) -> Gadget {
        // One newline at the end is not the string's.
        let value = |text: &str| format!("{text}\n").into_bytes();
        let strings = vec![
            ("manufacturer", value(manufacturer)),
            ("product", value(product)),
            ("serialnumber", value(serial)),
        ];
        Gadget { strings, ..self }
    }

    /// A mass storage with disks of these sizes in MiB.
    pub fn storage(self, luns: &[u64]) -> Gadget {
        self.add(Function { luns: luns.to_vec(), ..Function::new("mass_storage", &[]) })
    }

    pub fn keyboard(self) -> Gadget {
        // Device Class Definition for HID 1.11, appendix B.1, without the LEDs.
        const REPORT: [u8; 43] = [
            0x05, 0x01, 0x09, 0x06, 0xa1, 0x01, 0x05, 0x07, 0x19, 0xe0, 0x29, 0xe7, 0x15, 0x00,
            0x25, 0x01, 0x75, 0x01, 0x95, 0x08, 0x81, 0x02, 0x95, 0x01, 0x75, 0x08, 0x81, 0x01,
            0x95, 0x06, 0x75, 0x08, 0x15, 0x00, 0x25, 0x65, 0x19, 0x00, 0x29, 0x65, 0x81, 0x00,
            0xc0,
        ];
        let attributes: [(_, &[u8]); 4] = [
            ("subclass", b"1"),
            ("protocol", b"1"),
            ("report_length", b"8"),
            ("report_desc", &REPORT),
        ];
        self.add(Function::new("hid", &attributes))
    }

    /// A modem: CDC ACM, `/dev/ttyACM0` on the host.
    pub fn serial_port(self) -> Gadget {
        self.add(Function::new("acm", &[]))
    }

    /// A network adapter: CDC ECM.
    pub fn network(self) -> Gadget {
        self.add(Function::new("ecm", &[]))
    }

    /// A network adapter of the faster kind: CDC NCM.
    pub fn fast_network(self) -> Gadget {
        self.add(Function::new("ncm", &[]))
    }

    /// A sound device without isochronous endpoints, `/dev/snd/midiC0D0` on the host.
    pub fn midi(self) -> Gadget {
        self.add(Function::new("midi", &[]))
    }

    /// `/dev/usb/lp0` on the host.
    pub fn printer(self) -> Gadget {
        self.add(Function::new("printer", &[]))
    }

    /// An interface of any class with one bulk endpoint: FunctionFS, played by this program.
    pub fn interface(self, class: u8) -> Gadget {
        self.add(Function { played: Some(class), ..Function::new("ffs", &[]) })
    }

    fn add(mut self, function: Function) -> Gadget {
        self.functions.push(function);
        self
    }
}

impl Function {
    fn new(kind: &'static str, attributes: &[(&'static str, &[u8])]) -> Function {
        let attributes = attributes.iter().map(|(name, value)| (*name, value.to_vec())).collect();
        Function { kind, attributes, luns: Vec::new(), played: None }
    }
}

/// The sockets, numbered from 0, and what is in them.
pub struct Gadgets {
    /// Interfaces that this program plays as long as a file is open, each with its gadget's name.
    played: Vec<(String, File)>,
}

impl Gadgets {
    /// Sockets for high-speed devices, at most 32.
    pub fn load(sockets: u32) -> Gadgets {
        Gadgets::load_with(sockets, "is_high_speed=1")
    }

    /// Sockets with a USB 2 and a USB 3 half; gadgets appear on the SuperSpeed one.
    pub fn load_super_speed(sockets: u32) -> Gadgets {
        Gadgets::load_with(sockets, "is_super_speed=1")
    }

    fn load_with(sockets: u32, parameter: &str) -> Gadgets {
        load("dummy_hcd", &[&format!("num={sockets}"), parameter]);
        load("libcomposite", &[]);
        mount("configfs", "configfs", Path::new(CONFIGFS));
        Gadgets { played: Vec::new() }
    }

    pub fn plug(&mut self, gadget: Gadget, socket: u32) -> Plugged {
        self.insert(gadget, socket);
        let place = Socket::new("", &format!("dummy_hcd.{socket}"), 1);
        Plugged::arrived(name(socket), &place)
    }

    pub fn pull(&mut self, gadget: &Plugged) {
        self.take_out(&gadget.id);
        gadget.leaves();
    }

    /// Plugs it in and does not wait until anybody has seen it.
    pub fn insert(&mut self, gadget: Gadget, socket: u32) {
        self.try_insert(gadget, socket).unwrap_or_else(|error| panic!("socket {socket}: {error}"));
    }

    /// Pulls out what is in a socket and does not wait until the kernel has noticed.
    pub fn remove(&mut self, socket: u32) {
        self.take_out(&name(socket));
    }

    fn take_out(&mut self, name: &str) {
        let _ = fs::write(Path::new(GADGETS).join(name).join("UDC"), "\n");
        self.played.retain(|(gadget, _)| gadget != name);
        remove(Path::new(GADGETS).join(name));
    }

    fn try_insert(&mut self, gadget: Gadget, socket: u32) -> io::Result<()> {
        let directory = Path::new(GADGETS).join(name(socket));
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
                let control = play(&format!("s{socket}n{number}"), class)?;
                self.played.push((name(socket), control));
            }
            symlink(&path, configuration.join(&instance))?;
        }
        fs::write(directory.join("UDC"), format!("dummy_udc.{socket}"))
    }
}

fn name(socket: u32) -> String {
    format!("socket{socket}")
}

fn add_lun(function: &Path, lun: usize, name: &str, size: u64) -> io::Result<()> {
    fs::create_dir_all(FILES)?;
    let image = Path::new(FILES).join(name);
    File::create(&image)?.set_len(size << 20)?;
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

/// Takes a gadget apart, in the only order that configfs allows.
fn remove(gadget: PathBuf) {
    let _ = fs::write(gadget.join("UDC"), "\n");
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

/// Removes what an earlier test has left, and the sockets.
pub fn clear() {
    for gadget in fs::read_dir(GADGETS).into_iter().flatten().flatten() {
        remove(gadget.path());
    }
    unload("dummy_hcd");
    let _ = fs::remove_dir_all(FILES);
}
