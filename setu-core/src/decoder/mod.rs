//! What decoder-only models share, for authors of model components.
//!
//! A component reads hyper-parameters ([`Hyper`], [`Context`], [`Windows`]) and then writes its layers down piece by
//! piece ([`Decoder`], [`Layer`]); the pieces know the names of tensors in both formats of checkpoints ([`Part`]),
//! check their shapes before anything is loaded, and say in errors which key or tensor is at fault. No piece is
//! obligatory: a model that differs somewhere calls [`GraphBuilder`](crate::graph::GraphBuilder) there.
//!
//! A whole model:
//!
//! ```
//! use setu_core::decoder::{Bias, Context, Decoder, Family, Hyper, Windows, part};
//! use setu_core::graph::{Graph, GraphBuilder};
//! use setu_core::model::{CheckpointInfo, GraphOptions};
//! use setu_core::Result;
//!
//! const FAMILY: Family = Family { name: "mine", gguf: "mine", ..Family::LLAMA };
//!
//! fn build(checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
//!     let hyper = &Hyper::read(&FAMILY, checkpoint)?;
//!     let context = Context::read(&FAMILY, checkpoint, hyper)?;
//!     let windows = Windows::uniform(&FAMILY, checkpoint, None)?;
//!     let max_model_len = context.model_len(options.max_model_len)?;
//!     let mut g = GraphBuilder::new(FAMILY.name, hyper.vocab_size, max_model_len);
//!     let rope = context.rope(&mut g);
//!     let decoder = Decoder::new(checkpoint, hyper);
//!     let (table, mut x) = decoder.embed(&mut g)?;
//!     for index in 0..hyper.layers {
//!         let kv_group = windows.kv_group(&mut g, index);
//!         x = decoder.layer(&mut g, index, |g, layer| {
//!             let normed = layer.norm(g, part::ATTN_NORM, x)?;
//!             let [q, k, v] = layer.qkv(g, normed, Bias::Never)?;
//!             let [q, k] = layer.rope(g, [q, k], rope)?;
//!             let attended = layer.attend(g, [q, k, v], kv_group)?;
//!             let attended = layer.linear(g, part::O, attended, hyper.hidden, Bias::Never)?;
//!             let x = g.add("attn_add", x, attended)?;
//!             let normed = layer.norm(g, part::MLP_NORM, x)?;
//!             let fed = layer.mlp(g, normed, Bias::Never)?;
//!             g.add("mlp_add", x, fed)
//!         })?;
//!     }
//!     decoder.head(&mut g, x, table)?;
//!     g.finish()
//! }
//! ```

mod context;
mod experts;
mod hyper;
mod keys;
mod layer;
pub mod part;
mod rope;
mod tensors;
mod windows;

use crate::graph::RopeStyle;

pub use context::{Context, Rotary};
pub use experts::{ExpertPart, Experts, require_dense};
pub use hyper::Hyper;
pub use layer::{Decoder, Layer};
pub use part::Part;
pub use rope::{Llama3, LongRope, Rope, Scaling, Yarn, longrope_attention_factor, yarn_attention_factor};
pub use tensors::Bias;
pub use windows::{Windows, gguf_window};

/// What the checkpoints of a family have in common: names, and what its reference implementation takes for keys that a
/// checkpoint leaves out.
///
/// Start from one that is there, `Family { name: "mine", ..Family::LLAMA }`, since fields are added.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Family {
    /// The model component's key, which errors name.
    pub name: &'static str,
    /// What GGUF's keys begin with, such as `llama` in `llama.block_count`.
    pub gguf: &'static str,
    /// How GGUF files order the columns of Q and K.
    pub gguf_rope_style: RopeStyle,
    /// `max_position_embeddings` where `config.json` has none.
    pub max_position_embeddings: u32,
    /// `rms_norm_eps` where `config.json` has none.
    pub rms_norm_eps: f64,
    /// `rope_theta` where `config.json` has none.
    pub rope_theta: f64,
    /// The values of `rope_type` that the family knows.
    pub rope_types: &'static [&'static str],
    /// Whether `partial_rotary_factor` may leave columns of a head unrotated.
    pub partial_rotary: bool,
}

impl Family {
    /// Llama. Writers of GGUF permute the rows of its Q and K so that the columns of a pair lie side by side.
    pub const LLAMA: Family = Family {
        name: "llama",
        gguf: "llama",
        gguf_rope_style: RopeStyle::Interleaved,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_types: &["default", "linear", "dynamic", "yarn", "llama3"],
        partial_rotary: false,
    };

    /// A key of GGUF's: `block_count` gives `llama.block_count`.
    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.gguf)
    }
}
