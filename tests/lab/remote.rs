//! Devices that this program plays, down to every transfer: a USB/IP server (Linux, Documentation/usb/usbip_protocol.rst)
//! on a socket pair, whose other end `vhci_hcd` has. What gadgets cannot be, these are: strings of any 16-bit units,
//! hubs, and devices that hang, lie, or leave in the middle of an answer.
//!
//! ```ignore
//! let mut remotes = Remotes::load();
//! let mouse = Device::new(0x1234, 0x0001).interface(&VENDOR).strings(&[0x41], &[0xd800], &[0x42]);
//! let mouse = remotes.plug(mouse, 1);        // ports 1 to 15, each with a USB 2 and a USB 3 half
//! remotes.pull(&mouse);                      // as the end of the connection
//!
//! // usbhid's probe takes 20 s for each interface. For so long the kernel keeps the device locked, and finds
//! // nothing else that is plugged into this controller.
//! let id = remotes.insert(Device::hangs_in_probe(1), 2);
//! remotes.remove(&id);
//! // A hub by its interface only, which the kernel drives as one.
//! let hub = remotes.plug(remote_hub::by_interface_only(), 3);
//! // Whatever else: the first answer that is not None counts.
//! let liar = Device::new(0x1234, 0x0002).answers(|setup| (setup.request == 6).then_some(Answer::Disconnect));
//! ```
//!
//! All of them are gone when the test's process ends.

use crate::hardware::{Plugged, Socket};
use crate::host::{load, unload};
use crate::remote_wire::serve;
use crate::wait::wait_until;
use std::collections::HashMap;
use std::fs;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;

const CONTROLLER: &str = "/sys/devices/platform/vhci_hcd.0";

/// An interface of a class that no driver takes, without endpoints.
pub const VENDOR: [u8; 9] = [9, 4, 0, 0, 0, 0xff, 0, 0, 0];

pub use crate::remote_wire::{Answer, Setup};

type Answers = Box<dyn FnMut(&Setup) -> Option<Answer> + Send>;

pub struct Device {
    super_speed: bool,
    class: [u8; 3],
    vendor: u16,
    product: u16,
    strings: Vec<Vec<u16>>,
    interfaces: Vec<Vec<u8>>,
    answers: Answers,
}

impl Device {
    pub fn new(vendor: u16, product: u16) -> Device {
        Device {
            super_speed: false,
            class: [0; 3],
            vendor,
            product,
            strings: Vec::new(),
            interfaces: Vec::new(),
            answers: Box::new(|_| None),
        }
    }

    /// Its own class, subclass and protocol; none of its own where this is not called.
    pub fn class(self, class: [u8; 3]) -> Device {
        Device { class, ..self }
    }

    /// 5 Gb/s; otherwise it is 480 Mb/s.
    pub fn super_speed(self) -> Device {
        Device { super_speed: true, ..self }
    }

    pub fn is_super_speed(&self) -> bool {
        self.super_speed
    }

    /// At most 126 units each, whatever they are; an empty one is none.
    pub fn strings(self, manufacturer: &[u16], product: &[u16], serial: &[u16]) -> Device {
        let strings = [manufacturer, product, serial].map(<[u16]>::to_vec).to_vec();
        Device { strings, ..self }
    }

    /// An interface's descriptor, and those of its class and endpoints after it. Its number is set here.
    pub fn interface(mut self, descriptors: &[u8]) -> Device {
        let mut interface = descriptors.to_vec();
        interface[2] = self.interfaces.len() as u8;
        self.interfaces.push(interface);
        self
    }

    /// Answers before the descriptors do, and may remember what it was asked.
    pub fn answers(self, answers: impl FnMut(&Setup) -> Option<Answer> + Send + 'static) -> Device {
        Device { answers: Box::new(answers), ..self }
    }

    /// Input devices whose report descriptors never come.
    pub fn hangs_in_probe(interfaces: usize) -> Device {
        let hid: [u8; 25] = [
            9, 4, 0, 0, 1, 3, 0, 0, 0, // interface with one endpoint
            9, 0x21, 0x11, 1, 0, 1, 0x22, 63, 0, // HID, with a report descriptor of 63 bytes
            7, 5, 0x81, 3, 8, 0, 10, // interrupt in
        ];
        let name = |text: &str| text.encode_utf16().collect::<Vec<_>>();
        let device = Device::new(0x1209, 0x0020);
        let device = device.strings(&name("Lab"), &name("Hanging"), &name("HANGS"));
        let device = device.answers(|setup| {
            let is_report_descriptor = setup.kind == 0x81 && setup.request == GET_DESCRIPTOR;
            is_report_descriptor.then_some(Answer::Never)
        });
        (0..interfaces).fold(device, |device, number| {
            let mut hid = hid;
            hid[20] += number as u8;
            device.interface(&hid)
        })
    }

    /// Answers until it is configured, and nothing after that.
    pub fn falls_silent() -> Device {
        let name = |text: &str| text.encode_utf16().collect::<Vec<_>>();
        let mut is_configured = false;
        let device = Device::new(0x1209, 0x0021).interface(&VENDOR);
        device.strings(&name("Lab"), &name("Silent"), &name("SILENT")).answers(move |setup| {
            let silent = is_configured.then_some(Answer::Never);
            is_configured |= (setup.kind, setup.request) == (0, SET_CONFIGURATION);
            silent
        })
    }

    fn answer(&mut self, setup: &Setup) -> Answer {
        if let Some(answer) = (self.answers)(setup) {
            return answer;
        }
        match (setup.kind, setup.request, setup.value >> 8) {
            (0x80, GET_DESCRIPTOR, 1) => Answer::Data(self.device_descriptor()),
            (0x80, GET_DESCRIPTOR, 2) => Answer::Data(self.configuration()),
            (0x80, GET_DESCRIPTOR, 3) => self.string(usize::from(setup.value & 0xff)),
            (0x80, GET_DESCRIPTOR, 15) if self.super_speed => Answer::Data(vec![
                5, 15, 15, 0, 1, // one capability
                10, 16, 3, 0, 0x0e, 0, 1, 10, 0xff, 7, // SuperSpeed
            ]),
            (0x80..=0x82, GET_STATUS, _) => Answer::Data(vec![1, 0]), // powered by itself
            (0..=2, _, _) => Answer::Data(Vec::new()),
            _ => Answer::Stall,
        }
    }

    fn device_descriptor(&self) -> Vec<u8> {
        let [class, subclass, protocol] = self.class;
        let (version, packet) = if self.super_speed { (3, 9) } else { (2, 64) };
        let index = |string: usize| {
            let present = self.strings.get(string).is_some_and(|units| !units.is_empty());
            if present { string as u8 + 1 } else { 0 }
        };
        let [vendor, product] = [self.vendor, self.product].map(u16::to_le_bytes);
        let mut descriptor = vec![18, 1, 0, version, class, subclass, protocol, packet];
        descriptor.extend([vendor, product, [0, 1]].concat());
        descriptor.extend([index(0), index(1), index(2), 1]);
        descriptor
    }

    fn configuration(&self) -> Vec<u8> {
        let interfaces = self.interfaces.concat();
        let [low, high] = (9 + interfaces.len() as u16).to_le_bytes();
        let head = [9, 2, low, high, self.interfaces.len() as u8, 1, 0, 0xc0, 0];
        [head.to_vec(), interfaces].concat()
    }

    fn string(&self, index: usize) -> Answer {
        let units = match index.checked_sub(1) {
            None => &vec![0x0409],
            Some(string) => match self.strings.get(string) {
                Some(units) => units,
                None => return Answer::Stall,
            },
        };
        let mut descriptor = vec![2 + 2 * units.len() as u8, 3];
        descriptor.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
        Answer::Data(descriptor)
    }
}

pub const GET_STATUS: u8 = 0;
pub const GET_DESCRIPTOR: u8 = 6;
pub const SET_CONFIGURATION: u8 = 9;

/// What is connected to `vhci_hcd`.
pub struct Remotes {
    connections: HashMap<String, UnixStream>,
}

impl Remotes {
    pub fn load() -> Remotes {
        load("vhci-hcd", &[]);
        Remotes { connections: HashMap::new() }
    }

    pub fn plug(&mut self, device: Device, port: u32) -> Plugged {
        let socket = socket(port, device.super_speed);
        let id = self.insert(device, port);
        Plugged::arrived(id, &socket)
    }

    /// Plugs it in and does not wait until anybody has seen it.
    pub fn insert(&mut self, mut device: Device, port: u32) -> String {
        let (ours, its) = UnixStream::pair().expect("a socket pair");
        let speed = if device.super_speed { 5 } else { 3 }; // Linux, enum usb_device_speed
        let id = name(port, device.super_speed);
        let attach = format!("{} {} 1 {speed}", port - 1, its.as_raw_fd());
        let stream = ours.try_clone().expect("a descriptor");
        thread::spawn(move || serve(stream, |setup| device.answer(setup)));
        wait_until(&format!("remote port {port} is free"), || {
            fs::write(format!("{CONTROLLER}/attach"), &attach).is_ok()
        });
        self.connections.insert(id.clone(), ours);
        id
    }

    pub fn pull(&mut self, device: &Plugged) {
        self.remove(&device.id);
        device.leaves();
    }

    /// Ends its connection and does not wait until the kernel has noticed.
    pub fn remove(&mut self, id: &str) {
        let connection = self.connections.remove(id).expect("plugged in");
        connection.shutdown(Shutdown::Both).expect("a connection");
    }
}

/// A half of a port.
pub fn socket(port: u32, super_speed: bool) -> Socket {
    Socket::new("", "vhci_hcd.0", port).half(super_speed)
}

fn name(port: u32, super_speed: bool) -> String {
    format!("remote {port} {super_speed}")
}

/// Removes the ports; what was in them has gone with its process.
pub fn clear() {
    unload("vhci_hcd");
}
