//! The physical socket that a rule is for, with the ports that are its halves.
//! Stable names are used if there are any.

use std::fmt;

use crate::host::Host;
use crate::usb::{Port, PortPath};

/// A socket: one port, or the two ports that are the halves of a USB 3 socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// The ports by bus number. The port that the user named comes first.
    pub ports: Vec<Port>,
    /// The stable place, unless the rule is to use bus numbers.
    pub place: Option<Place>,
}

/// A socket, found by the place of its controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The stable names of the ports, in the same order.
    pub paths: Vec<PortPath>,
    /// The controller's `DEVPATH`.
    pub controller: String,
    /// The USB revisions of all buses of the controller.
    pub revisions: Vec<u8>,
}

impl Socket {
    /// The socket that a port belongs to.
    pub fn of(host: &Host, port: &Port, by_bus_number: bool) -> Self {
        let ports: Vec<Port> = std::iter::once(port.clone()).chain(host.twin(port)).collect();
        let place = if by_bus_number { None } else { Place::of(host, &ports) };
        Socket { ports, place }
    }

    /// The name of the port that the user named, as the rule has it.
    pub fn name(&self) -> String {
        self.names().into_iter().next().unwrap_or_default()
    }

    /// The names of the ports, as the rule has them.
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
    /// The place of ports of one controller. `None` if the controller has no
    /// stable name.
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

    /// Whether the ports with the same numbers, on all buses of the controller,
    /// are exactly these ports.
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
