//! A guest with an operating system: what it has written safely is there after any pull.

use crate::daemon::{Daemon, configure, rule};
use crate::gadget::{Gadget, Gadgets};
use crate::host::must;
use crate::vm::Vm;
use crate::wait::wait_at_most;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

crate::tests![what_a_guest_has_synced_survives_every_pull: long];

const ROUNDS: usize = 5;
const FILES_EACH_ROUND: usize = 5;
/// An emulated machine in an emulated machine boots in minutes.
const PATIENCE: Duration = Duration::from_secs(600);
const DIRECTORY: &str = "/run/guest";
const SERIAL: &str = "/run/guest.serial";

/// Mounts whatever disk comes, checks every file that was synced before, and writes more until the disk is gone.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec >/dev/ttyS0 2>&1
dmesg -n 1
for module in $(cat /modules/order); do insmod "/modules/$module"; done
echo booted
synced=0
while :; do
    until disk=$(ls /sys/block | grep '^sd') && mount -t ext4 "/dev/${disk%% *}" /mnt; do sleep 1; done
    file=1
    while [ $file -le $synced ]; do
        read -r content <"/mnt/file$file"
        [ "$content" = "$(printf '%0999d' $file)" ] || echo "wrong: $file"
        file=$((file + 1))
    done
    echo "checked $synced"
    while printf '%0999d\n' $((synced + 1)) | dd of="/mnt/file$((synced + 1))" conv=fsync 2>/dev/null; do
        synced=$((synced + 1))
        echo "synced $synced"
    done
    umount -l /mnt
    while [ -e "/sys/block/$disk" ]; do sleep 1; done
    echo "lost after $synced"
done
"#;

fn what_a_guest_has_synced_survives_every_pull() {
    let mut gadgets = Gadgets::load(1);
    // The same disk each time.
    let stick = || Gadget::new(0x1209, 0x0001).storage(&[32]);
    let on_host = gadgets.plug(stick(), 0);
    must("mkfs.ext4", &["-q", on_host.disk().to_str().unwrap()]);
    gadgets.pull(&on_host);

    let vm = start_linux();
    configure(&["guest"], &rule("guest", "vendor = \"1209\""));
    let daemon = Daemon::start();
    wait_for_line("booted");
    for round in 1..=ROUNDS {
        let before = last_synced();
        let plugged = gadgets.plug(stick(), 0);
        vm.gets(&[&plugged]);
        wait_for_line(&format!("checked {before}"));
        wait_for_line(&format!("synced {}", before + FILES_EACH_ROUND));
        // In the middle of the next one.
        gadgets.pull(&plugged);
        vm.loses_all();
        wait_at_most(PATIENCE, "the guest notices", || {
            (lines().filter(|line| line.starts_with("lost after")).count() == round).then_some(())
        });
    }
    drop(daemon);

    let on_host = gadgets.plug(stick(), 0);
    let mount_point = "/run/the guest's";
    fs::create_dir_all(mount_point).unwrap();
    must("mount", &[on_host.disk().to_str().unwrap(), mount_point]);
    let synced = last_synced();
    assert!(synced >= ROUNDS * FILES_EACH_ROUND);
    for file in 1..=synced {
        let content = fs::read_to_string(Path::new(mount_point).join(format!("file{file}")));
        assert_eq!(content.unwrap(), format!("{file:0999}\n"));
    }
    assert!(!lines().any(|line| line.starts_with("wrong")));
    must("umount", &[mount_point]);
    must("fsck.ext4", &["-fn", on_host.disk().to_str().unwrap()]);
}

/// The lab's own kernel, with a file system of its own in memory.
fn start_linux() -> Vm {
    let _ = fs::remove_dir_all(DIRECTORY);
    let _ = fs::remove_file(SERIAL);
    for directory in ["bin", "modules", "dev", "proc", "sys", "mnt"] {
        fs::create_dir_all(format!("{DIRECTORY}/{directory}")).unwrap();
    }
    fs::write(format!("{DIRECTORY}/init"), INIT).unwrap();
    let script = "set -e
        cp \"$(command -v busybox)\" bin
        modprobe -D -a xhci-pci usb-storage sd_mod ext4 crc32c |
            awk '$1 == \"insmod\" && !/pclmul|intel/ && !seen[$2]++ { print $2 }' |
            while read -r module; do cp \"$module\" modules; echo \"${module##*/}\"; done >modules/order
        chmod +x init
        find . -path ./initramfs -prune -o -print | cpio --quiet -o -H newc -R 0:0 >initramfs";
    let made = Command::new("sh").args(["-c", script]).current_dir(DIRECTORY).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let initramfs = format!("{DIRECTORY}/initramfs");
    let vm = Vm::new("guest")
        .argument("-m", "256")
        .argument("-kernel", "/vmlinux")
        .argument("-initrd", &initramfs)
        .argument(
            "-append",
            "console=ttyS0 quiet mitigations=off norandmaps no_timer_check panic=-1",
        )
        .argument("-serial", &format!("file:{SERIAL}"));
    let vm = vm.paused().start();
    vm.boot();
    vm
}

fn lines() -> impl Iterator<Item = String> {
    let said = fs::read_to_string(SERIAL).unwrap_or_default();
    // The last one may not be complete.
    let complete = said.rsplit_once('\n').map_or("", |(complete, _)| complete).to_owned();
    complete.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>().into_iter()
}

#[track_caller]
fn wait_for_line(wanted: &str) {
    wait_at_most(PATIENCE, &format!("{wanted:?} from the guest: {:?}", lines().last()), || {
        lines().any(|line| line == wanted).then_some(())
    });
}

fn last_synced() -> usize {
    let number = |line: String| line.strip_prefix("synced ")?.parse().ok();
    lines().filter_map(number).last().unwrap_or(0)
}
