//! KV pages.
//!
//! A page holds its tokens' keys and values of all layers of a group, one layer behind the other, so that a page is
//! copied at once and a short session touches little memory. Within a layer each head has its keys in groups
//! of sixteen tokens, dimension by dimension (a vector then holds a dimension of sixteen tokens, and their scores
//! come out one a lane), and behind all heads' keys their values, token by token.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use setu_core::backend::CompileOptions;
use setu_core::graph::KvGroupKind;
use setu_core::{Error, Graph, KvDType, Result};

use crate::memory::Region;
use crate::vector::LANES;

/// Where tokens lie in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub page_tokens: usize,
    /// Groups of up to sixteen tokens in a page.
    pub page_groups: usize,
}

impl Geometry {
    fn new(page_tokens: usize) -> Geometry {
        Geometry { page_tokens, page_groups: page_tokens.div_ceil(LANES) }
    }

    /// The group of sixteen that the token at `position` belongs to, counted from the sequence's start.
    pub fn group_of(&self, position: usize) -> usize {
        position / self.page_tokens * self.page_groups + position % self.page_tokens / LANES
    }

    /// The positions of a group's tokens.
    pub fn positions(&self, group: usize) -> std::ops::Range<usize> {
        let in_page = group % self.page_groups * LANES;
        let start = group / self.page_groups * self.page_tokens + in_page;
        start..start + LANES.min(self.page_tokens - in_page)
    }
}

/// An element of a page.
pub trait Element: Copy + Default + Send + Sync + 'static {
    const DTYPE: KvDType;
    fn from_f32(values: &[f32], out: &mut [Self]);
}

impl Element for f32 {
    const DTYPE: KvDType = KvDType::F32;
    fn from_f32(values: &[f32], out: &mut [f32]) {
        out.copy_from_slice(values);
    }
}

impl Element for f16 {
    const DTYPE: KvDType = KvDType::F16;
    fn from_f32(values: &[f32], out: &mut [f16]) {
        out.convert_from_f32_slice(values);
    }
}

impl Element for bf16 {
    const DTYPE: KvDType = KvDType::BF16;
    fn from_f32(values: &[f32], out: &mut [bf16]) {
        out.convert_from_f32_slice(values);
    }
}

/// The pages of all groups.
#[derive(Debug)]
pub struct Pages {
    pub geometry: Geometry,
    pub dtype: KvDType,
    pub groups: Vec<Group>,
    layers: Vec<Layer>,
}

/// The pages of one KV group.
#[derive(Debug)]
pub struct Group {
    pub pages: u32,
    /// Tokens that a query sees, itself included; `None`: all before it.
    pub window: Option<u32>,
    page_bytes: usize,
    region: Region,
}

/// The place of a layer in its group's pages; sizes in elements.
#[derive(Clone, Copy, Debug)]
struct Layer {
    group: usize,
    heads: usize,
    k_dim: usize,
    v_dim: usize,
    v_stride: usize,
    /// Bytes before this layer's keys in a page.
    start: usize,
    /// Elements of one head's keys in a page, and of its values.
    k_head: usize,
    v_head: usize,
}

impl Layer {
    fn elements(&self) -> usize {
        self.heads * (self.k_head + self.v_head)
    }
}

/// One head of one layer, for reading and writing pages.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    start: *mut u8,
    page_bytes: usize,
    pages: u32,
    pub geometry: Geometry,
    pub k_dim: usize,
    pub v_dim: usize,
    /// Elements from one token's values to the next's.
    pub v_stride: usize,
    values_at: usize,
}

impl Pages {
    /// Lays the pages out and reserves them.
    ///
    /// # Errors
    /// They are more than `kv_bytes` or the system allow; the message has the sum.
    pub fn new(graph: &Graph, options: &CompileOptions) -> Result<Pages> {
        let element = match options.kv_dtype {
            KvDType::F32 | KvDType::F16 | KvDType::BF16 => options.kv_dtype.element_bytes(),
            other => {
                return Err(Error::unsupported(format!(
                    "the CPU backend keeps keys and values in F32, F16 or BF16, not in {other}: set [kv] dtype to one of those"
                )));
            }
        };
        if options.page_tokens == 0 || options.page_tokens > 1 << 16 {
            return Err(Error::config(format!("page_tokens must be from 1 to 65536, not {}", options.page_tokens)));
        }
        let geometry = Geometry::new(options.page_tokens as usize);
        let mut page_bytes = vec![0_usize; graph.kv_groups.len()];
        let mut layers = Vec::with_capacity(graph.kv_layers.len());
        for kv in &graph.kv_layers {
            let group = kv.group as usize;
            let (k_dim, v_dim) = (kv.k_dim as usize, kv.v_dim as usize);
            let v_stride = v_dim.next_multiple_of(LANES);
            let layer = Layer {
                group,
                heads: kv.heads as usize,
                k_dim,
                v_dim,
                v_stride,
                start: page_bytes[group],
                k_head: geometry.page_groups * LANES * k_dim,
                v_head: geometry.page_tokens * v_stride,
            };
            page_bytes[group] += layer.elements() * element;
            layers.push(layer);
        }
        let pages = page_counts(graph, options, &page_bytes)?;
        let mut groups = Vec::with_capacity(pages.len());
        for ((kv, &page_bytes), &pages) in graph.kv_groups.iter().zip(&page_bytes).zip(&pages) {
            let window = match kv.kind {
                KvGroupKind::Full => None,
                KvGroupKind::SlidingWindow { tokens } => Some(tokens),
                other => {
                    return Err(Error::unsupported(format!(
                        "the CPU backend doesn't provide KV groups of kind {other:?} (group `{}`)",
                        kv.name
                    )));
                }
            };
            let bytes = page_bytes.checked_mul(pages as usize);
            let bytes =
                bytes.ok_or_else(|| Error::exhausted(format!("{pages} pages of {page_bytes} bytes overflow")))?;
            let region = Region::zeroed(bytes, &format!("{pages} KV pages of group `{}`", kv.name))?;
            region.prefer_huge_pages();
            groups.push(Group { pages, window, page_bytes, region });
        }
        Ok(Pages { geometry, dtype: options.kv_dtype, groups, layers })
    }

    pub fn byte_len(&self) -> usize {
        self.groups.iter().map(|group| group.region.len()).sum()
    }

    /// A head's keys and values.
    ///
    /// # Panics
    /// There is no such layer or head, or pages have another element type.
    pub fn head<E: Element>(&self, layer: usize, head: usize) -> Head {
        assert_eq!(E::DTYPE, self.dtype, "the pages' element type");
        let layer = &self.layers[layer];
        assert!(head < layer.heads, "a head of the layer");
        let group = &self.groups[layer.group];
        let keys = layer.start + head * layer.k_head * size_of::<E>();
        let values = layer.start + (layer.heads * layer.k_head + head * layer.v_head) * size_of::<E>();
        Head {
            start: group.region.as_ptr().wrapping_add(keys),
            page_bytes: group.page_bytes,
            pages: group.pages,
            geometry: self.geometry,
            k_dim: layer.k_dim,
            v_dim: layer.v_dim,
            v_stride: layer.v_stride,
            values_at: values - keys,
        }
    }

    /// Copies a page of `group`.
    ///
    /// # Safety
    /// No other thread may use the pages meanwhile.
    ///
    /// # Panics
    /// There are no such pages.
    pub unsafe fn copy(&self, group: u32, from: u32, to: u32) {
        let group = &self.groups[group as usize];
        assert!(from < group.pages && to < group.pages, "pages of the group");
        let page = |index: u32| group.region.as_ptr().wrapping_add(index as usize * group.page_bytes);
        // SAFETY: both pages lie in the region, and the caller keeps others out; a page may be copied to itself.
        unsafe { std::ptr::copy(page(from), page(to), group.page_bytes) };
    }
}

impl Head {
    /// The keys of group `group` of the page: `k_dim` times sixteen tokens.
    ///
    /// # Panics
    /// There is no such page or group.
    #[inline(always)]
    pub fn keys<E: Element>(&self, page: u32, group: usize) -> *mut E {
        assert!(page < self.pages && group < self.geometry.page_groups, "a page of the group");
        let page = self.start.wrapping_add(page as usize * self.page_bytes);
        page.cast::<E>().wrapping_add(group * LANES * self.k_dim)
    }

    /// The values of the page's token `token`; those of the tokens behind it follow.
    ///
    /// # Panics
    /// There is no such page or token.
    #[inline(always)]
    pub fn values<E: Element>(&self, page: u32, token: usize) -> *mut E {
        assert!(page < self.pages && token < self.geometry.page_tokens, "a token of the page");
        let page = self.start.wrapping_add(page as usize * self.page_bytes + self.values_at);
        page.cast::<E>().wrapping_add(token * self.v_stride)
    }

    /// Stores a token's key and value.
    ///
    /// # Safety
    /// `E` is the pages' element type and no other thread may use this token of this head meanwhile.
    pub unsafe fn store<E: Element>(&self, page: u32, token: usize, key: &[f32], value: &[f32]) {
        assert!(key.len() == self.k_dim && value.len() == self.v_dim, "a key and a value of this head");
        let keys = self.keys::<E>(page, token / LANES).wrapping_add(token % LANES);
        let values = self.values::<E>(page, token);
        // SAFETY: `keys` and `values` lie in the page, with room for the dimensions; the caller keeps others out.
        unsafe {
            for (part, key) in key.chunks(LANES).enumerate() {
                let mut elements = [E::default(); LANES];
                E::from_f32(key, &mut elements[..key.len()]);
                for (dim, &element) in elements[..key.len()].iter().enumerate() {
                    keys.add((part * LANES + dim) * LANES).write(element);
                }
            }
            E::from_f32(value, std::slice::from_raw_parts_mut(values, value.len()));
        }
    }
}

/// How many pages each group gets.
fn page_counts(graph: &Graph, options: &CompileOptions, page_bytes: &[usize]) -> Result<Vec<u32>> {
    let names = || graph.kv_groups.iter().map(|group| group.name.as_str()).collect::<Vec<_>>().join(", ");
    let sum = |pages: &[u32]| -> u128 { pages.iter().zip(page_bytes).map(|(&n, &b)| u128::from(n) * b as u128).sum() };
    let mib = |bytes: u128| bytes.div_ceil(1 << 20);
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
                mib(needed),
                mib(options.kv_bytes.into())
            )));
        }
        return Ok(options.kv_pages.clone());
    }
    // What the longest sessions could use, all at once; a window's session also holds a step's tokens.
    let most: Vec<u32> = graph
        .kv_groups
        .iter()
        .map(|group| {
            let tokens = match group.kind {
                KvGroupKind::SlidingWindow { tokens } => {
                    options.max_model_len.min(tokens.saturating_add(options.max_tokens))
                }
                _ => options.max_model_len,
            };
            (tokens.div_ceil(options.page_tokens) + 1).saturating_mul(options.max_rows.max(1))
        })
        .collect();
    let one = most.iter().map(|&pages| pages / options.max_rows.max(1)).collect::<Vec<_>>();
    let available = u128::from(crate::machine::available_bytes());
    let budget = match options.kv_bytes {
        // A quarter of what is free, but room for one session of full length if half of it suffices.
        0 => (available / 4).max(sum(&one).min(available / 2)),
        bytes => bytes.into(),
    };
    let needed = sum(&most);
    if needed <= budget {
        return Ok(most);
    }
    let pages: Vec<u32> = most.iter().map(|&pages| (u128::from(pages) * budget / needed) as u32).collect();
    if pages.contains(&0) {
        return Err(Error::exhausted(format!(
            "one KV page of each group ({}) needs {} MiB, there are {} MiB for them: raise kv_bytes or free memory",
            names(),
            mib(sum(&vec![1; pages.len()])),
            mib(budget)
        )));
    }
    Ok(pages)
}
