use super::*;
use crate::policy::config::Config;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// A host with a hub, a USB stick that is mounted, and a device whose strings
/// have control characters for a terminal.
fn host() -> (tempfile::TempDir, Host) {
    let root = tempfile::tempdir().unwrap();
    let devices = root.path().join("sys/bus/usb/devices");
    let device = |port: &str, numbers: [&str; 4], attributes: &[(&str, &str)]| {
        let directory = devices.join(port);
        fs::create_dir_all(&directory).unwrap();
        let names = ["devnum", "idVendor", "idProduct", "bDeviceClass"];
        let numbers = names.into_iter().zip(numbers).chain([("busnum", "1")]);
        for (name, value) in numbers.chain(attributes.iter().copied()) {
            fs::write(directory.join(name), format!("{value}\n")).unwrap();
        }
    };
    let driver = |interface: &str, driver: &str| {
        let directory = devices.join(interface);
        fs::create_dir_all(&directory).unwrap();
        symlink(format!("../../../drivers/{driver}"), directory.join("driver")).unwrap();
    };
    let bus = [
        ("speed", "480"),
        ("bDeviceProtocol", "01"),
        ("maxchild", "4"),
        ("product", "xHCI Host Controller"),
        ("serial", "0000:00:14.0"),
    ];
    let controller = root.path().join("sys/devices/pci0000:00/0000:00:14.0");
    fs::create_dir_all(controller.join("usb1")).unwrap();
    symlink("/sys/bus/pci", controller.join("subsystem")).unwrap();
    fs::create_dir_all(&devices).unwrap();
    symlink(controller.join("usb1"), devices.join("usb1")).unwrap();
    device("usb1", ["1", "1d6b", "0002", "09"], &bus);
    device(
        "1-1",
        ["2", "0409", "55aa", "09"],
        &[("speed", "480"), ("product", "Hub"), ("serial", "H1")],
    );
    driver("1-1/1-1:1.0", "hub");
    device(
        "1-1.2",
        ["3", "152d", "2338", "00"],
        &[
            ("speed", "480"),
            ("manufacturer", "日本製"),
            ("product", "USB to ATA/ATAPI bridge 日本語"),
            ("serial", "0123"),
        ],
    );
    driver("1-1.2/1-1.2:1.0", "usb-storage");
    let block = "1-1.2/1-1.2:1.0/host2/target2:0:0/2:0:0:0/block/sdb";
    fs::create_dir_all(devices.join(block)).unwrap();
    fs::write(devices.join(block).join("dev"), "8:16\n").unwrap();
    device(
        "1-10",
        ["9", "0001", "0002", "03"],
        &[("speed", "1.5"), ("product", "\u{1b}[2Jx\u{202e}"), ("serial", " ")],
    );
    fs::create_dir_all(root.path().join("proc/self")).unwrap();
    let table = "40 21 8:16 / /media/my\\040stick rw shared:5 - vfat /dev/sdb rw\n";
    fs::write(root.path().join("proc/self/mountinfo"), table).unwrap();
    let host = Host::at(root.path());
    (root, host)
}

fn policy() -> Arc<Policy> {
    let text = "[vm.win11]\nqmp = \"/run/win11.qmp\"\n\n[[rule]]\nvm = \"win11\"\nport = \"1-1*\"\n\
                vendor = \"152d\"\n[[rule]]\ndeny = true\nclass = \"03\"\n[[rule]]\nvm = \"win11\"\nport = \"*\"\n";
    Arc::new(Policy::new(Config::parse(Path::new("test.toml"), text).unwrap()))
}

#[test]
fn the_tree_shows_what_is_plugged_in_where() {
    let (_root, host) = host();
    let report = report(&host, &policy()).unwrap();
    let shown = tree::shown(&report, Screen { columns: 72, colour: false });
    assert_eq!(
        shown,
        "\
PORT       DEVICE  ID         Mb/s  DRIVER       NAME
bus 1  pci-0000:00:14.0-usbv2-0:  480 Mb/s, 4 ports, xHCI Host Controll…
├ 1-1      1:2     0409:55aa   480  hub          Hub
│ └ 1-1.2  1:3     152d:2338   480  usb-storage  日本製 USB to ATA/ATAP…
│     serial 0123
│     sdb is mounted on /media/my stick; rule at line 4: VM win11
└ 1-10     1:9     0001:0002   1.5               \\u{1b}[2Jx\\u{202e}
    rule at line 11: VM win11
"
    );
}

#[test]
fn a_long_driver_is_cut_before_its_column_goes() {
    let (_root, host) = host();
    let mut report = report(&host, &policy()).unwrap();
    report.devices[1].drivers = vec!["uvcvideo".into(), "snd-usb-audio".into(), "usbhid".into()];
    let line = |columns: usize| {
        let shown = tree::shown(&report, Screen { columns, colour: false });
        shown.lines().find(|line| line.contains("152d:2338")).unwrap().to_owned()
    };
    assert!(line(90).contains("  uvcvideo,snd-usb-audio,usbhid  "), "{}", line(90));
    assert!(line(80).contains("  uvcvideo,snd-usb-audio,us…  日本製 "), "{}", line(80));
    assert!(line(66).contains("  uvcvideo,sn…  "), "{}", line(66));
    assert!(!line(64).contains("uvc"), "{}", line(64));
}

#[test]
fn every_width_is_kept_and_no_colour_changes_the_text() {
    use unicode_width::UnicodeWidthStr;
    let (_root, host) = host();
    let report = report(&host, &policy()).unwrap();
    for columns in 1..140 {
        let plain = tree::shown(&report, Screen { columns, colour: false });
        assert!(plain.lines().all(|line| line.width() <= columns), "{columns}: {plain}");
        let colour = tree::shown(&report, Screen { columns, colour: true });
        let mut without = colour.clone();
        for code in ["[0m", "[1m", "[2m", "[31m", "[32m", "[33m", "[36m"] {
            without = without.replace(&format!("\u{1b}{code}"), "");
        }
        assert_eq!(without, plain);
    }
}

#[test]
fn json_has_all_of_it() {
    let (_root, host) = host();
    let report = report(&host, &policy()).unwrap();
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(
        json["devices"][1],
        serde_json::json!({
            "port": "1-1.2", "path": "pci-0000:00:14.0-usbv2-0:1.2", "twin": null, "hub": false, "bus": 1, "address": 3,
            "vendor": "152d", "product": "2338",
            "vendor_name": "日本製", "product_name": "USB to ATA/ATAPI bridge 日本語",
            "serial": "0123", "speed_mbps": 480, "drivers": ["usb-storage"],
            "in_use": [{"disk": "sdb", "by": "mount", "what": "/media/my stick"}],
            "other_use": [], "authorized": true,
            "held": false, "held_by": [],
            "rule": {"line": 4, "deny": false, "vm": "win11"}, "starting": false,
        })
    );
    assert_eq!(json["devices"][2]["serial"], serde_json::Value::Null);
    assert_eq!(json["devices"][2]["speed_mbps"], 1.5);
    assert_eq!(json["buses"][0]["ports"], 4);
}

#[test]
fn flat_lines_have_a_field_for_everything() {
    let (_root, host) = host();
    let report = report(&host, &policy()).unwrap();
    let lines: String = report.devices.iter().map(flat).collect();
    assert!(
        lines.starts_with(
            "1-1\t1:2\t0409:55aa\t480\thub\tHub\tH1\t-\t-\t-\t-\tpci-0000:00:14.0-usbv2-0:1\t-\n"
        ),
        "{lines}"
    );
    assert!(lines.lines().all(|line| line.split('\t').count() == 13), "{lines}");
    assert!(!lines.contains('\u{1b}'));
}

#[test]
fn a_host_without_usb_has_no_devices() {
    let report = report(&Host::at("/nonexistent"), &Arc::default()).unwrap();
    assert!(report.devices.is_empty());
}
