//! What the kernel tells: its uevents, before udevd has seen them, and who closes a device's node.

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// The kernel's multicast group for its own events; udevd repeats them in another (Linux, lib/kobject_uevent.c).
const KERNEL_GROUP: u32 = 1;

/// Nanoseconds since the machine was started, in every process alike.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A uevent.
#[derive(Clone, Debug)]
pub struct Uevent {
    pub at: u64,
    pub action: String,
    pub devpath: String,
    variables: Vec<(String, String)>,
}

impl Uevent {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub fn is_usb_device(&self) -> bool {
        self.get("DEVTYPE") == Some("usb_device")
    }

    /// The last part of the path: `1-3` of a device, `1-3:1.0` of an interface.
    pub fn name(&self) -> &str {
        self.devpath.rsplit('/').next().unwrap_or_default()
    }

    pub fn number(&self, name: &str) -> u32 {
        self.get(name).and_then(|text| text.parse().ok()).unwrap_or_default()
    }
}

/// The socket that they arrive on.
pub struct Uevents(File);

impl Uevents {
    pub fn listen() -> Uevents {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            Some(KOBJECT_UEVENT),
        )
        .expect("a netlink socket");
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP)).expect("the kernel's events");
        Uevents(File::from(socket))
    }

    /// The next one.
    pub fn next(&mut self) -> Uevent {
        let mut bytes = [0; 8192];
        loop {
            let length = self.0.read(&mut bytes).expect("the kernel's events");
            let at = now();
            let text = String::from_utf8_lossy(&bytes[..length]);
            let mut words = text.split('\0');
            let Some((action, devpath)) = words.next().and_then(|head| head.split_once('@')) else {
                continue;
            };
            let variable = |word: &str| {
                word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()))
            };
            return Uevent {
                at,
                action: action.to_owned(),
                devpath: devpath.to_owned(),
                variables: words.filter_map(variable).collect(),
            };
        }
    }
}

/// Something that happened.
#[derive(Debug)]
pub enum News {
    Uevent(Uevent),
    /// Somebody closed one of the watched nodes, or the last one who had it open did.
    Closed,
}

/// Everything that happens, in order.
pub struct Feed {
    news: Receiver<News>,
    inotify: OwnedFd,
}

impl Feed {
    pub fn start() -> Feed {
        let (sender, news) = channel();
        let mut uevents = Uevents::listen();
        let inotify = inotify::init(CreateFlags::CLOEXEC).expect("inotify");
        let nodes = inotify.try_clone().expect("a descriptor");
        thread::spawn({
            let sender = sender.clone();
            move || while sender.send(News::Uevent(uevents.next())).is_ok() {}
        });
        thread::spawn(move || tell_closes(&nodes, &sender));
        Feed { news, inotify }
    }

    /// Tells from now on when this node is closed.
    pub fn watch_node(&self, node: &Path) {
        let flags = WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE | WatchFlags::DELETE_SELF;
        inotify::add_watch(self.inotify.as_fd(), node, flags).expect("the node is there");
    }

    pub fn next(&self, timeout: Duration) -> Option<News> {
        match self.news.recv_timeout(timeout) {
            Ok(news) => Some(news),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("nobody listens to the kernel any more"),
        }
    }

    pub fn forget(&self) {
        while self.news.try_recv().is_ok() {}
    }
}

fn tell_closes(inotify: &OwnedFd, sender: &Sender<News>) {
    let mut space = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(inotify, &mut space);
    while reader.next().is_ok() {
        if sender.send(News::Closed).is_err() {
            return;
        }
    }
}
