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

use crate::configfs::{self, FILES, GADGETS};
use crate::hardware::{Plugged, Socket};
use crate::host::{load, unload};
use std::fs::{self, File};
use std::path::Path;

/// What a device says of itself, and its functions: interface 0 and up, in the order in which they were added.
#[derive(Clone)]
pub struct Gadget {
    pub attributes: Vec<(&'static str, String)>,
    pub strings: Vec<(&'static str, Vec<u8>)>,
    pub functions: Vec<Function>,
}

#[derive(Clone)]
pub struct Function {
    pub kind: &'static str,
    pub attributes: Vec<(&'static str, Vec<u8>)>,
    /// The sizes of its disks in MiB.
    pub luns: Vec<u64>,
    /// The class of an interface that a program plays.
    pub played: Option<u8>,
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

    /// A mass storage with disks of these sizes in MiB. Plugged into the same socket again, they have their content.
    pub fn storage(self, luns: &[u64]) -> Gadget {
        self.add(Function { luns: luns.to_vec(), ..Function::new("mass_storage", &[]) })
    }

    /// A CD-ROM drive with a disc of so many MiB, `/dev/sr0` on the host.
    pub fn cdrom(self, size: u64) -> Gadget {
        let drive = Function::new("mass_storage", &[("lun.0/cdrom", b"1")]);
        self.add(Function { luns: vec![size], ..drive })
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
        load("dummy_hcd", &[&format!("num={sockets}")]);
        load("libcomposite", &[]);
        configfs::prepare();
        Gadgets { played: Vec::new() }
    }

    pub fn plug(&mut self, gadget: Gadget, socket: u32) -> Plugged {
        self.insert(gadget, socket);
        self.arrived(socket)
    }

    /// Waits until the kernel and udevd have seen what was inserted.
    pub fn arrived(&self, socket: u32) -> Plugged {
        let place = Socket::new("", &format!("dummy_hcd.{socket}"), 1);
        Plugged::arrived(name(socket), &place)
    }

    pub fn pull(&mut self, gadget: &Plugged) {
        self.take_out(&gadget.id);
        gadget.leaves();
    }

    /// Plugs it in and does not wait until anybody has seen it.
    pub fn insert(&mut self, gadget: Gadget, socket: u32) {
        let name = name(socket);
        let played = configfs::create(&name, &gadget, socket);
        let played = played.unwrap_or_else(|error| panic!("{name}: {error}"));
        self.played.extend(played.into_iter().map(|file| (name.clone(), file)));
    }

    /// Pulls out what is in a socket and does not wait until the kernel has noticed.
    pub fn remove(&mut self, socket: u32) {
        self.take_out(&name(socket));
    }

    fn take_out(&mut self, name: &str) {
        let directory = Path::new(GADGETS).join(name);
        configfs::unplug(&directory);
        self.played.retain(|(gadget, _)| gadget != name);
        configfs::remove(&directory);
    }
}

fn name(socket: u32) -> String {
    format!("socket{socket}")
}

/// Removes what an earlier test has left, and the sockets.
pub fn clear() {
    for gadget in fs::read_dir(GADGETS).into_iter().flatten().flatten() {
        configfs::remove(&gadget.path());
    }
    unload("dummy_hcd");
    let _ = fs::remove_dir_all(FILES);
}
