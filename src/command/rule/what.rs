//! The things that a rule can be for: a port, the ports below a hub, or a
//! device.

use std::fmt;

use tracing::warn;

use super::serial;
use super::socket::Socket;
use crate::cli::By;
use crate::error::Error;
use crate::host::{self, Host};
use crate::text::escape;
use crate::usb::{Device, DeviceId, Port, Selector, VendorProduct};

/// What a rule is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// Every device that is plugged into a socket.
    Port(Socket),
    /// Every device below the hub in a socket, at any depth.
    Below(Socket),
    /// Every device with these ids.
    Product(VendorProduct),
    /// The device with these ids and this serial number. The serial number
    /// keeps its blanks at both ends.
    Serial(VendorProduct, String),
}

/// How a rule names its device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Naming {
    /// By its port, its product or its serial number.
    pub by: By,
    /// Whether ports are named by bus number.
    pub bus_number: bool,
}

impl What {
    /// What the user named. A port may be empty, and there may be no device or
    /// several devices of a product. Everything else has to be plugged in.
    pub fn named(host: &Host, selector: &Selector, naming: Naming) -> Result<What, Error> {
        let port = match selector {
            Selector::Port(port) => Some(port.clone()),
            Selector::Path(path) => host.port_of(path),
            Selector::Id(id) => id.port(),
            _ => None,
        };
        match (naming.by, selector, port) {
            (By::Port, _, Some(port)) => at_port(host, &port, selector, naming),
            (By::Product, Selector::Product(id), _) => {
                match host.devices()?.into_iter().find(|device| device.id == *id) {
                    Some(device) => What::of_device(host, &device, naming),
                    None => {
                        warn!("no {id} is plugged in now; the rule is for when one is");
                        Ok(What::Product(*id))
                    }
                }
            }
            _ => What::of_device(host, &host.find(selector)?, naming),
        }
    }

    /// What a rule for this device is for.
    pub fn of_device(host: &Host, device: &Device, naming: Naming) -> Result<What, Error> {
        let socket = || Socket::of(host, &device.port, naming.bus_number);
        match naming.by {
            By::Port if device.is_hub() => Ok(What::Below(socket())),
            By::Port => Ok(What::Port(socket())),
            _ if device.is_hub() => Err(Error::Hub(device.clone())),
            By::Product => Ok(What::Product(device.id)),
            By::Serial => {
                let reader = host.clone();
                let read = move |port| reader.serial_with_blanks(&port);
                let read = host.in_haste([device.port.clone()], read)?;
                let Some(serial) = read.into_iter().next().flatten() else {
                    return Err(Error::Silent(device.clone()));
                };
                let serial = serial.unwrap_or_default();
                if serial.trim().is_empty() {
                    let help = "use --by product, or --by port";
                    return Err(Error::Usage(format!("{device} has no serial number; {help}")));
                }
                serial::warn_of_others(host, device, serial.trim());
                Ok(What::Serial(device.id, serial))
            }
        }
    }

    /// A comment with the present names of the ports, for a rule that uses
    /// stable names.
    pub fn numbers(&self) -> String {
        match self {
            What::Port(socket) | What::Below(socket) if socket.place.is_some() => {
                format!("# When this was written, that was {}.\n", socket.numbers())
            }
            _ => String::new(),
        }
    }

    /// The label of the same rule if it used bus numbers.
    pub fn label_by_number(&self) -> Option<String> {
        let by_number = |socket: &Socket| Socket { ports: socket.ports.clone(), place: None };
        match self {
            What::Port(socket) => Some(What::Port(by_number(socket)).label()),
            What::Below(socket) => Some(What::Below(by_number(socket)).label()),
            What::Product(_) | What::Serial(..) => None,
        }
    }

    /// The part of a file name that says what the rule is for.
    pub fn label(&self) -> String {
        match self {
            What::Port(socket) => socket.name().chars().map(plain).collect(),
            What::Below(socket) => format!("below-{}", socket.name()).chars().map(plain).collect(),
            What::Product(id) => id.to_string().replace(':', "-"),
            What::Serial(id, serial) => {
                let serial: String = serial.trim().chars().take(64).map(plain).collect();
                format!("{:04x}-{:04x}-{serial}", id.vendor, id.product)
            }
        }
    }
}

fn plain(c: char) -> char {
    if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' }
}

fn at_port(host: &Host, port: &Port, selector: &Selector, naming: Naming) -> Result<What, Error> {
    match host.device(port)? {
        Some(device) => What::of_device(host, &device, naming),
        // If the hub does not have the port, it stays empty for ever.
        None if host.has_port(port) == Some(false) => {
            Err(host::Error::NoDevice(host.absent(selector)).into())
        }
        None => {
            let id = DeviceId::for_port(port);
            warn!(%id, "nothing is plugged into {port} now; the rule is for when something is");
            Ok(What::Port(Socket::of(host, port, naming.bus_number)))
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Port(socket) => write!(f, "whatever is plugged into port {socket}"),
            What::Below(socket) => write!(f, "whatever is behind the hub at port {socket}"),
            What::Product(id) => write!(f, "every device {id}"),
            What::Serial(id, serial) => {
                let serial = escape(serial.trim());
                write!(f, "the device {id} with the serial number \"{serial}\"")
            }
        }
    }
}
