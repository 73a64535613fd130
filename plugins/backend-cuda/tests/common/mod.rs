//! Backends on the emulated driver, and a model for them.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::path::Path;
use std::sync::Once;

use setu_backend_cuda::{CudaBackend, CudaConfig};
use setu_core::component::Component;
use setu_core::graph::{Graph, GraphBuilder, KvGroupKind, KvLayer, RopeStyle, RopeTable, Shard};
use setu_core::{Backend, Result};

/// Tokens of the models' vocabulary, and the longest session.
pub const VOCAB: u32 = 50;
pub const MAX_LEN: u32 = 448;

/// Where the emulated driver is built.
pub fn folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// A backend on the emulated driver, or on a GPU.
///
/// # Panics
/// The driver isn't there.
pub fn backend() -> Box<dyn Backend> {
    backend_with(CudaConfig::default())
}

/// One that gives a token the same bits whatever runs beside it.
///
/// # Panics
/// The driver isn't there.
pub fn invariant() -> Box<dyn Backend> {
    backend_with(CudaConfig { batch_invariant: true, ..CudaConfig::default() })
}

/// One that launches every step kernel by kernel.
///
/// # Panics
/// The driver isn't there.
pub fn without_graphs() -> Box<dyn Backend> {
    backend_with(CudaConfig { graphs: false, ..CudaConfig::default() })
}

/// One that computes products with the kernels for any GPU.
///
/// # Panics
/// The driver isn't there.
pub fn portable() -> Box<dyn Backend> {
    backend_with(CudaConfig { portable: true, ..CudaConfig::default() })
}

/// With `SETU_TEST_GPU` in the environment the driver is whichever the machine has.
fn backend_with(config: CudaConfig) -> Box<dyn Backend> {
    static ONCE: Once = Once::new();
    if std::env::var_os("SETU_TEST_GPU").is_none() {
        ONCE.call_once(|| setu_cuemu::load(folder()));
    }
    Box::new(CudaBackend::build(config).expect("the driver has a device"))
}

/// The heads of a model.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub heads: u32,
    pub kv_heads: u32,
    pub k_dim: u32,
    pub v_dim: u32,
    pub window: Option<u32>,
}

/// How columns of a head are turned: so many pairs of them, if any.
#[derive(Clone, Copy, Debug)]
pub struct Turns {
    pub style: RopeStyle,
    pub pairs: u32,
}

/// Two layers of attention between an embedding and a head, with whole heads turned.
pub fn model(shape: Heads) -> Result<Graph> {
    turned_model(shape, Turns { style: RopeStyle::Half, pairs: shape.k_dim / 2 })
}

/// The same, turned in another way.
pub fn turned_model(shape: Heads, Turns { style, pairs }: Turns) -> Result<Graph> {
    let Heads { heads, kv_heads, k_dim, v_dim, window } = shape;
    let mut g = GraphBuilder::new("attention", VOCAB, MAX_LEN);
    let kind = window.map_or(KvGroupKind::Full, |tokens| KvGroupKind::SlidingWindow { tokens });
    let group = g.kv_group("group", kind);
    let inv_freq = (0..pairs.max(1)).map(|i| 100f64.powf(-2.0 * f64::from(i) / f64::from(k_dim))).collect();
    let rope = g.rope_table(RopeTable { inv_freq, magnitude: 1.0 });
    let hidden = 32;
    let table = g.weight("embed", "embed", &[VOCAB as usize, hidden], Shard::Replicated);
    let mut x = g.embed("embed", table)?;
    for layer in 0..2 {
        x = g.scope(format!("layers.{layer}"), |g| {
            let linear = |g: &mut GraphBuilder, name: &str, x, rows: u32, cols: usize| {
                let source = format!("{layer}.{name}");
                let weight = g.weight(name, source, &[rows as usize, cols], Shard::Replicated);
                g.linear(name, x, weight, None)
            };
            let q = linear(g, "q", x, heads * k_dim, hidden)?;
            let k = linear(g, "k", x, kv_heads * k_dim, hidden)?;
            let v = linear(g, "v", x, kv_heads * v_dim, hidden)?;
            let mut turn = |name: &str, x| if pairs > 0 { g.rope(name, x, rope, k_dim, style) } else { Ok(x) };
            let (q, k) = (turn("rope_q", q)?, turn("rope_k", k)?);
            let kv = g.kv_layer(KvLayer { group, heads: kv_heads, k_dim, v_dim });
            let attended = g.attention("attend", [q, k, v], kv, heads, 1.0 / (k_dim as f32).sqrt())?;
            let out = linear(g, "o", attended, hidden as u32, (heads * v_dim) as usize)?;
            g.add("add", x, out)
        })?;
    }
    let x = g.select("select", x)?;
    let head = g.weight("head", "head", &[VOCAB as usize, hidden], Shard::Replicated);
    let logits = g.linear("head", x, head, None)?;
    g.output("logits", logits);
    g.finish()
}
