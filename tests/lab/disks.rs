//! Who uses a disk, beyond mounts and swap space: it is found and named, and the advice fits.

use crate::daemon::{CONFIG, Daemon, configure, rule};
use crate::hardware::{Hardware, Plugged, Stick, xhci};
use crate::host::must;
use crate::tool::{self, Outcome, run};
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_until;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

crate::tests![
    a_disk_behind_a_loop_device_is_refused: any_qemu,
    a_disk_that_a_program_has_open_is_refused: any_qemu,
    a_disk_that_is_another_vms_drive_is_refused: any_qemu,
    a_character_device_of_a_disk_that_is_open_is_refused: any_qemu,
    what_udev_starts_to_look_at_a_disk_is_no_reason_to_refuse: any_qemu,
    a_disk_that_is_open_where_the_service_may_not_look_is_refused: any_qemu,
    while_udev_has_not_looked_at_a_disk_nothing_is_known_of_others: waits,
    what_explains_that_a_disk_is_open_is_no_reason_to_refuse: any_qemu,
    a_mount_in_another_namespace_is_named: any_qemu,
    a_mount_that_no_process_shows_is_guessed: any_qemu,
    what_is_mounted_is_unmounted_first_if_that_is_asked_for: any_qemu,
    what_cannot_be_unmounted_cleanly_stays: any_qemu,
    a_rule_may_have_it_unmounted_first: any_qemu,
];

const MOUNT_POINT: &str = "/run/mount";
const OTHER: &str = "/run/other";

fn a_disk_behind_a_loop_device_is_refused() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    must("modprobe", &["loop"]);
    must("mount", &["-o", "loop", &disk, MOUNT_POINT]);
    let refused = attach(&vm, &stick).exits(7).stderr;
    let expected = format!("which is mounted on {MOUNT_POINT}; unmount it first");
    assert!(refused.contains("behind the loop device") && refused.contains(&expected), "{refused}");
    must("umount", &[MOUNT_POINT]);
    wait_until("the loop device lets go", || {
        fs::read_dir("/sys/block")
            .unwrap()
            .flatten()
            .all(|d| !d.path().join("loop/backing_file").exists())
    });
    must("losetup", &["/dev/loop0", &disk]);
    let refused = attach(&vm, &stick).exits(7).stderr;
    assert!(refused.contains("`losetup --detach /dev/loop0` first"), "{refused}");
    must("losetup", &["--detach", "/dev/loop0"]);
    attach(&vm, &stick).succeeds();
    vm.gets(&[&stick]);
}

fn a_disk_that_a_program_has_open_is_refused() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    let mut dd =
        Command::new("dd").arg(format!("of={disk}")).stdin(Stdio::piped()).spawn().unwrap();
    opens(&dd, &disk);
    let refused = attach(&vm, &stick).exits(7).stderr;
    let program = format!("sda is open in process {} (dd); have process", dd.id());
    assert!(refused.contains(&program), "{refused}");
    vm.loses_all();
    let listed = run(["list", "--json"]).succeeds().stdout;
    assert!(listed.contains("\"program\""), "{listed}");
    drop(dd.stdin.take());
    dd.wait().unwrap();
    attach(&vm, &stick).succeeds();
}

fn a_disk_that_is_another_vms_drive_is_refused() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    let drive = format!("file={disk},format=raw,if=none,id=drive");
    let own = Vm::new("own").argument("-drive", &drive).start();
    let refused = attach(&vm, &stick).exits(7).stderr;
    let owner = format!("sda is open in VM own (process {})", own.pid());
    assert!(refused.contains(&owner), "{refused}");
    // With the rights of the unit only the lock on it shows.
    let unit = "--bounding-set -all,+dac_override --inh-caps -all --no-new-privs";
    let refused = Command::new("setpriv")
        .args(unit.split(' '))
        .args([crate::tool::PROGRAM, "attach", &vm.socket(), &stick.port])
        .output()
        .unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("open in a program that this user may not see"), "{said}");
    assert_eq!(refused.status.code(), Some(7));
    own.kill();
    attach(&vm, &stick).succeeds();
}

fn a_character_device_of_a_disk_that_is_open_is_refused() {
    let (_hardware, vm, stick, _disk) = stick_with_filesystem();
    must("modprobe", &["sg"]);
    wait_until("sg0 is there", || Path::new("/dev/sg0").exists());
    let mut cat = Command::new("sh").args(["-c", "exec sleep 1000 <>/dev/sg0"]).spawn().unwrap();
    opens(&cat, "/dev/sg0");
    let refused = attach(&vm, &stick).exits(7).stderr;
    assert!(refused.contains(&format!("sg0 is open in process {} (sleep)", cat.id())), "{refused}");
    cat.kill().unwrap();
    cat.wait().unwrap();
    attach(&vm, &stick).succeeds();
}

fn what_udev_starts_to_look_at_a_disk_is_no_reason_to_refuse() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    // A rule starts this tool, and that is a reason to wait.
    let tool = "/run/udev-starts/usb-qmp-hotplug";
    fs::create_dir_all("/run/udev-starts").unwrap();
    fs::copy("/bin/sleep", tool).unwrap();
    let (mut udev, pid) = started_by_udev(tool, &disk);
    let refused = tool::run_within("20", ["attach", &vm.socket(), &stick.port]).exits(7).stderr;
    assert!(refused.contains(&format!("process {pid} (usb-qmp-hotplug)")), "{refused}");
    vm.loses_all();
    must("kill", &[&pid]);
    udev.wait().unwrap();

    let (mut udev, pid) = started_by_udev("sleep", &disk);
    attach(&vm, &stick).succeeds();
    vm.gets(&[&stick]);
    must("kill", &[&pid]);
    udev.wait().unwrap();
}

/// A program that has a disk open and whose parent is called udevd, and its process id.
fn started_by_udev(program: &str, disk: &str) -> (Child, String) {
    let udevd = "/run/udevd";
    fs::copy("/bin/sh", udevd).unwrap();
    let script = "\"$0\" 1000 <\"$1\" & echo $!; wait";
    let mut udev = Command::new(udevd)
        .args(["-c", script, program, disk])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pid = String::new();
    BufReader::new(udev.stdout.as_mut().unwrap()).read_line(&mut pid).unwrap();
    let pid = pid.trim().to_owned();
    let (file, comm) = (format!("/proc/{pid}/fd/0"), format!("/proc/{pid}/comm"));
    let name = Path::new(program).file_name().unwrap().to_str().unwrap();
    wait_until("it has the disk open", || {
        fs::read_link(&file).is_ok_and(|open| open == Path::new(disk))
            && fs::read_to_string(&comm).is_ok_and(|comm| comm.trim() == name)
    });
    (udev, pid)
}

fn a_disk_that_is_open_where_the_service_may_not_look_is_refused() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    let mut dd =
        Command::new("dd").arg(format!("of={disk}")).stdin(Stdio::piped()).spawn().unwrap();
    opens(&dd, &disk);
    let attach = ["attach", &vm.socket(), &stick.port];
    let refused = tool::run_as_the_unit(attach).exits(7).stderr;
    let seen = "its disk is in use: sda is in use by something that this user may not see";
    assert!(
        refused.contains(seen) && refused.contains("as root, `usb-qmp-hotplug list`"),
        "{refused}"
    );
    // What the README has the administrator add, for a service that names it.
    let capabilities = format!("{},+sys_ptrace", crate::daemon::capabilities());
    let wrapper =
        ["setpriv", "--inh-caps", "-all", "--no-new-privs", "--bounding-set", &capabilities];
    let refused = tool::run_in(&wrapper, tool::PROGRAM, attach).exits(7).stderr;
    assert!(refused.contains(&format!("sda is open in process {} (dd)", dd.id())), "{refused}");
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    daemon.wait_for_log(&["2-3", "is in use by something that this user may not see"]);
    vm.loses_all();
    drop(dd.stdin.take());
    dd.wait().unwrap();
    vm.gets(&[&stick]);
}

fn while_udev_has_not_looked_at_a_disk_nothing_is_known_of_others() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    let file = fs::File::open(&disk).unwrap();
    udev::settle();
    let sysfs = Path::new("/sys/class/block").join(disk.trim_start_matches("/dev/"));
    udev::forget_device('b', &sysfs);
    let attach = ["attach", &vm.socket(), &stick.port];
    let refused = tool::run_as_the_unit_within("20", attach).exits(7).stderr;
    assert!(
        refused.contains("sda is open, perhaps only for a look by the kernel, by udev"),
        "{refused}"
    );
    // It is waited for.
    let looks = thread::spawn(move || {
        thread::sleep(Duration::from_secs(2));
        drop(file);
    });
    tool::run_as_the_unit_within(tool::SECONDS, attach).succeeds();
    looks.join().unwrap();
    vm.gets(&[&stick]);
}

fn what_explains_that_a_disk_is_open_is_no_reason_to_refuse() {
    let (mut hardware, vm, stick, _disk) = stick_with_filesystem();
    let other = hardware.plug(Stick::new("SN2").mebibytes(4), xhci(4));
    let others = other.disk().to_str().unwrap().to_owned();
    must("mkfs.ext4", &["-q", &others]);
    must("mount", &[&others, MOUNT_POINT]);
    let attach = || {
        // What udev looks at is open, too.
        stick.disk();
        udev::settle();
        let told = tool::run_as_the_unit(["attach", &vm.socket(), &stick.port]).succeeds().stderr;
        run(["detach", &vm.socket(), &stick.port]).succeeds();
        told
    };
    assert_eq!(attach(), "");
    must("umount", &[MOUNT_POINT]);
    // It may be either of them. That is said, and no reason to refuse.
    let mut dd =
        Command::new("dd").arg(format!("of={others}")).stdin(Stdio::piped()).spawn().unwrap();
    opens(&dd, &others);
    let told = attach();
    assert!(told.contains("may not see has a disk open: one of the device at 2-3, or"), "{told}");
    drop(dd.stdin.take());
    dd.wait().unwrap();
    // Nor is what somebody pulled without unmounting it.
    must("mount", &[&others, MOUNT_POINT]);
    hardware.pull(&other);
    assert_eq!(attach(), "");
    must("umount", &[MOUNT_POINT]);
    let other = hardware.plug(Stick::new("SN3").mebibytes(4), xhci(4));
    must("modprobe", &["dm-mod"]);
    let table = format!("0 2048 linear {} 0", other.disk().display());
    must("dmsetup", &["create", "pulled", "--noudevsync", "--table", &table]);
    assert_eq!(attach(), "");
    hardware.pull(&other);
    assert_eq!(attach(), "");
    must("dmsetup", &["remove", "--noudevsync", "--retry", "pulled"]);
}

fn a_mount_that_no_process_shows_is_guessed() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    // A mount namespace without a process, as `ip netns` keeps those of networks.
    let directory = "/run/namespaces";
    fs::create_dir_all(directory).unwrap();
    must("mount", &["--bind", directory, directory]);
    must("mount", &["--make-private", directory]);
    let namespace = format!("{directory}/hidden");
    fs::write(&namespace, "").unwrap();
    must("unshare", &[&format!("--mount={namespace}"), "mount", &disk, "/mnt"]);
    let refused = attach(&vm, &stick).exits(7).stderr;
    let guess = "claimed, and nothing tells by what (perhaps by a mount in a container)";
    assert!(refused.contains(guess), "{refused}");
    let refused = tool::run_as_the_unit(["attach", &vm.socket(), &stick.port]).exits(7).stderr;
    assert!(refused.contains("something that this user may not see"), "{refused}");
    vm.loses_all();
    must("umount", &[&namespace]);
    attach(&vm, &stick).succeeds();
    must("umount", &[directory]);
}

fn a_mount_in_another_namespace_is_named() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    let script = "mount \"$0\" /mnt && echo mounted && exec cat";
    let mut elsewhere = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, &disk])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 8];
    std::io::Read::read_exact(elsewhere.stdout.as_mut().unwrap(), &mut said).expect("mounted");
    let refused = attach(&vm, &stick).exits(7).stderr;
    let place =
        format!("sda is mounted on /mnt in the mount namespace of process {}", elsewhere.id());
    assert!(refused.contains(&place), "{refused}");
    let refused = tool::run_as_the_unit(["attach", &vm.socket(), &stick.port]).exits(7).stderr;
    assert!(refused.contains(&place), "{refused}");
    drop(elsewhere.stdin.take());
    elsewhere.wait().unwrap();
    attach(&vm, &stick).succeeds();
}

fn what_is_mounted_is_unmounted_first_if_that_is_asked_for() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    must("mount", &[&disk, MOUNT_POINT]);
    fs::create_dir_all(OTHER).unwrap();
    must("mount", &["--bind", MOUNT_POINT, OTHER]);
    fs::write(Path::new(OTHER).join("file"), "precious").unwrap();
    let unmount = |options: &[&str]| {
        run(["attach", "--unmount", &vm.socket(), &stick.port].iter().chain(options))
    };
    let said = unmount(&["--dry-run"]).succeeds().stdout;
    assert!(said.contains("would unmount /run/") && said.contains("would then attach"), "{said}");
    assert!(is_mounted(&disk));
    let said = unmount(&[]).succeeds().stdout;
    for place in [MOUNT_POINT, OTHER] {
        assert!(said.contains(&format!("unmounted {place}\n")), "{said}");
    }
    vm.gets(&[&stick]);
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    let disk = stick.disk().to_str().unwrap().to_owned();
    must("fsck.ext4", &["-fn", &disk]);
    must("mount", &[&disk, MOUNT_POINT]);
    assert_eq!(fs::read_to_string(Path::new(MOUNT_POINT).join("file")).unwrap(), "precious");
    must("umount", &[MOUNT_POINT]);
    // Through a loop device that goes with its mount.
    must("modprobe", &["loop"]);
    must("mount", &["-o", "loop", &disk, MOUNT_POINT]);
    unmount(&[]).succeeds();
    vm.gets(&[&stick]);
}

fn what_cannot_be_unmounted_cleanly_stays() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    must("mount", &[&disk, MOUNT_POINT]);
    let file = fs::File::create(Path::new(MOUNT_POINT).join("open")).unwrap();
    let unmount = || run(["attach", "--unmount", &vm.socket(), &stick.port]);
    let refused = unmount().exits(7).stderr;
    let why =
        format!("cannot unmount {MOUNT_POINT} (`fuser -vm {MOUNT_POINT}` shows what uses it)");
    assert!(refused.contains(&why) && refused.contains("busy"), "{refused}");
    assert!(is_mounted(&disk));
    vm.loses_all();
    drop(file);
    // Where something else keeps it, nothing is unmounted for nothing.
    must("modprobe", &["sg"]);
    wait_until("sg0 is there", || Path::new("/dev/sg0").exists());
    let mut holder = Command::new("sh").args(["-c", "exec sleep 1000 <>/dev/sg0"]).spawn().unwrap();
    opens(&holder, "/dev/sg0");
    let refused = unmount().exits(7).stderr;
    assert!(refused.contains("sg0 is open in process"), "{refused}");
    assert!(is_mounted(&disk));
    holder.kill().unwrap();
    holder.wait().unwrap();
    unmount().succeeds();
    vm.gets(&[&stick]);
}

fn a_rule_may_have_it_unmounted_first() {
    let (_hardware, vm, stick, disk) = stick_with_filesystem();
    must("mount", &[&disk, MOUNT_POINT]);
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let sync = || run(["--config", CONFIG, "sync"]);
    sync().exits(7);
    assert!(is_mounted(&disk));
    configure(&["a"], &rule("a", "port = \"2-3\"\nunmount = true"));
    sync().succeeds();
    vm.gets(&[&stick]);
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    let disk = stick.disk().to_str().unwrap().to_owned();
    must("mount", &[&disk, MOUNT_POINT]);
    // With the rights of the unit, and without systemd, the daemon cannot, and says so.
    let daemon = Daemon::start();
    daemon.wait_for_log(&["rule at line 3", "may not unmount", "`usb-qmp-hotplug sync`"]);
    daemon.wait_for_log(&["2-3", "cannot unmount /run/mount: Operation not permitted"]);
    assert!(is_mounted(&disk));
    must("umount", &[MOUNT_POINT]);
    vm.gets(&[&stick]);
}

fn is_mounted(disk: &str) -> bool {
    fs::read_to_string("/proc/mounts").unwrap().contains(disk)
}

fn stick_with_filesystem() -> (Hardware, Vm, Plugged, String) {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    let disk = stick.disk().to_str().unwrap().to_owned();
    must("mkfs.ext4", &["-q", &disk]);
    fs::create_dir_all(MOUNT_POINT).unwrap();
    (hardware, vm, stick, disk)
}

fn opens(program: &Child, node: &str) {
    wait_until(&format!("it has {node} open"), || {
        let open = fs::read_dir(format!("/proc/{}/fd", program.id())).unwrap().flatten();
        open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|path| path == Path::new(node))
    });
}

fn attach(vm: &Vm, stick: &Plugged) -> Outcome {
    run(["attach", &vm.socket(), &stick.port])
}
