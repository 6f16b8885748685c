//! Directory trees like the kernel's, with one USB stick at 1-1 that has one
//! partition.

use super::*;

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
    let used = host.unseen_use(&port, Path::new("sdb"), &host.storage(&port));
    let shown = "1-1: the host uses its disk: sdb1 is mounted on /media/my stick in the mount \
                 namespace of process 4711 (podman)";
    assert_eq!(used.to_string(), shown);
}
