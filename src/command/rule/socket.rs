//! A socket that a rule is for: its halves, by the names that stay where they
//! have some.

use std::fmt;

use crate::host::Host;
use crate::usb::{Port, PortPath};

/// A socket: one port, or for USB 3 the two that are its halves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// The ports by bus number, the one that was named first.
    pub ports: Vec<Port>,
    /// What stays, unless the rule is to go by bus number.
    pub place: Option<Place>,
}

/// A socket by the place of its controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The names of the ports, in the same order.
    pub paths: Vec<PortPath>,
    /// The controller's `DEVPATH`.
    pub controller: String,
    /// The USB revisions of all buses of the controller.
    pub revisions: Vec<u8>,
}

impl Socket {
    /// The socket that a port is in.
    pub fn of(host: &Host, port: &Port, by_bus_number: bool) -> Self {
        let ports: Vec<Port> = std::iter::once(port.clone()).chain(host.twin(port)).collect();
        let place = if by_bus_number { None } else { Place::of(host, &ports) };
        Socket { ports, place }
    }

    /// The name of the port that was named, as the rule has it.
    pub fn name(&self) -> String {
        self.names().into_iter().next().unwrap_or_default()
    }

    /// The ports as the rule has them.
    fn names(&self) -> Vec<String> {
        match &self.place {
            Some(place) => place.paths.iter().map(ToString::to_string).collect(),
            None => self.ports.iter().map(ToString::to_string).collect(),
        }
    }

    /// The ports by bus number: `1-1.2 and 2-1.2`.
    pub fn numbers(&self) -> String {
        let ports: Vec<String> = self.ports.iter().map(ToString::to_string).collect();
        ports.join(" and ")
    }
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(" or its other half "))
    }
}

impl Place {
    /// Where ports of one controller are; `None` if that has no name.
    fn of(host: &Host, ports: &[Port]) -> Option<Self> {
        let paths = ports.iter().map(|port| host.port_path(port)).collect::<Option<_>>()?;
        let controller = host.controller(ports.first()?.bus())?;
        let beside = |bus: &u16| host.controller(*bus).as_ref() == Some(&controller);
        let buses = host.buses().into_iter().filter(beside);
        let mut revisions: Vec<u8> =
            buses.filter_map(|bus| Some(host.bus_path(bus)?.revision())).collect();
        revisions.dedup();
        Some(Place { paths, controller: controller.to_str()?.to_owned(), revisions })
    }

    /// Whether a port that has the same numbers as one of these is one of these:
    /// on each bus of the controller.
    pub fn is_all(&self) -> bool {
        self.paths.iter().all(|path| {
            let has = |revision: &u8| {
                let mut same = self.paths.iter().filter(|other| other.chain() == path.chain());
                same.any(|other| other.bus().revision() == *revision)
            };
            self.revisions.iter().all(has)
        })
    }
}
