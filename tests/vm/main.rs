//! Attach, detach and inspect against a QEMU that is played by a thread, for what a real one does not do
//! on demand. The host is a directory; its one device's node may not be opened, so that whoever runs these
//! tests needs no USB hardware.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod attaching;
mod descriptor;
mod detach;
mod inspect;
mod machine;
#[path = "../peer/mod.rs"]
mod peer;
mod present;
mod qemu;

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Map;
use tempfile::TempDir;
use usb_qmp_hotplug::Error;
use usb_qmp_hotplug::attach::{self, Attached, Options};
use usb_qmp_hotplug::qemu::{Access, Attachment, GuestPort, Vm};
use usb_qmp_hotplug::usb::{Address, DeviceId};

use machine::Machine;
use peer::Peer;
use qemu::Qemu;

const ENOUGH: Duration = Duration::from_secs(10);

/// A QEMU that is asked, and the socket's directory.
async fn vm(qemu: Qemu, time: Duration) -> (Vm, JoinHandle<Qemu>, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let served = std::thread::spawn(move || qemu.serve(Peer::new(listener.accept().unwrap().0)));
    (Vm::connect(&path.into(), time).await.unwrap(), served, directory)
}

/// The end of a conversation: what became of the QEMU.
fn end(vm: Vm, served: JoinHandle<Qemu>) -> Qemu {
    drop(vm);
    served.join().unwrap()
}

fn guest_ports(ports: &[&str]) -> Vec<GuestPort> {
    ports.iter().map(|port| GuestPort { bus: "xhci.0".into(), port: (*port).into() }).collect()
}

fn id() -> DeviceId {
    "usb-host-1-1.2".parse().unwrap()
}

fn address() -> Address {
    "1:37".parse().unwrap()
}

/// Attaches by a descriptor (of something else, which a played QEMU does not mind).
async fn attach_descriptor(vm: &mut Vm, ports: &[&str]) -> Result<GuestPort, Error> {
    let null = File::open("/dev/null").unwrap().into();
    let access = Access::Descriptor(&null);
    let (id, options) = (id(), Map::new());
    let attachment = Attachment { id: &id, address: address(), options: &options };
    Ok(vm.attach(&attachment, &access, &guest_ports(ports)).await?.unwrap())
}

async fn attach_from(
    machine: &Machine,
    qemu: Qemu,
    options: &Options,
) -> (Result<Attached, Error>, Qemu) {
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let attached = attach::attach(&machine.host(), &mut vm, &machine.device(), options).await;
    (attached, end(vm, served))
}

/// Time enough to connect and to begin, on a busy machine too.
const SHORT: Duration = Duration::from_secs(1);
