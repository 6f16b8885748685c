//! Devices that come and go faster than anybody follows, and addresses that come round.

use crate::daemon::{Daemon, configure, rule};
use crate::gadget::{Gadget, Gadgets};
use crate::hardware::Plugged;
use crate::inside;
use crate::remote::{self, Remotes, VENDOR};
use crate::tool::run;
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_until;
use serde_json::Value;
use std::fs;
use std::thread;
use std::time::Duration;

crate::tests![
    what_comes_and_goes_at_random_ends_where_it_belongs: long,
    an_address_that_comes_round_is_another_device: long,
];

const SOCKETS: u32 = 4;

fn what_comes_and_goes_at_random_ends_where_it_belongs() {
    let steps = std::env::var(inside::CYCLES).map_or(60, |cycles| cycles.parse().unwrap());
    let mut random = Random::new(20);
    let mut gadgets = Gadgets::load(SOCKETS);
    let (first, second) = (Vm::new("first").start(), Vm::new("second").start());
    let rules = ["first", "second"]
        .map(|vm| rule(vm, &format!("vendor = \"1209\"\nproduct = \"{}\"", product_of(vm))));
    configure(&["first", "second"], &rules.concat());
    let daemon = Daemon::start();
    let mut plugged = [None; SOCKETS as usize];
    for step in 0..steps {
        let socket = random.below(SOCKETS);
        let place = &mut plugged[socket as usize];
        if place.take().is_some() {
            gadgets.remove(socket);
        } else {
            // The third belongs to nobody.
            let product = 1 + random.below(3) as u16;
            let gadget = Gadget::new(0x1209, product);
            let gadget = if product == 1 { gadget.keyboard() } else { gadget.serial_port() };
            gadgets.insert(gadget, socket);
            *place = Some(product);
        }
        eprintln!("{step}: {plugged:?}");
        // Now and then long enough for the kernel, and for an attach.
        let longest = if random.below(3) == 0 { 1500 } else { 100 };
        thread::sleep(Duration::from_millis(random.below(longest).into()));
    }
    // On a busy machine udevd is minutes behind.
    udev::settle();
    let end_with_what_is_theirs = || {
        for (vm, product) in [(&first, 1), (&second, 2)] {
            let here = (0..).zip(&plugged).filter(|(_, here)| **here == Some(product));
            let here: Vec<Plugged> = here.map(|(socket, _)| gadgets.arrived(socket)).collect();
            vm.gets(&here.iter().collect::<Vec<_>>());
            vm.must_have_no_spare_descriptors();
        }
    };
    end_with_what_is_theirs();
    // Nothing of what is over happens later.
    daemon.is_idle();
    end_with_what_is_theirs();
}

fn product_of(vm: &str) -> &'static str {
    if vm == "first" { "0001" } else { "0002" }
}

fn an_address_that_comes_round_is_another_device() {
    let mut remotes = Remotes::load();
    let vm = Vm::new("a").start();
    let device = || remote::Device::new(0x1209, 0x0001).interface(&VENDOR);
    let first = remotes.plug(device(), 1);
    run(["attach", &vm.socket(), &first.port]).succeeds();
    vm.gets(&[&first]);
    // Nobody detaches. Linux gives 127 addresses in turn, and the hub has one (drivers/usb/core/hub.c, choose_devnum).
    remotes.pull(&first);
    let bus = format!("/sys/bus/usb/devices/usb{}", first.bus);
    // Those in between need an address, and no driver.
    fs::write(format!("{bus}/authorized_default"), "0").unwrap();
    let present = || {
        let entries = fs::read_dir("/sys/bus/usb/devices").unwrap().flatten();
        let is_there = |name: &String| name.starts_with(&format!("{}-", first.bus));
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let ports = names.filter(is_there).filter(|name| !name.contains(':'));
        let number = |port| fs::read_to_string(format!("/sys/bus/usb/devices/{port}/devnum"));
        ports.filter_map(|port| number(port).ok()?.trim().parse().ok()).collect::<Vec<u32>>()
    };
    let mut last = first.address;
    while last < 127 {
        let count = (127 - last).min(15);
        let ids: Vec<String> = (1..=count).map(|port| remotes.insert(device(), port)).collect();
        wait_until("they all have their addresses", || present().len() == ids.len());
        last = present().into_iter().max().unwrap();
        ids.iter().for_each(|id| remotes.remove(id));
        wait_until("they are all gone", || present().is_empty());
    }
    fs::write(format!("{bus}/authorized_default"), "1").unwrap();
    let again = remotes.plug(device(), 1);
    assert_eq!((&again.port, again.address), (&first.port, first.address));

    // Bus, address and id are right, and what the VM has is not this device.
    let json = run(["inspect", &vm.socket(), "--json"]).succeeds().stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["devices"][0]["host"]["state"], "dead", "{json}");
    run(["attach", &vm.socket(), &again.port]).succeeds();
    vm.gets(&[&again]);
    let json = run(["inspect", &vm.socket(), "--json"]).succeeds().stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["devices"][0]["host"]["state"], "present", "{json}");
}

/// Numbers that look random and are the same in each run (Marsaglia, "Xorshift RNGs").
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        eprintln!("seed {seed}");
        Random(seed)
    }

    fn below(&mut self, end: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32 % end
    }
}
