//! The types of the command line. This file imports nothing from the crate, so
//! that completions and manual pages can be generated from it alone.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

/// Else they would stand between the options of a command.
const EVERYWHERE: &str = "Options of every command";

/// Give a virtual machine a USB port, or a USB device, of this host.
///
/// Talks QMP to QEMU itself, and needs no libvirt. VM is the path of the VM's QMP
/// socket (`-qmp unix:PATH,server=on,wait=off`), `libvirt:NAME` for a domain of
/// libvirt, a name from the configuration, or the name of a VM that runs.
#[derive(Debug, Parser)]
#[command(name = "usb-qmp-hotplug", version, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done, 1 other errors, 2 usage, 3 no such device, 4 no such VM, \
    5 the VM does not answer or its monitor is held, 6 QEMU said no, 7 refused (hub, disk in use, \
    held by another VM)"
)]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
pub struct Global {
    /// How long a conversation with a VM may take, in seconds.
    #[arg(long, global = true, value_name = "SECONDS", default_value = "5")]
    #[arg(help_heading = EVERYWHERE)]
    pub timeout: String,

    /// The configuration, for names of VMs, for sync and for watch.
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/usb-qmp-hotplug.toml")]
    #[arg(value_hint = ValueHint::FilePath, help_heading = EVERYWHERE)]
    pub config: PathBuf,

    /// Say less: only errors.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = EVERYWHERE)]
    pub quiet: bool,

    /// Say more: what is tried, and why.
    #[arg(short, long, global = true, help_heading = EVERYWHERE)]
    pub verbose: bool,
}

/// The command line of a udev rule.
#[derive(Debug, Parser)]
struct OnlyUdev {
    #[command(flatten)]
    global: Global,

    #[command(subcommand)]
    command: UdevCommand,
}

#[derive(Debug, Subcommand)]
enum UdevCommand {
    Udev(Udev),
}

impl Cli {
    /// Reads the words of a command line, the program's name first.
    ///
    /// # Errors
    ///
    /// What clap says of them; also where help was asked for.
    pub fn read(words: &[OsString]) -> Result<Self, clap::Error> {
        // udev runs the program at every plug. Setting up the options of all
        // other commands would take longer than everything else that it does.
        let udev = words.iter().any(|word| word == "udev").then(|| OnlyUdev::try_parse_from(words));
        match udev {
            Some(Ok(OnlyUdev { global, command: UdevCommand::Udev(udev) })) => {
                Ok(Cli { global, command: Command::Udev(udev) })
            }
            _ => Cli::try_parse_from(words),
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show every USB device in a VM.
    ///
    /// Virtual devices too. A device of this host is `present`, `gone` (nothing
    /// is at its port any more), `replaced` (another device is there now) or
    /// `dead` (it is there, and the VM is not connected to it any more).
    Inspect(Inspect),
    /// Attach devices to a VM.
    ///
    /// Safe to repeat: a device that is in the VM stays as it is, and what an
    /// earlier device left behind at the same port is replaced. Refused are hubs,
    /// devices that are not authorized, that another VM or a program has, and
    /// whose disks are in use: mounted, swapped on, part of an array, open in a
    /// program.
    Attach(Attach),
    /// Detach devices from a VM.
    ///
    /// Also those whose hardware is gone, by port, by bus:device or by id.
    Detach(Detach),
    /// Give devices back to the host, from whichever VM has them.
    ///
    /// The VM is found by its process, and by the configuration; it must have
    /// a monitor that is free. What a program has claimed stays with it.
    Release(Release),
    /// Act on one udev event, from the environment.
    ///
    /// For a udev rule: attaches at ACTION=add, detaches at ACTION=remove, and
    /// passes over everything else. Waits up to a minute for its turn at the
    /// monitor, before --timeout begins. Logs to the journal, or to syslog.
    #[command(after_help = "A rule for everything that is plugged into port 1-1.2:\n  \
        SUBSYSTEM==\"usb\", ENV{DEVTYPE}==\"usb_device\", ACTION==\"add|remove\", \\\n      \
        DEVPATH==\"*/1-1.2\", RUN+=\"/usr/bin/usb-qmp-hotplug udev /run/vm.qmp\"\n\n\
        By hand:\n  ACTION=add BUSNUM=001 DEVNUM=037 usb-qmp-hotplug udev /run/vm.qmp")]
    Udev(Udev),
    /// Make reality match the configuration, once.
    ///
    /// Attaches what belongs to a VM and is not in it, detaches what was left
    /// behind by devices that are gone, and leaves everything else alone.
    Sync(Sync),
    /// Show this host's USB devices.
    ///
    /// As a tree by port, with what each is, what this host uses it for, which
    /// VM has it, and which rule of the configuration is for it. TWIN is the
    /// other half of a USB 3 socket: one socket is two ports. Lines are cut to
    /// the terminal's width, or to 80 columns; --flat and --json cut nothing.
    #[command(after_help = LIST_HELP)]
    List(List),
    /// Show the QEMU processes on this host, and their monitors.
    ///
    /// Whatever started them: they are looked for in /proc, and their monitors
    /// on their command lines, in the files that those name (-readconfig), and
    /// among the sockets that they listen on. A domain of libvirt is shown as
    /// `libvirt:NAME`. VMs of the configuration that do not run are shown, too.
    /// A monitor is `free`, or held by another client, or out of reach; a free
    /// one is asked how many USB ports are free. Where no monitor is free, what
    /// to add to the VM is shown. Another user's VMs are seen only as far as
    /// this user may.
    #[command(after_help = VMS_HELP)]
    Vms(Vms),
    /// Keep reality matching the configuration: the daemon.
    ///
    /// Attaches and detaches as devices are plugged and pulled, and as VMs
    /// start and end. SIGHUP reads the configuration again. For root it acts
    /// on the kernel's own events, before udev's rules have run; for others,
    /// and where a rule asks for a property of udev, after that.
    Watch,
    /// Print the udev rule that gives a device, or a port, to a VM.
    ///
    /// The rule attaches what is plugged in and detaches it when it is pulled.
    /// A port means both halves of a USB 3 socket, and a hub means everything
    /// behind it. What is printed can be installed as it is.
    #[command(after_help = "Whatever is plugged into one port:\n  \
        usb-qmp-hotplug rule 1-1.2 --vm /run/vm.qmp\n\n\
        Find the port by plugging something in, and install the rule:\n  \
        usb-qmp-hotplug rule --learn --vm win11 --install")]
    Rule(Rule),
    /// Print the completion script of a shell.
    #[command(after_help = "In this shell only:\n  \
        source <(usb-qmp-hotplug completions bash)\n\n\
        For good:\n  \
        mkdir -p ~/.local/share/bash-completion/completions\n  \
        usb-qmp-hotplug completions bash \\\n      \
        > ~/.local/share/bash-completion/completions/usb-qmp-hotplug\n\n\
        For zsh, in a directory of $fpath; for fish, in its own:\n  \
        usb-qmp-hotplug completions zsh > ~/.zfunc/_usb-qmp-hotplug\n  \
        usb-qmp-hotplug completions fish \\\n      \
        > ~/.config/fish/completions/usb-qmp-hotplug.fish")]
    Completions(Completions),
    /// Write the manual pages to a directory.
    Man(Man),
    /// What can stand in place of the last word; for the completion scripts.
    #[command(hide = true)]
    Complete(Complete),
}

/// `inspect`
#[derive(Debug, Args)]
pub struct Inspect {
    /// The VM's QMP socket, `libvirt:NAME`, or its name.
    pub vm: String,

    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// `attach`
#[derive(Debug, Args)]
pub struct Attach {
    /// The VM's QMP socket, `libvirt:NAME`, or its name.
    pub vm: String,

    /// A port `1-1.2` or `pci-0000:00:14.0-usbv2-0:1.2`, bus:device `1:37`,
    /// vendor:product `152d:2338`, `serial=XYZ`, a /dev/bus/usb node, or a
    /// path under /sys.
    #[arg(required = true, value_name = "DEVICE")]
    pub devices: Vec<String>,

    /// How to attach.
    #[command(flatten)]
    pub how: How,

    /// Take the device from the VM that has it: detach it there first, by
    /// whatever id it has. Not from a program.
    #[arg(long)]
    pub take: bool,

    /// Unmount first what this host has mounted from the device: cleanly, or
    /// not at all.
    #[arg(long, conflicts_with = "force")]
    pub unmount: bool,

    /// Show what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// `release`
#[derive(Debug, Args)]
pub struct Release {
    /// As for attach; of a device that is gone also an id in the VM.
    #[arg(required = true, value_name = "DEVICE")]
    pub devices: Vec<String>,

    /// Show what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// `detach`
#[derive(Debug, Args)]
pub struct Detach {
    /// The VM's QMP socket, `libvirt:NAME`, or its name.
    pub vm: String,

    /// As for attach, or an id in the VM.
    #[arg(required = true, value_name = "DEVICE")]
    pub devices: Vec<String>,

    /// Show what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// `udev`
#[derive(Debug, Args)]
pub struct Udev {
    /// The VM's QMP socket, `libvirt:NAME`, or its name.
    pub vm: String,

    /// How to attach.
    #[command(flatten)]
    pub how: How,
}

/// `list`
#[derive(Debug, Args)]
pub struct List {
    /// One line a device, with tabs between the fields: for scripts.
    #[arg(long, conflicts_with_all = ["json", "watch"])]
    pub flat: bool,

    /// Print one JSON document; with --watch, one a line.
    #[arg(long)]
    pub json: bool,

    /// Follow plugs and pulls, one line each, until interrupted.
    #[arg(short, long)]
    pub watch: bool,
}

const LIST_HELP: &str = "The fields of --flat, `-` where there is nothing to say: port, \
    bus:device, vendor:product, Mb/s, drivers, name, serial, use by this host, holder, rule, twin, \
    stable name of the port, `starting` while its drivers start.\n\n\
    Which ports have mass storage?\n  \
    usb-qmp-hotplug list --flat | awk -F'\\t' '$5 == \"usb-storage\" { print $1 }'";

/// `vms`
#[derive(Debug, Args)]
pub struct Vms {
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

const VMS_HELP: &str = "A monitor's state:\n  \
    free         it answers, and takes commands\n  \
    held         another client has it; a monitor serves one at a time\n  \
    silent       it accepts, and does not answer in half of --timeout\n  \
    stopped      QEMU's process is stopped, and answers nobody\n  \
    gone         there is no such socket, or nobody listens on it\n  \
    taken        another process listens on its path now\n  \
    forbidden    this user may not connect to it, or not see where it is\n  \
    unusable     no Unix socket that QEMU listens on: TCP, standard input\n  \
    broken       it answers something that is not QMP, or an error";

/// `sync`
#[derive(Debug, Args)]
pub struct Sync {
    /// The VMs [default: all of the configuration that are running].
    #[arg(value_name = "VM")]
    pub vms: Vec<String>,

    /// Show what would be done, and why, and do nothing.
    #[arg(long)]
    pub dry_run: bool,

    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// `rule`
#[derive(Debug, Args)]
pub struct Rule {
    /// As for attach; a hub means everything behind it, and a port may be
    /// empty.
    #[arg(required_unless_present = "learn", conflicts_with = "learn")]
    pub device: Option<String>,

    /// The VM's QMP socket, `libvirt:NAME`, or its name [default: the one that
    /// runs, if it is only one].
    #[arg(long)]
    pub vm: Option<String>,

    /// What the rule goes by.
    #[arg(long, value_enum, default_value_t)]
    pub by: By,

    /// Name ports by bus number, `1-1.2`: shorter, but after the next boot
    /// that may be another port.
    #[arg(long)]
    pub bus_number: bool,

    /// Wait until a device is plugged in, and take that.
    #[arg(long)]
    pub learn: bool,

    /// How long to wait for it, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "60", requires = "learn")]
    pub wait: String,

    /// Print the configuration, for sync and watch, instead of a udev rule.
    #[arg(long, conflicts_with = "install")]
    pub toml: bool,

    /// Write the rule to /etc/udev/rules.d, and have udev read it.
    #[arg(long)]
    pub install: bool,
}

/// `completions`
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell.
    pub shell: Shell,
}

/// `man`
#[derive(Debug, Args)]
pub struct Man {
    /// The directory; it is made if it is not there.
    #[arg(value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
}

/// `complete`
#[derive(Debug, Args)]
pub struct Complete {
    /// The shell that asks.
    pub shell: Shell,

    /// The words after the program's name, the last one unfinished.
    #[arg(last = true)]
    pub words: Vec<String>,
}

/// A shell with completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// bash, 4.4 or newer.
    Bash,
    /// zsh.
    Zsh,
    /// fish.
    Fish,
}

/// What a rule goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum By {
    /// The port: whatever is plugged in there.
    #[default]
    Port,
    /// Vendor and product id: every such device, at any port.
    Product,
    /// Vendor, product and serial number: that one device, at any port.
    Serial,
}

/// How to attach.
#[derive(Debug, Args)]
pub struct How {
    /// The guest's bus, `xhci.0` [default: an xHCI controller's, or one that
    /// fits the device's speed].
    #[arg(long, value_name = "BUS")]
    pub guest_bus: Option<String>,

    /// The port on that bus, `3` [default: the highest free one].
    #[arg(long, value_name = "PORT")]
    pub guest_port: Option<String>,

    /// Give the VM a controller (qemu-xhci) if it has no port for the device.
    #[arg(long, conflicts_with = "guest_bus")]
    pub add_controller: bool,

    /// A property of QEMU's usb-host, `guest-reset=off`. May be repeated.
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,

    /// How QEMU gets at the device.
    #[arg(long, value_enum, default_value_t)]
    pub open: Open,

    /// Attach a device even if it is in use: a disk, and what was not written
    /// is lost; the default route; claimed by a program; or not authorized.
    /// Never attaches a hub.
    #[arg(long)]
    pub force: bool,
}

/// How QEMU gets at the device.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub enum Open {
    /// It gets an open descriptor, and needs no rights of its own.
    #[default]
    Descriptor,
    /// It opens the device itself; for a QEMU older than 5.2.
    Address,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn examples_fit_the_terminal_and_can_be_copied_from_it() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines().filter(|line| line.starts_with("  ")) {
                assert!(line.chars().count() <= 80, "{}: {line}", command.get_name());
            }
        }
    }

    #[test]
    fn the_options_of_every_command_stand_by_themselves() {
        let mut root = Cli::command();
        root.build();
        for command in root.get_subcommands().filter(|command| command.get_name() != "help") {
            let apart = |name: &str| {
                let option = command.get_arguments().find(|option| option.get_id() == name);
                option.is_some_and(|option| option.get_help_heading() == Some(EVERYWHERE))
            };
            assert!(["timeout", "config", "quiet", "verbose"].into_iter().all(apart));
        }
    }

    #[test]
    fn the_line_of_a_udev_rule_means_what_it_means_among_all_commands() {
        for line in [
            "udev /run/vm.qmp",
            "--timeout 30 --config /x udev win11 --guest-bus xhci.0 -o guest-reset=off --force",
            "udev -q win11 --open address",
            "udev",
            "udev --help",
            "udev win11 extra",
            "inspect udev",
            "attach udev 1-1 --quiet",
        ] {
            let words: Vec<OsString> =
                ["usb-qmp-hotplug"].into_iter().chain(line.split(' ')).map(Into::into).collect();
            let said = |read: Result<Cli, clap::Error>| match read {
                Ok(cli) => format!("{cli:?}"),
                Err(error) => error.to_string(),
            };
            assert_eq!(said(Cli::read(&words)), said(Cli::try_parse_from(&words)), "{line}");
        }
    }
}
