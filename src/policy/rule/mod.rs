//! Whether a rule matches a device. Pure: the facts come from elsewhere.

mod glob;

use std::borrow::Cow;
use std::fmt;

pub use self::glob::{Glob, GlobError, MAX_GLOB};
use crate::text::escape;
use crate::usb::{Port, PortPath, VendorProduct};

/// One rule: what a device must be, and what then happens to it. A key that is
/// not set matches every device.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// The line it begins on in the configuration, counted from 1.
    pub line: usize,
    /// Fits either name of the device's port: `1-1.2`, or the one that stays,
    /// `pci-0000:00:14.0-usbv2-0:1.2`.
    pub port: Option<Glob>,
    /// Whether `port` means the physical socket: it may fit the name of the
    /// socket's other half instead.
    pub twin: bool,
    /// Is the vendor id.
    pub vendor: Option<u16>,
    /// Is the product id.
    pub product: Option<u16>,
    /// Fits the serial number, without the blanks around it, as it is or with
    /// the escapes that show it; a device without one does not match.
    pub serial: Option<Glob>,
    /// Is the class code of the device or of any of its interfaces.
    pub class: Option<u8>,
    /// Fit the udev properties of these names; a device that lacks one of them
    /// does not match.
    pub properties: Vec<(String, Glob)>,
    /// What happens to a device that matches.
    pub effect: Effect,
}

/// What a rule is for.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// The device stays with the host.
    Deny,
    /// The device belongs to a VM.
    Attach(Target),
}

/// The VM a device belongs to, and how it is attached there.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The VM's name in the configuration.
    pub vm: String,
    /// The guest's bus (`xhci.0`); if not set, one is chosen.
    pub guest_bus: Option<String>,
    /// The port on the guest's bus (`3`, or `1.2` behind a hub); if not set,
    /// a free one is chosen.
    pub guest_port: Option<String>,
    /// Whether the VM gets a controller if it has no port for the device.
    pub add_controller: bool,
    /// Whether what the host has mounted from the device is unmounted first.
    pub unmount: bool,
    /// More properties of `usb-host`: booleans, integers and strings.
    pub options: serde_json::Map<String, serde_json::Value>,
}

/// What rules look at, for one device. Holds only what it was given: see
/// [`Needs`] for what is worth fetching.
pub struct Facts<'a> {
    // As text, written once: most rules compare them.
    port: String,
    twin: Option<String>,
    path: Option<String>,
    twin_path: Option<String>,
    id: VendorProduct,
    serial: &'a dyn Fn() -> Fact<'a>,
    classes: &'a [u8],
    property: Property<'a>,
}

/// What is known of a device's serial number, or of a property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact<'a> {
    /// It is this.
    Is(Cow<'a, str>),
    /// The device has none.
    Lacking,
    /// Nobody can say yet.
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

    /// Whether it fits as it is or with the escapes that show it.
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
    /// All its keys do.
    Yes,
    /// A key does not.
    No,
    /// All its keys may, and of one nobody can say yet.
    Unknown,
}

/// What the rules say of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decision<'r> {
    /// This rule decides; its place among the rules, from 0.
    Rule(usize, &'r Rule),
    /// No rule matches.
    NoRule,
    /// That depends on what nobody can say yet.
    Unknown,
}

impl<'r> Decision<'r> {
    /// The rule that decides, if it is clear that there is one.
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
    /// What is known of every device. `twin` is the other half of the physical
    /// socket the device is in: one USB 3 socket is two ports, on two buses,
    /// that the kernel links to each other as `peer`.
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

    /// With the names that stay, of the port and of its twin.
    pub fn with_paths(self, path: Option<&PortPath>, twin: Option<&PortPath>) -> Self {
        let (path, twin_path) = (path.map(PortPath::to_string), twin.map(PortPath::to_string));
        Facts { path, twin_path, ..self }
    }

    /// With a way to ask for the serial number. It is asked only for a rule
    /// that names one and matches in all that is known at once.
    pub fn with_serial(self, serial: &'a dyn Fn() -> Fact<'a>) -> Self {
        Facts { serial, ..self }
    }

    /// With the class codes of the device and of all its interfaces, in any
    /// order.
    pub fn with_classes(self, classes: &'a [u8]) -> Self {
        Facts { classes, ..self }
    }

    /// With a way to look up a udev property by name. It is asked only by a
    /// rule that names a property and matches in everything else.
    pub fn with_properties(self, property: Property<'a>) -> Self {
        Facts { property, ..self }
    }
}

/// What rules look at beyond the port by its bus number, the vendor and the
/// product.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// The names of ports that stay.
    pub paths: bool,
    /// The class codes of device and interfaces.
    pub classes: bool,
    /// Properties of udev.
    pub properties: bool,
}

impl Needs {
    /// What any of these rules looks at.
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

    /// The glob for the port, if it names a bus by its number: then it can fit
    /// no name that stays.
    pub fn bus_number(&self) -> Option<&Glob> {
        let starts =
            |text: &str| text.trim_start_matches('[').starts_with(|c: char| c.is_ascii_digit());
        self.port.as_ref().filter(|port| starts(port.as_str()))
    }

    /// Whether it is clear that this rule matches every device that `later`
    /// matches. `false` means that nothing is known.
    pub fn covers(&self, later: &Rule) -> bool {
        // A port that fits everything needs no twin to do so.
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

/// Whether the later rule's key says at least what the earlier one's does.
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

/// The first rule that matches is the one that decides.
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

/// For a property of `usb-host` that this tool sets itself, or that cannot be
/// set: what to do instead. `None` for all others, which are the user's.
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
