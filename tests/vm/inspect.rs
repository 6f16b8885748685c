//! What a VM has, as far as its QEMU tells it.

use tokio::task::JoinSet;
use usb_qmp_hotplug::qemu::qmp::ErrorKind;

use crate::qemu::Qemu;
use crate::{ENOUGH, SHORT, end, vm};

#[tokio::test]
async fn a_qemu_that_falls_silent_in_an_inspect_did_not_answer_in_time() {
    let mut cases = JoinSet::new();
    for from in ["qmp_capabilities", "query-status", "query-name", "qom-list", "qom-get"] {
        cases.spawn(async move {
            let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
            let qemu = Qemu { silent_from: Some(from), ..qemu };
            let (mut vm, served, _directory) = vm(qemu, SHORT).await;
            let error = vm.inspect().await.unwrap_err();
            assert!(matches!(error.kind, ErrorKind::NoReply { .. }), "{from}: {error:?}");
            end(vm, served);
        });
    }
    cases.join_all().await;
}

#[tokio::test]
async fn inspect_passes_over_what_a_qemu_does_not_have() {
    for without in ["query-status", "query-name", "x-query-usb", "qom-get"] {
        let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
        let qemu = Qemu { refuses: Some((without, "not here")), ..qemu };
        let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
        let inventory = vm.inspect().await.unwrap();
        assert_eq!(inventory.devices.len(), 1, "{without}");
        assert_eq!(inventory.devices[0].id.as_deref(), Some("usb-host-1-1.2"));
        end(vm, served);
    }
}

#[tokio::test]
async fn the_real_ports_are_asked_of_whatever_command_a_qemu_has() {
    for (version, without) in [
        ([11, 1, 0], "human-monitor-command"),
        ([6, 2, 0], "human-monitor-command"),
        ([6, 1, 0], "x-query-usb"),
    ] {
        let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
        let qemu = Qemu { refuses: Some((without, "not here")), version, ..qemu };
        let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
        let inventory = vm.inspect().await.unwrap();
        assert!(inventory.devices[0].speed.is_some(), "{version:?}: {:?}", inventory.devices);
        end(vm, served);
    }
}

#[tokio::test]
async fn inspect_takes_a_run_state_that_nobody_knows_yet() {
    let qemu = Qemu { status: "levitating", ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    vm.inspect().await.unwrap();
    end(vm, served);
}
