//! Hubs that this program plays: USB 2.0, chapter 11, and USB 3.2, chapter 10.

use crate::hardware::Plugged;
use crate::remote::{Answer, Device, GET_DESCRIPTOR, GET_STATUS, Remotes, Setup, socket};
use crate::sockets::DEVICES;
use crate::wait::wait_until;
use std::fs;

const PORTS: usize = 4;

/// What the kernel drives as a hub for its interface, while the device itself says no class.
pub fn by_interface_only() -> Device {
    hub(false, &[], [0; 3])
}

/// Plugs in the USB 2 or the USB 3 half of a hub, and devices of its speed into its ports 1 to 4. [`pull`] is its opposite.
///
/// To `vhci_hcd`, a port that a hub says is one of its own: a device behind the hub is connected to the root port of the
/// same number, so both halves may have a device at one port, and nothing else. The root port sleeps, so that the
/// device is found behind the hub only.
pub fn plug(
    remotes: &mut Remotes,
    super_speed: bool,
    port: u32,
    devices: Vec<(Device, u32)>,
) -> (Plugged, Vec<Plugged>) {
    let used: Vec<u32> = devices.iter().map(|(_, below)| *below).collect();
    let ids: Vec<String> = devices
        .into_iter()
        .map(|(device, below)| {
            assert!(below != port && device.is_super_speed() == super_speed);
            let_root_port_sleep(below);
            remotes.insert(device, below)
        })
        .collect();
    let class = [9, 0, if super_speed { 3 } else { 1 }];
    let hub = remotes.plug(hub(super_speed, &used, class), port);
    let below =
        |(id, below): (String, u32)| Plugged::arrived(id, &socket(port, super_speed).below(below));
    (hub, ids.into_iter().zip(used).map(below).collect())
}

/// Pulls out a half, and what is plugged into it.
pub fn pull(remotes: &mut Remotes, hub: &Plugged, devices: &[Plugged]) {
    remotes.pull(hub);
    for device in devices {
        remotes.remove(&device.id);
        device.leaves();
    }
}

fn let_root_port_sleep(port: u32) {
    for half in [false, true] {
        let bus = socket(port, half).candidates()[0].file_name().unwrap().to_owned();
        let (bus, _) = bus.to_str().unwrap().split_once('-').unwrap();
        let power = format!("{DEVICES}/{bus}-0:1.0/usb{bus}-port{port}/power", bus = bus);
        fs::write(format!("{power}/pm_qos_no_power_off"), "0").expect("a root port");
        let status = format!("{power}/runtime_status");
        wait_until(&status, || fs::read_to_string(&status).unwrap().trim() == "suspended");
    }
}

fn hub(super_speed: bool, used: &[u32], class: [u8; 3]) -> Device {
    let mut interface = vec![9, 4, 0, 0, 1, 9, 0, 0, 0, 7, 5, 0x81, 3, 1, 0, 12];
    if super_speed {
        interface[13] = 2;
        interface.extend([6, 0x30, 0, 0, 2, 0]);
    }
    let mut ports = Ports::new(super_speed, used);
    let device = Device::new(0x1209, if super_speed { 0x0003 } else { 0x0002 });
    let device =
        device.interface(&interface).answers(move |setup| ports.answer(setup)).class(class);
    if super_speed { device.super_speed() } else { device }
}

/// The status and the changes of each port.
struct Ports {
    super_speed: bool,
    status: [u16; PORTS],
    change: [u16; PORTS],
}

const CONNECTED: u16 = 1;
const ENABLED: u16 = 1 << 1;
const HIGH_SPEED: u16 = 1 << 10;
const RESET: u16 = 1 << 4;

impl Ports {
    fn new(super_speed: bool, used: &[u32]) -> Ports {
        let connected = if super_speed { CONNECTED | ENABLED } else { CONNECTED };
        let at = |port: usize, value| if used.contains(&(port as u32 + 1)) { value } else { 0 };
        let power = if super_speed { 1 << 9 } else { 1 << 8 };
        Ports {
            super_speed,
            status: std::array::from_fn(|port| power | at(port, connected)),
            change: std::array::from_fn(|port| at(port, CONNECTED)),
        }
    }

    fn answer(&mut self, setup: &Setup) -> Option<Answer> {
        const CLEAR_FEATURE: u8 = 1;
        const SET_FEATURE: u8 = 3;
        const SET_DEPTH: u8 = 12;
        let port = usize::from(setup.index & 0xff).wrapping_sub(1);
        Some(match (setup.kind, setup.request) {
            (0xa0, GET_DESCRIPTOR) => Answer::Data(self.descriptor()),
            (0xa0, GET_STATUS) => Answer::Data(vec![0; 4]), // the hub's own
            (0x20, SET_DEPTH | SET_FEATURE | CLEAR_FEATURE) => Answer::Data(Vec::new()),
            (0xa3, GET_STATUS) => {
                let (status, change) = (self.status.get(port)?, self.change.get(port)?);
                Answer::Data([status.to_le_bytes(), change.to_le_bytes()].concat())
            }
            (0x23, SET_FEATURE) => {
                self.set(port, setup.value)?;
                Answer::Data(Vec::new())
            }
            (0x23, CLEAR_FEATURE) => {
                self.clear(port, setup.value)?;
                Answer::Data(Vec::new())
            }
            _ => return None,
        })
    }

    fn set(&mut self, port: usize, feature: u16) -> Option<()> {
        let (status, change) = (self.status.get_mut(port)?, self.change.get_mut(port)?);
        // PORT_RESET, BH_PORT_RESET
        if matches!(feature, 4 | 28) && *status & CONNECTED != 0 {
            *status |= if self.super_speed { ENABLED } else { ENABLED | HIGH_SPEED };
            *change |= RESET;
        }
        Some(())
    }

    fn clear(&mut self, port: usize, feature: u16) -> Option<()> {
        match feature {
            1 => *self.status.get_mut(port)? &= !ENABLED,
            16..=20 => *self.change.get_mut(port)? &= !(1 << (feature - 16)),
            _ => {}
        }
        Some(())
    }

    fn descriptor(&self) -> Vec<u8> {
        let ports = PORTS as u8;
        if self.super_speed {
            vec![12, 0x2a, ports, 9, 0, 1, 0, 0, 0, 0, 0, 0]
        } else {
            vec![9, 0x29, ports, 9, 0, 1, 0, 0, 0xff]
        }
    }
}
