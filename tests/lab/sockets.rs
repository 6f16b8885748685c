//! Where devices are plugged in: the machine's USB controllers, and the kernel's numbers for their buses.

use crate::wait::wait_until;
use std::fs;
use std::path::{Path, PathBuf};

pub const DEVICES: &str = "/sys/bus/usb/devices";
const DRIVER: &str = "/sys/bus/pci/drivers/xhci_hcd";
const XHCI: &str = "0000:00:14.0";
const DOCK: &str = "0000:01:00.0";

/// Where something is plugged in.
#[derive(Clone, Debug)]
pub struct Socket {
    /// The emulator's name for the controller's bus.
    pub controller: &'static str,
    /// The controller's directory below /sys/devices: for the emulated ones the address that `contrib/lab` gives them.
    directory: String,
    /// Which of the controller's buses is meant, 0 for the USB 2 one; all of them where there is none.
    half: Option<usize>,
    pub port: String,
}

impl Socket {
    pub fn new(controller: &'static str, directory: &str, port: u32) -> Socket {
        let (directory, port) = (directory.to_owned(), port.to_string());
        Socket { controller, directory, half: None, port }
    }

    /// Its USB 2 or its USB 3 half.
    pub fn half(self, super_speed: bool) -> Socket {
        Socket { half: Some(usize::from(super_speed)), ..self }
    }
}

/// Sockets 1 to 15 of the xHCI controller: two kernel buses, sticks appear on the SuperSpeed one.
pub fn xhci(port: u32) -> Socket {
    Socket::new("hw.0", XHCI, port)
}

/// Sockets 1 to 6 of the high-speed controller.
pub fn ehci(port: u32) -> Socket {
    Socket::new("ehci.0", "0000:00:1a.0", port)
}

/// Sockets 1 and 2 of the full-speed controller.
pub fn uhci(port: u32) -> Socket {
    Socket::new("uhci.0", "0000:00:1d.0", port)
}

/// Sockets 1 to 4 of the second xHCI controller ([`crate::hardware::Hardware::connect_dock`]), like those of [`xhci`].
pub fn dock(port: u32) -> Socket {
    Socket::new("dock.0", DOCK, port)
}

impl Socket {
    /// A socket of the hub that is plugged in here.
    pub fn below(&self, port: u32) -> Socket {
        Socket { port: format!("{}.{port}", self.port), ..self.clone() }
    }

    /// The kernel's directories for this socket: one for each bus of the controller.
    pub fn candidates(&self) -> Vec<PathBuf> {
        let is_meant = |(half, _): &(usize, u32)| self.half.is_none_or(|wanted| wanted == *half);
        let buses = buses(&self.directory).into_iter().enumerate().filter(is_meant);
        buses.map(|(_, bus)| Path::new(DEVICES).join(format!("{bus}-{}", self.port))).collect()
    }
}

/// The numbers of a controller's buses, in their order; none while no driver is bound.
fn buses(directory: &str) -> Vec<u32> {
    let number = |entry: fs::DirEntry| {
        let bus = entry.file_name().into_string().ok()?.strip_prefix("usb")?.parse().ok()?;
        let controller = entry.path().canonicalize().ok()?;
        (controller.parent()?.file_name()? == directory).then_some(bus)
    };
    let mut buses: Vec<u32> =
        fs::read_dir(DEVICES).expect("sysfs").flatten().filter_map(number).collect();
    buses.sort_unstable();
    buses
}

/// Unbinds both xHCI controllers and binds them in the other order, so that their bus numbers
/// change places: the one that is bound first gets the lowest. [`crate::hardware::Plugged::again`]
/// tells where the devices are then.
pub fn swap_buses() {
    let order = if buses(XHCI) < buses(DOCK) { [DOCK, XHCI] } else { [XHCI, DOCK] };
    order.into_iter().for_each(unbind);
    order.into_iter().for_each(bind);
}

/// Takes the xHCI controller from its driver and gives it back: its devices come again at the same
/// ports, and addresses are counted from the start.
pub fn rebind_xhci() {
    unbind(XHCI);
    bind(XHCI);
}

pub fn connect_dock(plug: impl FnOnce()) {
    if !Path::new("/sys/bus/pci/devices").join(DOCK).exists() {
        plug();
        wait_until("the dock has its buses", || buses(DOCK).len() == 2);
    } else if buses(DOCK).is_empty() {
        bind(DOCK);
    }
}

/// Disconnects the dock, and gives the xHCI controller its numbers back.
pub fn clear() {
    if !buses(DOCK).is_empty() {
        unbind(DOCK);
    }
    if buses(XHCI) != [1, 2] {
        unbind(XHCI);
        bind(XHCI);
    }
}

fn unbind(pci: &str) {
    fs::write(format!("{DRIVER}/unbind"), pci).expect("a bound controller");
}

fn bind(pci: &str) {
    fs::write(format!("{DRIVER}/bind"), pci).expect("a controller without a driver");
    wait_until("the controller has its buses", || buses(pci).len() == 2);
}
