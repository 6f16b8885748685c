//! A udev event: what happened, and the device that it happened to (udev(7)).

use super::{
    Address, CLASS_HUB, Device, ParseError, Port, Selector, VendorProduct, class_from_udev,
};

/// Why variables do not describe an event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// A variable that the user has to give is missing.
    #[error(
        "no udev event in the environment; by hand: ACTION=add BUSNUM=001 DEVNUM=037 \
         usb-qmp-hotplug udev VM"
    )]
    Missing,
    /// A variable has a value that it cannot have.
    #[error(transparent)]
    Wrong(#[from] ParseError),
}

/// What happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It was plugged in.
    Add,
    /// It was unplugged.
    Remove,
    /// Its driver has started. Now the ports of a hub exist and are linked to
    /// their other halves.
    Bind,
}

/// An event of a whole USB device.
#[derive(Debug, PartialEq, Eq)]
pub struct HotplugEvent {
    /// What happened.
    pub action: Action,
    /// The device's port. A user who types an event may leave it out.
    pub port: Option<Port>,
    /// The address of the device, now or before it was unplugged.
    pub address: Option<Address>,
    /// The device, described by what is certain in the event.
    pub selector: Selector,
    /// Whether a program made the kernel send the event although nothing
    /// happened (`udevadm trigger`; Linux,
    /// Documentation/ABI/testing/sysfs-uevent).
    pub is_synthetic: bool,
    id: Option<VendorProduct>,
    class: Option<u8>,
}

impl HotplugEvent {
    /// Reads the event from variables. Returns `None` if it does not matter
    /// here. Only `add`, `remove` and `bind` of devices matter. An attach
    /// itself causes `change` events, and `bind` and `unbind` events of
    /// interfaces. If this tool acted on those, it would never stop.
    ///
    /// # Errors
    ///
    /// [`EventError::Missing`] says what to type, [`EventError::Wrong`] which
    /// value is wrong.
    pub fn from_variables(
        get: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, EventError> {
        let action = match get("ACTION").as_deref() {
            Some("add") => Action::Add,
            Some("remove") => Action::Remove,
            Some("bind") => Action::Bind,
            Some(_) => return Ok(None),
            None => return Err(EventError::Missing),
        };
        let other = |name, ours| get(name).is_some_and(|value| value != ours);
        if other("SUBSYSTEM", "usb") || other("DEVTYPE", "usb_device") {
            return Ok(None);
        }
        // The last part of DEVPATH is the port, or `usb1` for a root hub.
        let port = match get("DEVPATH").as_deref().map(|path| path.rsplit('/').next()) {
            Some(Some(name)) if name.starts_with("usb") => return Ok(None),
            Some(Some(name)) => Some(name.parse::<Port>()?),
            _ => None,
        };
        let node = get("DEVNAME").and_then(|name| {
            let (bus, device) = name.strip_prefix("/dev/bus/usb/")?.split_once('/')?;
            Address::from_numbers(bus, device).ok()
        });
        let address = Address::from_variables(&get)?.or(node);
        let is_synthetic = get("SYNTH_UUID").is_some();
        let selector = match (address, &port) {
            (Some(address), _) => Selector::Address(address),
            (None, Some(port)) => Selector::Port(port.clone()),
            (None, None) => return Err(EventError::Missing),
        };
        let id = get("PRODUCT").map(|product| VendorProduct::from_udev(&product)).transpose()?;
        let class = get("TYPE").map(|kind| class_from_udev(&kind)).transpose()?;
        Ok(Some(HotplugEvent { action, port, address, selector, is_synthetic, id, class }))
    }

    /// The device as the event describes it. The event does not contain the
    /// classes of the device's interfaces. An event that a user typed contains
    /// less.
    pub fn device(&self) -> Option<Device> {
        Some(Device {
            port: self.port.clone()?,
            address: self.address?,
            id: self.id?,
            hub: self.class? == CLASS_HUB,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(variables: &[(&str, &str)]) -> Result<Option<HotplugEvent>, EventError> {
        HotplugEvent::from_variables(|name| {
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
        let device = event.device().unwrap();
        assert_eq!(device.to_string(), "1-1.2 (152d:2338, 1:37)");
        assert!(!device.is_hub());
    }

    #[test]
    fn a_device_that_is_being_reset_is_known_by_its_node() {
        let with = |more: &[(&str, &str)]| {
            let mut variables = PLUG.to_vec();
            variables.retain(|(name, _)| !["DEVNUM", "DEVNAME"].contains(name));
            variables.extend([("DEVNUM", "000"), ("DEVNAME", "/dev/bus/usb/001/000")]);
            variables.extend(more);
            event(&variables).unwrap().unwrap().address
        };
        assert_eq!(with(&[("MAJOR", "189"), ("MINOR", "36")]), Some("1:37".parse().unwrap()));
        assert_eq!(with(&[]), None);
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
        assert_eq!(with("ACTION", "unbind"), None);
        assert_eq!(with("ACTION", "change"), None);
        assert_eq!(with("DEVTYPE", "usb_interface"), None);
        assert_eq!(with("SUBSYSTEM", "block"), None);
        assert_eq!(with("DEVPATH", "/devices/pci0000:00/0000:00:04.0/usb1"), None);
    }

    #[test]
    fn nonsense_is_an_error_that_says_what_to_type() {
        for variables in [&[][..], &[("ACTION", "add")], &[("ACTION", "add"), ("BUSNUM", "1")]] {
            let error = event(variables).unwrap_err();
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
