//! The host devices in a VM, whoever attached them, and the properties by which
//! QEMU looks for them (QEMU, hw/usb/host-libusb.c, `usb_host_dev_properties`).

use super::qmp::{Error, Ticket};
use super::qom::{Property, QomGet};
use super::vm::{FDSET, Given, Object, USERS, Vm, address_of_node};
use crate::usb::{Address, Device, DeviceId, VendorProduct};

/// The type of QEMU's objects for devices of the host.
pub(super) const USB_HOST: &str = "usb-host";

/// A host device in a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsbHost {
    /// Its id if QEMU can find it by that, or else its path in QEMU's object
    /// tree. `device_del` accepts both (QEMU, qapi/qdev.json).
    pub name: String,
    /// The properties by which QEMU looks for the device.
    pub wanted: Wanted,
    /// Whether QEMU has found the device. `None` if QEMU does not tell.
    pub is_attached: Option<bool>,
}

/// The properties by which QEMU looks for a device. A property that is not set
/// fits every device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// `hostdevice`: a node, or a descriptor that was passed.
    pub node: Option<String>,
    /// `hostbus`
    pub bus: Option<u16>,
    /// `hostaddr`
    pub address: Option<u8>,
    /// `hostport`: the port numbers from the root hub down, `1.2`.
    pub port: Option<String>,
    /// `vendorid`
    pub vendor: Option<u16>,
    /// `productid`
    pub product: Option<u16>,
}

impl Wanted {
    /// Whether QEMU looks again and again for a device that fits (QEMU,
    /// hw/usb/host-libusb.c, `usb_host_realize`).
    pub fn is_search(&self) -> bool {
        let only_address = self.bus.is_some()
            && self.address.is_some()
            && self.vendor.is_none()
            && self.product.is_none()
            && self.port.is_none();
        self.node.is_none() && !only_address
    }

    /// The address of the device, if the properties name exactly one.
    pub fn exact(&self) -> Option<Address> {
        if self.is_search() {
            return None;
        }
        self.given().address
    }

    /// The address that QEMU was told, whether it searches for the device or
    /// not.
    pub fn given(&self) -> Given {
        let node = self.node.as_deref();
        let address = self.bus.zip(self.address).map(|(bus, device)| Address { bus, device });
        Given {
            address: address.or_else(|| address_of_node(node?)),
            by_descriptor: node.is_some_and(|node| node.starts_with(FDSET)),
        }
    }

    /// Whether these properties fit a device (QEMU, hw/usb/host-libusb.c,
    /// `usb_host_auto_check`). They never fit a hub.
    pub fn fits(&self, device: &Device) -> bool {
        let Device { port, address, id, .. } = device;
        let VendorProduct { vendor, product } = id;
        let any = |wanted: Option<u16>, is: u16| wanted.is_none_or(|wanted| wanted == is);
        !device.is_hub()
            && self.exact().is_none_or(|exact| exact == *address)
            && any(self.bus, address.bus)
            && self.address.is_none_or(|wanted| wanted == address.device)
            && self.port.as_ref().is_none_or(|wanted| *wanted == port.chain().to_string())
            && any(self.vendor, *vendor)
            && any(self.product, *product)
    }
}

/// The questions about a host device that have no answer yet.
pub(super) struct UsbHostTickets {
    name: String,
    texts: [Ticket<QomGet>; 2],
    numbers: [Ticket<QomGet>; 4],
    attached: Ticket<QomGet>,
}

impl Vm {
    /// The host devices in the VM, in two round trips.
    ///
    /// # Errors
    ///
    /// The same errors as [`crate::qemu::qmp::Session::reply`].
    pub async fn usb_hosts(&mut self) -> Result<Vec<UsbHost>, Error> {
        let objects = self.ask_objects(USERS)?;
        let mut asked = Vec::new();
        for object in self.answer_objects(objects).await? {
            if object.driver == USB_HOST {
                asked.push(self.ask_usb_host(&object)?);
            }
        }
        self.answer_usb_hosts(asked).await
    }

    pub(super) fn ask_usb_host(&mut self, object: &Object) -> Result<UsbHostTickets, Error> {
        let path = &object.path;
        let id = object.id.as_ref().filter(|id| id.parse::<DeviceId>().is_ok());
        Ok(UsbHostTickets {
            name: id.unwrap_or(path).clone(),
            texts: [self.ask(path, "hostdevice")?, self.ask(path, "hostport")?],
            numbers: [
                self.ask(path, "hostbus")?,
                self.ask(path, "hostaddr")?,
                self.ask(path, "vendorid")?,
                self.ask(path, "productid")?,
            ],
            attached: self.ask(path, "attached")?,
        })
    }

    pub(super) async fn answer_usb_hosts(
        &mut self,
        asked: Vec<UsbHostTickets>,
    ) -> Result<Vec<UsbHost>, Error> {
        let mut found = Vec::new();
        for UsbHostTickets { name, texts: [node, port], numbers, attached } in asked {
            let text = |text: Option<String>| text.filter(|text| !text.is_empty());
            let (node, port) = (self.answer_text(node).await?, self.answer_text(port).await?);
            let mut values = [None; 4];
            for (value, ticket) in values.iter_mut().zip(numbers) {
                let number = self.answer(ticket).await?.and_then(|number| number.number());
                // Zero means any device. A number that is too large matches no
                // device.
                *value = number.filter(|number| *number > 0);
            }
            let word = |value: Option<u64>| value.map(|v| u16::try_from(v).unwrap_or(u16::MAX));
            let byte = |value: Option<u64>| value.map(|v| u8::try_from(v).unwrap_or(u8::MAX));
            let [bus, address, vendor, product] = values;
            let wanted = Wanted {
                node: text(node),
                bus: word(bus),
                address: byte(address),
                port: text(port),
                vendor: word(vendor),
                product: word(product),
            };
            let is_attached = self.answer(attached).await?.and_then(Property::truth);
            found.push(UsbHost { name, wanted, is_attached });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(port: &str, address: &str, id: &str) -> Device {
        Device {
            port: port.parse().unwrap(),
            address: address.parse().unwrap(),
            id: id.parse().unwrap(),
            hub: false,
        }
    }

    #[test]
    fn what_qemu_was_told_fits_what_it_would_take() {
        let stick = device("1-1.2", "1:37", "152d:2338");
        let any = Wanted::default();
        assert!(any.fits(&stick) && any.is_search());
        assert!(!any.fits(&Device { hub: true, ..stick.clone() }));

        let product = Wanted { vendor: Some(0x152d), ..any.clone() };
        assert!(product.fits(&stick) && product.is_search());
        assert!(!product.fits(&device("1-1.2", "1:37", "152e:2338")));

        let port = Wanted { bus: Some(1), port: Some("1.2".into()), ..any.clone() };
        assert!(port.fits(&stick) && port.is_search());
        assert!(!port.fits(&device("1-1.3", "1:37", "152d:2338")));
        assert!(!port.fits(&device("2-1.2", "2:37", "152d:2338")));

        let address = Wanted { bus: Some(1), address: Some(37), ..any.clone() };
        assert_eq!(address.exact(), Some(stick.address));
        assert!(address.fits(&stick) && !address.is_search());
        let both = Wanted { vendor: Some(0x152d), ..address };
        assert!(both.is_search() && both.fits(&stick));

        let node = Wanted { node: Some("/dev/bus/usb/001/037".into()), ..any.clone() };
        assert_eq!(node.exact(), Some(stick.address));
        assert!(node.fits(&stick) && !node.fits(&device("1-1.2", "1:38", "152d:2338")));
        let passed = Wanted { node: Some("/dev/fdset/3".into()), ..any };
        assert!(passed.exact().is_none() && !passed.is_search());
    }
}
