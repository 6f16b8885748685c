//! Disks that are parts of something bigger: each is refused, with what it is a part of and what ends that. Nothing
//! of it needs a right that the service has not.

use crate::hardware::{Hardware, Plugged, Stick, xhci};
use crate::host::{load, must};
use crate::tool::{self, Outcome, run};
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_until;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use usb_qmp_hotplug::host::Host;

crate::tests![
    the_second_member_of_a_btrfs_is_refused_and_unmounted: any_qemu,
    parts_of_a_bcache_are_refused: any_qemu,
    what_device_mapper_and_md_have_is_refused_with_what_ends_it: any_qemu,
    a_member_of_a_zfs_pool_is_known_by_its_label: any_qemu,
];

const MOUNT_POINT: &str = "/run/storage";

fn the_second_member_of_a_btrfs_is_refused_and_unmounted() {
    load("btrfs", &[]);
    let (_hardware, vm, sticks) = sticks(&[Vec::new(), Vec::new()], 128);
    let [first, second] = [&sticks[0], &sticks[1]].map(|stick| stick.disk());
    let disks = [first.to_str().unwrap(), second.to_str().unwrap()];
    must("mkfs.btrfs", &["-q", "-m", "raid1", "-d", "raid1", disks[0], disks[1]]);
    must("btrfs", &["device", "scan", disks[0], disks[1]]);
    fs::create_dir_all(MOUNT_POINT).unwrap();
    must("mount", &["-t", "btrfs", disks[0], MOUNT_POINT]);
    for (stick, disk) in sticks.iter().zip(disks) {
        // The mount table has only the first one.
        let why = ["part of the btrfs on /run/storage", "mounted on /run/storage"];
        let refused = is_refused(&vm, stick, disk, "; unmount it first");
        assert!(why.iter().any(|why| refused.contains(why)), "{refused}");
    }
    let refused = is_refused(&vm, &sticks[1], disks[1], "part of the btrfs on /run/storage");
    assert!(!refused.contains("container"), "{refused}");
    fs::write(Path::new(MOUNT_POINT).join("file"), "precious").unwrap();
    let said = run(["attach", "--unmount", &vm.socket(), &sticks[1].port]).succeeds().stdout;
    assert!(said.contains("unmounted /run/storage\n"), "{said}");
    vm.gets(&[&sticks[1]]);
    must("mount", &["-t", "btrfs", "-o", "degraded,ro", disks[0], MOUNT_POINT]);
    assert_eq!(fs::read_to_string(Path::new(MOUNT_POINT).join("file")).unwrap(), "precious");
    must("umount", &[MOUNT_POINT]);
}

fn parts_of_a_bcache_are_refused() {
    load("bcache", &[]);
    let images = [super_block(Kind::Backing), super_block(Kind::Cache)];
    let (_hardware, vm, sticks) = sticks(&images, 16);
    let [backing, cache] = [&sticks[0], &sticks[1]].map(|stick| name(&stick.disk()));
    for disk in [&backing, &cache] {
        fs::write("/sys/fs/bcache/register", format!("/dev/{disk}\n")).expect("it is registered");
    }
    wait_until("the bcache runs", || Path::new("/sys/block/bcache0").exists());
    let stop = "/sys/block/bcache0/bcache/stop";
    for (stick, disk) in sticks.iter().zip([&backing, &cache]) {
        let end = format!("part of bcache0; stop the bcache (write 1 to {stop}) first");
        is_refused(&vm, stick, disk, &end);
    }
    // As the messages say.
    fs::write(stop, "1").unwrap();
    let is_free = |disk: &str| {
        wait_until("it is free", || !Path::new(&format!("/sys/class/block/{disk}/bcache")).exists())
    };
    is_free(&backing);
    run(["attach", &vm.socket(), &sticks[0].port]).succeeds();
    let end = format!("/sys/class/block/{cache}/bcache/set/unregister");
    let refused = run(["attach", &vm.socket(), &sticks[1].port]).exits(7).stderr;
    let advice = format!("part of a bcache; unregister the cache (write 1 to {end}) first");
    assert!(refused.contains(&advice), "{refused}");
    fs::write(end, "1").unwrap();
    is_free(&cache);
    run(["attach", &vm.socket(), &sticks[1].port]).succeeds();
    vm.gets(&[&sticks[0], &sticks[1]]);
}

fn what_device_mapper_and_md_have_is_refused_with_what_ends_it() {
    let (_hardware, vm, sticks) = sticks(&[Vec::new()], 8);
    let stick = &sticks[0];
    let disk = stick.disk();
    let disk = disk.to_str().unwrap();
    load("dm-mod", &[]);
    let create = |name: &str, uuid: &str| {
        let table = format!("0 2048 linear {disk} 0");
        must("dmsetup", &["create", name, "--uuid", uuid, "--noudevsync", "--table", &table]);
    };
    let remove = |name: &str| must("dmsetup", &["remove", "--noudevsync", "--retry", name]);
    // The names that cryptsetup and lvm give.
    for (its_name, uuid, end) in [
        ("luks-1", "CRYPT-LUKS2-0123-luks-1", "`cryptsetup close luks-1` first"),
        ("group-data", "LVM-0123", "`lvchange -an /dev/mapper/group-data`"),
        ("other", "", "`dmsetup remove other` first"),
    ] {
        create(its_name, uuid);
        let refused = is_refused(&vm, stick, disk, end);
        assert!(refused.contains(&format!("({its_name})")), "{refused}");
        remove(its_name);
    }
    // A filesystem on it comes first.
    create("luks-1", "CRYPT-LUKS2-0123-luks-1");
    must("mkfs.ext4", &["-q", "/dev/dm-0"]);
    fs::create_dir_all(MOUNT_POINT).unwrap();
    must("mount", &["/dev/dm-0", MOUNT_POINT]);
    is_refused(&vm, stick, disk, "; unmount it, then `cryptsetup close luks-1` first");
    must("umount", &[MOUNT_POINT]);
    remove("luks-1");
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    vm.gets(&[stick]);
}

/// There is no ZFS in Debian's kernel. What it would have in `/proc` is in a directory beside the real `/sys`, and
/// the label is real: the name of the pool comes from udev, which reads it from the disk.
fn a_member_of_a_zfs_pool_is_known_by_its_label() {
    let (_hardware, vm, sticks) = sticks(&[zfs_label("tank")], 64);
    let stick = &sticks[0];
    let disk = name(&stick.disk());
    udev::settle();
    let root = Path::new("/run/zfs");
    for directory in ["proc", "run"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    for known in ["sys", "dev", "proc/self", "proc/locks", "run/udev"] {
        symlink(format!("/{known}"), root.join(known)).unwrap();
    }
    let host = Host::at(root);
    let uses = || {
        let uses = host.uses(&stick.port.parse().unwrap()).into_iter();
        uses.map(|used| format!("{used}; {} first", used.advice())).collect::<Vec<_>>()
    };
    assert_eq!(uses(), [""; 0]);
    fs::create_dir_all(root.join("proc/spl/kstat/zfs/other")).unwrap();
    assert_eq!(uses(), [""; 0], "that pool is not imported");
    fs::create_dir_all(root.join("proc/spl/kstat/zfs/tank")).unwrap();
    let used = format!("2-3: the host uses its disk: {disk} is part of the ZFS pool tank");
    assert_eq!(uses(), [format!("{used}; `zpool export tank` first")]);
    // A label alone is no use.
    run(["attach", &vm.socket(), &stick.port]).succeeds();
}

/// Sticks with these contents, and a VM.
fn sticks(contents: &[Vec<u8>], mebibytes: u64) -> (Hardware, Vm, Vec<Plugged>) {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = |(content, port): (&Vec<u8>, u32)| {
        let stick = Stick::new(&format!("SN{port}")).content(content.clone());
        hardware.plug(stick.mebibytes(mebibytes), xhci(port))
    };
    let sticks = contents.iter().zip(3..).map(stick).collect();
    (hardware, vm, sticks)
}

fn name(disk: &Path) -> String {
    disk.file_name().unwrap().to_str().unwrap().to_owned()
}

/// Refused with this advice, whoever asks: root, and root with the rights of the unit.
#[track_caller]
fn is_refused(vm: &Vm, stick: &Plugged, disk: &str, part: &str) -> String {
    let attach = ["attach", &vm.socket(), &stick.port];
    let check = |outcome: Outcome| {
        let refused = outcome.exits(7).stderr;
        assert!(refused.contains(&stick.port) && refused.contains(part), "{refused}");
        assert!(refused.contains(disk.trim_start_matches("/dev/")), "{refused}");
        refused
    };
    check(run(attach));
    let refused = check(tool::run_as_the_unit(attach));
    vm.loses_all();
    refused
}

enum Kind {
    Backing,
    Cache,
}

/// What make-bcache writes, with its checksum (Linux, drivers/md/bcache/bcache_ondisk.h, `struct cache_sb_disk`).
fn super_block(kind: Kind) -> Vec<u8> {
    let mut block = vec![0; 0x1400];
    let mut put = |at: usize, bytes: &[u8]| {
        block[0x1000 + at..0x1000 + at + bytes.len()].copy_from_slice(bytes);
    };
    let hex = |text: &str| -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    };
    put(0x08, &[8]);
    put(0x18, &hex("c68573f64e1a45ca8265f57f48ba6d81"));
    put(0x38, &hex("00000000000040008000000000000001"));
    match kind {
        Kind::Backing => {
            put(0x00, &hex("5d6e3eb9d5aebe55"));
            put(0x10, &[1]);
            put(0x28, &hex("8b349c976bb24daca12a5e6122abcea1"));
            put(0xc0, &hex("08000004"));
        }
        Kind::Cache => {
            put(0x00, &hex("b3c67f550fa9a5e0"));
            put(0x28, &hex("e7860cba4f724ebaad90336d4de79085"));
            put(0xb0, &hex("0000000000000000000400000000000008002000010000000000000001000000"));
        }
    }
    block
}

/// The start of a disk that is a pool of its own: the list of names and values, and the blocks after it (OpenZFS,
/// include/sys/vdev_impl.h; the encoding: module/nvpair/nvpair.c, `nvs_xdr`).
fn zfs_label(pool: &str) -> Vec<u8> {
    let word = |number: usize| u32::try_from(number).unwrap().to_be_bytes().to_vec();
    let text = |text: &str| {
        let mut bytes = [word(text.len()), text.as_bytes().to_vec()].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let pair = |name: &str, kind: usize, value: Vec<u8>| {
        let rest = [text(name), word(kind), word(1), value].concat();
        [word(8 + rest.len()), word(8 + rest.len()), rest].concat()
    };
    let (uint64, string) = (8, 9);
    let list = [
        vec![1, 1, 0, 0], // XDR
        word(0),
        word(1),
        pair("version", uint64, 5000_u64.to_be_bytes().to_vec()),
        pair("state", uint64, 0_u64.to_be_bytes().to_vec()),
        pair("txg", uint64, 4_u64.to_be_bytes().to_vec()),
        pair("guid", uint64, 4712_u64.to_be_bytes().to_vec()),
        pair("name", string, text(pool)),
        pair("pool_guid", uint64, 4711_u64.to_be_bytes().to_vec()),
    ];
    let list = list.concat();
    let mut label = vec![0; 256 << 10];
    label[16 << 10..(16 << 10) + list.len()].copy_from_slice(&list);
    for uberblock in label[128 << 10..].chunks_mut(1 << 10).take(8) {
        uberblock[..8].copy_from_slice(&0x00ba_b10c_u64.to_le_bytes());
        uberblock[8..16].copy_from_slice(&5000_u64.to_le_bytes());
    }
    label
}
