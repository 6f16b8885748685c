//! The machine's USB controllers and what is plugged into them: the emulator's monitor, seen from inside.

use crate::qmp::Qmp;
use crate::sockets;
use crate::udev;
use crate::wait::{wait_for, wait_until};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

pub use crate::sockets::{Socket, dock, ehci, uhci, xhci};

/// Shared with the emulator, which takes file names relative to it.
const SHARED: &str = "/run/lab";

pub struct Hardware {
    qmp: Qmp<File>,
    plugged: u32,
}

/// What can be plugged in.
#[derive(Clone)]
pub enum Device {
    Stick(Stick),
    Mouse,
    Keyboard,
    Tablet,
    Hub,
}

#[derive(Clone)]
pub struct Stick {
    serial: String,
    content: Vec<u8>,
    size: u64,
}

impl Stick {
    /// An empty stick of one MiB; a serial has at most 20 characters.
    pub fn new(serial: &str) -> Stick {
        Stick { serial: serial.to_owned(), content: Vec::new(), size: 1 << 20 }
    }

    pub fn content(self, content: Vec<u8>) -> Stick {
        Stick { size: self.size.max(content.len() as u64), content, ..self }
    }

    pub fn mebibytes(self, size: u64) -> Stick {
        Stick { size: size << 20, ..self }
    }

    /// A stick whose boot sector writes `word` to the firmware's debug port, then halts.
    pub fn bootable(serial: &str, word: &str) -> Stick {
        let mut sector = vec![0xba, 0x02, 0x04]; // mov dx, 0x402
        for byte in word.bytes() {
            sector.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
        }
        sector.extend([0xfa, 0xf4, 0xeb, 0xfd]); // cli; hlt; jmp to the hlt
        sector.resize(510, 0);
        sector.extend([0x55, 0xaa]);
        Stick::new(serial).content(sector)
    }
}

impl From<Stick> for Device {
    fn from(stick: Stick) -> Device {
        Device::Stick(stick)
    }
}

/// A device that the kernel and udevd have seen.
#[derive(Clone, Debug)]
pub struct Plugged {
    /// Its name where it comes from: the emulator, a gadget.
    pub id: String,
    socket: Socket,
    /// The kernel's name for the port, `2-3`.
    pub port: String,
    pub sysfs: PathBuf,
    pub bus: u32,
    pub address: u32,
}

impl Plugged {
    /// Waits until the kernel and udevd have seen what was plugged in there.
    pub fn arrived(id: String, socket: &Socket) -> Plugged {
        let in_kernel = || {
            let sysfs = socket.candidates().into_iter().find(|path| path.exists())?;
            let plugged = Plugged {
                id: id.clone(),
                socket: socket.clone(),
                port: sysfs.file_name()?.to_str()?.to_owned(),
                bus: read(&sysfs.join("busnum"))?.parse().ok()?,
                address: read(&sysfs.join("devnum"))?.parse().ok()?,
                sysfs,
            };
            Some((read(&plugged.sysfs.join("dev"))?, plugged))
        };
        let (_, plugged) = wait_for(&format!("{socket:?} in the kernel"), in_kernel);
        wait_for(&format!("{plugged:?} in udevd"), || {
            let (number, plugged) = in_kernel()?;
            Path::new("/run/udev/data").join(format!("c{number}")).exists().then_some(plugged)
        })
    }

    /// Waits until it has left the kernel.
    pub fn leaves(&self) {
        let node = self.node();
        wait_until(&format!("{} leaves the kernel", self.port), || !node.exists());
    }

    pub fn node(&self) -> PathBuf {
        format!("/dev/bus/usb/{:03}/{:03}", self.bus, self.address).into()
    }

    /// Waits until the kernel and udevd have it again, where bus numbers or addresses have changed.
    pub fn again(&self) -> Plugged {
        Plugged::arrived(self.id.clone(), &self.socket)
    }

    /// What the program under test calls it in a VM.
    pub fn id_in_vm(&self) -> String {
        format!("usb-host-{}", self.port)
    }

    /// `/sys/...` without the `/sys`, as udev says it.
    pub fn devpath(&self) -> String {
        let path = self.sysfs.canonicalize().expect("still plugged in");
        path.to_str().unwrap().trim_start_matches("/sys").to_owned()
    }

    /// The driver of the first interface, if one is bound.
    pub fn driver(&self) -> Option<String> {
        self.driver_of(0)
    }

    /// The driver of an interface in the first configuration, if one is bound.
    pub fn driver_of(&self, interface: u32) -> Option<String> {
        let link = self.sysfs.join(format!("{}:1.{interface}/driver", self.port));
        Some(fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
    }

    /// The node of its only or first disk, `/dev/sda`, once it is there.
    pub fn disk(&self) -> PathBuf {
        self.lun(0)
    }

    /// The node of the disk with this logical unit number, once it is there.
    pub fn lun(&self, number: u32) -> PathBuf {
        let device = self.sysfs.canonicalize().expect("still plugged in");
        // .../host2/target2:0:0/2:0:0:1/block/sda
        let is_its_disk = |path: &Path| {
            let unit = path.parent().and_then(Path::parent).unwrap().to_string_lossy();
            path.starts_with(&device) && unit.ends_with(&format!(":0:0:{number}"))
        };
        wait_for(&format!("disk {number} for {}", self.port), || {
            let disk = fs::read_dir("/sys/class/block")
                .ok()?
                .filter_map(|entry| entry.ok()?.path().canonicalize().ok())
                .find(|path| is_its_disk(path))?;
            let node = Path::new("/dev").join(disk.file_name()?);
            File::open(&node).is_ok().then_some(node)
        })
    }
}

impl Hardware {
    pub fn open() -> Hardware {
        let port = File::options()
            .read(true)
            .write(true)
            .open("/dev/virtio-ports/hardware")
            .expect("the lab's monitor");
        Hardware { qmp: Qmp::new(port), plugged: 0 }
    }

    pub fn plug(&mut self, device: impl Into<Device>, socket: Socket) -> Plugged {
        self.plug_all(vec![(device.into(), socket)]).remove(0)
    }

    /// Plugs in everything at the same instant, and waits for all of it.
    pub fn plug_all(&mut self, devices: Vec<(Device, Socket)>) -> Vec<Plugged> {
        let mut commands = Vec::new();
        let mut ids = Vec::new();
        for (device, socket) in &devices {
            self.plugged += 1;
            // The emulator may use the image of an earlier test's stick, and so its name, some time longer.
            let id = format!("plugged{}-{}", std::process::id(), self.plugged);
            commands.push(("device_add", self.arguments(&id, device, socket)));
            ids.push(id);
        }
        self.qmp.must_all(&commands);
        ids.into_iter()
            .zip(devices)
            .map(|(id, (_, socket))| Plugged::arrived(id, &socket))
            .collect()
    }

    fn arguments(&mut self, id: &str, device: &Device, socket: &Socket) -> Value {
        let mut arguments = json!({"id": id, "bus": socket.controller, "port": socket.port});
        match device {
            Device::Stick(stick) => {
                let file = format!("{id}.img");
                let image = Path::new(SHARED).join(&file);
                fs::write(&image, &stick.content).expect("the stick's image");
                File::options()
                    .write(true)
                    .open(&image)
                    .and_then(|file| file.set_len(stick.size))
                    .expect("the stick's image");
                let file = json!({"driver": "file", "filename": file});
                self.qmp
                    .must("blockdev-add", json!({"driver": "raw", "node-name": id, "file": file}));
                arguments["driver"] = "usb-storage".into();
                arguments["drive"] = id.into();
                arguments["serial"] = stick.serial.as_str().into();
            }
            Device::Mouse => arguments["driver"] = "usb-mouse".into(),
            Device::Keyboard => arguments["driver"] = "usb-kbd".into(),
            Device::Tablet => arguments["driver"] = "usb-tablet".into(),
            Device::Hub => arguments["driver"] = "usb-hub".into(),
        }
        arguments
    }

    /// Pulls it out and waits until the kernel has noticed.
    pub fn pull(&mut self, device: &Plugged) {
        self.pull_all(std::slice::from_ref(device));
    }

    /// Pulls out everything at the same instant.
    pub fn pull_all(&mut self, devices: &[Plugged]) {
        let commands: Vec<_> =
            devices.iter().map(|device| ("device_del", json!({"id": device.id}))).collect();
        self.qmp.must_all(&commands);
        for device in devices {
            device.leaves();
        }
        self.forget_images();
    }

    /// Connects the dock: a second xHCI controller, which gets the last bus numbers.
    pub fn connect_dock(&mut self) {
        let controller = json!({"driver": "qemu-xhci", "id": "dock", "bus": "expansion"});
        sockets::connect_dock(|| {
            self.qmp.must("device_add", controller);
        });
    }

    /// Pulls out what an earlier test has left.
    pub fn clear(&mut self) {
        let left = self.qmp.must("qom-list", json!({"path": "/machine/peripheral"}));
        let left: Vec<&str> = left
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|child| child["name"].as_str())
            .filter(|name| name.starts_with("plugged"))
            .collect();
        for id in left {
            // A hub takes what is behind it along.
            let _ = self.qmp.execute("device_del", json!({"id": id}));
        }
        sockets::clear();
        wait_until("nothing is plugged in", || {
            fs::read_dir("/sys/bus/usb/devices").unwrap().flatten().all(|entry| {
                let name = entry.file_name().into_string().unwrap();
                name.starts_with("usb") || name.contains("-0:")
            })
        });
        udev::settle();
        self.forget_images();
    }

    /// An image outlives its stick, and its name is to be used again.
    fn forget_images(&mut self) {
        let nodes = self.qmp.must("query-named-block-nodes", json!({"flat": true}));
        for node in nodes
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|node| node["node-name"].as_str())
            .filter(|name| name.starts_with("plugged"))
        {
            if self.qmp.execute("blockdev-del", json!({"node-name": node})).is_ok() {
                let _ = fs::remove_file(Path::new(SHARED).join(format!("{node}.img")));
            }
        }
    }
}

fn read(attribute: &Path) -> Option<String> {
    Some(fs::read_to_string(attribute).ok()?.trim().to_owned())
}
