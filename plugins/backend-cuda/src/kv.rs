//! KV pages on the device.
//!
//! A page holds its tokens' keys and values of all layers of a group, one layer behind the other, so that a page is
//! copied at once. How a layer lies in it is told in `kernels/attention.cuh`.

use setu_core::backend::CompileOptions;
use setu_core::graph::{KvGroupKind, KvLayer};
use setu_core::{Error, Graph, KvDType, Result};

use crate::gpu::{Device, Memory, mib};

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
    /// Tokens that a query sees, itself included; `None`: all before it.
    pub window: Option<u32>,
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
        if options.page_tokens == 0 || options.page_tokens > 1 << 16 {
            return Err(Error::config(format!("page_tokens must be from 1 to 65536, not {}", options.page_tokens)));
        }
        let page_tokens = options.page_tokens as usize;
        let mut page_bytes = vec![0_usize; graph.kv_groups.len()];
        let mut layers = Vec::with_capacity(graph.kv_layers.len());
        for &kv in &graph.kv_layers {
            let end = &mut page_bytes[kv.group as usize];
            let layer;
            (layer, *end) = Layer::new(kv, *end, options.kv_dtype, page_tokens);
            layers.push(layer);
        }
        let pages = page_counts(graph, options, &page_bytes, budget)?;
        let mut groups = Vec::with_capacity(pages.len());
        for ((kv, &page_bytes), &pages) in graph.kv_groups.iter().zip(&page_bytes).zip(&pages) {
            let window = match kv.kind {
                KvGroupKind::Full => None,
                KvGroupKind::SlidingWindow { tokens } => Some(tokens),
                other => {
                    let name = &kv.name;
                    return Err(Error::unsupported(format!(
                        "the CUDA backend doesn't provide KV groups of kind {other:?} (group `{name}`)"
                    )));
                }
            };
            // Behind the pages lies one of nobody's, for rows that fill a step up.
            let bytes = page_bytes.checked_mul(pages as usize + 1);
            let bytes =
                bytes.ok_or_else(|| Error::exhausted(format!("{pages} pages of {page_bytes} bytes overflow")))?;
            let memory = device.allocate(bytes, &format!("{pages} KV pages of group `{}`", kv.name))?;
            groups.push(Group { pages, window, page_bytes, memory });
        }
        Ok(Pages { page_tokens, groups, layers })
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
        let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
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

/// How many pages each group gets.
fn page_counts(graph: &Graph, options: &CompileOptions, page_bytes: &[usize], budget: u64) -> Result<Vec<u32>> {
    let names = || graph.kv_groups.iter().map(|group| group.name.as_str()).collect::<Vec<_>>().join(", ");
    let sum = |pages: &[u32]| -> u128 { pages.iter().zip(page_bytes).map(|(&n, &b)| u128::from(n) * b as u128).sum() };
    let in_mib = |bytes: u128| mib(bytes.try_into().unwrap_or(u64::MAX));
    if !options.kv_pages.is_empty() {
        if options.kv_pages.len() != page_bytes.len() {
            let (given, wanted) = (options.kv_pages.len(), page_bytes.len());
            return Err(Error::config(format!(
                "kv_pages has {given} entries, the model {wanted} KV groups ({})",
                names()
            )));
        }
        let needed = sum(&options.kv_pages);
        if options.kv_bytes > 0 && needed > u128::from(options.kv_bytes) {
            return Err(Error::exhausted(format!(
                "{:?} KV pages need {} MiB, kv_bytes allows {} MiB: raise it or lower kv_pages",
                options.kv_pages,
                in_mib(needed),
                mib(options.kv_bytes)
            )));
        }
        return Ok(options.kv_pages.clone());
    }
    // What the longest sessions could use, all at once; a window's session also holds a step's tokens.
    let most = |group: &setu_core::graph::KvGroup| {
        let tokens = match group.kind {
            KvGroupKind::SlidingWindow { tokens } => {
                options.max_model_len.min(tokens.saturating_add(options.max_tokens))
            }
            _ => options.max_model_len,
        };
        (tokens.div_ceil(options.page_tokens) + 1).saturating_mul(options.max_rows.max(1))
    };
    let most: Vec<u32> = graph.kv_groups.iter().map(most).collect();
    let nobodys = page_bytes.iter().map(|&bytes| bytes as u64).sum();
    let budget = if options.kv_bytes == 0 { budget.saturating_sub(nobodys) } else { options.kv_bytes };
    let needed = sum(&most);
    if needed <= u128::from(budget) {
        return Ok(most);
    }
    let pages: Vec<u32> = most.iter().map(|&pages| (u128::from(pages) * u128::from(budget) / needed) as u32).collect();
    if pages.contains(&0) {
        return Err(Error::exhausted(format!(
            "one KV page of each group ({}) needs {} MiB, there are {} MiB for them: raise kv_bytes or \
             [backend] memory_utilization, lower max_batched tokens, or free memory on the device",
            names(),
            in_mib(sum(&vec![1; pages.len()])),
            mib(budget)
        )));
    }
    Ok(pages)
}
