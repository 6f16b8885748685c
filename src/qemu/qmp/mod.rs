//! One conversation with a QMP socket (QEMU, docs/interop/qmp-spec.rst).
//!
//! A [`Session`] connects and waits for the greeting. It sends nothing before
//! that. [`Session::send`] queues a command and returns a [`Ticket`].
//! [`Session::reply`] takes the ticket, sends everything that is queued, and
//! returns the reply, so many commands cost only one round trip. One deadline
//! is valid for the whole conversation. After an error of the connection, the
//! session is unusable. A command that QEMU refuses does not change the
//! session.

mod address;
mod domain;
mod error;
mod frame;
mod libvirt;
mod libvirt_error;
mod rpc;
mod stream;
mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::time::Duration;

use qapi::qmp::{QmpCommand, qmp_capabilities};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Error as _};
use tokio::net::UnixStream;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::text::words;
pub use address::{Socket, VmAddress};
use domain::users;
pub use domain::{Domain, NotADomain, user_id};
pub use error::{Error, ErrorKind, LibvirtError, Refusal};
use frame::{Message, Reply};
use wire::Wire;

/// The most events that are kept of the kind that was asked for. Later ones are
/// dropped, and so are all other events.
const MAX_EVENTS: usize = 256;

/// The most messages that may come before the greeting.
const MAX_BEFORE_GREETING: usize = 256;

/// The most bytes that are sent in one conversation. The limit is needed
/// because the peer's answers decide how many questions follow.
const MAX_SENT: usize = 2 << 20;

/// A time longer than any machine runs, but short enough to be added to the
/// current time.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// QEMU's version, from its greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize)]
pub struct Version {
    /// The major version: 10 in 10.0.2.
    pub major: u32,
    /// The minor version: 0 in 10.0.2.
    pub minor: u32,
    /// The micro version: 2 in 10.0.2.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Stands for the reply to a command. Each ticket is used once.
#[must_use = "a command is sent when its reply, or a later one, is asked for"]
#[derive(Debug)]
pub struct Ticket<C> {
    id: u64,
    command: PhantomData<fn() -> C>,
}

/// A connection to a monitor that has sent its greeting.
#[derive(Debug)]
pub struct Session {
    address: VmAddress,
    wire: Wire,
    started: Instant,
    deadline: Instant,
    version: Version,
    /// The ids of this conversation. They matter because QEMU may still send
    /// replies for an earlier client.
    ids: Range<u64>,
    negotiation: Option<Ticket<qmp_capabilities>>,
    replies: BTreeMap<u64, Reply>,
    /// The name of the events that are kept.
    wanted: Option<&'static str>,
    /// Their data, as JSON.
    events: VecDeque<String>,
    sent: usize,
    usable: bool,
}

impl Session {
    /// Connects to the VM's monitor and waits for its greeting. `time` is the
    /// limit for this and for every command after it.
    ///
    /// # Errors
    ///
    /// Every [`ErrorKind`] up to [`ErrorKind::Lost`]. A monitor serves one
    /// client at a time. While another client uses it, the connection succeeds
    /// but the greeting does not arrive ([`ErrorKind::NoGreeting`]).
    pub async fn connect(address: &VmAddress, time: Duration) -> Result<Session, Error> {
        Session::begin(pin!(Wire::connect(address)), address, time).await
    }

    /// Like [`Session::connect`], but waits for the greeting without a limit,
    /// while another client uses the monitor or QEMU is stopped. `time` begins
    /// with the greeting. Drop the future to stop waiting.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::connect`].
    pub async fn connect_when_free(address: &VmAddress, time: Duration) -> Result<Session, Error> {
        Session::connect_in_turn(address, FOREVER, time).await
    }

    /// Like [`Session::connect_when_free`], but stops waiting if the monitor is
    /// not free within `turn`.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::connect`].
    pub async fn connect_in_turn(
        address: &VmAddress,
        turn: Duration,
        time: Duration,
    ) -> Result<Session, Error> {
        let mut session = Session::connect(address, turn).await?;
        session.started = Instant::now();
        session.deadline = session.started + time;
        Ok(session)
    }

    /// Creates a session over a stream that is connected already. `address` is
    /// used in errors.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::connect`].
    pub async fn on_stream(
        stream: UnixStream,
        address: &VmAddress,
        time: Duration,
    ) -> Result<Session, Error> {
        Session::begin(pin!(Wire::on_stream(stream, address)), address, time).await
    }

    /// Creates a session as soon as there is a connection and QEMU's version is
    /// known. A socket tells it in its greeting.
    /// The caller pins `connecting`, so that a session's future has room for it
    /// only once.
    async fn begin(
        connecting: impl Future<Output = Result<(Wire, Option<Version>), ErrorKind>>,
        address: &VmAddress,
        time: Duration,
    ) -> Result<Session, Error> {
        let started = Instant::now();
        let deadline = started + time;
        let fail = |kind| Error::new(address, kind);
        let connected = timeout_at(deadline, connecting).await;
        let (wire, version) =
            connected.map_err(|_| fail(ErrorKind::NoGreeting { waited: time }))?.map_err(fail)?;
        let mut session = Session {
            address: address.clone(),
            wire,
            started,
            deadline,
            version: version.unwrap_or_default(),
            ids: first_id(),
            negotiation: None,
            replies: BTreeMap::new(),
            wanted: None,
            events: VecDeque::new(),
            sent: 0,
            usable: true,
        };
        if version.is_none() {
            session.version = match session.greeting().await {
                Err(Error { kind: ErrorKind::NoReply { waited }, .. }) => {
                    return Err(session.error(ErrorKind::NoGreeting { waited }));
                }
                version => version?,
            };
            session.negotiation = Some(session.send(&qmp_capabilities { enable: None })?);
        }
        Ok(session)
    }

    /// Waits for the greeting. QEMU writes events from another thread than the
    /// greeting, so an event may arrive before it (QEMU, monitor/qmp.c,
    /// `monitor_qmp_event`). A reply to the client before this one may arrive
    /// first, too.
    async fn greeting(&mut self) -> Result<Version, Error> {
        for _ in 0..MAX_BEFORE_GREETING {
            match self.message().await? {
                Message::Greeting(version) => return Ok(version),
                Message::Event { .. } | Message::Reply { .. } | Message::Foreign => {}
                Message::Complaint(desc) => {
                    return Err(self.broken(ErrorKind::NotQmp { saw: desc }));
                }
            }
        }
        let saw = format!("{MAX_BEFORE_GREETING} messages without a greeting");
        Err(self.broken(ErrorKind::NotQmp { saw }))
    }

    /// The address of the monitor.
    pub fn address(&self) -> &VmAddress {
        &self.address
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The time when the conversation has to be over.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// QEMU's process id, as this process sees it (unix(7), `SO_PEERCRED`).
    /// `None` if QEMU is outside this process's PID namespace.
    pub fn peer_pid(&self) -> Option<i32> {
        self.wire.pid()
    }

    /// Keeps the events of this name from now on, for [`Session::event`]. All
    /// other events are dropped.
    pub fn want_events(&mut self, name: &'static str) {
        self.wanted = Some(name);
    }

    /// Queues a command.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unusable`] after an error of the connection.
    pub fn send<C: QmpCommand>(&mut self, command: &C) -> Result<Ticket<C>, Error> {
        if !self.usable {
            return Err(self.error(ErrorKind::Unusable));
        }
        let id = self.ids.end;
        self.ids.end += 1;
        match self.wire.queue(id, command) {
            Ok(bytes) => self.sent += bytes,
            Err(source) => {
                let command = C::NAME;
                return Err(self.error(ErrorKind::Unexpected { command, source }));
            }
        }
        if self.sent > MAX_SENT {
            return Err(self.broken(ErrorKind::TooMuch("so much that asking about it takes 2 MiB")));
        }
        Ok(Ticket { id, command: PhantomData })
    }

    /// Queues a command that takes a file descriptor, for example `add-fd`. The
    /// descriptor is sent with the next bytes (unix(7), `SCM_RIGHTS`). QEMU
    /// keeps only the last descriptor that it received, so queue only one per
    /// round trip.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::send`].
    pub fn send_with_descriptor<C: QmpCommand>(
        &mut self,
        command: &C,
        descriptor: OwnedFd,
    ) -> Result<Ticket<C>, Error> {
        let ticket = self.send(command)?;
        self.wire.add_descriptor(descriptor);
        Ok(ticket)
    }

    /// Sends what is queued and waits for the reply to one command.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`] if QEMU refuses the command,
    /// [`ErrorKind::Unexpected`] if the reply does not have the command's
    /// format. Otherwise an error of the connection, after which the session is
    /// unusable.
    pub async fn reply<C: QmpCommand>(&mut self, ticket: Ticket<C>) -> Result<C::Ok, Error> {
        if let Some(negotiation) = self.negotiation.take() {
            self.reply_to(negotiation).await?;
        }
        self.reply_to(ticket).await
    }

    /// Sends one command and waits for its reply.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::reply`].
    pub async fn execute<C: QmpCommand>(&mut self, command: &C) -> Result<C::Ok, Error> {
        let ticket = self.send(command)?;
        self.reply(ticket).await
    }

    async fn reply_to<C: QmpCommand>(&mut self, ticket: Ticket<C>) -> Result<C::Ok, Error> {
        self.flush().await?;
        let reply = loop {
            if let Some(reply) = self.replies.remove(&ticket.id) {
                break reply;
            }
            self.hear().await?;
        };
        let command = C::NAME;
        match reply {
            Reply::Return(json) => serde_json::from_str(&json).map_err(|source| {
                // The error may repeat all fields that it did not expect, so it
                // is cut.
                let source = serde_json::Error::custom(words(&source.to_string()));
                self.error(ErrorKind::Unexpected { command, source })
            }),
            Reply::Error { class, desc } => {
                let refusal = Refusal { command, class, desc };
                Err(self.error(ErrorKind::Refused(refusal)))
            }
        }
    }

    /// Waits for one of the kept events whose data passes the test. It may have
    /// arrived already. Returns false if it does not arrive until the given
    /// time. The events before it are dropped. If no event can arrive on this
    /// connection, it waits and returns true, because the event may have
    /// happened.
    ///
    /// # Errors
    ///
    /// An error of the connection, after which the session is unusable.
    pub async fn event<T: DeserializeOwned>(
        &mut self,
        is_it: impl Fn(&T) -> bool,
        until: Instant,
    ) -> Result<bool, Error> {
        if !self.wire.has_events() {
            sleep_until(until).await;
            return Ok(true);
        }
        loop {
            while let Some(data) = self.events.pop_front() {
                if serde_json::from_str(&data).is_ok_and(|data| is_it(&data)) {
                    return Ok(true);
                }
            }
            match timeout_at(until, self.hear()).await {
                Ok(heard) => heard?,
                Err(_) => return Ok(false),
            }
        }
    }

    /// Reads one message, and keeps it if it belongs to this session.
    async fn hear(&mut self) -> Result<(), Error> {
        match self.message().await? {
            // The reply to a command that this session sent.
            Message::Reply { id, reply } if self.ids.contains(&id) => {
                self.replies.insert(id, reply);
            }
            Message::Event { name, data } => {
                if self.wanted == Some(name.as_str()) && self.events.len() < MAX_EVENTS {
                    self.events.push_back(data);
                }
            }
            // The reply to an earlier client, which left before QEMU had
            // answered.
            Message::Reply { .. } | Message::Foreign => {}
            Message::Greeting(_) => {
                let saw = "a second greeting".to_owned();
                return Err(self.broken(ErrorKind::NotQmp { saw }));
            }
            Message::Complaint(desc) => {
                return Err(self.broken(ErrorKind::NotQmp { saw: desc }));
            }
        }
        Ok(())
    }

    /// Sends everything that is queued.
    async fn flush(&mut self) -> Result<(), Error> {
        let flushed = timeout_at(self.deadline, self.wire.flush(&mut self.replies)).await;
        self.checked(flushed)
    }

    /// Returns the next message.
    async fn message(&mut self) -> Result<Message, Error> {
        if !self.usable {
            return Err(self.error(ErrorKind::Unusable));
        }
        let message = timeout_at(self.deadline, self.wire.message()).await;
        self.checked(message)
    }

    /// The result of the connection. If it failed, or took too long, the
    /// session is unusable.
    fn checked<T>(&mut self, result: Result<Result<T, ErrorKind>, Elapsed>) -> Result<T, Error> {
        match result {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(kind)) => Err(self.broken(kind)),
            Err(_) => {
                let waited = self.deadline - self.started;
                Err(self.broken(ErrorKind::NoReply { waited }))
            }
        }
    }

    fn broken(&mut self, kind: ErrorKind) -> Error {
        self.usable = false;
        self.error(kind)
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(&self.address, kind)
    }
}

/// Chooses where the ids of a conversation begin. The number is random, so the
/// ids differ from those of an earlier conversation. It is below 2^52, because
/// every JSON reader can represent such a number exactly.
fn first_id() -> Range<u64> {
    // The standard library takes the keys of its hashes from the system's
    // random numbers.
    let random = RandomState::new().build_hasher().finish();
    let first = random >> 12;
    first..first
}
