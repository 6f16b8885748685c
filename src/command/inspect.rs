//! `inspect VM`

use std::fmt::Write;
use std::io::IsTerminal;

use serde::Serialize;
use tracing::debug;

use super::Context;
use crate::cli::Inspect;
use crate::error::Error;
use crate::host::{Host, Strings};
use crate::passed::{self, Passed};
use crate::presence::{Leftover, Presence, presence};
use crate::qemu::{Given, GuestDevice, Inventory, UsbHost};
use crate::text::{chain, escape};
use crate::ui::output::{json, print};
use crate::ui::screen::Screen;
use crate::ui::table::{narrow, table};
use crate::usb::{Device, DeviceId, Port, PortPath, Speed};

/// The column with the names that devices give themselves. It can be of any
/// length.
const PRODUCT: usize = 4;

/// The JSON document.
#[derive(Debug, Serialize)]
struct Report {
    vm: VmReport,
    devices: Vec<DeviceReport>,
}

#[derive(Debug, Serialize)]
struct VmReport {
    socket: String,
    name: Option<String>,
    qemu: String,
    status: Option<String>,
}

#[derive(Debug, Serialize)]
struct DeviceReport {
    id: Option<String>,
    qom_path: String,
    driver: String,
    guest_bus: Option<String>,
    guest_port: Option<String>,
    speed_mbps: Option<Speed>,
    product: Option<String>,
    host: Option<HostReport>,
}

/// The facts about a host device that the host knows.
#[derive(Debug, Default, Serialize)]
struct HostReport {
    bus: Option<u16>,
    address: Option<u8>,
    port: Option<Port>,
    /// The stable name of the port.
    path: Option<PortPath>,
    vendor: Option<String>,
    product: Option<String>,
    serial: Option<String>,
    state: State,
    /// Whether these are the facts about a device that is there.
    #[serde(skip)]
    is_there: bool,
}

/// Whether a VM's device is still there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// The device is at its port.
    Present,
    /// No device is at its port.
    #[default]
    Gone,
    /// Another device is at its port.
    Replaced,
    /// The device is at its port, but the VM is not connected to it any more.
    Dead,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            State::Present => "present",
            State::Gone => "gone",
            State::Replaced => "replaced",
            State::Dead => "dead",
        }
    }
}

/// Shows the USB devices of the VM.
pub async fn run(context: &Context, arguments: &Inspect) -> Result<(), Error> {
    let address = context.typed_vm(&arguments.vm)?;
    let mut vm = context.connect(&address).await?;
    let name = vm.name();
    let what = || format!("asking {} for its devices", escape(&name));
    let inventory = context.during(what, vm.inspect()).await?;
    let pid = vm.pid();
    drop(vm);
    let has_controller = !inventory.controllers.is_empty();
    let report = report(&context.host, pid, name, inventory)?;
    if arguments.json {
        return print(&json(&report)?);
    }
    // Only the output for people is cut.
    let columns = std::io::stdout().is_terminal().then(|| Screen::of_stdout().columns);
    print(&shown(&report, has_controller, columns))
}

fn report(
    host: &Host,
    pid: Option<i32>,
    socket: String,
    inventory: Inventory,
) -> Result<Report, Error> {
    let Inventory { name, version, status, devices, .. } = inventory;
    let objects: Vec<_> = devices.iter().filter_map(|device| device.host.clone()).collect();
    let is_told = |object: &UsbHost| object.wanted.exact().is_some();
    // If QEMU was told an address, the host's list is not needed.
    let on_host = if objects.iter().all(is_told) { Ok(Vec::new()) } else { host.devices() };
    let on_host = on_host.unwrap_or_else(|error| {
        debug!("the devices that QEMU found by itself stay unknown: {}", chain(&error));
        Vec::new()
    });
    let mut passed = passed::behind(host, pid, objects, &on_host).into_iter();
    let devices = devices.into_iter().map(|device| {
        let passed = if device.host.is_some() { passed.next() } else { None };
        device_report(host, pid, device, passed)
    });
    let mut devices: Vec<DeviceReport> = devices.collect();
    add_strings(host, &mut devices)?;
    Ok(Report { vm: VmReport { socket, name, qemu: version.to_string(), status }, devices })
}

/// Adds what the devices tell of themselves. A device whose drivers are
/// starting does not tell it yet.
fn add_strings(host: &Host, devices: &mut [DeviceReport]) -> Result<(), Error> {
    let there = devices.iter_mut().filter_map(|device| {
        let port = device.host.as_ref().filter(|host| host.is_there)?.port.clone()?;
        Some((device, port))
    });
    let (there, ports): (Vec<&mut DeviceReport>, Vec<Port>) = there.unzip();
    let reader = host.clone();
    let strings = host.in_haste(ports, move |port| reader.strings(&port))?;
    for (device, strings) in there.into_iter().zip(strings) {
        let Some(report) = &mut device.host else { continue };
        let Strings { product, serial, .. } = strings.unwrap_or_default();
        report.serial = serial;
        // QEMU's text of a product has at most 31 characters, with `?` for
        // every character that is not ASCII. If the text has a line break,
        // neither the name nor the speed can be read (QEMU, include/hw/usb.h,
        // `product_desc`; hw/usb/host-libusb.c, `usb_host_open`).
        if report.state == State::Present {
            device.product = product.or(device.product.take());
        }
    }
    Ok(())
}

fn device_report(
    host: &Host,
    pid: Option<i32>,
    device: GuestDevice,
    passed: Option<Passed>,
) -> DeviceReport {
    let mut speed_mbps = device.speed;
    let host = passed.map(|passed| {
        let id = device.id.as_deref().and_then(|id| id.parse::<DeviceId>().ok());
        let report = match passed.object.wanted.exact() {
            Some(_) => host_report(host, pid, id.as_ref(), &passed.object.wanted.given()),
            None => found_report(host, &passed),
        };
        if report.is_there && report.state == State::Present {
            speed_mbps = speed_mbps.or(report.port.as_ref().and_then(|port| host.speed(port)));
        }
        report
    });
    DeviceReport {
        id: device.id,
        qom_path: device.qom_path,
        driver: device.driver,
        guest_bus: device.bus,
        guest_port: device.port,
        speed_mbps,
        product: device.product,
        host,
    }
}

fn host_report(host: &Host, pid: Option<i32>, id: Option<&DeviceId>, given: &Given) -> HostReport {
    let (presence, found) = presence(host, pid, id, given);
    let state = match presence {
        // If no problem is known, the state is `present`.
        Presence::Alive | Presence::Unknown => State::Present,
        Presence::Lost(Leftover::Dead) => State::Dead,
        Presence::Lost(Leftover::Gone) => State::Gone,
        Presence::Lost(Leftover::Replaced) => State::Replaced,
    };
    if let Some(found) = found.as_ref().filter(|found| given.address == Some(found.address)) {
        return of_device(host, found, state);
    }
    let port = found.map(|found| found.port).or_else(|| id.and_then(DeviceId::port));
    HostReport {
        bus: given.address.map(|address| address.bus),
        address: given.address.map(|address| address.device),
        path: port.as_ref().and_then(|port| host.port_path(port)),
        port,
        state,
        ..HostReport::default()
    }
}

/// The device that QEMU has found by itself. QEMU tells only what it looks for.
fn found_report(host: &Host, passed: &Passed) -> HostReport {
    if let [found] = passed.devices.as_slice() {
        return of_device(host, found, State::Present);
    }
    let wanted = &passed.object.wanted;
    let hex = |number: Option<u16>| number.map(|number| format!("{number:04x}"));
    HostReport {
        bus: wanted.bus,
        address: wanted.address,
        vendor: hex(wanted.vendor),
        product: hex(wanted.product),
        // QEMU may have any of several, or it has none and goes on looking.
        state: if passed.devices.is_empty() { State::Gone } else { State::Present },
        ..HostReport::default()
    }
}

/// The facts about a device that is there, without its strings.
fn of_device(host: &Host, device: &Device, state: State) -> HostReport {
    HostReport {
        bus: Some(device.address.bus),
        address: Some(device.address.device),
        port: Some(device.port.clone()),
        path: host.port_path(&device.port),
        vendor: Some(format!("{:04x}", device.id.vendor)),
        product: Some(format!("{:04x}", device.id.product)),
        serial: None,
        state,
        is_there: true,
    }
}

fn shown(report: &Report, has_controller: bool, columns: Option<usize>) -> String {
    let vm = &report.vm;
    let mut text = format!("VM {}", escape(vm.name.as_deref().unwrap_or(&vm.socket)));
    let status = vm.status.as_deref().unwrap_or("status unknown");
    // Writing to a String cannot fail.
    let _ = writeln!(text, ": QEMU {}, {}", vm.qemu, escape(status));
    if report.devices.is_empty() {
        text += if has_controller { "no USB devices\n" } else { "this VM has no USB controller\n" };
        return text;
    }
    let mut rows =
        vec![["BUS", "PORT", "Mb/s", "ID", "PRODUCT", "HOST"].map(str::to_owned).to_vec()];
    for device in &report.devices {
        let or_dash = |text: Option<&str>| match text {
            Some(text) if !text.is_empty() => escape(text).into_owned(),
            _ => "-".to_owned(),
        };
        rows.push(vec![
            or_dash(device.guest_bus.as_deref()),
            or_dash(device.guest_port.as_deref()),
            or_dash(device.speed_mbps.map(|speed| speed.to_string()).as_deref()),
            or_dash(device.id.as_deref()),
            or_dash(device.product.as_deref()),
            device.host.as_ref().map(host_cell).unwrap_or_default(),
        ]);
    }
    if let Some(columns) = columns {
        narrow(&mut rows, PRODUCT, columns);
    }
    text + &table(&rows)
}

/// `1-1.2 1:37 152d:2338 present`
fn host_cell(host: &HostReport) -> String {
    let mut words = Vec::new();
    words.extend(host.port.as_ref().map(ToString::to_string));
    words.extend(host.bus.zip(host.address).map(|(bus, address)| format!("{bus}:{address}")));
    words.extend(host.vendor.as_ref().zip(host.product.as_ref()).map(|(v, p)| format!("{v}:{p}")));
    words.push(host.state.word().to_owned());
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::Wanted;
    use crate::qemu::qmp::Version;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use std::fs;
    use std::time::Duration;

    #[test]
    fn a_device_that_is_starting_is_shown_without_its_strings() {
        let root = tempfile::tempdir().unwrap();
        let plug = |port: &str, number: &str| {
            let directory = root.path().join("sys/bus/usb/devices").join(port);
            fs::create_dir_all(&directory).unwrap();
            let numbers = [("busnum", "1"), ("devnum", number), ("speed", "480")];
            let ids = [("idVendor", "1209"), ("idProduct", "0001"), ("bDeviceClass", "00")];
            for (name, value) in numbers.into_iter().chain(ids) {
                fs::write(directory.join(name), value).unwrap();
            }
            directory
        };
        let ready = plug("1-1", "2");
        fs::write(ready.join("product"), "A name of more than 31 characters\n").unwrap();
        fs::write(ready.join("serial"), "SN1\n").unwrap();
        // Whoever opens these waits.
        let starting = plug("1-2", "3");
        for name in ["product", "serial"] {
            mknodat(CWD, starting.join(name), FileType::Fifo, Mode::RUSR, 0).unwrap();
        }
        let device = |port: &str, number: u8| {
            let wanted = Wanted { bus: Some(1), address: Some(number), ..Wanted::default() };
            let id = format!("usb-host-{port}");
            GuestDevice {
                id: Some(id.clone()),
                qom_path: format!("/machine/peripheral/{id}"),
                driver: "usb-host".into(),
                bus: Some("xhci.0".into()),
                port: Some(number.to_string()),
                speed: None,
                product: Some("what QEMU says".into()),
                host: Some(UsbHost { name: id, wanted, is_attached: Some(true) }),
            }
        };
        let inventory = Inventory {
            name: None,
            version: Version { major: 10, minor: 0, micro: 2 },
            status: None,
            controllers: Vec::new(),
            devices: vec![device("1-1", 2), device("1-2", 3), device("1-3", 4)],
        };
        let host = Host::at(root.path()).within(Duration::from_secs(5));
        let report = report(&host, None, "a".into(), inventory).unwrap();
        let shown = |device: &DeviceReport| {
            let host = device.host.as_ref().unwrap();
            let vendor = host.vendor.as_deref() == Some("1209");
            (device.product.clone().unwrap(), host.serial.clone(), vendor, host.state)
        };
        let shown: Vec<_> = report.devices.iter().map(shown).collect();
        let own = "A name of more than 31 characters".to_owned();
        assert_eq!(shown[0], (own, Some("SN1".into()), true, State::Present));
        assert_eq!(shown[1], ("what QEMU says".into(), None, true, State::Present));
        assert_eq!(shown[2], ("what QEMU says".into(), None, false, State::Gone));
        let speeds: Vec<bool> = report.devices.iter().map(|d| d.speed_mbps.is_some()).collect();
        assert_eq!(speeds, [true, true, false]);
    }
}
