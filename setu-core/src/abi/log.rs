//! Log messages of a plugin, brought to the host.
//!
//! A library has its own copy of `tracing`, whose messages nobody would see. So the host passes a
//! function in; [`connect`] installs a subscriber in the plugin's copy that calls it, and [`HostLog`] sends
//! each message on to the host's subscriber with its level, target, fields and the plugin's name. What
//! nobody on the host listened to when the plugin was loaded costs the plugin one comparison. Spans stay
//! behind.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, OnceLock};

use tracing::field::{Field, FieldSet, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber, Value};
use tracing_core::{Callsite, Kind};

use super::version::{ABI, AbiVersion};
use crate::error::{Error, Result};
use crate::rows::{Column, Row, Rows};

/// What a host gives to a plugin. Lives for as long as the process; fields are added at the end.
#[repr(C)]
pub struct HostServices {
    abi_major: u32,
    abi_minor: u32,
    /// Levels that somebody listens to: 0 none, 1 errors, to 5 everything.
    max_level: u32,
    reserved: u32,
    /// First argument of `log`.
    context: *const HostLog,
    log: unsafe extern "C" fn(*const HostLog, *const LogRecord<'_>),
}

// SAFETY: HostLog is Sync, and the function may be called from any thread.
unsafe impl Send for HostServices {}
// SAFETY: as above.
unsafe impl Sync for HostServices {}

/// A message on its way. Written by the plugin, which may be older than the host: it never changes.
#[repr(C)]
pub struct LogRecord<'a> {
    level: u32,
    line: u32,
    /// Tells the place in the plugin's code; what follows is the same whenever it is.
    callsite: usize,
    target: Column<'a, u8>,
    file: Column<'a, u8>,
    fields: Rows<'a, LogField<'a>>,
}

/// A field of a message, its text among them. Never changes, as [`LogRecord`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct LogField<'a> {
    name: Column<'a, u8>,
    text: Column<'a, u8>,
    bits: u64,
    kind: u32,
    reserved: u32,
}

// SAFETY: repr(C), plain data and references to it; frozen.
unsafe impl Row for LogField<'_> {}

const ABSENT: u32 = 0;
const SHOWN: u32 = 1;
const TEXT: u32 = 2;
const SIGNED: u32 = 3;
const UNSIGNED: u32 = 4;
const FLOAT: u32 = 5;
const BOOL: u32 = 6;

/// The levels in the order of their numbers, from 1.
const LEVELS: [Level; 5] = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];

fn number_of(level: Level) -> u32 {
    LEVELS.iter().position(|&known| known == level).map_or(5, |index| index as u32 + 1)
}

/// Connects the plugin's side; the first host services that a library sees are the ones it keeps.
///
/// # Errors
/// The host speaks an older boundary than this library.
pub fn connect(host: &'static HostServices) -> Result<()> {
    let abi = AbiVersion { major: host.abi_major as u16, minor: host.abi_minor as u16 };
    if abi.major != ABI.major || abi.minor < ABI.minor {
        return Err(Error::contract(format!("the plugin is built for ABI {ABI}, the host speaks {abi}")));
    }
    // It fails where a header of the same library was first, which is as good.
    let _ = tracing::subscriber::set_global_default(Forward { host });
    Ok(())
}

/// The plugin's subscriber.
struct Forward {
    host: &'static HostServices,
}

impl Subscriber for Forward {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && number_of(*metadata.level()) <= self.host.max_level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let index = (self.host.max_level as usize).checked_sub(1);
        Some(index.map_or(LevelFilter::OFF, |index| LevelFilter::from_level(LEVELS[index.min(4)])))
    }

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let names: Vec<&'static str> = metadata.fields().iter().map(|field| field.name()).collect();
        let mut values = Values(vec![Held::Absent; names.len()]);
        event.record(&mut values);
        let fields: Vec<LogField<'_>> = names.iter().zip(&values.0).map(|(name, held)| held.field(name)).collect();
        let record = LogRecord {
            level: number_of(*metadata.level()),
            line: metadata.line().unwrap_or(0),
            callsite: std::ptr::from_ref(metadata).addr(),
            target: Column::new(metadata.target().as_bytes()),
            file: Column::new(metadata.file().unwrap_or("").as_bytes()),
            fields: Rows::new(&fields),
        };
        // SAFETY: the host keeps its services alive and takes the record by reference.
        unsafe { (self.host.log)(self.host.context, &record) };
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Clone)]
enum Held {
    Absent,
    Shown(String),
    Text(String),
    Bits(u32, u64),
}

impl Held {
    fn field<'a>(&'a self, name: &'a str) -> LogField<'a> {
        let (kind, bits, text) = match self {
            Held::Absent => (ABSENT, 0, ""),
            Held::Shown(text) => (SHOWN, 0, text.as_str()),
            Held::Text(text) => (TEXT, 0, text.as_str()),
            &Held::Bits(kind, bits) => (kind, bits, ""),
        };
        LogField { name: Column::new(name.as_bytes()), text: Column::new(text.as_bytes()), bits, kind, reserved: 0 }
    }
}

/// The values of an event, by the index of their field.
struct Values(Vec<Held>);

impl Values {
    fn set(&mut self, field: &Field, held: Held) {
        if let Some(slot) = self.0.get_mut(field.index()) {
            *slot = held;
        }
    }
}

impl Visit for Values {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let mut text = String::new();
        let _ = write!(text, "{value:?}");
        self.set(field, Held::Shown(text));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, Held::Text(value.to_owned()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, Held::Bits(SIGNED, value as u64));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, Held::Bits(UNSIGNED, value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, Held::Bits(FLOAT, value.to_bits()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, Held::Bits(BOOL, u64::from(value)));
    }
}

/// Places in a plugin's code that may log; a plugin that makes up more is cut off.
const MAX_CALLSITES: usize = 4096;
/// Fields that one message may have, the plugin's name included.
const MAX_FIELDS: usize = 32;

/// The host's side: what one plugin's messages go through.
pub struct HostLog {
    plugin: String,
    /// By the plugin's number of the callsite. Subscribers keep them forever.
    callsites: Mutex<HashMap<usize, &'static HostCallsite>>,
}

impl HostLog {
    /// Services for the plugin of this name, which it may keep.
    pub fn services(plugin: &str) -> &'static HostServices {
        let log = Box::leak(Box::new(HostLog { plugin: plugin.to_owned(), callsites: Mutex::default() }));
        let max_level = LevelFilter::current().into_level().map_or(0, number_of);
        Box::leak(Box::new(HostServices {
            abi_major: ABI.major.into(),
            abi_minor: ABI.minor.into(),
            max_level,
            reserved: 0,
            context: log,
            log: receive,
        }))
    }

    fn emit(&self, record: &LogRecord<'_>) {
        let Some(callsite) = self.callsite(record) else { return };
        tracing::dispatcher::get_default(|dispatch| {
            if dispatch.enabled(callsite.metadata()) {
                callsite.send(record, &self.plugin, dispatch);
            }
        });
    }

    fn callsite(&self, record: &LogRecord<'_>) -> Option<&'static HostCallsite> {
        let mut callsites = self.callsites.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = callsites.get(&record.callsite) {
            return Some(known);
        }
        if callsites.len() == MAX_CALLSITES {
            return None;
        }
        let callsite = HostCallsite::new(record)?;
        callsites.insert(record.callsite, callsite);
        drop(callsites);
        tracing_core::callsite::register(callsite);
        Some(callsite)
    }
}

unsafe extern "C" fn receive(log: *const HostLog, record: *const LogRecord<'_>) {
    // A panic of the host's subscriber must not cross into the plugin.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the log was leaked by `services`; the plugin lends a record for the call.
        let (log, record) = unsafe { (&*log, &*record) };
        log.emit(record);
    }));
}

/// A place in a plugin's code, as the host's subscribers see it.
struct HostCallsite {
    metadata: OnceLock<Metadata<'static>>,
}

impl Callsite for HostCallsite {
    fn set_interest(&self, _: Interest) {}

    fn metadata(&self) -> &Metadata<'_> {
        self.metadata.get().expect("set before anybody sees it")
    }
}

impl HostCallsite {
    fn new(record: &LogRecord<'_>) -> Option<&'static HostCallsite> {
        let level = *LEVELS.get((record.level as usize).checked_sub(1)?)?;
        let mut names: Vec<&'static str> = Vec::new();
        for field in record.fields.iter().take(MAX_FIELDS - 1) {
            names.push(leaked(&field.name));
        }
        names.push("plugin");
        let callsite: &'static HostCallsite = Box::leak(Box::new(HostCallsite { metadata: OnceLock::new() }));
        let fields = FieldSet::new(Vec::leak(names), tracing_core::identify_callsite!(callsite));
        let file = (!record.file.is_empty()).then(|| leaked(&record.file));
        let target = leaked(&record.target);
        let line = (record.line > 0).then_some(record.line);
        let metadata = Metadata::new("plugin event", target, level, file, line, Some(target), fields, Kind::EVENT);
        callsite.metadata.set(metadata).expect("nobody else has it");
        Some(callsite)
    }

    fn send(&'static self, record: &LogRecord<'_>, plugin: &str, dispatch: &tracing::Dispatch) {
        let Some(metadata) = self.metadata.get() else { return };
        let fields: Vec<Field> = metadata.fields().iter().collect();
        let Some((last, known)) = fields.split_last() else { return };
        let sent: Vec<_> = record.fields.iter().map(|field| (field, String::from_utf8_lossy(&field.text))).collect();
        let values: Vec<Option<Box<dyn Value + '_>>> = sent.iter().map(|(field, text)| value_of(field, text)).collect();
        // A value set is an array; places that stay empty are skipped.
        let mut set: [(&Field, Option<&dyn Value>); MAX_FIELDS] = [(last, None); MAX_FIELDS];
        set[0] = (last, Some(&plugin));
        for (slot, (field, value)) in set[1..].iter_mut().zip(known.iter().zip(&values)) {
            *slot = (field, value.as_deref());
        }
        dispatch.event(&Event::new(metadata, &metadata.fields().value_set(&set)));
    }
}

fn value_of<'a>(field: &LogField<'_>, text: &'a str) -> Option<Box<dyn Value + 'a>> {
    match field.kind {
        SHOWN => Some(Box::new(tracing::field::display(text))),
        TEXT => Some(Box::new(text)),
        SIGNED => Some(Box::new(field.bits as i64)),
        UNSIGNED => Some(Box::new(field.bits)),
        FLOAT => Some(Box::new(f64::from_bits(field.bits))),
        BOOL => Some(Box::new(field.bits != 0)),
        _ => None,
    }
}

fn leaked(text: &[u8]) -> &'static str {
    String::leak(String::from_utf8_lossy(text).into_owned())
}
