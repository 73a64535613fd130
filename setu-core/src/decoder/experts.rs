//! Mixtures of experts: a router, and feed-forwards whose matrices lie in a tensor for all experts or in one for each.

use super::keys::{count_or_zero, lacks};
use super::layer::Layer;
use super::{Bias, Family, Hyper, Part};
use crate::error::{Error, Result};
use crate::graph::{GraphBuilder, Shard, Tensor, WeightId};
use crate::model::{CheckpointFormat, CheckpointInfo};

/// How many experts a layer has, and how many of them a token uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    pub count: u32,
    pub used: u32,
}

/// One of the matrices of all experts of a layer. A `*` stands for the expert's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertPart {
    /// Name within the layer.
    pub name: &'static str,
    /// Name within `model.layers.N` of an expert's matrix in Hugging Face's checkpoints.
    pub hf: &'static str,
    /// Name within `blk.N` of the tensor of all experts' in GGUF files.
    pub gguf: &'static str,
    /// Name within `blk.N` of an expert's matrix in older GGUF files.
    pub gguf_each: &'static str,
}

impl Experts {
    /// Those of a mixture: `num_local_experts` and `num_experts_per_tok` of `config.json`, `expert_count` and
    /// `expert_used_count` of GGUF.
    ///
    /// # Errors
    /// A key is missing, or more experts are used than there are.
    pub fn read(family: &Family, checkpoint: &CheckpointInfo) -> Result<Experts> {
        let (count_key, used_key) = match checkpoint.format {
            CheckpointFormat::Hf => ("num_local_experts".to_owned(), "num_experts_per_tok".to_owned()),
            CheckpointFormat::Gguf => (family.key("expert_count"), family.key("expert_used_count")),
        };
        let need = |key: &str| checkpoint.count(key)?.ok_or_else(|| lacks(key));
        let experts = Experts { count: need(&count_key)?, used: need(&used_key)? };
        if experts.used > experts.count {
            let Experts { count, used } = experts;
            return Err(Error::invalid(format!("`{used_key}` {used} is more than `{count_key}` {count}")));
        }
        Ok(experts)
    }
}

/// Refuses the GGUF file of a mixture of experts, for models whose name it shares.
///
/// # Errors
/// The file has experts.
pub fn require_dense(family: &Family, checkpoint: &CheckpointInfo) -> Result<()> {
    let key = family.key("expert_count");
    match count_or_zero(checkpoint, &key)? {
        None | Some(0) => Ok(()),
        Some(count) => {
            Err(Error::unsupported(format!("`{key}` is {count}: a mixture of experts is not model {}", family.name)))
        }
    }
}

impl Layer<'_> {
    /// The feed-forwards of the experts that `router` chooses for each row, weighted by a softmax over the chosen ones;
    /// `parts` are gate, up and down.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn experts(
        &self,
        g: &mut GraphBuilder,
        router: Part,
        [gate, up, down]: [ExpertPart; 3],
        x: Tensor,
        experts: Experts,
    ) -> Result<Tensor> {
        let &Hyper { ffn, hidden, activation, .. } = self.hyper;
        let logits = self.linear(g, router, x, experts.count, Bias::Never)?;
        let routing = g.route("moe.route", logits, experts.used)?;
        let weights = [
            self.stacked(g, gate, experts.count, [ffn, hidden])?,
            self.stacked(g, up, experts.count, [ffn, hidden])?,
            self.stacked(g, down, experts.count, [hidden, ffn])?,
        ];
        g.experts("moe.experts", activation, weights, x, routing)
    }

    fn stacked(&self, g: &mut GraphBuilder, part: ExpertPart, count: u32, [out, cols]: [u32; 2]) -> Result<WeightId> {
        let shape = [count as usize, out as usize, cols as usize];
        let whole = self.tensors.inner(self.index, (part.hf, part.gguf), "weight");
        if self.tensors.format == CheckpointFormat::Gguf && self.tensors.has(&whole) {
            return self.tensors.declare(g, part.name, whole, &shape, Shard::Expert);
        }
        let mut sources = Vec::new();
        for expert in 0..count {
            let number = expert.to_string();
            let names = (part.hf.replace('*', &number), part.gguf_each.replace('*', &number));
            let source = self.tensors.inner(self.index, (&names.0, &names.1), "weight");
            self.tensors.check(&source, &shape[1..])?;
            sources.push(source);
        }
        Ok(g.stacked_weight(part.name, sources, &shape, Shard::Expert))
    }
}
