//! Turns TOML into VMs and rules. Mistakes are reported to the sink, and the
//! check continues. The result is valid only if the sink stays empty.

use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::complaint::Sink;
use super::section::Section;
use super::value::{self, not, shown};
use super::{Config, VmEntry};
use crate::policy::rule::{Effect, Glob, Rule, Target, reserved_option};
use crate::qemu::{Socket, VmAddress};
use crate::text::escape;

/// The keys that say which devices a rule matches.
const MATCH: [&str; 6] = ["port", "vendor", "product", "serial", "class", "property"];

/// The keys that say how a device is attached.
const GUEST: [&str; 5] = ["guest_bus", "guest_port", "add_controller", "unmount", "options"];

/// The most earlier rules that a rule is compared with, to find rules that can
/// never match. A comparison with all rules would take seconds for the longest
/// files.
const COMPARED: usize = 2000;

/// The configuration in a file. It is valid only if the sink stays empty.
pub(super) fn document(text: &str, sink: &mut Sink) -> Config {
    let (root, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        syntax(error, text, sink);
    }
    if !errors.is_empty() {
        return Config::default();
    }
    let mut top = Section::top(root.get_ref(), sink);
    top.allow(&["vm", "rule", "detach_at_stop"]);
    let detach_at_stop = top.read("detach_at_stop", value::boolean).unwrap_or_default();
    let named = top.inner("vm", "a table of VMs; begin each with `[vm.NAME]`");
    let (vms, names) = named.map(vms).unwrap_or_default();
    let list = top.read("rule", |value| {
        let expected = "a list of rules; begin each with `[[rule]]`, in two pairs of brackets";
        value.as_array().ok_or_else(|| not(value, expected))
    });
    let rules = list.map(|list| rules(list.iter(), &names, sink)).unwrap_or_default();
    Config { vms, rules, detach_at_stop }
}

/// Complains about a text that is not TOML, with the parser's message.
fn syntax(error: &toml::de::Error, text: &str, sink: &mut Sink) {
    let span = error.span().unwrap_or(0..0);
    let at = span.start;
    let message = escape(error.message());
    let part = text.get(span).unwrap_or("");
    if part.is_empty() {
        return sink.add(at, message.into_owned());
    }
    // TOML reads `port = 1-1` as a date, and its message does not say more.
    let before = text.get(..at).unwrap_or("").trim_end_matches([' ', '\t']);
    let unquoted = before.ends_with('=') && !message.contains("quoted");
    let hint = if unquoted { "; text must be in quotes" } else { "" };
    sink.add(at, format!("`{}`: {message}{hint}", shown(part)));
}

/// The VMs, and all names that the file defines, even those with mistakes.
fn vms<'t>(mut section: Section<'t, '_>) -> (Vec<VmEntry>, Vec<&'t str>) {
    let (mut vms, mut names) = (Vec::new(), Vec::new());
    let mut addresses = BTreeMap::new();
    for (name, at, item) in section.entries() {
        names.push(name);
        if !value::is_name(name) {
            section.complain(name, at, &format!("a VM's name is {}", value::NAME));
        }
        let expected =
            "a table; write `[vm.NAME]` and below it `qmp = \"PATH\"` or `libvirt = \"NAME\"`";
        let who = format!("vm `{}`", shown(name));
        let Some(mut vm) = Section::named(who, item, expected, section.sink()) else { continue };
        vm.allow(&["qmp", "libvirt", "user"]);
        match (vm.has("qmp"), vm.has("libvirt")) {
            (false, false) => vm.complain_here(
                "it is not said where it is; add `qmp = \"PATH\"`, the path of its socket, or `libvirt = \
                 \"NAME\"`, the name of its domain",
            ),
            (true, true) => vm.complain_at_key(
                "libvirt",
                "`qmp` says where the VM is, too; keep one of them",
            ),
            _ => {}
        }
        let mut once = |address: VmAddress, what| match addresses.insert(address.clone(), name) {
            None => Ok(address),
            Some(other) => {
                let other = shown(other);
                Err(format!("VM `{other}` has this {what} too; give each VM one of its own"))
            }
        };
        let user = vm.read("user", value::user);
        if vm.has("user") && !vm.has("qmp") {
            vm.complain_at_key(
                "user",
                "it says who listens at `qmp`, which is not there; remove it",
            );
        }
        let socket = vm.read("qmp", |path| {
            once(VmAddress::Socket(Socket { path: value::socket(path)?, user }), "socket")
        });
        let domain = vm.read("libvirt", |name| once(value::domain(name)?.into(), "domain"));
        let address = socket.or(domain);
        vms.extend(address.map(|address| VmEntry { name: name.to_owned(), address }));
    }
    (vms, names)
}

/// The rules. It also complains about rules that can never match.
fn rules<'t>(
    items: impl Iterator<Item = &'t Spanned<DeValue<'t>>>,
    vms: &[&str],
    sink: &mut Sink,
) -> Vec<Rule> {
    let mut rules: Vec<(usize, Rule)> = Vec::new();
    for (number, item) in (1..).zip(items) {
        let expected = "a table; begin each rule with `[[rule]]`";
        let Some(section) = Section::named(format!("rule {number}"), item, expected, sink) else {
            continue;
        };
        let at = section.at();
        let Some(rule) = rule(section, vms) else { continue };
        let mut compared = rules.iter().take(COMPARED);
        if let Some((earlier, hides)) = compared.find(|(_, earlier)| earlier.covers(&rule)) {
            let line = hides.line;
            sink.add(
                at,
                format!(
                    "rule {number}: it can never match, because rule {earlier} (line {line}) matches \
                     the same devices first; move it up, or remove it"
                ),
            );
        }
        rules.push((number, rule));
    }
    rules.into_iter().map(|(_, rule)| rule).collect()
}

/// A rule. `None` if it is not clear what it matches.
fn rule(mut section: Section, vms: &[&str]) -> Option<Rule> {
    let before = section.complaints();
    let known: Vec<_> = ["vm", "deny", "twin"].into_iter().chain(MATCH).chain(GUEST).collect();
    section.allow(&known);
    let mut rule = Rule {
        line: section.line(),
        port: section.read("port", value::port),
        twin: section.read("twin", value::boolean).unwrap_or(true),
        vendor: section.read("vendor", value::vendor_or_product),
        product: section.read("product", value::vendor_or_product),
        serial: section.read("serial", value::glob),
        class: section.read("class", value::class),
        properties: properties(&mut section),
        effect: Effect::Deny,
    };
    let mut clear = section.complaints() == before;
    if clear && !MATCH.iter().any(|key| section.has(key)) {
        clear = false;
        section.complain_here(&format!(
            "it would match every device; say which with `{}` (`port = \"*\"` if all are meant)",
            MATCH.join("`, `")
        ));
    }
    if let Some(target) = target(&mut section, vms) {
        rule.effect = Effect::Attach(target);
    }
    clear.then_some(rule)
}

fn properties(section: &mut Section) -> Vec<(String, Glob)> {
    let expected = "a table of globs, like `{ ID_PATH = \"pci-0000:00:1a.0-*\" }`";
    let Some(mut table) = section.inner("property", expected) else { return Vec::new() };
    let entries = table.entries();
    if entries.is_empty() {
        section.complain_at_key("property", "it is empty; name a property of udev, or remove it");
        return Vec::new();
    }
    let globs = entries.into_iter().map(|(name, ..)| (name, table.read(name, value::glob)));
    globs.filter_map(|(name, glob)| Some((name.to_owned(), glob?))).collect()
}

/// The VM of the rule's devices. `None` if they stay with the host.
fn target(section: &mut Section, vms: &[&str]) -> Option<Target> {
    let vm = section.read("vm", value::vm);
    if let Some(name) = vm.filter(|name| !vms.contains(name)) {
        let hint = match section.nearest(name, vms.iter().copied()) {
            Some(meant) => format!("did you mean `{}`?", shown(meant)),
            None => "define it with `[vm.NAME]`".into(),
        };
        section.complain_at_value("vm", &format!("there is no VM `{}`; {hint}", shown(name)));
    }
    let denied = section.read("deny", value::boolean);
    let target = Target {
        vm: vm.unwrap_or_default().to_owned(),
        guest_bus: section.read("guest_bus", value::guest_bus),
        guest_port: section.read("guest_port", value::guest_port),
        add_controller: section.read("add_controller", value::boolean).unwrap_or(false),
        unmount: section.read("unmount", value::boolean).unwrap_or(false),
        options: options(section),
    };
    if target.add_controller && section.has("guest_bus") {
        let matter = "it adds a bus of its own; remove it, or `guest_bus`";
        section.complain_at_key("add_controller", matter);
    }
    if denied != Some(true) {
        if !section.has("vm") && (denied.is_some() || !section.has("deny")) {
            section.complain_here("it has neither `vm` nor `deny = true`; add one of them");
        }
        return Some(target);
    }
    if section.has("vm") {
        section.complain_at_key("deny", "it excludes `vm`; keep one of them");
        return None;
    }
    for key in GUEST {
        section.complain_at_key(key, "it has no meaning with `deny`; remove it");
    }
    None
}

fn options(section: &mut Section) -> serde_json::Map<String, serde_json::Value> {
    let expected = "a table of properties of `usb-host`, like `{ guest-reset = false }`";
    let Some(mut section) = section.inner("options", expected) else { return Default::default() };
    let mut options = serde_json::Map::new();
    for (name, at, _) in section.entries() {
        if let Some(instead) = reserved_option(name) {
            section.complain(name, at, &format!("it cannot be set here; {instead}"));
        } else if !value::is_name(name) {
            section.complain(name, at, &format!("a property's name is {}", value::NAME));
        }
        let value = section.read(name, value::option);
        options.extend(value.map(|value| (name.to_owned(), value)));
    }
    options
}
