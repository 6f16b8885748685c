//! A QEMU that is played by a thread.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::peer::{Command, Peer};

/// A QEMU with one xHCI controller, `xhci.0`.
pub struct Qemu {
    pub version: [u32; 3],
    pub status: &'static str,
    pub ports: u32,
    /// The host devices that it has: id, bus and address, port.
    pub devices: BTreeMap<String, (u64, u64, String)>,
    /// Whether it got those as descriptors.
    pub by_descriptor: bool,
    /// Ports in use by something that it does not tell of.
    pub in_use: Vec<&'static str>,
    /// It keeps the id of what it removed until it has told that it did, once (QEMU before 6.0).
    pub frees_late: bool,
    /// A command that it refuses, and its words.
    pub refuses: Option<(&'static str, &'static str)>,
    /// The command from which on it says nothing any more.
    pub silent_from: Option<&'static str>,
    /// The command at which it dies.
    pub dies_at: Option<&'static str>,
    /// What changed something, or was to, in order.
    pub changes: Vec<String>,
    /// The arguments of each `device_add`.
    pub added: Vec<Value>,
    /// How many descriptors each set has.
    pub sets: BTreeMap<i64, usize>,
}

impl Default for Qemu {
    fn default() -> Self {
        Qemu {
            version: [10, 0, 2],
            status: "running",
            ports: 4,
            devices: BTreeMap::new(),
            by_descriptor: true,
            in_use: Vec::new(),
            frees_late: false,
            refuses: None,
            silent_from: None,
            dies_at: None,
            changes: Vec::new(),
            added: Vec::new(),
            sets: BTreeMap::new(),
        }
    }
}

impl Qemu {
    pub fn with_device(id: &str, bus: u64, address: u64, port: &str) -> Self {
        let devices = BTreeMap::from([(id.to_owned(), (bus, address, port.to_owned()))]);
        Qemu { devices, ..Qemu::default() }
    }

    /// Answers until the client leaves.
    pub fn serve(mut self, mut peer: Peer) -> Self {
        peer.greet(self.version);
        while let Some(command) = peer.command() {
            if self.dies_at == Some(command.name.as_str()) {
                return self;
            }
            // What follows a passed descriptor must be here already: the client may die at any moment.
            let mut commands = vec![command];
            if commands[0].name == "add-fd" {
                commands.push(peer.next("device_add"));
                commands.push(peer.next("remove-fd"));
            }
            for command in commands {
                if self.silent_from == Some(command.name.as_str()) {
                    peer.rest();
                    return self;
                }
                let descriptor = match command.name.as_str() {
                    "add-fd" => peer.take_descriptor(),
                    _ => None,
                };
                let is_freed = command.name == "device_add" && self.frees_late;
                match self.answer(&command, descriptor.is_some()) {
                    Ok(result) => peer.answer(&command, result),
                    Err((class, desc)) => peer.refuse(&command, class, &desc),
                };
                if is_freed {
                    self.frees_late = false;
                    let data = json!({"device": command.arguments["id"], "path": "/x"});
                    peer.write(format!("{}\r\n", json!({"event": "DEVICE_DELETED", "data": data})));
                }
            }
        }
        self
    }

    fn answer(
        &mut self,
        command: &Command,
        descriptor: bool,
    ) -> Result<Value, (&'static str, String)> {
        let no = |desc: String| Err(("GenericError", desc));
        let text = |name: &str| command.arguments[name].as_str().unwrap_or_default().to_owned();
        let change = match command.name.as_str() {
            "add-fd" | "remove-fd" => Some(command.name.clone()),
            "device_add" if text("driver") == "qemu-xhci" => {
                Some(format!("device_add {}", text("id")))
            }
            "device_add" => Some(format!("device_add {}", text("port"))),
            "device_del" => Some(format!("device_del {}", text("id"))),
            _ => None,
        };
        self.changes.extend(change);
        if let Some((_, desc)) = self.refuses.filter(|(name, _)| *name == command.name) {
            return no(desc.to_owned());
        }
        match command.name.as_str() {
            "qmp_capabilities" => Ok(json!({})),
            "query-status" => Ok(json!({"running": true, "status": self.status})),
            "query-name" => Ok(json!({"name": "played"})),
            "qom-list-types" => Ok(json!([{"name": "usb-host", "parent": "usb-device"}])),
            "qom-list" => self.list(&text("path")).ok_or(()).or_else(|()| not_found(&text("path"))),
            "qom-get" => {
                let found = self.get(&text("path"), &text("property"));
                found.ok_or(()).or_else(|()| not_found(&text("path")))
            }
            "x-query-usb" => Ok(json!({"human-readable-text": self.info_usb()})),
            "human-monitor-command" => Ok(json!(self.info_usb())),
            "add-fd" => {
                assert!(descriptor, "add-fd without a descriptor");
                let set = command.arguments["fdset-id"].as_i64().unwrap();
                *self.sets.entry(set).or_default() += 1;
                Ok(json!({"fd": 20, "fdset-id": set}))
            }
            "remove-fd" => {
                let set = command.arguments["fdset-id"].as_i64().unwrap();
                match self.sets.get_mut(&set) {
                    Some(descriptors) => *descriptors = 0,
                    None => return no(format!("File descriptor named 'fdset-id:{set}' not found")),
                }
                Ok(json!({}))
            }
            "device_add" if text("driver") == "qemu-xhci" => Ok(json!({})),
            "device_add" => {
                let (id, port) = (text("id"), text("port"));
                self.added.push(command.arguments.clone());
                let number = |name: &str| command.arguments[name].as_u64().unwrap();
                let set = text("hostdevice").strip_prefix("/dev/fdset/").map(str::to_owned);
                let set = set.map(|set| self.sets.get(&set.parse().unwrap()).copied());
                if self.frees_late {
                    return no(format!("Duplicate ID '{id}' for device"));
                }
                if self.devices.contains_key(&id) {
                    return no(format!("Duplicate device ID '{id}'"));
                }
                if self.in_use.contains(&port.as_str()) || self.port_is_taken(&port) {
                    return no(format!("usb port {port} (bus xhci.0) not found (in use?)"));
                }
                if set.is_some_and(|descriptors| descriptors != Some(1)) {
                    return no("Failed to find fdset".to_owned());
                }
                self.devices.insert(id, (number("hostbus"), number("hostaddr"), port));
                Ok(json!({}))
            }
            "device_del" => match self.devices.remove(&text("id")) {
                Some(_) => Ok(json!({})),
                None => not_found(&text("id")),
            },
            other => panic!("{other}"),
        }
    }

    fn port_is_taken(&self, port: &str) -> bool {
        self.devices.values().any(|(_, _, taken)| taken == port)
    }

    fn list(&self, path: &str) -> Option<Value> {
        let child =
            |name: &str, kind: &str| json!({"name": name, "type": format!("child<{kind}>")});
        match path {
            "/machine/peripheral" => {
                let mut children: Vec<Value> =
                    self.devices.keys().map(|id| child(id, "usb-host")).collect();
                children.extend((self.ports > 0).then(|| child("xhci", "qemu-xhci")));
                children.push(json!({"name": "type", "type": "string"}));
                Some(Value::Array(children))
            }
            "/machine/peripheral-anon" => Some(json!([])),
            "/machine/unattached" => {
                Some(json!([child("pc.bios[0]", "memory-region"), child("device[0]", "i8042")]))
            }
            "/machine/peripheral/xhci" => Some(json!([child("xhci.0", "usb-bus")])),
            _ => None,
        }
    }

    fn get(&self, path: &str, property: &str) -> Option<Value> {
        if path.starts_with("/machine/unattached/") {
            // Each question costs time, and there are hundreds of such objects.
            assert_eq!((path, property), ("/machine/unattached/device[0]", "parent_bus"));
            return Some(json!("/machine/unattached/device[7]/isa.0"));
        }
        let id = path.strip_prefix("/machine/peripheral/")?;
        if id == "xhci" {
            return ["p2", "p3"].contains(&property).then(|| json!(self.ports));
        }
        let (bus, address, port) = self.devices.get(id)?;
        match property {
            "hostbus" => Some(json!(bus)),
            "hostaddr" => Some(json!(address)),
            "port" => Some(json!(port)),
            "hostdevice" => Some(json!(if self.by_descriptor { "/dev/fdset/1" } else { "" })),
            "parent_bus" => Some(json!("/machine/peripheral/xhci/xhci.0")),
            _ => None,
        }
    }

    fn info_usb(&self) -> String {
        let line = |(id, (_, address, port)): (&String, &(u64, u64, String))| {
            format!(
                "  Device 0.{address}, Port {port}, Speed 480 Mb/s, Product Stick, ID: {id}\r\n"
            )
        };
        self.devices.iter().map(line).collect()
    }
}

fn not_found(what: &str) -> Result<Value, (&'static str, String)> {
    Err(("DeviceNotFound", format!("Device '{what}' not found")))
}
