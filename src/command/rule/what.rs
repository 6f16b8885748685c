//! What a rule is for: a port, what is below a hub, or a device.

use std::fmt;

use tracing::warn;

use crate::cli::By;
use crate::error::Error;
use crate::host::{self, Host};
use crate::text::escape;
use crate::usb::{Device, DeviceId, Port, Selector, VendorProduct};

/// What a rule is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// Whatever is plugged into a socket: its port, and for USB 3 the port
    /// that is its other half.
    Port(Vec<Port>),
    /// Whatever is below a hub, at any depth: the hub's port, and for USB 3 the
    /// port of its other half.
    Below(Vec<Port>),
    /// Every device with these ids.
    Product(VendorProduct),
    /// The device with these ids and this serial number.
    Serial(VendorProduct, String),
}

impl What {
    /// What a person named. A port may be empty, and a product may be absent or
    /// there several times; all else has to be plugged in.
    pub fn named(host: &Host, selector: &Selector, by: By) -> Result<What, Error> {
        match (by, selector) {
            (By::Port, Selector::Port(port)) => at_port(host, port, selector),
            (By::Port, Selector::Id(id)) => match id.port() {
                Some(port) => at_port(host, &port, selector),
                None => Ok(What::of_device(host, &host.find(selector)?, by)?),
            },
            (By::Product, Selector::Product(id)) => {
                match host.devices()?.into_iter().find(|device| device.id == *id) {
                    Some(device) => What::of_device(host, &device, by),
                    None => {
                        warn!("no {id} is plugged in now; the rule is for when one is");
                        Ok(What::Product(*id))
                    }
                }
            }
            _ => What::of_device(host, &host.find(selector)?, by),
        }
    }

    /// What a device means.
    pub fn of_device(host: &Host, device: &Device, by: By) -> Result<What, Error> {
        match by {
            By::Port if device.is_hub() => Ok(What::Below(socket(host, &device.port))),
            By::Port => Ok(What::Port(socket(host, &device.port))),
            _ if device.is_hub() => Err(Error::Hub(device.clone())),
            By::Product => Ok(What::Product(device.id)),
            By::Serial => {
                let serial = host.strings(&device.port).serial.unwrap_or_default();
                if serial.trim().is_empty() {
                    let help = "use --by product, or --by port";
                    return Err(Error::Usage(format!("{device} has no serial number; {help}")));
                }
                Ok(What::Serial(device.id, serial))
            }
        }
    }

    /// A part of a file name that says what the rule is for.
    pub fn label(&self) -> String {
        match self {
            What::Port(ports) => first(ports),
            What::Below(ports) => format!("below-{}", first(ports)),
            What::Product(id) => id.to_string().replace(':', "-"),
            What::Serial(id, serial) => {
                let serial: String = serial.chars().take(64).map(plain).collect();
                format!("{:04x}-{:04x}-{serial}", id.vendor, id.product)
            }
        }
    }
}

fn plain(c: char) -> char {
    if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' }
}

fn first(ports: &[Port]) -> String {
    ports.first().map(ToString::to_string).unwrap_or_default()
}

fn at_port(host: &Host, port: &Port, selector: &Selector) -> Result<What, Error> {
    match host.device(port)? {
        Some(device) => What::of_device(host, &device, By::Port),
        // A port that its hub does not have stays empty for ever.
        None if host.has_port(port) == Some(false) => {
            Err(host::Error::NoDevice(host.absent(selector)).into())
        }
        None => {
            let id = DeviceId::for_port(port);
            warn!(%id, "nothing is plugged into {port} now; the rule is for when something is");
            Ok(What::Port(socket(host, port)))
        }
    }
}

/// The ports of a socket.
fn socket(host: &Host, port: &Port) -> Vec<Port> {
    std::iter::once(port.clone()).chain(host.twin(port)).collect()
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ports, what) = match self {
            What::Port(ports) => (ports, "whatever is plugged into port "),
            What::Below(ports) => (ports, "whatever is behind the hub at port "),
            What::Product(id) => return write!(f, "every device {id}"),
            What::Serial(id, serial) => {
                return write!(f, "the device {id} with the serial number \"{}\"", escape(serial));
            }
        };
        f.write_str(what)?;
        match ports.as_slice() {
            [port, twin] => write!(f, "{port} or its other half {twin}"),
            _ => f.write_str(&first(ports)),
        }
    }
}
