//! The README's recipes: QEMU as others start it. Their command lines stand here as they are started there, but
//! for what needs KVM, a display, a disk or SPICE.

use crate::hardware::{Device, Hardware, Plugged, Stick, xhci};
use crate::qmp::Qmp;
use crate::tool::run;
use crate::vm;
use crate::wait::{wait_for, wait_until};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};

crate::tests![
    proxmox_ve_finds_its_own_ports_free: any_qemu,
    quickemu_gets_a_monitor_by_its_extra_arguments: any_qemu,
    qemu_in_dockurs_container_gets_a_monitor_by_its_arguments: any_qemu,
    podman_needs_no_privilege_and_no_device: any_qemu,
];

/// A QEMU that somebody else would have started.
struct Started(Pid);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

/// Starts QEMU with these words, and with what keeps it still.
fn start(words: &str) -> Started {
    fs::create_dir_all(vm::directory()).unwrap();
    let firmware = vm::firmware("recipe");
    let pid_file = words.split_whitespace().skip_while(|word| *word != "-pidfile").nth(1).unwrap();
    let _ = fs::remove_file(pid_file);
    let mut child = Command::new("qemu-system-x86_64")
        .args(words.split_whitespace())
        .args(["-accel", "tcg", "-display", "none", "-bios", &firmware])
        .spawn()
        .unwrap();
    if words.contains("-daemonize") {
        assert!(child.wait().unwrap().success(), "{words}");
    } else {
        // Whoever ends it, somebody has to wait for it.
        std::thread::spawn(move || child.wait());
    }
    let pid =
        wait_for("QEMU's process id", || fs::read_to_string(pid_file).ok()?.trim().parse().ok());
    Started(Pid::from_raw(pid).unwrap())
}

/// The monitors that `vms` finds of a QEMU, by their state.
fn monitors(qemu: &Started, state: &str) -> Vec<String> {
    let all: Value = serde_json::from_str(&run(["vms", "--json"]).succeeds().stdout).unwrap();
    let vms = all["vms"].as_array().unwrap();
    let vm = vms.iter().find(|vm| vm["pid"] == qemu.0.as_raw_nonzero().get()).unwrap();
    let of_state = vm["monitors"].as_array().unwrap().iter().filter(|m| m["state"] == state);
    of_state.map(|monitor| monitor["asked"].as_str().unwrap().to_owned()).collect()
}

/// Attaches and says where, then detaches again.
fn attach_and_detach(vm: &str, device: &Plugged) -> (String, String) {
    run(["attach", vm, &device.port]).succeeds();
    let shown: Value =
        serde_json::from_str(&run(["inspect", vm, "--json"]).succeeds().stdout).unwrap();
    let devices = shown["devices"].as_array().unwrap();
    let ours = devices.iter().find(|found| found["id"] == device.id_in_vm()).unwrap();
    assert_eq!(ours["host"]["state"], "present");
    let text = |name: &str| ours[name].as_str().unwrap().to_owned();
    let place = (text("guest_bus"), text("guest_port"));
    run(["detach", vm, &device.port]).succeeds();
    wait_until("the host has it again", || device.driver().as_deref() != Some("usbfs"));
    place
}

fn proxmox_ve_finds_its_own_ports_free() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let directory = "/run/vm/qemu-server";
    fs::create_dir_all(directory).unwrap();
    // What `qm showcmd` prints; `-id` and the CPU's flags are those of Proxmox VE's own QEMU. Its usbN are at
    // the ports that their numbers say, counted from 1.
    let qemu = start(&format!(
        "-name win11,debug-threads=on -no-shutdown \
         -chardev socket,id=qmp,path={directory}/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control \
         -chardev socket,id=qmp-event,path={directory}/qmeventd.sock,server=on,wait=off \
         -mon chardev=qmp-event,mode=control -pidfile {directory}/100.pid -daemonize \
         -smp 2,sockets=1,cores=2,maxcpus=2 -nodefaults -m 64 \
         -device pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e \
         -device pci-bridge,id=pci.2,chassis_nr=2,bus=pci.0,addr=0x1f \
         -device piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2 \
         -device qemu-xhci,p2=15,p3=15,id=xhci,bus=pci.1,addr=0x1b \
         -device usb-tablet,id=tablet,bus=uhci.0,port=1"
    ));
    let socket = format!("{directory}/100.qmp");
    assert!(monitors(&qemu, "free").contains(&socket));
    run(["attach", &socket, &stick.port]).succeeds();
    // What `qm set 100 --usb0 ...` plugs in, while ours is there.
    {
        let mut qmp = Qmp::new(UnixStream::connect(&socket).unwrap());
        for number in 0..4 {
            let (id, port) = (format!("usb{number}"), (number + 1).to_string());
            let device = json!({"driver": "usb-mouse", "id": id, "bus": "xhci.0", "port": port});
            qmp.must("device_add", device);
        }
    }
    run(["detach", &socket, &stick.port]).succeeds();
    let place = attach_and_detach(&socket, &stick);
    assert_eq!(place, ("xhci.0".to_owned(), "15".to_owned()));
}

fn quickemu_gets_a_monitor_by_its_extra_arguments() {
    let mut hardware = Hardware::open();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let directory = "/run/vm/win11";
    fs::create_dir_all(directory).unwrap();
    // Its redirected devices, for which QEMU needs SPICE, take three ports of `spicepass`.
    let words = format!(
        "-name win11,process=win11 -machine q35,smm=off,vmport=off -m 64 -pidfile {directory}/win11.pid \
         -device qemu-xhci,id=spicepass -device usb-mouse,bus=spicepass.0 -device usb-mouse,bus=spicepass.0 \
         -device usb-mouse,bus=spicepass.0 -device pci-ohci,id=smartpass -device usb-ccid \
         -device qemu-xhci,id=input -device usb-kbd,bus=input.0 -device usb-tablet,bus=input.0 -nic none \
         -monitor unix:{directory}/win11-monitor.socket,server,nowait"
    );
    {
        let qemu = start(&words);
        assert_eq!(monitors(&qemu, "free"), [""; 0], "it has none for programs");
    }
    let socket = format!("{directory}/win11.qmp");
    let qemu = start(&format!("{words} -qmp unix:{socket},server=on,wait=off"));
    wait_until("QEMU listens", || UnixStream::connect(&socket).is_ok());
    assert_eq!(monitors(&qemu, "free"), std::slice::from_ref(&socket));
    let (bus, _) = attach_and_detach(&socket, &mouse);
    assert!(["input.0", "spicepass.0"].contains(&bus.as_str()), "{bus}");
}

fn qemu_in_dockurs_container_gets_a_monitor_by_its_arguments() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let directory = "/run/vm/windows";
    fs::create_dir_all(directory).unwrap();
    let socket = format!("{directory}/windows.qmp");
    let qemu = start(&format!(
        "-nodefaults -smp 2,sockets=1,dies=1,cores=2,threads=1 -m 64 \
         -machine type=q35,smm=off,graphics=off,vmport=off,dump-guest-core=off \
         -monitor unix:{directory}/monitor.sock,server,wait=off,nodelay \
         -name windows,process=windows,debug-threads=on -pidfile {directory}/qemu.pid \
         -serial null -device qemu-xhci,id=xhci,p2=7,p3=7 -device usb-tablet \
         -object rng-random,id=objrng0,filename=/dev/urandom \
         -device virtio-rng-pci,rng=objrng0,id=rng0,bus=pcie.0 \
         -qmp unix:{socket},server=on,wait=off"
    ));
    wait_until("QEMU listens", || UnixStream::connect(&socket).is_ok());
    assert_eq!(monitors(&qemu, "free"), std::slice::from_ref(&socket));
    assert_eq!(attach_and_detach(&socket, &stick), ("xhci.0".to_owned(), "7".to_owned()));
}

fn podman_needs_no_privilege_and_no_device() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let (image, shared) = ("/mnt/image", "/run/vm/win11");
    fs::create_dir_all(image).unwrap();
    fs::create_dir_all(shared).unwrap();
    mount(&["--bind", "/", image]);
    if !Path::new("/sys/fs/cgroup/cgroup.procs").exists() {
        mount(&["-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"]);
    }
    // This machine's own root stands for an image.
    let socket = format!("{shared}/win11.qmp");
    let _podman = Container(
        Command::new("podman")
            .args([
                "--storage-driver",
                "vfs",
                "run",
                "--rm",
                "--name",
                "win11",
                "--network",
                "none",
                "--cgroups",
                "disabled",
            ])
            .args(["--volume", &format!("{shared}:/run/qmp"), "--rootfs", image])
            .args(["qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg"])
            .args(["-m", "64", "-S", "-device", "qemu-xhci,id=xhci,p2=15,p3=15"])
            .args(["-qmp", "unix:/run/qmp/win11.qmp,server=on,wait=off"])
            .spawn()
            .unwrap(),
        socket.clone(),
    );
    wait_until("QEMU listens", || UnixStream::connect(&socket).is_ok());
    let place = attach_and_detach(&socket, &stick);
    assert_eq!(place, ("xhci.0".to_owned(), "15".to_owned()));
}

fn mount(arguments: &[&str]) {
    assert!(Command::new("mount").args(arguments).status().unwrap().success(), "{arguments:?}");
}

/// A container, and the socket of the QEMU that is in it.
struct Container(Child, String);

impl Drop for Container {
    fn drop(&mut self) {
        if let Ok(client) = UnixStream::connect(&self.1) {
            let qemu = socket_peercred(&client).expect("QEMU's process").pid;
            let _ = kill_process(qemu, Signal::KILL);
        }
        let _ = self.0.wait();
        let _ = Command::new("umount").arg("/mnt/image").status();
    }
}
