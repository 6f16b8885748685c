//! A udev event: what happened to which device (udev(7)).

use crate::error::Error;
use crate::host::Host;
use crate::usb::{Address, Device, Port, Selector, VendorProduct, class_from_udev};

const MISSING: &str = "no udev event in the environment; by hand: ACTION=add BUSNUM=001 DEVNUM=037 \
                       usb-qmp-hotplug udev VM";

/// What happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It was plugged in.
    Add,
    /// It was pulled out.
    Remove,
}

/// An event of a whole USB device.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub action: Action,
    /// The device's port; who types an event by hand may leave it out.
    pub port: Option<Port>,
    /// Where the device is, or was.
    pub address: Option<Address>,
    id: Option<VendorProduct>,
    class: Option<u8>,
}

impl Event {
    /// Reads the event from variables; `None` if it is of no concern. Only
    /// `add` and `remove` of whole devices are: an attach itself causes
    /// `change` and `unbind`, and to act on those would never end.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] says what to type, [`Error::Parse`] which value is wrong.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Error> {
        let action = match get("ACTION").as_deref() {
            Some("add") => Action::Add,
            Some("remove") => Action::Remove,
            Some(_) => return Ok(None),
            None => return Err(Error::Usage(MISSING.into())),
        };
        let other = |name, ours| get(name).is_some_and(|value| value != ours);
        if other("SUBSYSTEM", "usb") || other("DEVTYPE", "usb_device") {
            return Ok(None);
        }
        // The last part of DEVPATH is the port, or `usb1` for a root hub.
        let port = match get("DEVPATH").as_deref().map(|path| path.rsplit('/').next()) {
            Some(Some(name)) if name.starts_with("usb") => return Ok(None),
            Some(Some(name)) => Some(name.parse()?),
            _ => None,
        };
        let node = get("DEVNAME").and_then(|name| {
            let (bus, device) = name.strip_prefix("/dev/bus/usb/")?.split_once('/')?;
            Address::from_numbers(bus, device).ok()
        });
        let address = match (get("BUSNUM"), get("DEVNUM")) {
            (Some(bus), Some(device)) => Some(Address::from_numbers(&bus, &device)?),
            _ => node,
        };
        if port.is_none() && address.is_none() {
            return Err(Error::Usage(MISSING.into()));
        }
        let id = get("PRODUCT").map(|product| VendorProduct::from_udev(&product)).transpose()?;
        let class = get("TYPE").map(|kind| class_from_udev(&kind)).transpose()?;
        Ok(Some(Event { action, port, address, id, class }))
    }

    /// The device that was added: as the event says it, or where it was typed
    /// by hand and says too little, as sysfs does.
    ///
    /// # Errors
    ///
    /// As for [`Host::find`].
    pub fn device(&self, host: &Host) -> Result<Device, Error> {
        match (&self.port, self.address, self.id, self.class) {
            (Some(port), Some(address), Some(id), Some(class)) => {
                Ok(Device { port: port.clone(), address, id, class })
            }
            (Some(port), None, ..) => Ok(host.find(&Selector::Port(port.clone()))?),
            (_, Some(address), ..) => Ok(host.find(&Selector::Address(address))?),
            (None, None, ..) => Err(Error::Usage(MISSING.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(variables: &[(&str, &str)]) -> Result<Option<Event>, Error> {
        Event::from_variables(|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        })
    }

    const PLUG: [(&str, &str); 9] = [
        ("ACTION", "add"),
        ("SUBSYSTEM", "usb"),
        ("DEVTYPE", "usb_device"),
        ("DEVPATH", "/devices/pci0000:00/0000:00:04.0/usb1/1-1/1-1.2"),
        ("BUSNUM", "001"),
        ("DEVNUM", "037"),
        ("DEVNAME", "/dev/bus/usb/001/037"),
        ("PRODUCT", "152d/2338/100"),
        ("TYPE", "0/0/0"),
    ];

    #[test]
    fn udevs_event_says_it_all() {
        let event = event(&PLUG).unwrap().unwrap();
        assert_eq!(event.action, Action::Add);
        let device = event.device(&Host::at("/nonexistent")).unwrap();
        assert_eq!(device.to_string(), "1-1.2 (152d:2338, 1:37)");
        assert!(!device.is_hub());
    }

    #[test]
    fn bus_and_device_typed_by_hand_are_enough() {
        let typed = [("ACTION", "remove"), ("BUSNUM", "1"), ("DEVNUM", "37")];
        let event = event(&typed).unwrap().unwrap();
        assert_eq!((event.port, event.address), (None, Some("1:37".parse().unwrap())));
    }

    #[test]
    fn other_events_are_passed_over() {
        let with = |name, value| {
            let mut variables = PLUG;
            for variable in &mut variables {
                if variable.0 == name {
                    variable.1 = value;
                }
            }
            event(&variables).unwrap()
        };
        assert_eq!(with("ACTION", "bind"), None);
        assert_eq!(with("ACTION", "change"), None);
        assert_eq!(with("DEVTYPE", "usb_interface"), None);
        assert_eq!(with("SUBSYSTEM", "block"), None);
        assert_eq!(with("DEVPATH", "/devices/pci0000:00/0000:00:04.0/usb1"), None);
    }

    #[test]
    fn nonsense_is_an_error_that_says_what_to_type() {
        for variables in [&[][..], &[("ACTION", "add")], &[("ACTION", "add"), ("BUSNUM", "1")]] {
            let error = event(variables).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("BUSNUM=001"), "{error}");
        }
        assert!(event(&[("ACTION", "add"), ("BUSNUM", "1"), ("DEVNUM", "x")]).is_err());
        assert!(event(&[("ACTION", "add"), ("DEVPATH", "/devices/../x")]).is_err());
    }

    proptest! {
        #[test]
        fn no_environment_panics(
            action in "add|remove", devpath in "\\PC{0,30}|/devices/(usb1/)?[0-9.-]{0,12}",
            busnum in "[0-9]{0,5}|\\PC{0,3}", devnum in "[0-9]{0,5}",
            product in "[0-9a-f/]{0,15}", kind in "[0-9/]{0,12}",
        ) {
            let _ = event(&[
                ("ACTION", &action), ("DEVPATH", &devpath), ("BUSNUM", &busnum),
                ("DEVNUM", &devnum), ("PRODUCT", &product), ("TYPE", &kind),
            ]);
        }
    }
}
