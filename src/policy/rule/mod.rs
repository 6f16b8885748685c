//! Decides whether a rule matches a device. There is no I/O here: the caller
//! provides the facts.

mod glob;

use std::borrow::Cow;
use std::fmt;

pub use self::glob::{Glob, GlobError, MAX_GLOB};
use crate::text::escape;
use crate::usb::{Port, PortPath, VendorProduct};

/// One rule: the properties that a device must have, and what happens to such a
/// device. A key that is not set matches every device.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// The line in the configuration where it begins, counted from 1.
    pub line: usize,
    /// Matches either name of the device's port: `1-1.2`, or the stable name
    /// `pci-0000:00:14.0-usbv2-0:1.2`.
    pub port: Option<Glob>,
    /// Whether `port` means the physical socket. Then it may also match the
    /// name of the socket's other half.
    pub twin: bool,
    /// The vendor id.
    pub vendor: Option<u16>,
    /// The product id.
    pub product: Option<u16>,
    /// Matches the serial number without leading and trailing blanks, either as
    /// it is or with the escapes that this tool shows. A device without a
    /// serial number does not match.
    pub serial: Option<Glob>,
    /// The class code of the device or of any of its interfaces.
    pub class: Option<u8>,
    /// Match the udev properties of these names. A device that lacks one of
    /// them does not match.
    pub properties: Vec<(String, Glob)>,
    /// What happens to a device that matches.
    pub effect: Effect,
}

/// The effect of a rule.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// The device stays with the host.
    Deny,
    /// The device belongs to a VM.
    Attach(Target),
}

/// The VM that a device belongs to, and how it is attached there.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The VM's name in the configuration.
    pub vm: String,
    /// The guest's bus (`xhci.0`). If it is not set, this tool chooses one.
    pub guest_bus: Option<String>,
    /// The port on the guest's bus (`3`, or `1.2` behind a hub). If it is not
    /// set, this tool chooses a free one.
    pub guest_port: Option<String>,
    /// Whether a controller is added to the VM if it has no port for the
    /// device.
    pub add_controller: bool,
    /// Whether the filesystems that the host has mounted from the device are
    /// unmounted first.
    pub unmount: bool,
    /// More properties of `usb-host`: booleans, integers and strings.
    pub options: serde_json::Map<String, serde_json::Value>,
}

/// The facts about one device that rules ask for. It has only the facts that it
/// was given. [`Needs`] tells which facts are worth reading.
pub struct Facts<'a> {
    // The port as text, which is created only once because most rules compare
    // it.
    port: String,
    twin: Option<String>,
    path: Option<String>,
    twin_path: Option<String>,
    id: VendorProduct,
    serial: &'a dyn Fn() -> Fact<'a>,
    classes: &'a [u8],
    property: Property<'a>,
}

/// The known state of a device's serial number or of a property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact<'a> {
    /// It has this value.
    Is(Cow<'a, str>),
    /// The device has none.
    Lacking,
    /// It is not known yet.
    Unknown,
}

impl<'a, T: Into<Cow<'a, str>>> From<Option<T>> for Fact<'a> {
    fn from(text: Option<T>) -> Self {
        text.map_or(Fact::Lacking, |text| Fact::Is(text.into()))
    }
}

impl Fact<'_> {
    fn fits(&self, glob: &Glob) -> Match {
        match self {
            Fact::Is(text) if glob.matches(text) => Match::Yes,
            Fact::Is(_) | Fact::Lacking => Match::No,
            Fact::Unknown => Match::Unknown,
        }
    }

    /// Whether it matches as it is or with the escapes that this tool shows.
    fn fits_as_shown(&self, glob: &Glob) -> Match {
        match self {
            Fact::Is(text) if glob.matches(&escape(text)) => Match::Yes,
            _ => self.fits(glob),
        }
    }
}

/// Whether a rule matches a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// All its keys match.
    Yes,
    /// At least one key does not match.
    No,
    /// No key is known not to match, but at least one is not known yet.
    Unknown,
}

/// The decision of the rules about a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decision<'r> {
    /// This rule decides. The number is its index among the rules, from 0.
    Rule(usize, &'r Rule),
    /// No rule matches.
    NoRule,
    /// It depends on a fact that is not known yet.
    Unknown,
}

impl<'r> Decision<'r> {
    /// The rule that decides, if it is certain that there is one.
    pub fn rule(self) -> Option<(usize, &'r Rule)> {
        match self {
            Decision::Rule(place, rule) => Some((place, rule)),
            Decision::NoRule | Decision::Unknown => None,
        }
    }
}

/// Looks up a udev property by its name.
type Property<'a> = &'a dyn Fn(&str) -> Fact<'a>;

impl<'a> Facts<'a> {
    /// The facts that are known of every device. `twin` is the other half of
    /// the physical socket: one USB 3 socket is two ports on two buses, and the
    /// kernel links them to each other as `peer`.
    pub fn new(port: &Port, twin: Option<&Port>, id: VendorProduct) -> Self {
        Facts {
            port: port.to_string(),
            twin: twin.map(Port::to_string),
            path: None,
            twin_path: None,
            id,
            serial: &|| Fact::Lacking,
            classes: &[],
            property: &|_| Fact::Lacking,
        }
    }

    /// Adds the stable names of the port and of its twin.
    pub fn with_paths(self, path: Option<&PortPath>, twin: Option<&PortPath>) -> Self {
        let (path, twin_path) = (path.map(PortPath::to_string), twin.map(PortPath::to_string));
        Facts { path, twin_path, ..self }
    }

    /// Adds a function that reads the serial number. It is called only for a
    /// rule that names a serial number and matches in everything that is known
    /// at once.
    pub fn with_serial(self, serial: &'a dyn Fn() -> Fact<'a>) -> Self {
        Facts { serial, ..self }
    }

    /// Adds the class codes of the device and of all its interfaces, in any
    /// order.
    pub fn with_classes(self, classes: &'a [u8]) -> Self {
        Facts { classes, ..self }
    }

    /// Adds a function that looks up a udev property by name. It is called only
    /// for a rule that names a property and matches in everything else.
    pub fn with_properties(self, property: Property<'a>) -> Self {
        Facts { property, ..self }
    }
}

/// The facts that rules ask for, besides the port by its bus number, the vendor
/// and the product.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// The stable names of ports.
    pub paths: bool,
    /// The class codes of the device and its interfaces.
    pub classes: bool,
    /// Properties of udev.
    pub properties: bool,
}

impl Needs {
    /// The facts that at least one of these rules asks for.
    pub fn of(rules: &[Rule]) -> Self {
        rules.iter().fold(Needs::default(), |all, rule| Needs {
            paths: all.paths || (rule.port.is_some() && rule.bus_number().is_none()),
            classes: all.classes || rule.class.is_some(),
            properties: all.properties || !rule.properties.is_empty(),
        })
    }
}

impl Rule {
    /// Whether all keys of the rule match.
    pub fn matches(&self, facts: &Facts) -> Match {
        // The cheapest comparison comes first.
        let may = self.vendor.is_none_or(|vendor| vendor == facts.id.vendor)
            && self.product.is_none_or(|product| product == facts.id.product)
            && self.class.is_none_or(|class| facts.classes.contains(&class))
            && self.port.as_ref().is_none_or(|port| self.fits_socket(port, facts));
        if !may {
            return Match::No;
        }
        let serial = self.serial.iter().map(|glob| (facts.serial)().fits_as_shown(glob));
        let properties = self.properties.iter();
        let properties = properties.map(|(name, glob)| (facts.property)(name).fits(glob));
        let mut matches = Match::Yes;
        for fits in serial.chain(properties) {
            match fits {
                Match::Yes => {}
                Match::No => return Match::No,
                Match::Unknown => matches = Match::Unknown,
            }
        }
        matches
    }

    fn fits_socket(&self, port: &Glob, facts: &Facts) -> bool {
        let fits = |name: &Option<String>| name.as_ref().is_some_and(|name| port.matches(name));
        port.matches(&facts.port)
            || fits(&facts.path)
            || (self.twin && (fits(&facts.twin) || fits(&facts.twin_path)))
    }

    /// The glob for the port, if it names a bus by its number. Then it cannot
    /// match a stable name.
    pub fn bus_number(&self) -> Option<&Glob> {
        let starts =
            |text: &str| text.trim_start_matches('[').starts_with(|c: char| c.is_ascii_digit());
        self.port.as_ref().filter(|port| starts(port.as_str()))
    }

    /// Whether it is certain that this rule matches every device that `later`
    /// matches. `false` means that this is not known.
    pub fn covers(&self, later: &Rule) -> bool {
        // A glob that matches every port does not need the twin.
        let socket =
            self.twin || !later.twin || self.port.as_ref().is_none_or(|p| p.as_str() == "*");
        socket
            && implied(&self.vendor, &later.vendor, |a, b| a == b)
            && implied(&self.product, &later.product, |a, b| a == b)
            && implied(&self.class, &later.class, |a, b| a == b)
            && implied(&self.port, &later.port, Glob::covers)
            && implied(&self.serial, &later.serial, Glob::covers)
            && self.properties.iter().all(|(name, glob)| {
                later.properties.iter().any(|(other, value)| name == other && glob.covers(value))
            })
    }
}

/// Whether the later rule's key is at least as strict as the earlier rule's
/// key.
fn implied<T>(earlier: &Option<T>, later: &Option<T>, covers: impl Fn(&T, &T) -> bool) -> bool {
    match (earlier, later) {
        (None, _) => true,
        (Some(earlier), Some(later)) => covers(earlier, later),
        (Some(_), None) => false,
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule at line {}", self.line)
    }
}

/// Finds the first rule that matches. That rule decides.
pub fn first_match<'r>(rules: &'r [Rule], facts: &Facts) -> Decision<'r> {
    for (place, rule) in rules.iter().enumerate() {
        match rule.matches(facts) {
            Match::Yes => return Decision::Rule(place, rule),
            Match::No => {}
            Match::Unknown => return Decision::Unknown,
        }
    }
    Decision::NoRule
}

/// The advice for a property of `usb-host` that this tool sets itself or that
/// cannot be set. `None` for all other properties, which the user may set.
pub fn reserved_option(name: &str) -> Option<&'static str> {
    match name {
        "bus" => Some("use `guest_bus`"),
        "port" => Some("use `guest_port`"),
        "vendorid" => Some("match with `vendor`"),
        "productid" => Some("match with `product`"),
        "hostport" => Some("match with `port`"),
        "hostbus" | "hostaddr" | "hostdevice" => Some("it comes from the device that matched"),
        "id" => Some("the id comes from the port the device is plugged into"),
        "driver" => Some("it is always `usb-host`"),
        "attached" => Some("it can only be read"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
