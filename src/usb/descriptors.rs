//! Reads a device's descriptors.

use super::CLASS_HUB;

/// The type of a device descriptor, and of an interface descriptor (USB 2.0
/// specification, table 9-5).
const DEVICE: u8 = 1;
const INTERFACE: u8 = 4;

/// The class codes in a device's descriptors: its own, and those of its
/// interfaces in every configuration, each once (USB 2.0 specification,
/// `bDeviceClass` in table 9-8 and `bInterfaceClass` in table 9-12).
///
/// A device may send anything. Parts that are incomplete or in the wrong order
/// are skipped.
pub fn classes(descriptors: &[u8]) -> Vec<u8> {
    let mut classes: Vec<u8> = Vec::new();
    for (kind, descriptor) in all(descriptors) {
        let class = match kind {
            DEVICE => descriptor.get(4),
            INTERFACE => descriptor.get(5),
            _ => None,
        };
        classes.extend(class.filter(|class| !classes.contains(class)));
    }
    classes
}

/// Each descriptor with its type.
fn all(descriptors: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = descriptors;
    std::iter::from_fn(move || {
        // Each descriptor begins with its length and its type, so it has at
        // least two bytes.
        let [length, kind, ..] = rest else { return None };
        let (descriptor, after) = rest.split_at_checked(usize::from(*length).max(2))?;
        rest = after;
        Some((*kind, descriptor))
    })
}

/// Whether these are the descriptors of a keyboard. A keyboard that works
/// without an operating system has such an interface (HID 1.11, section 4.2 and
/// appendix B.1: class 3, subclass 1, protocol 1).
pub fn is_keyboard(descriptors: &[u8]) -> bool {
    all(descriptors).any(|(kind, descriptor)| {
        kind == INTERFACE && descriptor.get(5..8).is_some_and(|class| class == [3, 1, 1])
    })
}

/// Whether these are the descriptors of a hub. Its own class or the class of an
/// interface tells it, as for the kernel (Linux, drivers/usb/core/hub.c,
/// `hub_id_table`).
pub fn is_hub(descriptors: &[u8]) -> bool {
    classes(descriptors).contains(&CLASS_HUB)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEVICE_OF_CLASS_0: [u8; 18] =
        [18, 1, 0, 2, 0, 0, 0, 64, 0x2d, 0x15, 0x38, 0x23, 0, 1, 1, 2, 3, 1];

    fn interface(class: u8) -> [u8; 9] {
        [9, 4, 0, 0, 2, class, 6, 80, 0]
    }

    #[test]
    fn the_classes_of_all_interfaces_count() {
        let configuration = [9, 2, 41, 0, 2, 1, 0, 0x80, 50];
        let endpoint = [7, 5, 0x81, 2, 0, 2, 0];
        let all = [
            &DEVICE_OF_CLASS_0[..],
            &configuration,
            &interface(8),
            &endpoint,
            &interface(0xff),
            &configuration,
            &interface(8),
        ];
        assert_eq!(classes(&all.concat()), [0, 8, 0xff]);
    }

    #[test]
    fn a_keyboard_says_so_in_an_interface() {
        let hid = |protocol| [9, 4, 0, 0, 1, 3, 1, protocol, 0];
        assert!(is_keyboard(&[&DEVICE_OF_CLASS_0[..], &interface(8), &hid(1)].concat()));
        assert!(!is_keyboard(&[&DEVICE_OF_CLASS_0[..], &hid(2)].concat()), "a mouse");
    }

    #[test]
    fn a_hub_may_say_so_in_an_interface_only() {
        assert!(is_hub(&[&DEVICE_OF_CLASS_0[..], &interface(9)].concat()));
        assert!(!is_hub(&[&DEVICE_OF_CLASS_0[..], &interface(8)].concat()));
    }

    #[test]
    fn what_is_cut_off_is_passed_over() {
        assert_eq!(classes(&[&DEVICE_OF_CLASS_0[..], &interface(8)[..8]].concat()), [0]);
        assert_eq!(classes(&[5, 4, 0, 0, 2]), [0_u8; 0]);
        assert_eq!(classes(&[]), [0_u8; 0]);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = classes(&bytes);
        }
    }
}
