//! A session by way of libvirt, against a libvirtd that does what a real one will not do on demand.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "peer/libvirtd.rs"]
mod libvirtd;
#[path = "peer/session.rs"]
mod session;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libvirtd::{Libvirtd, domain, framed, packet, string, words};
use qapi::qmp::{add_fd, query_name, query_status, remove_fd};
use serde_json::json;
use session::{ENOUGH, outcome, with_peer};
use usb_qmp_hotplug::qemu::VmAddress;
use usb_qmp_hotplug::qemu::qmp::{Error, Session, Version};

/// A domain of this user's.
const DOMAIN: &str = "libvirt:session/test";

/// A session with a libvirtd that follows a script.
async fn session<T: Send + 'static>(
    time: Duration,
    script: impl FnOnce(Libvirtd) -> T + Send + 'static,
) -> (Result<Session, Error>, JoinHandle<T>) {
    let address = VmAddress::read(DOMAIN).unwrap().unwrap();
    with_peer(&address, time, |stream| script(Libvirtd::new(stream))).await
}

/// What a user and a script get of a session that does not come about.
async fn refused(script: impl FnOnce(Libvirtd) + Send + 'static) -> (String, u8) {
    let (session, peer) = session(ENOUGH, script).await;
    let outcome = outcome(session.unwrap_err());
    peer.join().unwrap();
    outcome
}

#[tokio::test]
async fn commands_go_one_at_a_time_and_each_gets_its_own_answer() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.begin();
        let first = peer.next(1);
        assert_eq!(first.command()["execute"], "query-name");
        std::thread::sleep(Duration::from_millis(20));
        assert!(peer.is_idle(), "it did not wait for the answer");
        peer.answer(&first, json!({"return": {"name": "a"}, "id": "libvirt-12"}));
        let second = peer.next(1);
        assert_eq!(second.command()["execute"], "query-status");
        let status = json!({"running": true, "status": "running"});
        peer.answer(&second, json!({"return": status, "id": "libvirt-13"}));
    })
    .await;
    let mut session = session.unwrap();
    assert_eq!(session.version(), Version { major: 10, minor: 0, micro: 2 });
    let name = session.send(&query_name {}).unwrap();
    let status = session.send(&query_status {}).unwrap();
    assert!(session.reply(status).await.unwrap().running);
    assert_eq!(session.reply(name).await.unwrap().name.as_deref(), Some("a"));
    peer.join().unwrap();
}

#[tokio::test]
async fn a_descriptor_goes_with_its_command_alone() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.begin();
        let added = peer.next(7);
        let expected = json!({"execute": "add-fd", "arguments": {"fdset-id": 3}});
        assert_eq!(added.command(), expected);
        peer.answer(&added, json!({"return": {"fdset-id": 3, "fd": 30}, "id": "libvirt-8"}));
        let removed = peer.next(1);
        assert!(removed.descriptor.is_none());
        peer.answer(&removed, json!({"return": {}, "id": "libvirt-9"}));
        File::from(added.descriptor.unwrap()).metadata().unwrap().ino()
    })
    .await;
    let mut session = session.unwrap();
    let file = tempfile::tempfile().unwrap();
    let inode = file.metadata().unwrap().ino();
    let add = add_fd { fdset_id: Some(3), opaque: None };
    let added = session.send_with_descriptor(&add, file.into()).unwrap();
    let removed = session.send(&remove_fd { fdset_id: 3, fd: None }).unwrap();
    session.reply(removed).await.unwrap();
    assert_eq!(session.reply(added).await.unwrap().fdset_id, 3);
    assert_eq!(peer.join().unwrap(), inode);
}

#[tokio::test]
async fn what_qemu_refuses_leaves_the_session_as_it_was() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.begin();
        let call = peer.next(1);
        let error = json!({"class": "DeviceNotFound", "desc": "Device 'x' not found"});
        peer.answer(&call, json!({"id": "libvirt-12", "error": error}));
        let call = peer.next(1);
        peer.answer(&call, json!({"return": {}, "id": "libvirt-13"}));
    })
    .await;
    let mut session = session.unwrap();
    let error = session.execute(&query_name {}).await.unwrap_err();
    assert!(error.refusal().is_some_and(|refusal| refusal.is_not_found()), "{error}");
    assert_eq!(outcome(error).1, 6);
    session.execute(&query_name {}).await.unwrap();
    peer.join().unwrap();
}

#[tokio::test]
async fn who_has_all_answers_takes_leave() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.begin();
        let close = peer.next(2);
        peer.give(&close, &[]);
        assert!(peer.call().is_none());
    })
    .await;
    drop(session.unwrap());
    peer.join().unwrap();
}

#[tokio::test]
async fn polkit_is_asked_where_libvirt_wants_it() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        let list = peer.next(66);
        peer.give(&list, &words(&[2, 1, 2]));
        let polkit = peer.next(70);
        peer.give(&polkit, &words(&[1]));
        peer.open();
        peer.look_up();
    })
    .await;
    session.unwrap();
    peer.join().unwrap();
}

#[tokio::test]
async fn who_may_not_is_told_how_to() {
    let (text, code) = refused(|mut peer| {
        let list = peer.next(66);
        peer.give(&list, &words(&[1, 2]));
        let polkit = peer.next(70);
        peer.fail(&polkit, 88, "no polkit agent \u{1b}available");
    })
    .await;
    assert_eq!(code, 1);
    let said = "VM libvirt:session/test: libvirt does not allow it: no polkit agent \\u{1b}available; \
                 do it as root, or join the group libvirt";
    assert_eq!(text, said);
    let (text, code) = refused(|mut peer| {
        let list = peer.next(66);
        peer.give(&list, &words(&[1, 1]));
    })
    .await;
    assert!(code == 1 && text.contains("it asks for a password"), "{text}");
}

#[tokio::test]
async fn whatever_keeps_polkit_from_allowing_it_is_told() {
    let (text, code) = refused(|mut peer| {
        let list = peer.next(66);
        peer.give(&list, &words(&[1, 2]));
        let polkit = peer.next(70);
        peer.fail(&polkit, 1, "no system bus");
    })
    .await;
    assert!(
        code == 1 && text.contains("does not allow it: no system bus; do it as root"),
        "{text}"
    );
}

#[tokio::test]
async fn what_libvirt_says_no_to_has_its_exit_code_and_its_next_step() {
    for (code, message, exit, next) in [
        (42, "Domain not found", 4, "virsh list --all"),
        (55, "domain is not running", 4, "virsh start"),
        (45, "authentication failed", 1, "group libvirt"),
        (9, "it is broken", 1, "libvirt says: it is broken (error 9)"),
    ] {
        let (text, exited) = refused(move |mut peer| {
            peer.log_in();
            let lookup = peer.next(23);
            peer.fail(&lookup, code, message);
        })
        .await;
        assert!(exited == exit && text.contains(next), "{code}: {exited}, {text}");
    }
}

#[tokio::test]
async fn a_domain_that_is_off_is_not_asked() {
    let (text, code) = refused(|mut peer| {
        peer.log_in();
        let lookup = peer.next(23);
        let off = [string("test"), vec![7; 16], words(&[u32::MAX])].concat();
        peer.give(&lookup, &off);
    })
    .await;
    assert!(code == 4 && text.contains("the domain is not running"), "{text}");
}

#[tokio::test]
async fn a_domain_that_a_job_holds_is_asked_again() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.log_in();
        let lookup = peer.next(23);
        peer.give(&lookup, &domain("test"));
        let version = peer.next(1);
        peer.fail(&version, 68, "cannot acquire state change lock");
        peer.version();
        let call = peer.next(1);
        peer.fail(&call, 68, "cannot acquire state change lock");
    })
    .await;
    let error = session.unwrap().execute(&query_name {}).await.unwrap_err();
    let (text, code) = outcome(error);
    assert!(code == 5 && text.contains("another job holds the domain"), "{text}");
    peer.join().unwrap();
}

#[tokio::test]
async fn a_libvirt_without_descriptors_is_too_old() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.begin();
        let added = peer.next(7);
        peer.fail(&added, 39, "unknown procedure: 7");
    })
    .await;
    let mut session = session.unwrap();
    let file = tempfile::tempfile().unwrap();
    let add = add_fd { fdset_id: Some(3), opaque: None };
    let added = session.send_with_descriptor(&add, file.into()).unwrap();
    let (text, code) = outcome(session.reply(added).await.unwrap_err());
    assert!(code == 1 && text.contains("8.2") && text.contains("second monitor"), "{text}");
    peer.join().unwrap();
}

#[tokio::test]
async fn a_libvirtd_that_hangs_costs_no_more_than_the_time() {
    type Script = fn(&mut Libvirtd);
    let steps: [Script; 4] = [
        |_| {},
        |peer| peer.log_in(),
        |peer| {
            let list = peer.next(66);
            // A packet that is not all there.
            peer.write(&packet(&list, 0, &[0; 40])[..30]);
        },
        |peer| {
            peer.begin();
            peer.next(1);
        },
    ];
    for script in steps {
        let time = Duration::from_millis(100);
        let start = Instant::now();
        let (session, peer) = session(time, move |mut peer| {
            script(&mut peer);
            // Until the other end has had enough.
            while let Some(call) = peer.call() {
                assert_ne!(call.procedure, 2, "it waits for a word");
            }
        })
        .await;
        let error = match session {
            Ok(mut session) => session.execute(&query_name {}).await.unwrap_err(),
            Err(error) => error,
        };
        assert!(start.elapsed() < ENOUGH / 2, "{:?}", start.elapsed());
        let (text, code) = outcome(error);
        assert!(code == 5 && text.contains("no answer within 100ms"), "{text}");
        peer.join().unwrap();
    }
}

#[tokio::test]
async fn what_is_not_for_this_call_is_passed_over() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        let list = peer.next(66);
        let event = words(&[list.program, 1, 318, 2, 0, 0, 1, 2, 3]);
        peer.write(framed(&event));
        let late =
            libvirtd::Call { serial: list.serial + 9, descriptor: None, arguments: vec![], ..list };
        peer.give(&late, &words(&[1, 1]));
        peer.give(&libvirtd::Call { serial: list.serial, ..late }, &words(&[1, 0]));
        peer.open();
        peer.look_up();
    })
    .await;
    session.unwrap();
    peer.join().unwrap();
}

#[tokio::test]
async fn bytes_that_are_not_libvirts_hurt_nothing() {
    let header = words(&[0x2000_8086, 1, 66, 1, 1]);
    let with = |rest: &[u8]| framed(&[&header, rest].concat());
    for bytes in [
        b"{\"QMP\": {\"version\": {}}}\r\n".to_vec(),
        vec![0; 64],
        words(&[27, 0, 0, 0, 0, 0, 0]),
        words(&[u32::MAX, 0]),
        words(&[1 << 24, 0]),
        with(&words(&[0])),
        with(&words(&[1])),
        with(&words(&[1, 9, 10])),
        with(&words(&[1, 9, 10, 1, u32::MAX])),
        with(&words(&[1, 9, 10, 1, 400, 0])),
    ] {
        let shown = format!("{:?}", &bytes[..bytes.len().min(32)]);
        let (text, code) = refused(move |mut peer| {
            peer.next(66);
            peer.write(bytes);
        })
        .await;
        assert!(code == 1 && text.contains("answers something else"), "{shown}: {text}");
    }
}

#[tokio::test]
async fn an_answer_that_is_no_reply_of_qemus_is_told() {
    for given in [
        vec![],
        words(&[100]),
        string("no JSON"),
        string("{\"event\": \"STOP\"}"),
        string("{}"),
        vec![0, 0, 0, 4, 0xff, 0xfe, 0xfd, 0xfc],
    ] {
        let shown = format!("{given:?}");
        let (session, peer) = session(ENOUGH, move |mut peer| {
            peer.begin();
            let call = peer.next(1);
            peer.give(&call, &given);
        })
        .await;
        let error = session.unwrap().execute(&query_name {}).await.unwrap_err();
        let (text, code) = outcome(error);
        assert!(code == 1 && text.contains("answers something else"), "{shown}: {text}");
        peer.join().unwrap();
    }
}

#[tokio::test]
async fn another_domain_than_was_asked_for_is_not_taken() {
    let (text, code) = refused(|mut peer| {
        peer.log_in();
        let lookup = peer.next(23);
        peer.give(&lookup, &domain("tess"));
    })
    .await;
    assert!(code == 1 && text.contains("another domain"), "{text}");
}

#[tokio::test]
async fn a_libvirtd_that_ends_in_between_is_told() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.begin();
        peer.next(1);
    })
    .await;
    let (text, code) = outcome(session.unwrap().execute(&query_name {}).await.unwrap_err());
    assert!(code == 1 && text.contains("the connection to libvirt was lost"), "{text}");
    peer.join().unwrap();
}
