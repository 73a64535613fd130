//! Models across the boundary: descriptions in and graphs out as bytes, once at load.

use abi_stable::prefix_type::WithMetadata;
use abi_stable::std_types::RSlice;

use super::export::{self, call, drop_handle};
use super::import::Remote;
use super::module::{Exports, ModelApi, ModelApiRef, ModelObject};
use super::wire::{Handle, Json, WireResult, from_json, sent, to_json};
use crate::error::Result;
use crate::graph::Graph;
use crate::model::{CheckpointInfo, GraphOptions, Model};
use crate::registry::Build;

type Exported = Box<dyn Model>;

static API: WithMetadata<ModelApi> = WithMetadata::new(ModelApi { drop: drop_handle::<Exported>, supports, graph });

pub(super) unsafe extern "C" fn build(exports: Exports, index: u32, config: RSlice<'_, u8>) -> WireResult<ModelObject> {
    let built = export::build(exports, index, config, |linked| match linked.build {
        Build::Model(build) => Some(build),
        _ => None,
    });
    sent(built, |handle| ModelObject { handle, api: ModelApiRef(API.static_as_prefix()) })
}

unsafe extern "C" fn supports(handle: Handle, checkpoint: RSlice<'_, u8>) -> WireResult<bool> {
    let run = |model: &mut Exported| Ok(model.supports(&checkpoint_of(checkpoint)?));
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "supports", run, |supports| supports) }
}

unsafe extern "C" fn graph(handle: Handle, checkpoint: RSlice<'_, u8>, options: RSlice<'_, u8>) -> WireResult<Json> {
    let run = |model: &mut Exported| {
        let options: GraphOptions = from_json("the options of the graph", options.as_slice())?;
        Ok(model.graph(&checkpoint_of(checkpoint)?, &options)?.to_bytes())
    };
    // SAFETY: `build` made the handle, and the host makes one call at a time.
    unsafe { call(handle, "graph", run, Json::from) }
}

fn checkpoint_of(bytes: RSlice<'_, u8>) -> Result<CheckpointInfo> {
    from_json("the description of the checkpoint", bytes.as_slice())
}

/// A model in a plugin's memory.
pub(super) struct RemoteModel {
    remote: Remote,
    api: ModelApiRef,
}

impl RemoteModel {
    pub fn new(name: &str, object: ModelObject) -> RemoteModel {
        RemoteModel { remote: Remote::new(name, object.handle, object.api.drop()), api: object.api }
    }
}

impl Model for RemoteModel {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        let supports = to_json(checkpoint).and_then(|checkpoint| {
            // SAFETY: the handle belongs to this table, and the bytes outlast the call.
            self.remote.call(|handle| unsafe { self.api.supports()(handle, checkpoint.as_rslice()) })
        });
        supports.unwrap_or_else(|error| {
            self.remote.log(&error);
            false
        })
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        let (checkpoint, options) = (to_json(checkpoint)?, to_json(options)?);
        let (checkpoint, options) = (checkpoint.as_rslice(), options.as_rslice());
        // SAFETY: the handle belongs to this table, and the bytes outlast the call.
        let bytes = self.remote.call(|handle| unsafe { self.api.graph()(handle, checkpoint, options) })?;
        Graph::from_bytes(&bytes)
    }
}
