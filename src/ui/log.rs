//! Writes the log. On standard error, people read only the message. A command
//! that udev runs, and the daemon, also log to the journal with all fields.
//! Without a journal, they log to syslog.

use std::fmt::Debug;
use std::io::Write as _;
use std::os::fd::AsFd;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::{Data, LookupSpan};
use tracing_subscriber::util::SubscriberInitExt;

use crate::text::escape;

/// The program's name in the log.
const NAME: &str = "usb-qmp-hotplug";

/// Starts logging.
pub fn start(to_system_log: bool, quiet: bool, verbose: bool) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, true) => LevelFilter::DEBUG,
        _ => LevelFilter::INFO,
    };
    let system_log = if to_system_log { system_log() } else { None };
    // In a service, standard error is the journal. Each line must appear there
    // only once, and with its fields.
    let is_twice = system_log.is_some() && is_the_journal(std::io::stderr());
    let standard_error = (!is_twice).then_some(StandardError);
    let messages = Messages.with(level).with(standard_error);
    // A test may have set a subscriber before. Then that one stays.
    let _ = messages.with(system_log).try_init();
}

/// Passes messages on. This program has no spans, and the registry of
/// tracing-subscriber would fill 32 KiB of memory for them at every start.
struct Messages;

impl Subscriber for Messages {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl<'a> LookupSpan<'a> for Messages {
    type Data = Data<'a>;

    fn span_data(&'a self, _: &Id) -> Option<Self::Data> {
        None
    }
}

/// Whether this stream is the connection to the journal that systemd created
/// (systemd.exec(5), `$JOURNAL_STREAM`).
fn is_the_journal(stream: impl AsFd) -> bool {
    let Ok(stat) = rustix::fs::fstat(stream) else { return false };
    let journal = std::env::var("JOURNAL_STREAM");
    journal.is_ok_and(|journal| journal == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// The journal. Without it, syslog. If that fails, too, `None`.
fn system_log<S>() -> Option<Box<dyn Layer<S> + Send + Sync>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    if let Ok(journal) = tracing_journald::layer() {
        // Without a prefix, the fields are VM=, PORT=, ID=.
        let journal = journal.with_field_prefix(None).with_syslog_identifier(NAME.to_owned());
        return Some(journal.boxed());
    }
    let (options, facility) = (syslog_tracing::Options::LOG_PID, syslog_tracing::Facility::Daemon);
    let syslog = syslog_tracing::Syslog::new(c"usb-qmp-hotplug", options, facility)?;
    let layer = tracing_subscriber::fmt::layer().with_writer(syslog);
    Some(layer.with_ansi(false).with_level(false).with_target(false).without_time().boxed())
}

/// Writes each message as a line on standard error. The messages that --verbose
/// adds have their fields, because those messages alone may not name the VM or
/// the device.
struct StandardError;

impl<S: Subscriber> Layer<S> for StandardError {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let text = format!("{}{}\n", crate::ui::progress::make_way(), shown(event));
        // If this fails, there is no other place to report it to.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}

fn shown(event: &Event<'_>) -> String {
    let mut line = Line::default();
    event.record(&mut line);
    let Line { message, fields } = line;
    match *event.metadata().level() {
        Level::DEBUG if !fields.is_empty() => format!("{NAME}: {message} ({})", fields.join(", ")),
        _ => format!("{NAME}: {message}"),
    }
}

#[derive(Default)]
struct Line {
    message: String,
    fields: Vec<String>,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => self.fields.push(format!("{name} {value:?}")),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        // Escaped like a quoted text, only without the quotes.
        self.record_debug(field, &format_args!("{}", escape(value)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn what_verbose_adds_says_of_what_it_speaks() {
        struct Kept(Arc<Mutex<Vec<String>>>);
        impl<S: Subscriber> Layer<S> for Kept {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                self.0.lock().unwrap().push(shown(event));
            }
        }
        let kept = Arc::new(Mutex::new(Vec::new()));
        let subscriber = Messages.with(Kept(kept.clone()));
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!(vm = "a\u{1b}b", id = %"usb-host-1-1", "in use");
            tracing::info!(vm = "a", "attached");
        });
        assert_eq!(
            *kept.lock().unwrap(),
            [
                "usb-qmp-hotplug: in use (vm a\\u{1b}b, id usb-host-1-1)",
                "usb-qmp-hotplug: attached"
            ]
        );
    }
}
