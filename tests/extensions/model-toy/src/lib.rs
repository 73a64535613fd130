//! A decoder in which attention and feed-forward read the same norm and run side by side:
//! `x + attention(norm(x)) + down(gelu(up(norm(x))))`, as in GPT-J, with one fused weight for q, k and v.

use setu_core::graph::{ActivationKind, GraphBuilder, KvGroupKind, KvLayer, Op, RopeStyle, RopeTable, Shard};
use setu_core::prelude::*;

/// Nothing to set: the checkpoint says it all.
#[derive(Config, Clone, Debug)]
pub struct ToyConfig {}

pub struct Toy;

impl Component for Toy {
    type Config = ToyConfig;
    const KEY: &'static str = "toy";
    const DESCRIPTION: &'static str = "A decoder with parallel attention and feed-forward.";

    fn build(_: ToyConfig) -> Result<Self> {
        Ok(Toy)
    }
}

impl Model for Toy {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        checkpoint.format == CheckpointFormat::Hf && checkpoint.architecture == "ToyForCausalLM"
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        let vocab = checkpoint.need_count("toy_vocab")?;
        let depth = checkpoint.need_count("toy_depth")?;
        let width = checkpoint.need_count("toy_width")?;
        let heads = checkpoint.need_count("toy_heads")?;
        let length = checkpoint.need_count("toy_context")?;
        let base = checkpoint.number("toy_rope_base")?.unwrap_or(10_000.0);
        if depth > 1024 || width % heads != 0 || (width / heads) % 2 != 0 {
            return Err(Error::invalid(format!(
                "a toy has at most 1024 layers and heads of an even width, not {depth} layers and {heads} heads of a \
                 width of {width}"
            )));
        }
        let head_dim = width / heads;
        let wide = width as usize;
        let mut g = GraphBuilder::new("toy", vocab, options.max_model_len.unwrap_or(length));
        let group = g.kv_group("all", KvGroupKind::Full);
        let inv_freq = (0..head_dim / 2).map(|i| base.powf(-2.0 * f64::from(i) / f64::from(head_dim))).collect();
        let rope = g.rope_table(RopeTable { inv_freq, magnitude: 1.0 });
        let table = g.weight("embed", "embed", &[vocab as usize, wide], Shard::Replicated);
        let mut x = g.embed("embed", table)?;
        for layer in 0..depth {
            x = g.scope(format!("blocks.{layer}"), |g| {
                let source = |name: &str| format!("blocks.{layer}.{name}");
                let norm = g.weight("norm", source("norm"), &[wide], Shard::Replicated);
                let qkv = g.weight("qkv", source("qkv"), &[3 * wide, wide], Shard::Replicated);
                let out = g.weight("out", source("out"), &[wide, wide], Shard::Row);
                let up = g.weight("up", source("up"), &[4 * wide, wide], Shard::Column);
                let down = g.weight("down", source("down"), &[wide, 4 * wide], Shard::Row);

                let normed = g.rms_norm("norm", x, norm, 1e-5)?;
                let qkv = g.linear("qkv", normed, qkv, None)?;
                let q = g.slice("q", qkv, 0, width)?;
                let k = g.slice("k", qkv, width, width)?;
                let v = g.slice("v", qkv, 2 * width, width)?;
                let q = g.rope("rope_q", q, rope, head_dim, RopeStyle::Half)?;
                let k = g.rope("rope_k", k, rope, head_dim, RopeStyle::Half)?;
                let kv = g.kv_layer(KvLayer { group, heads, k_dim: head_dim, v_dim: head_dim });
                let attended = g.attention("attention", [q, k, v], kv, heads, 1.0 / (head_dim as f32).sqrt())?;
                let attended = g.linear("out", attended, out, None)?;

                let hidden = g.linear("up", normed, up, None)?;
                let hidden = g.node("gelu", Op::Activation { kind: ActivationKind::Gelu }, &[hidden])?[0];
                let hidden = g.linear("down", hidden, down, None)?;

                let both = g.add("both", attended, hidden)?;
                g.add("residual", x, both)
            })?;
        }
        let norm = g.weight("norm", "norm", &[wide], Shard::Replicated);
        let x = g.rms_norm("norm", x, norm, 1e-5)?;
        let x = g.select("select", x)?;
        let logits = g.linear("head", x, table, None)?;
        g.output("logits", logits);
        g.finish()
    }
}

setu_core::export_plugin!(model: Toy);
