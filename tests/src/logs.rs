//! A subscriber that keeps what it is told, for tests of what is logged.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Mutex, PoisonError};
use std::thread::ThreadId;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// A message that was logged.
#[derive(Clone, Debug)]
pub struct Logged {
    pub level: Level,
    pub target: String,
    pub message: String,
    pub fields: BTreeMap<String, Logs>,
    thread: ThreadId,
}

/// The value of a field, with the type in which it was logged.
#[derive(Clone, Debug, PartialEq)]
pub enum Logs {
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Bool(bool),
    Text(String),
    Shown(String),
}

static LOGGED: Mutex<Vec<Logged>> = Mutex::new(Vec::new());

thread_local! {
    static PANICKING: Cell<bool> = const { Cell::new(false) };
}

/// Keeps every message of the process from now on.
pub fn keep_logs() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| tracing::subscriber::set_global_default(Keeper).expect("no other subscriber"));
}

/// What this thread has logged since it last asked.
pub fn take_logs() -> Vec<Logged> {
    let thread = std::thread::current().id();
    let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    logged.extract_if(.., |message| message.thread == thread).collect()
}

/// The messages of every thread that begin so.
pub fn logs_beginning(beginning: &str) -> Vec<Logged> {
    let logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    logged.iter().filter(|message| message.message.starts_with(beginning)).cloned().collect()
}

/// Has the subscriber panic at every message of this thread.
pub fn panic_at_logs(panicking: bool) {
    PANICKING.set(panicking);
}

struct Keeper;

impl Subscriber for Keeper {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }

    fn event(&self, event: &Event<'_>) {
        assert!(!PANICKING.get(), "the subscriber panics, as it was told to");
        let mut logged = Logged {
            level: *event.metadata().level(),
            target: event.metadata().target().to_owned(),
            message: String::new(),
            fields: BTreeMap::new(),
            thread: std::thread::current().id(),
        };
        event.record(&mut logged);
        LOGGED.lock().unwrap_or_else(PoisonError::into_inner).push(logged);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl Logged {
    fn set(&mut self, field: &Field, value: Logs) {
        self.fields.insert(field.name().to_owned(), value);
    }
}

impl Visit for Logged {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            _ => self.set(field, Logs::Shown(format!("{value:?}"))),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, Logs::Text(value.to_owned()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, Logs::Signed(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, Logs::Unsigned(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, Logs::Float(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, Logs::Bool(value));
    }
}
