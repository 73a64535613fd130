//! KV pages.
//!
//! A page holds its tokens' keys and values of all layers of a group, one layer behind the other, so that a page is
//! copied at once and a short session touches little memory. Within a layer each head has its keys in groups
//! of sixteen tokens, dimension by dimension (a vector then holds a dimension of sixteen tokens, and their scores
//! come out one a lane), behind all heads' keys their values, token by token, and behind those, in formats that have scales,
//! for each sixteen tokens the scales of the keys and those of the values.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use setu_core::backend::{CompileOptions, sum_of_pages};
use setu_core::{Error, Graph, KvDType, Result};

use crate::e4m3::E4m3;
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
    /// Whether a token's head has a scale, in a byte.
    const SCALED: bool = false;

    /// The scale of a key's or a value's head.
    fn scale_of(_head: &[f32]) -> u8 {
        0
    }

    /// Elements of a head with this scale.
    fn from_f32(values: &[f32], scale: u8, out: &mut [Self]);
}

impl Element for f32 {
    const DTYPE: KvDType = KvDType::F32;
    fn from_f32(values: &[f32], _: u8, out: &mut [f32]) {
        out.copy_from_slice(values);
    }
}

impl Element for f16 {
    const DTYPE: KvDType = KvDType::F16;
    fn from_f32(values: &[f32], _: u8, out: &mut [f16]) {
        out.convert_from_f32_slice(values);
    }
}

impl Element for bf16 {
    const DTYPE: KvDType = KvDType::BF16;
    fn from_f32(values: &[f32], _: u8, out: &mut [bf16]) {
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
    fn bytes(&self, dtype: KvDType, geometry: Geometry) -> usize {
        let scales = 2 * LANES * geometry.page_groups * dtype.scale_bytes();
        self.heads * ((self.k_head + self.v_head) * dtype.element_bytes() + scales)
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
    scales_at: usize,
}

impl Pages {
    /// Lays the pages out and reserves them.
    ///
    /// # Errors
    /// They are more than `kv_bytes` or the system allow, and the message has the sum; or the format isn't known here.
    pub fn new(graph: &Graph, options: &CompileOptions) -> Result<Pages> {
        if ![f32::DTYPE, f16::DTYPE, bf16::DTYPE, E4m3::DTYPE].contains(&options.kv_dtype) {
            let dtype = options.kv_dtype;
            return Err(Error::unsupported(format!(
                "the CPU backend doesn't keep keys and values in {dtype}: set [kv] dtype"
            )));
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
            page_bytes[group] += layer.bytes(options.kv_dtype, geometry);
            layers.push(layer);
        }
        let bytes: Vec<u64> = page_bytes.iter().map(|&bytes| bytes as u64).collect();
        // A quarter of what is free, but room for one session of full length if half of it suffices.
        let available = crate::machine::available_bytes();
        let session = u64::try_from(sum_of_pages(&options.session_pages(graph), &bytes)).unwrap_or(u64::MAX);
        let budget = (available / 4).max(session.min(available / 2));
        let pages = options.page_counts(graph, &bytes, budget, "raise [kv] memory or free memory")?;
        let mut groups = Vec::with_capacity(pages.len());
        for ((kv, &page_bytes), &pages) in graph.kv_groups.iter().zip(&page_bytes).zip(&pages) {
            let bytes = page_bytes.checked_mul(pages as usize);
            let bytes =
                bytes.ok_or_else(|| Error::exhausted(format!("{pages} pages of {page_bytes} bytes overflow")))?;
            let region = Region::zeroed(bytes, &format!("{pages} KV pages of group `{}`", kv.name))?;
            region.prefer_huge_pages();
            groups.push(Group { pages, window: kv.kind.window(), page_bytes, region });
        }
        Ok(Pages { geometry, dtype: options.kv_dtype, groups, layers })
    }

    /// Pages of each group.
    pub fn counts(&self) -> Vec<u32> {
        self.groups.iter().map(|group| group.pages).collect()
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
        let all = layer.start + layer.heads * (layer.k_head + layer.v_head) * size_of::<E>();
        let scales = all + head * 2 * LANES * self.geometry.page_groups;
        Head {
            start: group.region.as_ptr().wrapping_add(keys),
            page_bytes: group.page_bytes,
            pages: group.pages,
            geometry: self.geometry,
            k_dim: layer.k_dim,
            v_dim: layer.v_dim,
            v_stride: layer.v_stride,
            values_at: values - keys,
            scales_at: scales - keys,
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

    /// The scales of group `group` of the page: of sixteen keys, then of their values. For elements that are `SCALED`.
    ///
    /// # Panics
    /// There is no such page or group.
    #[inline(always)]
    pub fn scales(&self, page: u32, group: usize) -> *mut u8 {
        assert!(page < self.pages && group < self.geometry.page_groups, "a page of the group");
        let page = self.start.wrapping_add(page as usize * self.page_bytes + self.scales_at);
        page.wrapping_add(group * 2 * LANES)
    }

    /// Stores a token's key and value.
    ///
    /// # Safety
    /// `E` is the pages' element type and no other thread may use this token of this head meanwhile.
    pub unsafe fn store<E: Element>(&self, page: u32, token: usize, key: &[f32], value: &[f32]) {
        assert!(key.len() == self.k_dim && value.len() == self.v_dim, "a key and a value of this head");
        let keys = self.keys::<E>(page, token / LANES).wrapping_add(token % LANES);
        let values = self.values::<E>(page, token);
        let (key_scale, value_scale) = (E::scale_of(key), E::scale_of(value));
        // SAFETY: `keys`, `values` and scales lie in the page, with room for the dimensions; the caller keeps others out.
        unsafe {
            if E::SCALED {
                let scales = self.scales(page, token / LANES).wrapping_add(token % LANES);
                scales.write(key_scale);
                scales.add(LANES).write(value_scale);
            }
            for (part, key) in key.chunks(LANES).enumerate() {
                let mut elements = [E::default(); LANES];
                E::from_f32(key, key_scale, &mut elements[..key.len()]);
                for (dim, &element) in elements[..key.len()].iter().enumerate() {
                    keys.add((part * LANES + dim) * LANES).write(element);
                }
            }
            E::from_f32(value, value_scale, std::slice::from_raw_parts_mut(values, value.len()));
        }
    }
}
