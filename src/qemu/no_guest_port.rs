//! Why a VM has no port for a device, and what to do about it. There is no I/O
//! here.

use std::fmt;

use crate::text::{escape, words};
use crate::usb::Speed;

/// Why there is no port for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoGuestPort {
    /// The VM has no USB controller.
    NoController,
    /// The VM has no such bus.
    UnknownBus(String, Vec<String>),
    /// No controller takes such a slow device.
    NoneFits {
        /// The device's speed.
        speed: Speed,
        /// The VM's buses.
        buses: Vec<String>,
    },
    /// Every port that fits is in use.
    Full(Vec<String>),
    /// A controller was to be added, but there is no slot for it.
    NoSlot {
        /// Why a controller was to be added.
        lacks: Box<NoGuestPort>,
        /// QEMU's message.
        said: String,
    },
}

impl NoGuestPort {
    /// The VM's buses, if one more controller would help.
    fn buses(&self) -> Option<&[String]> {
        match self {
            NoGuestPort::NoController => Some(&[]),
            NoGuestPort::UnknownBus(..) => None,
            NoGuestPort::NoneFits { buses, .. } | NoGuestPort::Full(buses) => Some(buses),
            NoGuestPort::NoSlot { lacks, .. } => lacks.buses(),
        }
    }

    /// The message for a VM that libvirt starts.
    pub fn for_libvirt(&self) -> impl fmt::Display {
        ForLibvirt(self)
    }

    fn with_advice(
        &self,
        f: &mut fmt::Formatter<'_>,
        add: impl Fn(&[String]) -> String,
    ) -> fmt::Result {
        self.matter(f)?;
        let Some(buses) = self.buses() else { return Ok(()) };
        let or = if matches!(self, NoGuestPort::Full(_)) { "detach something, or " } else { "" };
        write!(f, "; {or}{}", add(buses))?;
        match self {
            NoGuestPort::NoSlot { .. } => Ok(()),
            _ => f.write_str(", or use --add-controller (in a rule: `add_controller = true`)"),
        }
    }

    /// The problem, without advice.
    fn matter(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoGuestPort::NoController => f.write_str("this VM has no USB controller"),
            NoGuestPort::UnknownBus(bus, others) => {
                write!(f, "this VM has no USB bus `{}`; it has {}", escape(bus), others.join(", "))
            }
            NoGuestPort::NoneFits { speed, buses } => write!(
                f,
                "no USB controller of this VM ({}) takes a device of {speed} Mb/s",
                buses.join(", ")
            ),
            NoGuestPort::Full(buses) => write!(f, "no free port on {}", buses.join(", ")),
            NoGuestPort::NoSlot { lacks, said } => {
                lacks.matter(f)?;
                write!(f, ", and no slot for a controller more ({})", escape(&words(said)))
            }
        }
    }
}

/// The message for a VM that is started without libvirt.
/// [`NoGuestPort::for_libvirt`] has the other one.
impl fmt::Display for NoGuestPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_advice(f, |buses| format!("add `{}` to its QEMU", line_to_add(buses)))
    }
}

impl std::error::Error for NoGuestPort {}

/// The XML of a domain's controller with the most possible ports (libvirt,
/// docs/formatdomain.rst, "Controllers").
pub const CONTROLLER_XML: &str = "<controller type='usb' model='qemu-xhci' ports='15'/>";

struct ForLibvirt<'a>(&'a NoGuestPort);

impl fmt::Display for ForLibvirt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.with_advice(f, |_| {
            format!("add `{CONTROLLER_XML}` to its XML with `virsh edit`, then stop and start it")
        })
    }
}

/// The option that adds a controller with the most possible ports (QEMU,
/// include/hw/usb/xhci.h, `XHCI_MAXPORTS_2`). Its id is not in use yet.
fn line_to_add(buses: &[String]) -> String {
    let taken = |id: &str| buses.iter().any(|bus| bus.strip_suffix(".0") == Some(id));
    let id = ["xhci", "xhci2", "xhci3"].into_iter().find(|id| !taken(id)).unwrap_or("xhci4");
    format!("-device qemu-xhci,id={id},p2=15,p3=15")
}
