//! Backends and executables across the boundary: graphs and options as bytes, weights and steps in place.

use abi_stable::prefix_type::WithMetadata;
use abi_stable::std_types::RSlice;

use super::export::{self, call, drop_handle};
use super::import::Remote;
use super::module::{
    BackendApi, BackendApiRef, BackendObject, ExecutableApi, ExecutableApiRef, ExecutableObject, Exports,
};
use super::wire::{Handle, Json, MasksPtr, OutputsPtr, StepPtr, WeightsPtr, WireResult, from_json, sent, to_json};
use crate::backend::{
    Backend, CompileOptions, DeviceInfo, Executable, ExecutableInfo, Masks, Step, StepOutputs, WeightData,
};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::ids::Ticket;
use crate::registry::Build;
use crate::rows::{Column, Row, Rows};

/// A weight as it crosses.
#[repr(C)]
pub struct RawWeight<'a> {
    dtype: u32,
    reserved: u32,
    parts: Rows<'a, RawPart<'a>>,
}

/// A part of a weight.
#[repr(C)]
pub struct RawPart<'a> {
    bytes: Column<'a, u8>,
}

// SAFETY: repr(C), plain data and references to it; fields are added at the end.
unsafe impl Row for RawWeight<'_> {}
// SAFETY: as above.
unsafe impl Row for RawPart<'_> {}

type Exported = Box<dyn Backend>;
type ExportedExecutable = Box<dyn Executable>;

static API: WithMetadata<BackendApi> =
    WithMetadata::new(BackendApi { drop: drop_handle::<Exported>, devices, compile });
static EXECUTABLE: WithMetadata<ExecutableApi> =
    WithMetadata::new(ExecutableApi { drop: drop_handle::<ExportedExecutable>, info, submit, provide, wait });

pub(super) unsafe extern "C" fn build(
    exports: Exports,
    index: u32,
    config: RSlice<'_, u8>,
) -> WireResult<BackendObject> {
    let built = export::build(exports, index, config, |linked| match linked.build {
        Build::Backend(build) => Some(build),
        _ => None,
    });
    sent(built, |handle| BackendObject { handle, api: BackendApiRef(API.static_as_prefix()) })
}

unsafe extern "C" fn devices(handle: Handle) -> WireResult<Json> {
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "devices", |backend: &mut Exported| to_json(&backend.devices()), |json| json) }
}

unsafe extern "C" fn compile(
    handle: Handle,
    graph: RSlice<'_, u8>,
    weights: WeightsPtr,
    options: RSlice<'_, u8>,
) -> WireResult<ExecutableObject> {
    let run = |backend: &mut Exported| {
        let graph = Graph::from_bytes(graph.as_slice())?;
        let options: CompileOptions = from_json("the options of the backend", options.as_slice())?;
        // SAFETY: the host lends the list for the call.
        let weights = unsafe { weights.get() }.iter().map(weight_of).collect::<Result<Vec<_>>>()?;
        backend.compile(&graph, &weights, &options)
    };
    let object = |executable| ExecutableObject {
        handle: Handle::new::<ExportedExecutable>(executable),
        api: ExecutableApiRef(EXECUTABLE.static_as_prefix()),
    };
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "compile", run, object) }
}

fn weight_of<'a>(raw: &'a RawWeight<'a>) -> Result<WeightData<'a>> {
    let dtype = DType::from_code(raw.dtype).ok_or_else(|| {
        Error::unsupported(format!("weights of format {}, which this plugin does not know", raw.dtype))
    })?;
    Ok(WeightData { dtype, parts: raw.parts.iter().map(|part| part.bytes.as_slice()).collect() })
}

unsafe extern "C" fn info(handle: Handle) -> WireResult<Json> {
    // SAFETY: `compile` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "info", |executable: &mut ExportedExecutable| to_json(&executable.info()), |json| json) }
}

unsafe extern "C" fn submit(handle: Handle, step: StepPtr) -> WireResult<u64> {
    // SAFETY: the host lends the step for the call.
    let run = |executable: &mut ExportedExecutable| executable.submit(unsafe { step.get() });
    // SAFETY: `compile` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "submit", run, |ticket| ticket.0) }
}

unsafe extern "C" fn provide(handle: Handle, ticket: u64, masks: MasksPtr) -> WireResult<()> {
    // SAFETY: the host lends the masks for the call.
    let run = |executable: &mut ExportedExecutable| executable.provide(Ticket(ticket), unsafe { masks.get() });
    // SAFETY: `compile` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "provide", run, |()| ()) }
}

unsafe extern "C" fn wait(handle: Handle, ticket: u64, outputs: OutputsPtr) -> WireResult<()> {
    // SAFETY: the host lends the outputs for the call.
    let run = |executable: &mut ExportedExecutable| executable.wait(Ticket(ticket), unsafe { outputs.get() });
    // SAFETY: `compile` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "wait", run, |()| ()) }
}

/// A backend in a plugin's memory.
pub(super) struct RemoteBackend {
    remote: Remote,
    api: BackendApiRef,
}

impl RemoteBackend {
    pub fn new(name: &str, object: BackendObject) -> RemoteBackend {
        RemoteBackend { remote: Remote::new(name, object.handle, object.api.drop()), api: object.api }
    }
}

impl Backend for RemoteBackend {
    fn devices(&self) -> Vec<DeviceInfo> {
        // SAFETY: the handle belongs to this table.
        let json = self.remote.call(|handle| unsafe { self.api.devices()(handle) });
        json.and_then(|json| from_json("the list of devices", &json)).unwrap_or_else(|error| {
            self.remote.log(&error);
            Vec::new()
        })
    }

    fn compile(
        &mut self,
        graph: &Graph,
        weights: &[WeightData<'_>],
        options: &CompileOptions,
    ) -> Result<Box<dyn Executable>> {
        let parts: Vec<Vec<RawPart<'_>>> = weights
            .iter()
            .map(|weight| weight.parts.iter().map(|bytes| RawPart { bytes: Column::new(bytes) }).collect())
            .collect();
        let weights: Vec<RawWeight<'_>> = weights
            .iter()
            .zip(&parts)
            .map(|(weight, parts)| RawWeight { dtype: weight.dtype as u32, reserved: 0, parts: Rows::new(parts) })
            .collect();
        // What the model ignores is no concern of a backend, and one from before the field refuses it.
        let graph = Graph { ignored: Vec::new(), ..graph.clone() };
        let (graph, weights, options) = (graph.to_bytes(), Rows::new(&weights), to_json(options)?);
        let compiled = self.remote.call(|handle| {
            let graph = RSlice::from_slice(&graph);
            // SAFETY: the handle belongs to this table, and the borrows outlast the call; the caller keeps
            // the memory behind the weights mapped.
            unsafe { self.api.compile()(handle, graph, WeightsPtr::new(&weights), options.as_rslice()) }
        })?;
        Ok(Box::new(RemoteExecutable::new(self.remote.name(), compiled)?))
    }
}

/// An executable in a plugin's memory.
struct RemoteExecutable {
    remote: Remote,
    info: ExecutableInfo,
    submit: unsafe extern "C" fn(Handle, StepPtr) -> WireResult<u64>,
    provide: unsafe extern "C" fn(Handle, u64, MasksPtr) -> WireResult<()>,
    wait: unsafe extern "C" fn(Handle, u64, OutputsPtr) -> WireResult<()>,
}

impl RemoteExecutable {
    fn new(name: &str, object: ExecutableObject) -> Result<RemoteExecutable> {
        let ExecutableObject { handle, api } = object;
        let remote = Remote::new(name, handle, api.drop());
        // SAFETY: the handle belongs to this table.
        let info = remote.call(|handle| unsafe { api.info()(handle) })?;
        let info = from_json("what the executable says of itself", &info)?;
        Ok(RemoteExecutable { remote, info, submit: api.submit(), provide: api.provide(), wait: api.wait() })
    }
}

impl Executable for RemoteExecutable {
    fn info(&self) -> ExecutableInfo {
        self.info.clone()
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        // SAFETY: the handle belongs to this table, and the step outlasts the call.
        self.remote.call(|handle| unsafe { (self.submit)(handle, StepPtr::new(step)) }).map(Ticket)
    }

    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()> {
        // SAFETY: the handle belongs to this table, and the masks outlast the call.
        self.remote.call(|handle| unsafe { (self.provide)(handle, ticket.0, MasksPtr::new(masks)) })
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        let outputs = OutputsPtr::new(outputs);
        // SAFETY: the handle belongs to this table, and the outputs outlast the call.
        self.remote.call(|handle| unsafe { (self.wait)(handle, ticket.0, outputs) })
    }
}
