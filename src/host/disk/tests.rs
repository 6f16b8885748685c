//! Directory trees like the kernel's, with one USB stick at 1-1 that has one
//! partition.

use super::*;
use std::os::unix::fs::MetadataExt;

pub(super) const MOUNTS: &str = "\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 21 8:17 / /media/my\\040stick rw,nosuid shared:5 - vfat /dev/sdb1 rw
41 21 0:50 / /data rw - btrfs /dev/sdc rw
";

const DISK: &str = "sys/bus/usb/devices/1-1/1-1:1.0/host2/target2:0:0/2:0:0:0/block/sdb";

struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        let tree = Tree(tempfile::tempdir().unwrap());
        tree.file(&format!("{DISK}/dev"), "8:16\n");
        tree.file(&format!("{DISK}/sdb1/dev"), "8:17\n");
        tree.file(&format!("{DISK}/sdb1/partition"), "1\n");
        tree.directory(&format!("{DISK}/sdb1/holders"));
        tree.directory("proc/self");
        tree
    }

    fn directory(&self, path: &str) {
        fs::create_dir_all(self.0.path().join(path)).unwrap();
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(target, path).unwrap();
    }

    /// Has the driver drive a device.
    fn drives(&self, port: &str) {
        let interface = format!("sys/bus/usb/devices/{port}/{port}:1.0");
        self.link(&format!("{interface}/driver"), "../../../drivers/usb-storage");
        let driver = format!("sys/bus/usb/drivers/usb-storage/{port}:1.0");
        self.link(&driver, &format!("../../devices/{port}/{port}:1.0"));
    }

    fn uses(&self) -> Vec<String> {
        let uses = Host::at(self.0.path()).uses(&"1-1".parse().unwrap());
        uses.iter().map(|used| format!("{} is {}: {}", used.disk, used.by, used.advice())).collect()
    }
}

#[test]
fn a_disk_that_nothing_uses_may_go() {
    let tree = Tree::new();
    assert!(Host::at(tree.0.path()).claim_disks(&"1-1".parse().unwrap()).is_ok());
    assert_eq!(tree.uses(), [""; 0]);
}

#[test]
fn mounts_and_swap_are_seen() {
    let tree = Tree::new();
    tree.file("proc/self/mountinfo", MOUNTS);
    assert_eq!(tree.uses(), ["sdb1 is mounted on /media/my stick: unmount it"]);
    let refused = Host::at(tree.0.path()).claim_disks(&"1-1".parse().unwrap()).unwrap_err();
    let said = refused.to_string();
    assert!(
        said.ends_with("unmount it first, or use --force and lose what was not written"),
        "{said}"
    );

    let tree = Tree::new();
    tree.file("proc/swaps", "Filename\t\tType\n/dev/sdb1     partition\t1\t0\n");
    assert_eq!(tree.uses(), ["sdb1 is swap space: `swapoff /dev/sdb1`"]);
}

#[test]
fn what_stands_on_a_disk_is_told_with_what_stands_on_that() {
    let tree = Tree::new();
    let dm = format!("{DISK}/sdb1/holders/dm-0");
    tree.file(&format!("{dm}/dm/name"), "luks-1\n");
    tree.file(&format!("{dm}/dm/uuid"), "CRYPT-LUKS2-1234-luks-1\n");
    tree.file(&format!("{dm}/dev"), "253:0\n");
    let part = "sdb1 is part of dm-0 (luks-1)";
    assert_eq!(tree.uses(), [format!("{part}: `cryptsetup close luks-1`")]);
    tree.file("proc/1/mountinfo", "40 21 253:0 / /secret rw - ext4 /dev/mapper/luks-1 rw\n");
    let then = "unmount it, then `cryptsetup close luks-1`";
    assert_eq!(tree.uses(), [format!("{part}, which is mounted on /secret: {then}")]);
    // The search ends for any number of them, and even if they form a circle.
    std::os::unix::fs::symlink("..", tree.0.path().join(&dm).join("holders")).unwrap();
    assert_eq!(tree.uses().len(), 1);
}

#[test]
fn loop_devices_on_a_disk_are_seen() {
    let tree = Tree::new();
    tree.file("sys/block/loop3/loop/backing_file", "/dev/sdb\n");
    tree.file("sys/block/loop3/loop/autoclear", "0\n");
    tree.file("sys/block/loop3/dev", "7:3\n");
    let detach = "`losetup --detach /dev/loop3`";
    assert_eq!(tree.uses(), [format!("sdb is behind the loop device loop3: {detach}")]);
    tree.file("proc/self/mountinfo", "40 21 7:3 / /img rw - ext4 /dev/loop3 rw\n");
    let mounted = "sdb is behind the loop device loop3, which is mounted on /img";
    assert_eq!(tree.uses(), [format!("{mounted}: unmount it, then {detach}")]);
    tree.file("sys/block/loop3/loop/autoclear", "1\n");
    assert_eq!(tree.uses(), [format!("{mounted}: unmount it")]);
}

#[test]
fn members_of_a_btrfs_a_bcache_and_an_array_are_seen() {
    let tree = Tree::new();
    tree.directory("sys/fs/btrfs/features");
    tree.directory("sys/fs/btrfs/4f2c/devices/sdc");
    tree.directory("sys/fs/btrfs/4f2c/devices/sdb");
    tree.file("proc/self/mountinfo", MOUNTS);
    let uses = tree.uses();
    assert_eq!(uses[0], "sdb is part of the btrfs on /data: unmount it");

    let tree = Tree::new();
    tree.directory(&format!("{DISK}/bcache"));
    assert!(tree.uses()[0].starts_with("sdb is part of a bcache: stop the bcache"));
    tree.directory(&format!("{DISK}/bcache/set"));
    assert!(tree.uses()[0].starts_with("sdb is part of a bcache: unregister the cache"));

    let tree = Tree::new();
    tree.directory(&format!("{DISK}/sdb1/holders/md127"));
    assert_eq!(tree.uses(), ["sdb1 is part of md127: stop the array (`mdadm --stop /dev/md127`)"]);
}

#[test]
fn a_mount_of_another_process_is_found() {
    let tree = Tree::new();
    tree.file("proc/4711/mountinfo", MOUNTS);
    tree.file("proc/4711/comm", "podman\n");
    let host = Host::at(tree.0.path());
    let port = "1-1".parse().unwrap();
    let (disk, by) = host.mounted_somewhere(&host.storage(&port)).expect("it is mounted");
    let used = Use { port, disk, by };
    let shown = "1-1: the host uses its disk: sdb1 is mounted on /media/my stick in the mount \
                 namespace of process 4711 (podman)";
    assert_eq!(used.to_string(), shown);
}

/// What the kernel counts for the driver of the stick.
fn counted(count: u32) -> Tree {
    let tree = Tree::new();
    tree.file("sys/module/usb_storage/refcnt", &format!("{count}\n"));
    tree.link("sys/bus/usb/drivers/usb-storage/module", "../../../../module/usb_storage");
    tree.drives("1-1");
    tree.directory("sys/dev/block/8:17");
    tree
}

#[test]
fn a_disk_that_somebody_has_open_is_seen_by_the_kernels_count() {
    assert_eq!(counted(0).uses(), [""; 0]);
    let tree = counted(1);
    assert_eq!(tree.uses(), [OPEN]);
    // Other modules count, too.
    tree.directory("sys/module/usb_storage/holders/uas");
    assert_eq!(tree.uses(), [""; 0]);
    // While udev looks at a disk, nothing tells whether others have it open, too.
    let tree = counted(2);
    tree.file("dev/sdb", "");
    let node = fs::metadata(tree.0.path().join("dev/sdb")).unwrap();
    let (major, minor) = (rustix::fs::major(node.dev()), rustix::fs::minor(node.dev()));
    let lock = format!("FLOCK  ADVISORY  READ 9 {major:02x}:{minor:02x}:{} 0 EOF", node.ino());
    tree.file("proc/locks", &format!("1: {lock}\n"));
    assert_eq!(tree.uses(), [EXAMINED]);
}

const OPEN: &str = "sdb is in use by something that this user may not see: stop what uses it (as \
                    root, `usb-qmp-hotplug list` shows what)";
const EXAMINED: &str = "sdb is open, perhaps only for a look by the kernel, by udev, or by a program \
                        that has locked it: wait until that is over";

#[test]
fn while_the_kernel_and_udev_look_at_a_new_disk_nothing_is_known_of_others() {
    let lun = "sys/bus/usb/devices/1-1/1-1:1.0/host2/target2:0:0/2:0:0:0";
    let tree = counted(1);
    tree.file(&format!("{lun}/block/sdb/dev"), "8:16\n");
    tree.directory("run/udev/data");
    assert_eq!(tree.uses(), [EXAMINED]);
    tree.file("run/udev/data/b8:16", "");
    assert_eq!(tree.uses(), [OPEN]);
    // udev looks at a character device of a disk, too, and locks nothing then.
    tree.file("run/udev/queue", "");
    assert_eq!(tree.uses(), [EXAMINED]);
    fs::remove_file(tree.0.path().join("run/udev/queue")).unwrap();
    // There is no block device yet.
    fs::remove_dir_all(tree.0.path().join(lun).join("block")).unwrap();
    tree.directory(&format!("{lun}/bsg/2:0:0:0"));
    tree.file(&format!("{lun}/type"), "0\n");
    assert_eq!(tree.uses(), [EXAMINED.replace("sdb", "2:0:0:0")]);
    // Nor will there be one for an enclosure.
    tree.file(&format!("{lun}/type"), "13\n");
    assert_eq!(tree.uses(), [OPEN.replace("sdb", "2:0:0:0")]);
}

#[test]
fn what_explains_the_count_is_no_reason_to_refuse() {
    let refused = |tree: &Tree| {
        Host::at(tree.0.path()).claim_disks(&"1-1".parse().unwrap()).map(|_| ()).is_err()
    };
    // A stick that was pulled while it was mounted.
    let tree = counted(1);
    tree.file("proc/self/mountinfo", "40 21 8:33 / /media/x rw - vfat /dev/sdc1 rw\n");
    assert!(!refused(&tree));
    // One that was pulled while it was a part of something.
    let tree = counted(1);
    tree.link("sys/block/dm-0/slaves/sdc", "../../../gone");
    assert!(!refused(&tree));
    let tree = counted(1);
    tree.file("sys/block/loop0/loop/backing_file", "/dev/sdc (deleted)\n");
    assert!(!refused(&tree));
    // Another one that is mounted. Beside it, nothing is known for sure.
    let tree = counted(1);
    tree.drives("1-2");
    let other = "sys/bus/usb/devices/1-2/1-2:1.0/host3/target3:0:0/3:0:0:0/block/sdc";
    tree.file(&format!("{other}/dev"), "8:32\n");
    assert!(!refused(&tree), "it may be either of them");
    tree.file("proc/self/mountinfo", "40 21 8:32 / /media/x rw - vfat /dev/sdc rw\n");
    tree.directory("sys/dev/block/8:32");
    assert!(!refused(&tree));
    assert!(refused(&counted(1)));
}
