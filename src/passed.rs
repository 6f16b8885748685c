//! The host's devices in a VM, whoever attached them. It finds the device
//! behind each of QEMU's objects, and the object that a person means.

use crate::error::Error;
use crate::host::{self, Host};
use crate::qemu::{UsbHost, Vm};
use crate::usb::{Device, DeviceId, Port, Selector};

/// A host device in a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// QEMU's object.
    pub object: UsbHost,
    /// The device behind it. There are several if it may be any of them, and
    /// none if the device is gone or cannot be known.
    pub devices: Vec<Device>,
}

/// Finds all devices of the host in a VM.
///
/// # Errors
///
/// As for [`Vm::usb_hosts`] and [`Host::devices`].
pub async fn look(host: &Host, vm: &mut Vm) -> Result<Vec<Passed>, Error> {
    let objects = vm.usb_hosts().await?;
    let devices = if objects.is_empty() { Vec::new() } else { host.devices()? };
    Ok(behind(host, vm.pid(), objects, &devices))
}

/// The name of the object by which a QEMU has a device, if it has it. If
/// several objects may have it, the first one is returned.
///
/// # Errors
///
/// The same errors as [`Host::devices`].
pub fn name_of(
    host: &Host,
    qemu: Option<i32>,
    objects: Vec<UsbHost>,
    device: &Device,
) -> Result<Option<String>, Error> {
    if objects.iter().all(|object| !object.wanted.fits(device)) {
        return Ok(None);
    }
    let holds = qemu.and_then(|pid| host.holds(pid, device.address)) == Some(true);
    let passed = behind(host, qemu, objects, &host.devices()?).into_iter();
    let mut its = passed.filter(|passed| match passed.devices.as_slice() {
        [only] => only == device,
        several => holds && several.contains(device),
    });
    Ok(its.next().map(|passed| passed.object.name))
}

/// Finds the devices behind the objects of a QEMU. QEMU says which device it
/// was told to take. If it searched for one by itself, only its open nodes tell
/// which. The order of the objects is kept.
pub fn behind(
    host: &Host,
    qemu: Option<i32>,
    objects: Vec<UsbHost>,
    devices: &[Device],
) -> Vec<Passed> {
    let exact: Vec<_> = objects.iter().filter_map(|object| object.wanted.exact()).collect();
    let has = |object: &UsbHost, device: &Device| {
        let is_exact = object.wanted.exact().is_some();
        let holds = qemu.and_then(|pid| host.holds(pid, device.address));
        object.wanted.fits(device)
            && (is_exact || !exact.contains(&device.address))
            && holds.unwrap_or_else(|| is_exact || host.has_no_driver(&device.port))
    };
    let passed = |object: UsbHost| {
        let its = devices.iter().filter(|device| has(&object, device)).cloned();
        let devices = if object.is_attached == Some(false) { Vec::new() } else { its.collect() };
        Passed { object, devices }
    };
    objects.into_iter().map(passed).collect()
}

/// The names of the objects that have a device. QEMU lets several open the same
/// one (QEMU, hw/usb/host-libusb.c, `usb_host_auto_check`).
///
/// # Errors
///
/// [`Error::Unclear`] if one object has it and it cannot be known which one.
pub fn find(passed: &[Passed], device: &Device) -> Result<Vec<String>, Error> {
    let names = |fits: &dyn Fn(&&Passed) -> bool| -> Vec<String> {
        let its = passed.iter().filter(fits);
        its.map(|passed| passed.object.name.clone()).collect()
    };
    let its = names(&|passed| passed.devices == [device.clone()]);
    let maybe = names(&|passed| passed.devices.contains(device));
    if its.is_empty() && !maybe.is_empty() {
        return Err(Error::Unclear { device: device.clone(), names: maybe });
    }
    Ok(its)
}

/// The objects that a person means, by their names. The list is empty if the VM
/// does not have it. The hardware may be gone: for a port, an address and an
/// id, the name and the VM's own facts are enough.
///
/// # Errors
///
/// [`Error::Unclear`], and those of [`Host::find`].
pub fn choose(host: &Host, selector: &Selector, passed: &[Passed]) -> Result<Vec<String>, Error> {
    let names = |fits: &dyn Fn(&&Passed) -> bool| -> Vec<String> {
        let its = passed.iter().filter(fits);
        its.map(|passed| passed.object.name.clone()).collect()
    };
    let with_id = |id: &DeviceId| names(&|passed| passed.object.name == id.as_str());
    let or = |found: Vec<String>, other: &dyn Fn() -> Result<Vec<String>, Error>| {
        if found.is_empty() { other() } else { Ok(found) }
    };
    let of = |device: &Device| {
        let its_id = || Ok(with_id(&DeviceId::for_port(&device.port)));
        or(find(passed, device)?, &its_id)
    };
    let at_port = |port: &Port| match host.device(port) {
        Ok(Some(device)) => of(&device),
        _ => Ok(with_id(&DeviceId::for_port(port))),
    };
    match selector {
        Selector::Id(id) => Ok(with_id(id)),
        Selector::Address(address) => {
            let exact = names(&|passed| passed.object.wanted.exact() == Some(*address));
            or(exact, &|| host.find(selector).map_or_else(|_| Ok(Vec::new()), |device| of(&device)))
        }
        Selector::Port(port) => at_port(port),
        // If a controller is gone, its bus number is not known.
        Selector::Path(path) => match host.port_of(path) {
            Some(port) => at_port(&port),
            None => Err(host::Error::NoDevice(host.absent(selector)).into()),
        },
        _ => match host.find(selector) {
            Ok(device) => of(&device),
            // If several devices match, the one in the VM is meant.
            Err(host::Error::Ambiguous { devices, selector }) => {
                let here: Vec<Vec<String>> =
                    devices.iter().map(of).collect::<Result<_, Error>>()?;
                let mut here: Vec<Vec<String>> =
                    here.into_iter().filter(|names| !names.is_empty()).collect();
                match here.len() {
                    0 | 1 => Ok(here.pop().unwrap_or_default()),
                    _ => Err(host::Error::Ambiguous { devices, selector }.into()),
                }
            }
            Err(error) => Err(error.into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::Wanted;

    fn device(port: &str, address: &str) -> Device {
        Device {
            port: port.parse().unwrap(),
            address: address.parse().unwrap(),
            id: "46f4:0001".parse().unwrap(),
            hub: false,
        }
    }

    fn object(name: &str, wanted: Wanted) -> UsbHost {
        UsbHost { name: name.into(), wanted, is_attached: Some(true) }
    }

    /// A host without `/proc` and drivers, where nothing is known of QEMU.
    fn host() -> Host {
        Host::at("/nonexistent")
    }

    fn at(bus: u16, address: u8) -> Wanted {
        Wanted { bus: Some(bus), address: Some(address), ..Wanted::default() }
    }

    #[test]
    fn the_device_at_an_address_is_behind_what_was_told_that_address() {
        let devices = [device("1-1", "1:2"), device("1-2", "1:3")];
        let objects = vec![object("hostdev0", at(1, 3)), object("hostdev1", at(1, 9))];
        let passed = behind(&host(), None, objects, &devices);
        assert_eq!(passed[0].devices, [device("1-2", "1:3")]);
        assert!(passed[1].devices.is_empty());
        let chosen = |selector: &str| choose(&host(), &selector.parse().unwrap(), &passed);
        assert_eq!(chosen("1:9").unwrap(), ["hostdev1"]);
        assert_eq!(chosen("hostdev0").unwrap(), ["hostdev0"]);
        assert_eq!(chosen("1-1").unwrap(), [""; 0]);
    }

    #[test]
    fn a_search_may_have_what_fits_and_no_other_object_has() {
        let devices = [device("1-1", "1:2"), device("1-2", "1:3"), device("2-1", "2:2")];
        let search = || Wanted { vendor: Some(0x46f4), ..Wanted::default() };
        let objects = vec![object("exact", at(1, 3)), object("search", search())];
        let passed = behind(&host(), None, objects, &devices);
        assert_eq!(passed[1].devices, [device("1-1", "1:2"), device("2-1", "2:2")]);
        let idle = UsbHost { is_attached: Some(false), ..object("search", search()) };
        assert!(behind(&host(), None, vec![idle], &devices)[0].devices.is_empty());
    }
}
