//! What to add to a VM that has no monitor to use.

use serde::Serialize;

use crate::host::proc::cmdline::CommandLine;

/// What to add, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "to", content = "lines", rename_all = "lowercase")]
pub enum Advice {
    /// An option for QEMU's command line.
    Qemu(String),
    /// Lines of a libvirt domain's XML.
    Libvirt(String),
}

impl Advice {
    /// What gives this VM one more monitor.
    pub fn new(line: &CommandLine) -> Self {
        let name = line.name.as_deref().map(plain).filter(|name| !name.is_empty());
        let name = name.as_deref().unwrap_or("vm");
        if line.is_libvirt {
            Advice::Libvirt(libvirt(name))
        } else {
            Advice::Qemu(format!("-qmp unix:/run/{name}.qmp,server=on,wait=off"))
        }
    }
}

/// A name that needs no quotes anywhere.
fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')).collect()
}

/// The element goes last in the domain; its namespace into the first line
/// (libvirt, docs/drvqemu.rst, "Pass-through of arbitrary QEMU commands"). The
/// directory is one that QEMU's user may write to.
fn libvirt(name: &str) -> String {
    format!(
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\n  \
           ...\n  \
           <qemu:commandline>\n    \
             <qemu:arg value='-qmp'/>\n    \
             <qemu:arg value='unix:/var/lib/libvirt/qemu/{name}.qmp,server=on,wait=off'/>\n  \
           </qemu:commandline>\n\
         </domain>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_add_options_of_its_own() {
        let line = |name: &str| CommandLine { name: Some(name.into()), ..CommandLine::default() };
        let advice = Advice::new(&line("../a b,server=off;rm"));
        let option = "-qmp unix:/run/..abserveroffrm.qmp,server=on,wait=off";
        assert_eq!(advice, Advice::Qemu(option.into()));
        assert_eq!(Advice::new(&line("日本")), Advice::new(&line("vm")));
    }

    #[test]
    fn a_libvirt_domain_gets_whole_lines() {
        let name = Some("web1".to_owned());
        let line = CommandLine { name, is_libvirt: true, ..CommandLine::default() };
        let Advice::Libvirt(lines) = Advice::new(&line) else { panic!("not libvirt's") };
        assert!(lines.contains("<qemu:arg value='-qmp'/>"));
        assert!(lines.contains("qemu/web1.qmp,server=on,wait=off"));
        assert_eq!(lines.lines().count(), 7);
    }
}
