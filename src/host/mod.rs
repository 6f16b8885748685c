//! Access to the host: its USB devices as sysfs shows them. Everything is read
//! below a root directory, so that tests can use their own.
//!
//! Linux documents the attributes in Documentation/ABI/testing/sysfs-bus-usb.

mod absent;
mod attributes;
mod blocking;
mod bus;
mod controller;
mod database;
mod disk;
mod error;
pub mod events;
mod life;
mod node;
mod owner;
pub mod proc;
pub mod readable;
mod release;
mod signs;
mod stranger;
mod trust;
pub mod uses;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::warn;

pub use absent::Absent;
pub use blocking::{blocking, blocking_drop, blocking_each};
pub use bus::Bus;
pub use disk::{Claims, Told, Use, UsedBy};
pub use error::Error;
pub use life::{Life, Opened};
pub use node::{Claim, Node};
pub use owner::{CLAIMED, Look, Owner};
pub use proc::{Holder, Qemu, Reach, UnixSockets};
pub use signs::Signs;
pub use trust::Exposed;
pub use uses::OtherUse;

use crate::text::escape;
use crate::usb::{self, Address, CLASS_HUB, Device, HotplugEvent, Port, Selector, Speed};

/// Character devices of this major number are USB device nodes (Linux,
/// include/linux/usb.h, `USB_DEVICE_MAJOR`).
pub const USB_DEVICE_MAJOR: u32 = 189;

/// The most bytes that are read from one file of sysfs or `/proc`. An attribute
/// of sysfs has at most one page, but mount tables can be long.
const MAX_FILE: u64 = 4 << 20;

/// A caller that shows or looks for devices can continue without those that are
/// starting. It waits for them for its time divided by this.
const HASTE: u32 = 5;

/// The strings of a device, without leading and trailing blanks. A string of
/// blanks counts as missing. Untrusted: escape them before they are shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Strings {
    /// The maker's name.
    pub manufacturer: Option<String>,
    /// The product's name.
    pub product: Option<String>,
    /// The serial number.
    pub serial: Option<String>,
}

impl Strings {
    /// The names of the manufacturer and the product. Many products repeat the
    /// manufacturer's name, so it is shown only once.
    pub fn name(&self) -> Option<String> {
        match (&self.manufacturer, &self.product) {
            (Some(maker), Some(product)) if product.starts_with(maker) => Some(product.clone()),
            (Some(maker), Some(product)) => Some(format!("{maker} {product}")),
            (maker, product) => product.clone().or_else(|| maker.clone()),
        }
    }
}

/// The host, below a root directory.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
    haste: Duration,
}

impl Default for Host {
    fn default() -> Self {
        Host::at("/")
    }
}

impl Host {
    /// The host whose `/sys`, `/proc` and `/dev` lie below `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Host { root: root.into(), haste: Duration::from_secs(1) }
    }

    /// The same host, for a caller that has only this time. It waits a fifth of
    /// it for devices that are starting, so it may look for them more than once.
    pub fn within(self, time: Duration) -> Self {
        Host { haste: time / HASTE, ..self }
    }

    fn path(&self, absolute: impl AsRef<Path>) -> PathBuf {
        let absolute = absolute.as_ref();
        self.root.join(absolute.strip_prefix("/").unwrap_or(absolute))
    }

    fn directory(&self, port: &Port) -> PathBuf {
        self.path(format!("/sys/bus/usb/devices/{port}"))
    }

    /// The device at a port, if there is one. Only attributes are read that
    /// never wait. The others wait while the device's lock is held, and it is
    /// held while drivers start: `uevent`, the strings, and the attributes of
    /// the configuration (Linux, drivers/usb/core/sysfs.c).
    ///
    /// # Errors
    ///
    /// When an attribute cannot be read or understood.
    pub fn device(&self, port: &Port) -> Result<Option<Device>, Error> {
        let directory = self.directory(port);
        let mut texts = Vec::new();
        for name in ["busnum", "devnum", "idVendor", "idProduct", "bDeviceClass"] {
            match read_if_there(&directory.join(name))? {
                Some(text) => texts.push(text.trim_end().to_owned()),
                // The device is not there, or it is leaving now.
                None => return Ok(None),
            }
        }
        let [bus, device, vendor, product, class] = texts.as_slice() else { return Ok(None) };
        let wrong = |source| Error::Attribute { path: directory.clone(), source };
        let minor = || {
            let number = self.attribute(port, "dev")?;
            Some(number.split_once(':')?.1.to_owned())
        };
        let address = Address::from_variables(|name| match name {
            "BUSNUM" => Some(bus.clone()),
            "DEVNUM" => Some(device.clone()),
            _ => minor(),
        });
        Ok(Some(self.with_interfaces(Device {
            port: port.clone(),
            address: match address.map_err(wrong)? {
                Some(address) => address,
                None => Address::from_numbers(bus, device).map_err(wrong)?,
            },
            id: format!("{vendor}:{product}").parse().map_err(wrong)?,
            hub: usb::class_from_sysfs(class).map_err(wrong)? == CLASS_HUB,
        })))
    }

    /// The device at an address, if there is one.
    ///
    /// # Errors
    ///
    /// The same errors as [`Host::device`].
    pub fn device_at(&self, address: Address) -> Result<Option<Device>, Error> {
        match self.port_at(address, &Selector::Address(address))? {
            Some(port) => Ok(self.device(&port)?.filter(|device| device.address == address)),
            None => Ok(None),
        }
    }

    /// Whether the list of devices exists. Without it, no device is known to be
    /// gone.
    pub fn has_usb(&self) -> bool {
        self.path("/sys/bus/usb/devices").is_dir()
    }

    /// Every device except the root hubs, sorted by port. A device that cannot
    /// be read is left out, with a warning.
    ///
    /// # Errors
    ///
    /// When the list of devices cannot be read.
    pub fn devices(&self) -> Result<Vec<Device>, Error> {
        let path = self.path("/sys/bus/usb/devices");
        let names = match fs::read_dir(&path) {
            Ok(names) => names,
            // A kernel without USB support has no devices.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(Error::Read { path, source }),
        };
        let mut devices = Vec::new();
        for name in names {
            let name = name.map_err(|source| Error::Read { path: path.clone(), source })?;
            // Interfaces (`1-1:1.0`) and root hubs (`usb1`) are not ports.
            let Some(port) = name.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            match self.device(&port) {
                Ok(Some(device)) => devices.push(device),
                Ok(None) => {}
                Err(error) => warn!(%port, "left out: {}", crate::text::chain(&error)),
            }
        }
        devices.sort_by(|a, b| a.port.cmp(&b.port));
        Ok(devices)
    }

    /// The device that a person named. [`Selector::Id`] stands for the port in
    /// it.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`], [`Error::Ambiguous`], [`Error::RootHub`], or an
    /// error of reading sysfs.
    pub fn find(&self, selector: &Selector) -> Result<Device, Error> {
        let none = || Error::NoDevice(self.absent(selector));
        let port = match selector {
            Selector::Port(port) => Some(port.clone()),
            Selector::Path(path) => self.port_of(path),
            Selector::Id(id) => id.port(),
            Selector::Address(address) => self.port_at(*address, selector)?,
            Selector::Sysfs(path) => self.port_of_path(path, selector)?,
            Selector::Product(id) => return self.only(selector, |device| device.id == *id),
            Selector::Serial(serial) => return self.with_serial(selector, serial),
        };
        let device = self.device(&port.ok_or_else(none)?)?;
        device.ok_or_else(none)
    }

    /// The device of an event, with the event's own data. If a person typed the
    /// event and it has too little data, sysfs is read.
    ///
    /// # Errors
    ///
    /// The same errors as [`Host::find`].
    pub fn device_of(&self, event: &HotplugEvent) -> Result<Device, Error> {
        match event.device() {
            Some(device) => Ok(self.with_interfaces(device)),
            None => self.find(&event.selector),
        }
    }

    /// The device, with the class codes of its interfaces.
    fn with_interfaces(&self, device: Device) -> Device {
        Device { hub: device.hub || usb::is_hub(&self.descriptors(&device.port)), ..device }
    }

    fn only(&self, selector: &Selector, fits: impl Fn(&Device) -> bool) -> Result<Device, Error> {
        let mut devices = self.devices()?;
        devices.retain(fits);
        if devices.len() > 1 {
            return Err(Error::Ambiguous { selector: selector.clone(), devices });
        }
        devices.pop().ok_or_else(|| Error::NoDevice(self.absent(selector)))
    }

    /// The device with a serial number. The user may write it as it is, or with
    /// the escapes that this tool shows.
    fn with_serial(&self, selector: &Selector, serial: &str) -> Result<Device, Error> {
        let (mut devices, mut starting) = (Vec::new(), Vec::new());
        for (device, its) in self.serials(self.devices()?)? {
            match its {
                Some(Some(its)) if its == serial || escape(&its) == serial => devices.push(device),
                Some(_) => {}
                None => starting.push(device),
            }
        }
        match (devices.len(), starting.is_empty()) {
            (0, true) => Err(Error::NoDevice(self.absent(selector))),
            (0, false) => Err(Error::Starting { selector: selector.clone(), devices: starting }),
            (1, _) => Ok(devices.remove(0)),
            _ => Err(Error::Ambiguous { selector: selector.clone(), devices }),
        }
    }

    /// The serial numbers of devices. The outer `None` means that it could not
    /// be read in time, because the device is starting.
    ///
    /// # Errors
    ///
    /// [`Error::Thread`].
    #[allow(clippy::type_complexity, reason = "a pair that is taken apart at once")]
    pub fn serials(
        &self,
        devices: Vec<Device>,
    ) -> Result<Vec<(Device, Option<Option<String>>)>, Error> {
        let host = self.clone();
        let (with, without): (Vec<Device>, Vec<Device>) =
            devices.into_iter().partition(|device| self.has_serial(&device.port));
        let read = self.in_haste(with.clone(), move |device| host.serial(&device.port))?;
        let without = without.into_iter().map(|device| (device, Some(None)));
        Ok(with.into_iter().zip(read).chain(without).collect())
    }

    /// The port of the device at an address. It is found through the kernel's
    /// index of character devices.
    fn port_at(&self, address: Address, selector: &Selector) -> Result<Option<Port>, Error> {
        let link = format!("/sys/dev/char/{USB_DEVICE_MAJOR}:{}", address.minor());
        self.port_of_path(Path::new(&link), selector)
    }

    /// The port of a path in sysfs: the path of a device itself, or of
    /// something that belongs to a device.
    fn port_of_path(&self, path: &Path, selector: &Selector) -> Result<Option<Port>, Error> {
        let path = self.path(path);
        let real = match path.canonicalize() {
            Ok(real) => real,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Read { path, source }),
        };
        for name in real.iter().rev().filter_map(|name| name.to_str()) {
            if let Ok(port) = name.parse() {
                return Ok(Some(port));
            }
            let bus = name.strip_prefix("usb").unwrap_or_default();
            if !bus.is_empty() && bus.bytes().all(|b| b.is_ascii_digit()) {
                return Err(Error::RootHub(selector.clone()));
            }
        }
        Ok(None)
    }

    /// Whether udev has processed the device at a port. Before that, udev has
    /// no property of it.
    pub fn is_known_to_udev(&self, port: &Port) -> bool {
        let path = self.directory(port).canonicalize();
        let device = path.and_then(|path| udev::Device::from_syspath(&path));
        device.is_ok_and(|device| device.is_initialized())
    }

    /// The speed of the device at a port. `None` if the kernel does not know
    /// it.
    pub fn speed(&self, port: &Port) -> Option<Speed> {
        self.attribute(port, "speed")?.parse().ok()
    }

    /// The strings of the device at a port. This may wait for its drivers.
    pub fn strings(&self, port: &Port) -> Strings {
        Strings {
            manufacturer: self.string(port, "manufacturer"),
            product: self.string(port, "product"),
            serial: self.serial(port),
        }
    }

    /// The serial number of the device at a port, without leading and trailing
    /// blanks. This may wait for its drivers.
    pub fn serial(&self, port: &Port) -> Option<String> {
        self.string(port, "serial")
    }

    /// The serial number with its blanks, because udev compares it with them.
    /// This may wait for the device's drivers.
    pub fn serial_with_blanks(&self, port: &Port) -> Option<String> {
        self.attribute(port, "serial")
    }

    fn string(&self, port: &Port, name: &str) -> Option<String> {
        let text = self.attribute(port, name)?.trim().to_owned();
        (!text.is_empty()).then_some(text)
    }

    /// Whether the device at a port has a serial number. If a device has none,
    /// the kernel does not create the attribute.
    pub fn has_serial(&self, port: &Port) -> bool {
        self.directory(port).join("serial").exists()
    }

    /// Waits until no driver is starting for the device at a port, or until it
    /// is gone (Linux, drivers/usb/core/sysfs.c, `usb_actconfig_show`: the
    /// attribute is read under the lock that a start holds).
    pub fn wait_for_drivers(&self, port: &Port) {
        let _ = self.attribute(port, "bConfigurationValue");
    }

    /// An attribute of the device at a port, without its newline. `None` if
    /// there is none. A device's own strings may be invalid UTF-8.
    fn attribute(&self, port: &Port, name: &str) -> Option<String> {
        let text = read_if_there(&self.directory(port).join(name)).ok()??;
        Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())
    }
}

/// The text of a file, up to a limit. `None` if there is no such file, or if
/// its device is gone (ENODEV).
fn read_if_there(path: &Path) -> Result<Option<String>, Error> {
    Ok(read_bytes(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// Like [`read_if_there`], for content that is not text.
fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    use io::Read;
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
    match read {
        Ok(_) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {
            Ok(None)
        }
        Err(source) => Err(Error::Read { path: path.to_owned(), source }),
    }
}
