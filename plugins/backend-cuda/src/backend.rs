//! The component: finds the device and compiles graphs for it.

use setu_core::backend::{Backend, CompileOptions, DeviceInfo, Executable, StepLimits, WeightData};
use setu_core::component::Component;
use setu_core::{Error, Graph, Result};

use crate::attention::PART_TOKENS;
use crate::config::CudaConfig;
use crate::executable::{CudaExecutable, Parts, StepKernels};
use crate::gpu::{Device, mib};
use crate::kernels::{Kernels, Unit};
use crate::kv::Pages;
use crate::plan;
use crate::probe;
use crate::sampler::Slots;
use crate::step::Limits;
use crate::weights::Weights;

/// Runs graphs on one NVIDIA GPU.
#[derive(Debug)]
pub struct CudaBackend {
    device: Device,
    config: CudaConfig,
}

impl Component for CudaBackend {
    type Config = CudaConfig;
    const KEY: &'static str = "cuda";
    const DESCRIPTION: &'static str = "Runs graphs on an NVIDIA GPU.";

    fn build(config: CudaConfig) -> Result<Self> {
        let devices = probe::devices()?;
        if config.device >= devices {
            let asked = config.device;
            return Err(Error::config(format!(
                "device {asked} doesn't exist: the NVIDIA driver has {devices}, counted from 0; `nvidia-smi -L` lists them"
            )));
        }
        Ok(CudaBackend { device: Device::open(config.device)?, config })
    }
}

impl Backend for CudaBackend {
    fn devices(&self) -> Vec<DeviceInfo> {
        let device = &self.device;
        let features = || {
            let ((major, minor), processors) = (device.capability()?, device.multiprocessors()?);
            Ok::<_, Error>(format!("compute capability {major}.{minor}, {processors} multiprocessors"))
        };
        let (free_bytes, memory_bytes) = device.memory().unwrap_or_default();
        vec![DeviceInfo {
            name: device.name().unwrap_or_else(|error| error.message().to_owned()),
            features: features().unwrap_or_else(|error| error.message().to_owned()),
            memory_bytes,
            free_bytes,
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
        let device = &self.device;
        let mut kernels = Kernels::new(device, &self.config)?;
        let mut weights = Weights::new(device, graph, weights)?;
        let unpaged = plan::lower(device, graph, &mut weights, &mut kernels, options, self.config.batch_invariant)?;
        let weights = weights.finish()?;
        let (slots, vocab) = (options.max_slots as usize, graph.vocab_size as usize);
        let slots = Slots::new(device, slots, vocab)?;
        let scratch = device.allocate(4 * unpaged.plan().wants * unpaged.plan().logits.stride, "processed logits")?;
        let kernel = |kernels: &mut Kernels, file, name| kernels.get(Unit { file, format: None }, name);
        let step_kernels = StepKernels {
            open: kernel(&mut kernels, "slot", "slot_open")?,
            carry: kernel(&mut kernels, "slot", "carry")?,
            answer: kernel(&mut kernels, "sample", "answer")?,
        };

        // Pages take what is left of the share, which others on the device may have had a part of.
        let (free, total) = device.memory()?;
        let share = (total as f64 * self.config.memory_utilization) as u64;
        let taken = total - free;
        let pages = Pages::new(device, graph, options, share.saturating_sub(taken).min(free)).map_err(|error| {
            let weight_bytes = weights.iter().map(|memory| memory.len() as u64).sum();
            let workspace = unpaged.plan().workspace_bytes() + slots.byte_len() + scratch.len();
            error.within(format!(
                "of {} MiB, {} of them free at first, weights take {} and workspace {}",
                mib(total),
                mib(free + weight_bytes + workspace as u64),
                mib(weight_bytes),
                mib(workspace as u64)
            ))
        })?;
        let plan = unpaged.with_pages(&pages)?;
        let limits = Limits {
            step: StepLimits::new(graph, options, &pages.counts()),
            tilings: plan.tilings.clone(),
            part_tokens: PART_TOKENS,
            spread_rows: plan.spread_rows(),
            bucket_rows: self.config.graphs.then(|| options.max_rows.min(options.max_tokens) as usize),
        };
        let _modules = kernels.into_modules();
        let device = device.clone();
        let parts = Parts { device, plan, pages, slots, scratch, kernels: step_kernels, limits, weights, _modules };
        Ok(Box::new(CudaExecutable::new(parts, self.config.overlap)?))
    }
}
