//! Batchers across the boundary.

use abi_stable::prefix_type::WithMetadata;
use abi_stable::std_types::RSlice;

use super::export::{self, call, drop_handle};
use super::import::Remote;
use super::module::{BatcherApi, BatcherApiRef, BatcherObject, Exports};
use super::wire::{ChunksPtr, Handle, Json, OutcomePtr, ReadyPtr, StepViewPtr, WireResult, from_json, sent, to_json};
use crate::batcher::{Batcher, BatcherProperties, Chunks};
use crate::error::Result;
use crate::registry::Build;
use crate::rows::Column;
use crate::view::{StepOutcome, StepView};

type Exported = Box<dyn Batcher>;

static API: WithMetadata<BatcherApi> =
    WithMetadata::new(BatcherApi { drop: drop_handle::<Exported>, batch, observe, properties });

pub(super) unsafe extern "C" fn build(
    exports: Exports,
    index: u32,
    config: RSlice<'_, u8>,
) -> WireResult<BatcherObject> {
    let built = export::build(exports, index, config, |linked| match linked.build {
        Build::Batcher(build) => Some(build),
        _ => None,
    });
    sent(built, |handle| BatcherObject { handle, api: BatcherApiRef(API.static_as_prefix()) })
}

unsafe extern "C" fn batch(handle: Handle, view: StepViewPtr, ready: ReadyPtr, chunks: ChunksPtr) -> WireResult<()> {
    let run = |batcher: &mut Exported| {
        // SAFETY: the host lends all of them for the call.
        let (view, ready, chunks) = unsafe { (view.get(), ready.get(), chunks.get()) };
        batcher.batch(view, *ready, chunks)
    };
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "batch", run, |()| ()) }
}

unsafe extern "C" fn observe(handle: Handle, outcome: OutcomePtr) -> WireResult<()> {
    let run = |batcher: &mut Exported| {
        // SAFETY: the host lends the outcome for the call.
        batcher.observe(unsafe { outcome.get() });
        Ok(())
    };
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "observe", run, |()| ()) }
}

unsafe extern "C" fn properties(handle: Handle) -> WireResult<Json> {
    let run = |batcher: &mut Exported| to_json(&batcher.properties());
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "properties", run, |json| json) }
}

/// A batcher in a plugin's memory.
pub(super) struct RemoteBatcher {
    remote: Remote,
    batch: unsafe extern "C" fn(Handle, StepViewPtr, ReadyPtr, ChunksPtr) -> WireResult<()>,
    observe: unsafe extern "C" fn(Handle, OutcomePtr) -> WireResult<()>,
    properties: BatcherProperties,
}

impl RemoteBatcher {
    pub fn new(name: &str, object: BatcherObject) -> RemoteBatcher {
        let BatcherObject { handle, api } = object;
        let remote = Remote::new(name, handle, api.drop());
        // Asked once, for what it promises doesn't change; a plugin that fails to say promises nothing.
        let properties = api.properties().and_then(|properties| {
            // SAFETY: the handle belongs to this table.
            let json = remote.call(|handle| unsafe { properties(handle) }).ok()?;
            from_json("its properties", &json).ok()
        });
        let properties = properties.unwrap_or_default();
        RemoteBatcher { remote, batch: api.batch(), observe: api.observe(), properties }
    }
}

impl Batcher for RemoteBatcher {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        let (view, ready, chunks) = (StepViewPtr::new(view), ReadyPtr::new(&ready), ChunksPtr::new(chunks));
        // SAFETY: the handle belongs to this table, and the borrows outlast the call.
        self.remote.call(|handle| unsafe { (self.batch)(handle, view, ready, chunks) })
    }

    fn observe(&mut self, outcome: &StepOutcome) {
        // SAFETY: the handle belongs to this table, and the outcome outlasts the call.
        self.remote.tell(|handle| unsafe { (self.observe)(handle, OutcomePtr::new(outcome)) });
    }
    fn properties(&self) -> BatcherProperties {
        self.properties.clone()
    }
}
