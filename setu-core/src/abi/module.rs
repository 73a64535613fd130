//! The tables of functions that a header leads to.
//!
//! All are prefix types: fields are added at the end only, and a host that finds a table shorter than
//! its own sees which are missing. `unsafe` functions are called with handles and pointers as their
//! file says, one call of a handle at a time.

// The macros of abi_stable make types that nobody here names.
#![allow(missing_docs, reason = "generated items")]

use abi_stable::StableAbi;
use abi_stable::library::RootModule;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::RSlice;

use super::wire::{
    ChunksPtr, DecisionsPtr, EventsPtr, Handle, HostPtr, Json, MasksPtr, OutcomePtr, OutputsPtr, ReadyPtr, StepPtr,
    StepViewPtr, WeightsPtr, WireResult,
};
use crate::registry::Linked;

/// The components of one `export_plugin!`, in the plugin's memory.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
#[sabi(unsafe_opaque_fields)]
pub struct Exports {
    first: *const Linked,
    len: usize,
}

// SAFETY: points to statics, which are Sync.
unsafe impl Send for Exports {}
// SAFETY: as above.
unsafe impl Sync for Exports {}

impl Exports {
    pub const fn new(components: &'static [Linked]) -> Exports {
        Exports { first: components.as_ptr(), len: components.len() }
    }

    /// # Safety
    /// It was made in this library.
    pub unsafe fn get(self) -> &'static [Linked] {
        // SAFETY: made from a static slice, of the type that this library knows.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }
}

/// What a header leads to.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = ModuleRef, prefix_fields = ModuleFields)))]
#[sabi(missing_field(panic))]
pub struct Module {
    /// The first argument of all that follow.
    pub exports: Exports,
    /// Connects the library to the host; called before anything else, once for each header.
    pub start: unsafe extern "C" fn(HostPtr) -> WireResult<()>,
    /// The number of components.
    pub count: unsafe extern "C" fn(Exports) -> WireResult<u32>,
    /// The configuration that a component takes.
    pub config: unsafe extern "C" fn(Exports, u32) -> WireResult<Json>,
    pub build_scheduler: unsafe extern "C" fn(Exports, u32, RSlice<'_, u8>) -> WireResult<SchedulerObject>,
    pub build_batcher: unsafe extern "C" fn(Exports, u32, RSlice<'_, u8>) -> WireResult<BatcherObject>,
    pub build_model: unsafe extern "C" fn(Exports, u32, RSlice<'_, u8>) -> WireResult<ModelObject>,
    #[sabi(last_prefix_field)]
    pub build_backend: unsafe extern "C" fn(Exports, u32, RSlice<'_, u8>) -> WireResult<BackendObject>,
}

impl RootModule for ModuleRef {
    abi_stable::declare_root_module_statics! {ModuleRef}
    const BASE_NAME: &'static str = "setu_plugin";
    const NAME: &'static str = "setu_plugin";
    // Versions are compared by the metadata, before anything is loaded.
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("0.1.0");
}

#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct SchedulerObject {
    pub handle: Handle,
    pub api: SchedulerApiRef,
}

#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = SchedulerApiRef, prefix_fields = SchedulerApiFields)))]
#[sabi(missing_field(panic))]
pub struct SchedulerApi {
    pub drop: unsafe extern "C" fn(Handle) -> WireResult<()>,
    pub schedule: unsafe extern "C" fn(Handle, StepViewPtr, DecisionsPtr) -> WireResult<()>,
    #[sabi(last_prefix_field)]
    pub observe: unsafe extern "C" fn(Handle, EventsPtr) -> WireResult<()>,
    /// Returns `SchedulerProperties` as JSON. Since 0.2.
    #[sabi(missing_field(option))]
    pub properties: unsafe extern "C" fn(Handle) -> WireResult<Json>,
}

#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct BatcherObject {
    pub handle: Handle,
    pub api: BatcherApiRef,
}

#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = BatcherApiRef, prefix_fields = BatcherApiFields)))]
#[sabi(missing_field(panic))]
pub struct BatcherApi {
    pub drop: unsafe extern "C" fn(Handle) -> WireResult<()>,
    pub batch: unsafe extern "C" fn(Handle, StepViewPtr, ReadyPtr, ChunksPtr) -> WireResult<()>,
    #[sabi(last_prefix_field)]
    pub observe: unsafe extern "C" fn(Handle, OutcomePtr) -> WireResult<()>,
    /// Returns `BatcherProperties` as JSON. Since 0.2.
    #[sabi(missing_field(option))]
    pub properties: unsafe extern "C" fn(Handle) -> WireResult<Json>,
}

#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct ModelObject {
    pub handle: Handle,
    pub api: ModelApiRef,
}

#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = ModelApiRef, prefix_fields = ModelApiFields)))]
#[sabi(missing_field(panic))]
pub struct ModelApi {
    pub drop: unsafe extern "C" fn(Handle) -> WireResult<()>,
    /// Takes a `CheckpointInfo` as JSON.
    pub supports: unsafe extern "C" fn(Handle, RSlice<'_, u8>) -> WireResult<bool>,
    /// Takes a `CheckpointInfo` and `GraphOptions` as JSON, returns a graph's bytes.
    #[sabi(last_prefix_field)]
    pub graph: unsafe extern "C" fn(Handle, RSlice<'_, u8>, RSlice<'_, u8>) -> WireResult<Json>,
}

#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct BackendObject {
    pub handle: Handle,
    pub api: BackendApiRef,
}

#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = BackendApiRef, prefix_fields = BackendApiFields)))]
#[sabi(missing_field(panic))]
pub struct BackendApi {
    pub drop: unsafe extern "C" fn(Handle) -> WireResult<()>,
    /// Returns a list of `DeviceInfo` as JSON.
    pub devices: unsafe extern "C" fn(Handle) -> WireResult<Json>,
    /// Takes a graph's bytes, its weights, and `CompileOptions` as JSON.
    #[sabi(last_prefix_field)]
    pub compile:
        unsafe extern "C" fn(Handle, RSlice<'_, u8>, WeightsPtr, RSlice<'_, u8>) -> WireResult<ExecutableObject>,
}

#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct ExecutableObject {
    pub handle: Handle,
    pub api: ExecutableApiRef,
}

#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = ExecutableApiRef, prefix_fields = ExecutableApiFields)))]
#[sabi(missing_field(panic))]
pub struct ExecutableApi {
    pub drop: unsafe extern "C" fn(Handle) -> WireResult<()>,
    /// Returns `ExecutableInfo` as JSON.
    pub info: unsafe extern "C" fn(Handle) -> WireResult<Json>,
    /// Returns the ticket.
    pub submit: unsafe extern "C" fn(Handle, StepPtr) -> WireResult<u64>,
    pub provide: unsafe extern "C" fn(Handle, u64, MasksPtr) -> WireResult<()>,
    #[sabi(last_prefix_field)]
    pub wait: unsafe extern "C" fn(Handle, u64, OutputsPtr) -> WireResult<()>,
}
