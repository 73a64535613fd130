//! KV pages on the device.
//!
//! A page holds its tokens' keys and values of all layers of a group, one layer behind the other, so that a page is
//! copied at once. How a layer lies in it is told in `kernels/attention.cuh`.

use setu_core::backend::CompileOptions;
use setu_core::graph::KvLayer;
use setu_core::{Error, Graph, KvDType, Result};

use crate::gpu::{Device, Memory, pair};

/// Bytes that a thread reads of a key at once.
const PIECE_BYTES: usize = 16;

/// The pages of all groups.
#[derive(Debug)]
pub struct Pages {
    pub page_tokens: usize,
    pub groups: Vec<Group>,
    layers: Vec<Layer>,
}

/// The pages of one KV group.
#[derive(Debug)]
pub struct Group {
    pub pages: u32,
    pub page_bytes: usize,
    memory: Memory,
}

impl Group {
    /// Where page `page` begins.
    pub fn address(&self, page: u32) -> u64 {
        self.memory.address() + u64::from(page) * self.page_bytes as u64
    }
}

/// The place of a layer in its group's pages.
#[derive(Clone, Copy, Debug)]
struct Layer {
    kv: KvLayer,
    /// Elements of a key, those that fill its last piece counted.
    k_padded: usize,
    /// Bytes before its keys in a page, before its values, and before the scales of both.
    k_at: usize,
    v_at: usize,
    scales_at: usize,
}

impl Layer {
    /// Lays a layer out from byte `start` of a page on: also where the next one starts.
    fn new(kv: KvLayer, start: usize, dtype: KvDType, page_tokens: usize) -> (Layer, usize) {
        let element = dtype.element_bytes();
        let k_padded = (kv.k_dim as usize).next_multiple_of(PIECE_BYTES / element);
        let heads = kv.heads as usize * page_tokens;
        let v_at = start + heads * k_padded * element;
        let scales_at = (v_at + heads * kv.v_dim as usize * element).next_multiple_of(PIECE_BYTES);
        let end = (scales_at + heads * 2 * dtype.scale_bytes()).next_multiple_of(PIECE_BYTES);
        (Layer { kv, k_padded, k_at: start, v_at, scales_at }, end)
    }
}

impl Pages {
    /// Lays the pages out and allocates them, within `budget` bytes where the options name no number.
    ///
    /// # Errors
    /// They don't fit; the message has the sum.
    pub fn new(device: &Device, graph: &Graph, options: &CompileOptions, budget: u64) -> Result<Pages> {
        let page_tokens = options.page_tokens as usize;
        let mut page_bytes = vec![0_usize; graph.kv_groups.len()];
        let mut layers = Vec::with_capacity(graph.kv_layers.len());
        for &kv in &graph.kv_layers {
            let end = &mut page_bytes[kv.group as usize];
            let layer;
            (layer, *end) = Layer::new(kv, *end, options.kv_dtype, page_tokens);
            layers.push(layer);
        }
        // Behind the pages lies one of nobody's, for rows that fill a step up.
        let bytes: Vec<u64> = page_bytes.iter().map(|&bytes| bytes as u64).collect();
        let budget = budget.saturating_sub(bytes.iter().sum());
        let advice = "raise [kv] memory or [backend] memory_utilization, lower [engine] max_step_tokens, or free memory on the \
                      device";
        let pages = options.page_counts(graph, &bytes, budget, advice)?;
        let mut groups = Vec::with_capacity(pages.len());
        for ((kv, &page_bytes), &pages) in graph.kv_groups.iter().zip(&page_bytes).zip(&pages) {
            let bytes = page_bytes.checked_mul(pages as usize + 1);
            let bytes =
                bytes.ok_or_else(|| Error::exhausted(format!("{pages} pages of {page_bytes} bytes overflow")))?;
            let memory = device.allocate(bytes, &format!("{pages} KV pages of group `{}`", kv.name))?;
            groups.push(Group { pages, page_bytes, memory });
        }
        Ok(Pages { page_tokens, groups, layers })
    }

    /// Pages of each group.
    pub fn counts(&self) -> Vec<u32> {
        self.groups.iter().map(|group| group.pages).collect()
    }

    pub fn byte_len(&self) -> usize {
        self.groups.iter().map(|group| group.memory.len()).sum()
    }

    /// Elements of a layer's key, as the kernels see it.
    pub fn padded_key(&self, layer: usize) -> usize {
        self.layers[layer].k_padded
    }

    /// The struct `Pages` of `kernels/attention.cuh` for a layer.
    pub fn argument(&self, layer: usize) -> [u64; 8] {
        let Layer { kv, k_padded, k_at, v_at, scales_at } = self.layers[layer];
        let group = &self.groups[kv.group as usize];
        [
            group.memory.address(),
            group.page_bytes as u64,
            k_at as u64,
            v_at as u64,
            scales_at as u64,
            pair(self.page_tokens, kv.heads as usize),
            pair(kv.k_dim as usize, k_padded),
            kv.v_dim.into(),
        ]
    }
}
