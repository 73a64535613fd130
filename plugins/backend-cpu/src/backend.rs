//! The component: finds the device and compiles graphs for it.

use setu_core::backend::{Backend, CompileOptions, DeviceInfo, Executable, StepLimits, WeightData};
use setu_core::component::Component;
use setu_core::{Graph, Result};

use crate::config::{Activations, CpuConfig};
use crate::executable::CpuExecutable;
use crate::kv::Pages;
use crate::machine;
use crate::matmul::{Isa, Precision};
use crate::plan::{self, Options};
use crate::pool::Pool;
use crate::run::{Compiled, Constants};
use crate::weights::Weights;

/// Runs graphs on the machine's own cores.
#[derive(Debug)]
pub struct CpuBackend {
    isa: Isa,
    threads: usize,
    precision: Option<Precision>,
}

impl Component for CpuBackend {
    type Config = CpuConfig;
    const KEY: &'static str = "cpu";
    const DESCRIPTION: &'static str = "Runs graphs on the CPU, with the same results however sessions are batched.";

    fn build(config: CpuConfig) -> Result<Self> {
        let precision = match config.activations {
            Activations::Auto => None,
            Activations::Int8 => Some(Precision::Int8),
            Activations::Int16 => Some(Precision::Int16),
            Activations::F32 => Some(Precision::F32),
        };
        Ok(CpuBackend { isa: config.isa.isa()?, threads: config.thread_count(), precision })
    }
}

impl Backend for CpuBackend {
    fn devices(&self) -> Vec<DeviceInfo> {
        let threads = if self.threads == 1 { "1 thread".to_owned() } else { format!("{} threads", self.threads) };
        vec![DeviceInfo {
            name: machine::processor(),
            features: format!("{}, {threads}", self.isa),
            memory_bytes: machine::memory_bytes(),
            free_bytes: machine::available_bytes(),
        }]
    }

    fn compile(
        &mut self,
        graph: &Graph,
        weights: &[WeightData<'_>],
        options: &CompileOptions,
    ) -> Result<Box<dyn Executable>> {
        graph.verify()?;
        options.check(graph)?;
        let mut pool = Pool::new(self.threads)?;
        let mut weights = Weights::new(graph, weights)?;
        let plan = plan::lower(graph, &mut weights, Options { isa: self.isa, precision: self.precision })?;
        let pages = Pages::new(graph, options)?;
        let matrices = weights.pack(&mut pool)?;
        let limits = StepLimits::new(graph, options, &pages.counts());
        let constants = Constants { matrices, tables: weights.tables(), ropes: graph.rope_tables.clone() };
        let compiled = Compiled::new(self.isa, plan, constants, pages, &limits, self.threads)?;
        Ok(Box::new(CpuExecutable::new(compiled, limits, pool)))
    }
}
