//! The messages that the kernel and udev send about devices, without I/O.

/// The start of udev's messages: a name, and a number (systemd,
/// src/libsystemd/sd-device/device-monitor.c, `monitor_netlink_header`). After
/// it, as numbers of 32 bits: the length of the header, and where the variables
/// begin.
const UDEV: &[u8] = b"libudev\0\xfe\xed\xca\xfe";

/// The variables of a message: `ACTION=add`, each with a NUL at its end.
#[derive(Debug, Clone, Copy)]
pub struct Uevent<'a>(&'a [u8]);

impl<'a> Uevent<'a> {
    /// Reads a message of the kernel, which begins with `add@/devices/...` (Linux,
    /// lib/kobject_uevent.c), or one of udev. `None` if it is neither.
    pub fn read(message: &'a [u8]) -> Option<Self> {
        let variables = match message.strip_prefix(UDEV) {
            Some(rest) => {
                let start = rest.get(4..8)?.try_into().ok()?;
                message.get(usize::try_from(u32::from_ne_bytes(start)).ok()?..)?
            }
            None => {
                let end = message.iter().position(|byte| *byte == 0)?;
                let (head, rest) = message.split_at(end);
                head.contains(&b'@').then_some(rest)?
            }
        };
        Some(Uevent(variables))
    }

    /// The value of a variable.
    pub fn get(&self, name: &str) -> Option<String> {
        let mut variables = self.0.split(|byte| *byte == 0);
        let value = variables
            .find_map(|variable| variable.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
        Some(String::from_utf8_lossy(value).into_owned())
    }

    /// Whether it is about a device of this subsystem.
    pub fn is_of(&self, subsystem: &str) -> bool {
        self.get("SUBSYSTEM").as_deref() == Some(subsystem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VARIABLES: &[u8] = b"ACTION=add\0DEVPATH=/devices/usb1/1-1\0SUBSYSTEM=usb\0BUSNUM=001\0";

    fn of_udev(start: u32) -> Vec<u8> {
        let header: Vec<u8> =
            [40, start, VARIABLES.len() as u32, 0, 0, 0, 0].map(u32::to_ne_bytes).concat();
        [UDEV, &header, VARIABLES].concat()
    }

    #[test]
    fn the_kernel_and_udev_say_the_same() {
        let of_kernel = [b"add@/devices/usb1/1-1\0", VARIABLES].concat();
        for message in [of_kernel, of_udev(40)] {
            let uevent = Uevent::read(&message).unwrap();
            assert!(uevent.is_of("usb") && !uevent.is_of("us"));
            assert_eq!(uevent.get("BUSNUM").as_deref(), Some("001"));
            assert_eq!((uevent.get("BUS"), uevent.get("DEVNUM")), (None, None));
        }
    }

    #[test]
    fn what_is_neither_is_nothing() {
        let far = of_udev(4000);
        let neither: [&[u8]; 5] = [b"", b"add@/devices", b"ACTION=add\0", &UDEV[..9], &far];
        for message in neither {
            assert!(Uevent::read(message).and_then(|uevent| uevent.get("ACTION")).is_none());
        }
    }
}
