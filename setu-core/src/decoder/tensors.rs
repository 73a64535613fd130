//! The checkpoint's tensors: under which name each part of the model lies, and whether it is there and of
//! the right shape. Asked before anything is loaded, so that the error names the tensor.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::graph::{GraphBuilder, Shard, WeightId};
use crate::model::{CheckpointFormat, CheckpointInfo};

/// Whether a linear adds a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    Never,
    Always,
    /// Where the checkpoint holds one.
    IfThere,
}

impl Bias {
    /// As Hugging Face's model has it, which knows it or has a flag for it. In GGUF files it shows in the tensors.
    pub fn of(checkpoint: &CheckpointInfo, in_hf: bool) -> Bias {
        match checkpoint.format {
            CheckpointFormat::Gguf => Bias::IfThere,
            CheckpointFormat::Hf if in_hf => Bias::Always,
            CheckpointFormat::Hf => Bias::Never,
        }
    }
}

/// What a model has once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outer {
    Embed,
    /// The norm before the head.
    Norm,
    Head,
}

/// The tensors of a checkpoint by name.
#[derive(Debug)]
pub(super) struct Tensors<'a> {
    pub format: CheckpointFormat,
    /// `model.`, or nothing where only the inner model was saved.
    prefix: &'static str,
    /// Whatever is asked for is there.
    dummy: bool,
    shapes: HashMap<&'a str, &'a [usize]>,
}

impl<'a> Tensors<'a> {
    pub fn new(checkpoint: &'a CheckpointInfo) -> Tensors<'a> {
        let shapes: HashMap<&str, &[usize]> =
            checkpoint.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice())).collect();
        let bare = !shapes.contains_key("model.embed_tokens.weight") && shapes.contains_key("embed_tokens.weight");
        Tensors { format: checkpoint.format, prefix: if bare { "" } else { "model." }, dummy: checkpoint.dummy, shapes }
    }

    pub fn has(&self, name: &str) -> bool {
        self.dummy || self.shapes.contains_key(name)
    }

    pub fn outer(&self, part: Outer) -> String {
        let (hf, gguf) = match part {
            Outer::Embed => (format!("{}embed_tokens", self.prefix), "token_embd"),
            Outer::Norm => (format!("{}norm", self.prefix), "output_norm"),
            Outer::Head => ("lm_head".to_owned(), "output"),
        };
        if self.format == CheckpointFormat::Gguf { format!("{gguf}.weight") } else { format!("{hf}.weight") }
    }

    /// The name of a tensor of layer `layer`.
    pub fn inner(&self, layer: u32, (hf, gguf): (&str, &str), kind: &str) -> String {
        match self.format {
            CheckpointFormat::Gguf => format!("blk.{layer}.{gguf}.{kind}"),
            CheckpointFormat::Hf => format!("{}layers.{layer}.{hf}.{kind}", self.prefix),
        }
    }

    /// That the tensor is there and has this shape.
    ///
    /// # Errors
    /// It isn't or hasn't; the error names it.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        match self.shapes.get(name) {
            None if self.dummy => Ok(()),
            None => Err(Error::invalid(format!("the checkpoint lacks the tensor `{name}` of the shape {shape:?}"))),
            Some(&found) if found != shape => Err(Error::invalid(format!(
                "tensor `{name}` has the shape {found:?}, the hyper-parameters make it {shape:?}"
            ))),
            Some(_) => Ok(()),
        }
    }

    /// Declares a weight that is one tensor.
    ///
    /// # Errors
    /// As for [`check`](Tensors::check).
    pub fn declare(
        &self,
        g: &mut GraphBuilder,
        name: &str,
        source: String,
        shape: &[usize],
        shard: Shard,
    ) -> Result<WeightId> {
        self.check(&source, shape)?;
        Ok(g.weight(name, source, shape, shard))
    }

    /// Leaves out what the hyper-parameters say already, and the head where the embedding serves as one.
    pub fn ignore_known(&self, g: &mut GraphBuilder, tied: bool) {
        let head = self.outer(Outer::Head);
        if tied && self.has(&head) {
            g.ignore(head, "the head is tied to the embedding");
        }
        let mut computed: Vec<&str> =
            self.shapes.keys().copied().filter(|name| name.ends_with("rotary_emb.inv_freq")).collect();
        computed.sort_unstable();
        computed.into_iter().for_each(|name| g.ignore(name, "rotary frequencies follow from the hyper-parameters"));
    }
}
