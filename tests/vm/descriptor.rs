//! A device that QEMU gets as a descriptor, and what becomes of the descriptor.

use std::os::unix::net::UnixListener;

use serde_json::json;
use tokio::task::JoinSet;
use usb_qmp_hotplug::qemu::Vm;
use usb_qmp_hotplug::text::chain;

use crate::peer::Peer;
use crate::qemu::Qemu;
use crate::{ENOUGH, SHORT, attach_descriptor, end, id, vm};

#[tokio::test]
async fn a_device_is_added_by_descriptor_and_none_is_left_in_its_set() {
    let (mut vm, served, _directory) = vm(Qemu::default(), ENOUGH).await;
    let guest_port = attach_descriptor(&mut vm, &["3", "4"]).await.unwrap();
    assert_eq!(guest_port.to_string(), "xhci.0 port 3");
    let qemu = end(vm, served);
    assert_eq!(qemu.changes, ["add-fd", "device_add 3", "remove-fd"]);
    let set = *qemu.sets.keys().next().unwrap();
    let expected = json!({
        "driver": "usb-host", "id": "usb-host-1-1.2", "bus": "xhci.0", "port": "3",
        "hostbus": 1, "hostaddr": 37, "hostdevice": format!("/dev/fdset/{set}"),
    });
    assert_eq!(qemu.added, [expected]);
    assert!(set > 0 && qemu.sets[&set] == 0, "{:?}", qemu.sets);
}

#[tokio::test]
async fn one_set_serves_all_attaches_through_a_socket() {
    let (mut vm, served, _directory) = vm(Qemu::default(), ENOUGH).await;
    for _ in 0..3 {
        attach_descriptor(&mut vm, &["1"]).await.unwrap();
        assert!(vm.detach(&id()).await.unwrap());
    }
    assert_eq!(end(vm, served).sets.len(), 1);
}

#[tokio::test]
async fn it_is_the_same_set_however_the_sockets_path_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let link = directory.path().join("link.qmp");
    std::os::unix::fs::symlink("vm.qmp", &link).unwrap();
    let served = std::thread::spawn(move || {
        let serve = |qemu: Qemu, _| qemu.serve(Peer::new(listener.accept().unwrap().0));
        (0..3).fold(Qemu::default(), serve)
    });
    for path in [path.clone(), link, directory.path().join("./vm.qmp")] {
        let mut vm = Vm::connect(&path.into(), ENOUGH).await.unwrap();
        attach_descriptor(&mut vm, &["1"]).await.unwrap();
        assert!(vm.detach(&id()).await.unwrap());
    }
    assert_eq!(served.join().unwrap().sets.len(), 1);
}

#[tokio::test]
async fn a_port_in_use_is_passed_over() {
    let qemu = Qemu { in_use: vec!["1", "2"], ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let guest_port = attach_descriptor(&mut vm, &["1", "2", "3", "4"]).await.unwrap();
    assert_eq!(guest_port.port, "3");
    let qemu = end(vm, served);
    let each = ["1", "2", "3"].map(|port| format!("add-fd device_add {port} remove-fd"));
    assert_eq!(qemu.changes.join(" "), each.join(" "));
    assert!(qemu.sets.values().all(|descriptors| *descriptors == 0));
}

#[tokio::test]
async fn where_every_port_is_in_use_qemu_has_the_last_word() {
    let qemu = Qemu { in_use: vec!["1", "2"], ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 6);
    assert!(chain(&error).contains("usb port 2 (bus xhci.0) not found (in use?)"), "{error}");
    end(vm, served);
}

#[tokio::test]
async fn a_refused_device_leaves_no_descriptor_and_the_vm_usable() {
    let desc = "failed to open host usb device /dev/fdset/1";
    let qemu = Qemu { refuses: Some(("device_add", desc)), ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 6);
    assert!(error.to_string().contains(desc), "{error}");
    assert_eq!(vm.host_devices().await.unwrap(), []);
    let qemu = end(vm, served);
    assert_eq!(qemu.changes, ["add-fd", "device_add 1", "remove-fd"], "tried elsewhere, too");
    assert!(qemu.sets.values().all(|descriptors| *descriptors == 0));
}

#[tokio::test]
async fn a_refused_descriptor_is_the_error_and_leaves_the_vm_usable() {
    let desc = "No file descriptor supplied via SCM_RIGHTS";
    let qemu = Qemu { refuses: Some(("add-fd", desc)), ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 6);
    assert!(error.to_string().contains(desc), "{error}");
    assert_eq!(vm.host_devices().await.unwrap(), []);
    assert_eq!(end(vm, served).changes, ["add-fd", "device_add 1", "remove-fd"]);
}

#[tokio::test]
async fn an_id_that_is_never_freed_is_qemus_refusal() {
    let refuses = Some(("device_add", "Duplicate ID 'usb-host-1-1.2' for device"));
    let (mut vm, served, _directory) = vm(Qemu { refuses, ..Qemu::default() }, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 6, "{error}");
    assert_eq!(vm.host_devices().await.unwrap(), []);
    end(vm, served);
}

#[tokio::test]
async fn a_qemu_that_falls_silent_in_an_attach_did_not_answer_in_time() {
    let mut cases = JoinSet::new();
    for from in ["add-fd", "device_add", "remove-fd"] {
        cases.spawn(async move {
            let qemu = Qemu { silent_from: Some(from), ..Qemu::default() };
            let (mut vm, served, _directory) = vm(qemu, SHORT).await;
            let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
            assert_eq!(error.exit_code(), 5, "{from}: {}", chain(&error));
            end(vm, served);
        });
    }
    cases.join_all().await;
}

#[tokio::test]
async fn a_qemu_that_dies_in_an_attach_is_a_lost_connection() {
    let qemu = Qemu { dies_at: Some("add-fd"), ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
    assert!(chain(&error).contains("connection was lost"), "{}", chain(&error));
    end(vm, served);
}
