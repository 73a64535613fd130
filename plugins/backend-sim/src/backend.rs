//! The component: accepts any graph and gives it pages without memory.

use setu_core::backend::{Backend, CompileOptions, DeviceInfo, Executable, ExecutableInfo, WeightData};
use setu_core::component::Component;
use setu_core::graph::{KvGroupKind, Op};
use setu_core::{Error, Graph, Result};

use crate::config::SimConfig;
use crate::executable::SimExecutable;
use crate::step::Limits;
use crate::time::StepTimes;

/// Most pages of a KV group unless somebody asks for more: the engine keeps books of each.
const MOST_PAGES: u32 = 1 << 20;

/// Says how long steps would take.
#[derive(Clone, Debug)]
pub struct SimBackend {
    config: SimConfig,
}

impl Component for SimBackend {
    type Config = SimConfig;
    const KEY: &'static str = "sim";
    const DESCRIPTION: &'static str = "Executes nothing and says how long steps would take, on a virtual clock.";

    fn build(config: SimConfig) -> Result<Self> {
        Ok(SimBackend { config })
    }
}

impl Backend for SimBackend {
    fn devices(&self) -> Vec<DeviceInfo> {
        let SimConfig { base_us, prefill_token_us, decode_us, .. } = self.config;
        let features = format!("{base_us} µs a step, {prefill_token_us} µs a prefill token, {decode_us} µs a decode");
        vec![DeviceInfo { name: "simulated device".to_owned(), features, memory_bytes: 0, free_bytes: 0 }]
    }

    fn compile(
        &mut self,
        graph: &Graph,
        weights: &[WeightData<'_>],
        options: &CompileOptions,
    ) -> Result<Box<dyn Executable>> {
        graph.verify()?;
        if let Some(node) = graph.nodes.iter().find(|node| matches!(node.op, Op::Custom { .. })) {
            return Err(Error::unsupported(format!("the op {} of node {} is not known", node.op.name(), node.name)));
        }
        if options.page_tokens == 0 || options.max_tokens == 0 || options.max_rows == 0 {
            return Err(Error::contract("page_tokens, max_tokens and max_rows must be over 0"));
        }
        if options.max_model_len > graph.max_model_len {
            let (asked, most) = (options.max_model_len, graph.max_model_len);
            return Err(Error::config(format!("sessions of {asked} tokens are longer than the graph's {most}")));
        }
        let page_bytes = page_bytes(graph, options);
        let kv_pages = page_counts(graph, options, &page_bytes, self.config.kv_pages)?;
        let info = ExecutableInfo {
            max_in_flight: self.config.max_in_flight,
            weight_bytes: weights.iter().flat_map(|weight| &weight.parts).map(|part| part.len() as u64).sum(),
            kv_bytes: u64::try_from(sum(&kv_pages, &page_bytes)).unwrap_or(u64::MAX),
            workspace_bytes: 0,
            batch_invariant: true,
            virtual_time: true,
            kv_pages,
        };
        let windows = graph.kv_groups.iter().map(|group| match group.kind {
            KvGroupKind::SlidingWindow { tokens } => Some(tokens),
            _ => None,
        });
        let limits = Limits {
            tokens: options.max_tokens,
            rows: options.max_rows,
            slots: options.max_slots,
            model_len: options.max_model_len,
            vocab: graph.vocab_size,
            page_tokens: options.page_tokens,
            groups: info.kv_pages.iter().copied().zip(windows).collect(),
        };
        Ok(Box::new(SimExecutable::new(info, limits, StepTimes::new(&self.config))))
    }
}

/// What a page of each KV group would take.
fn page_bytes(graph: &Graph, options: &CompileOptions) -> Vec<u64> {
    let groups = 0..graph.kv_groups.len() as u32;
    groups.map(|group| u64::from(options.page_tokens) * graph.kv_token_bytes(group, options.kv_dtype) as u64).collect()
}

fn sum(pages: &[u32], page_bytes: &[u64]) -> u128 {
    pages.iter().zip(page_bytes).map(|(&pages, &bytes)| u128::from(pages) * u128::from(bytes)).sum()
}

/// How many pages each group gets; `configured` is the backend's own setting, 0 for none.
fn page_counts(graph: &Graph, options: &CompileOptions, page_bytes: &[u64], configured: u32) -> Result<Vec<u32>> {
    let groups = graph.kv_groups.len();
    let limit = if options.kv_bytes == 0 { u128::MAX } else { options.kv_bytes.into() };
    if !options.kv_pages.is_empty() || configured > 0 {
        let pages = if options.kv_pages.is_empty() { vec![configured; groups] } else { options.kv_pages.clone() };
        if pages.len() != groups {
            return Err(Error::config(format!("kv_pages has {} entries, the model {groups} KV groups", pages.len())));
        }
        let needed = sum(&pages, page_bytes);
        if needed > limit {
            return Err(Error::exhausted(format!(
                "{pages:?} KV pages would take {needed} bytes, [kv] memory allows {limit}: raise it or lower kv_pages"
            )));
        }
        return Ok(pages);
    }
    // What the longest sessions of a step could use; a window's session also holds a step's tokens.
    let most = graph.kv_groups.iter().map(|group| {
        let tokens = match group.kind {
            KvGroupKind::SlidingWindow { tokens } => {
                options.max_model_len.min(tokens.saturating_add(options.max_tokens))
            }
            _ => options.max_model_len,
        };
        (tokens.div_ceil(options.page_tokens) + 1).saturating_mul(options.max_rows).min(MOST_PAGES)
    });
    let most: Vec<u32> = most.collect();
    let needed = sum(&most, page_bytes);
    if needed <= limit {
        return Ok(most);
    }
    let pages: Vec<u32> = most.iter().map(|&pages| (u128::from(pages) * limit / needed) as u32).collect();
    if pages.contains(&0) {
        let all: u64 = page_bytes.iter().sum();
        return Err(Error::exhausted(format!(
            "one KV page of each group would take {all} bytes, [kv] memory allows {limit}: raise it"
        )));
    }
    Ok(pages)
}
