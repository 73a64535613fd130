//! Schedulers across the boundary.

use abi_stable::prefix_type::WithMetadata;
use abi_stable::std_types::RSlice;

use super::export::{self, call, drop_handle};
use super::import::Remote;
use super::module::{Exports, SchedulerApi, SchedulerApiRef, SchedulerObject};
use super::wire::{DecisionsPtr, EventsPtr, Handle, Json, StepViewPtr, WireResult, from_json, sent, to_json};
use crate::error::Result;
use crate::registry::Build;
use crate::rows::Rows;
use crate::scheduler::{Decisions, Scheduler, SchedulerProperties, SessionEvent};
use crate::view::StepView;

type Exported = Box<dyn Scheduler>;

static API: WithMetadata<SchedulerApi> =
    WithMetadata::new(SchedulerApi { drop: drop_handle::<Exported>, schedule, observe, properties });

pub(super) unsafe extern "C" fn build(
    exports: Exports,
    index: u32,
    config: RSlice<'_, u8>,
) -> WireResult<SchedulerObject> {
    let built = export::build(exports, index, config, |linked| match linked.build {
        Build::Scheduler(build) => Some(build),
        _ => None,
    });
    sent(built, |handle| SchedulerObject { handle, api: SchedulerApiRef(API.static_as_prefix()) })
}

unsafe extern "C" fn schedule(handle: Handle, view: StepViewPtr, decisions: DecisionsPtr) -> WireResult<()> {
    let run = |scheduler: &mut Exported| {
        // SAFETY: the host lends both for the call.
        let (view, decisions) = unsafe { (view.get(), decisions.get()) };
        scheduler.schedule(view, decisions)
    };
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "schedule", run, |()| ()) }
}

unsafe extern "C" fn observe(handle: Handle, events: EventsPtr) -> WireResult<()> {
    let run = |scheduler: &mut Exported| {
        // SAFETY: the host lends the events for the call.
        scheduler.observe(*unsafe { events.get() });
        Ok(())
    };
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "observe", run, |()| ()) }
}

unsafe extern "C" fn properties(handle: Handle) -> WireResult<Json> {
    let run = |scheduler: &mut Exported| to_json(&scheduler.properties());
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "properties", run, |json| json) }
}

/// A scheduler in a plugin's memory.
pub(super) struct RemoteScheduler {
    remote: Remote,
    schedule: unsafe extern "C" fn(Handle, StepViewPtr, DecisionsPtr) -> WireResult<()>,
    observe: unsafe extern "C" fn(Handle, EventsPtr) -> WireResult<()>,
    properties: SchedulerProperties,
}

impl RemoteScheduler {
    pub fn new(name: &str, object: SchedulerObject) -> RemoteScheduler {
        let SchedulerObject { handle, api } = object;
        let remote = Remote::new(name, handle, api.drop());
        // Asked once, for what it promises doesn't change; a plugin that fails to say promises nothing.
        let properties = api.properties().and_then(|properties| {
            // SAFETY: the handle belongs to this table.
            let json = remote.call(|handle| unsafe { properties(handle) }).ok()?;
            from_json("its properties", &json).ok()
        });
        let properties = properties.unwrap_or_default();
        RemoteScheduler { remote, schedule: api.schedule(), observe: api.observe(), properties }
    }
}

impl Scheduler for RemoteScheduler {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let (view, decisions) = (StepViewPtr::new(view), DecisionsPtr::new(decisions));
        // SAFETY: the handle belongs to this table, and both borrows outlast the call.
        self.remote.call(|handle| unsafe { (self.schedule)(handle, view, decisions) })
    }

    fn observe(&mut self, events: Rows<'_, SessionEvent>) {
        // SAFETY: the handle belongs to this table, and the events outlast the call.
        self.remote.tell(|handle| unsafe { (self.observe)(handle, EventsPtr::new(&events)) });
    }
    fn properties(&self) -> SchedulerProperties {
        self.properties.clone()
    }
}
