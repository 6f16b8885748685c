//! Hubs that are not like most: by an interface only, or with halves that come one after the other.

use crate::daemon::{Daemon, configure, rule};
use crate::hardware::Hardware;
use crate::remote::{Device, Remotes, VENDOR};
use crate::remote_hub;
use crate::tool::{self, run};
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_until;
use std::path::Path;

crate::tests![
    a_hub_by_its_interface_only_stays_with_the_host: any_qemu,
    a_rule_for_what_is_behind_a_hub_passes_over_such_a_hub: any_qemu,
    a_fast_device_goes_to_its_vm_when_the_other_half_of_its_hub_comes: any_qemu,
];

fn a_hub_by_its_interface_only_stays_with_the_host() {
    let _hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mut remotes = Remotes::load();
    configure(&["a"], &rule("a", "port = \"*\""));
    let daemon = Daemon::start();
    let hub = remotes.plug(remote_hub::by_interface_only(), 3);
    assert_eq!(hub.driver().as_deref(), Some("hub"));
    let refused = run(["attach", "--force", &vm.socket(), &hub.port]).exits(7);
    assert!(refused.stderr.contains("hub"), "{refused:?}");
    let variables = [("ACTION", "add"), ("DEVPATH", &*hub.devpath()), ("DEVTYPE", "usb_device")];
    let address = [hub.bus.to_string(), hub.address.to_string()];
    let variables = variables.into_iter().chain([
        ("BUSNUM", &*address[0]),
        ("DEVNUM", &*address[1]),
        ("PRODUCT", "1209/2/100"),
        ("TYPE", "0/0/0"),
    ]);
    tool::run_with(["udev", &vm.socket()], variables.collect::<Vec<_>>()).exits(7);
    let list = run(["list", "--json"]).succeeds().stdout;
    assert!(list.contains("\"hub\": true"), "{list}");
    daemon.wait_for_status("1 VM, 1 running, 0 devices attached");
    assert_eq!(hub.driver().as_deref(), Some("hub"));
    assert!(vm.ids().is_empty());
    remotes.pull(&hub);
}

fn a_rule_for_what_is_behind_a_hub_passes_over_such_a_hub() {
    let _hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mut remotes = Remotes::load();
    let device = Device::new(0x1209, 0x0001).interface(&VENDOR);
    let below = vec![(remote_hub::by_interface_only(), 2), (device, 1)];
    let (hub, behind) = remote_hub::plug(&mut remotes, false, 4, below);
    let printed = run(["rule", &hub.port, "--vm", &vm.socket()]).succeeds().stdout;
    let (matches, _) = printed.split_once("RUN+=").unwrap();
    tool::rules(&format!("{matches}RUN+=\"/usr/bin/touch /run/ran-%k\"\n"));
    for device in &behind {
        udev::trigger("add", &device.sysfs);
    }
    udev::settle();
    let has_run = |port: &str| Path::new(&format!("/run/ran-{port}")).exists();
    wait_until("the rule has run for the device", || has_run(&behind[1].port));
    assert!(!has_run(&behind[0].port), "{printed}");
    remote_hub::pull(&mut remotes, &hub, &behind);
}

fn a_fast_device_goes_to_its_vm_when_the_other_half_of_its_hub_comes() {
    let _hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mut remotes = Remotes::load();
    configure(&["a"], &rule("a", "port = \"platform-vhci_hcd.0-usbv2-0:4.1\""));
    let _daemon = Daemon::start();
    let fast = Device::new(0x1209, 0x0011).interface(&VENDOR).super_speed();
    let (usb3, fast) = remote_hub::plug(&mut remotes, true, 4, vec![(fast, 1)]);
    udev::settle();
    assert!(vm.ids().is_empty(), "nobody can know yet");
    let (usb2, _) = remote_hub::plug(&mut remotes, false, 4, vec![]);
    vm.gets(&[&fast[0]]);
    remote_hub::pull(&mut remotes, &usb2, &[]);
    remote_hub::pull(&mut remotes, &usb3, &fast);
    vm.loses_all();
}
