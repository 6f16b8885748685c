//! A device's own description of itself, byte by byte.

use super::CLASS_HUB;

/// The type of a device descriptor, and of an interface descriptor (USB 2.0
/// specification, table 9-5).
const DEVICE: u8 = 1;
const INTERFACE: u8 = 4;

/// The class codes in a device's descriptors: its own, and those of its
/// interfaces in every configuration, each once (USB 2.0 specification,
/// `bDeviceClass` in table 9-8 and `bInterfaceClass` in table 9-12).
///
/// A device may send anything; what is cut off or out of order is passed over.
pub fn classes(descriptors: &[u8]) -> Vec<u8> {
    let mut classes: Vec<u8> = Vec::new();
    let mut rest = descriptors;
    // Each begins with its length and its type.
    while let [length, kind, ..] = rest {
        // No descriptor is shorter than these two.
        let Some((descriptor, after)) = rest.split_at_checked(usize::from(*length).max(2)) else {
            break;
        };
        let class = match *kind {
            DEVICE => descriptor.get(4),
            INTERFACE => descriptor.get(5),
            _ => None,
        };
        classes.extend(class.filter(|class| !classes.contains(class)));
        rest = after;
    }
    classes
}

/// Whether these are the descriptors of a hub: by its own class or by that of an
/// interface, which is enough for the kernel (Linux, drivers/usb/core/hub.c,
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
