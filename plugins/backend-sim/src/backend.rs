//! The component: accepts any graph and gives it pages without memory.

use setu_core::backend::{
    Backend, CompileOptions, DeviceInfo, Executable, ExecutableInfo, StepLimits, WeightData, sum_of_pages,
};
use setu_core::component::Component;
use setu_core::graph::Op;
use setu_core::{Error, Graph, Result};

use crate::config::SimConfig;
use crate::executable::SimExecutable;
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
        options.check(graph)?;
        let page_bytes = page_bytes(graph, options);
        let mut options = options.clone();
        if options.kv_pages.is_empty() && self.config.kv_pages > 0 {
            options.kv_pages = vec![self.config.kv_pages; graph.kv_groups.len()];
        }
        let mut kv_pages = options.page_counts(graph, &page_bytes, u64::MAX, "raise [kv] memory")?;
        if options.kv_pages.is_empty() {
            kv_pages.iter_mut().for_each(|pages| *pages = MOST_PAGES.min(*pages));
        }
        let info = ExecutableInfo {
            max_in_flight: self.config.max_in_flight,
            weight_bytes: weights.iter().flat_map(|weight| &weight.parts).map(|part| part.len() as u64).sum(),
            kv_bytes: u64::try_from(sum_of_pages(&kv_pages, &page_bytes)).unwrap_or(u64::MAX),
            workspace_bytes: 0,
            batch_invariant: true,
            virtual_time: true,
            kv_pages,
        };
        let limits = StepLimits::new(graph, &options, &info.kv_pages);
        Ok(Box::new(SimExecutable::new(info, limits, StepTimes::new(&self.config))))
    }
}

/// What a page of each KV group would take.
fn page_bytes(graph: &Graph, options: &CompileOptions) -> Vec<u64> {
    let groups = 0..graph.kv_groups.len() as u32;
    groups.map(|group| u64::from(options.page_tokens) * graph.kv_token_bytes(group, options.kv_dtype) as u64).collect()
}
