//! A backend at fault. It computes nothing: each wanted token is the sum of its row's tokens.

use setu_core::backend::{Masks, Step, StepOutputs};
use setu_core::prelude::*;

/// What it does wrong.
#[derive(ConfigEnum, Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Panics when it is built.
    PanicInBuild,
    /// Panics in `devices`.
    PanicInDevices,
    /// Panics in `compile`.
    PanicInCompile,
    /// The executable panics in `info`.
    PanicInInfo,
    /// The executable panics in `submit`.
    PanicInSubmit,
    /// The executable panics in `provide`.
    PanicInProvide,
    /// The executable panics in `wait`.
    PanicInWait,
    /// Both panic when they are dropped.
    PanicInDrop,
}

/// A backend at fault.
#[derive(Config, Clone, Debug)]
pub struct FaultyConfig {
    /// What it does wrong.
    #[config(default = Fault::None)]
    pub fault: Fault,
}

pub struct Faulty(Fault);

impl Component for Faulty {
    type Config = FaultyConfig;
    const KEY: &'static str = "faulty";
    const DESCRIPTION: &'static str = "A backend at fault.";

    fn build(config: FaultyConfig) -> Result<Self> {
        hit(config.fault, Fault::PanicInBuild, "be built");
        Ok(Faulty(config.fault))
    }
}

fn hit(fault: Fault, here: Fault, what: &str) {
    if fault == here {
        panic!("cannot {what}");
    }
}

impl Backend for Faulty {
    fn devices(&self) -> Vec<DeviceInfo> {
        hit(self.0, Fault::PanicInDevices, "list devices");
        vec![DeviceInfo { name: "faulty".into(), features: "none".into(), memory_bytes: 1, free_bytes: 0 }]
    }

    fn compile(
        &mut self,
        graph: &Graph,
        weights: &[WeightData<'_>],
        options: &CompileOptions,
    ) -> Result<Box<dyn Executable>> {
        hit(self.0, Fault::PanicInCompile, "compile");
        let weight_bytes = weights.iter().flat_map(|weight| &weight.parts).map(|part| part.len() as u64).sum();
        let info = ExecutableInfo {
            max_in_flight: 1,
            kv_pages: vec![options.max_rows; graph.kv_groups.len()],
            weight_bytes,
            ..ExecutableInfo::default()
        };
        Ok(Box::new(Adder { fault: self.0, info, sums: Vec::new(), step: 0 }))
    }
}

struct Adder {
    fault: Fault,
    info: ExecutableInfo,
    sums: Vec<u32>,
    step: u64,
}

impl Executable for Adder {
    fn info(&self) -> ExecutableInfo {
        hit(self.fault, Fault::PanicInInfo, "describe itself");
        self.info.clone()
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        hit(self.fault, Fault::PanicInSubmit, "submit");
        self.sums.clear();
        for want in step.wants.iter() {
            let row = want.row as usize;
            let tokens = step.row_offsets[row] as usize..step.row_offsets[row + 1] as usize;
            self.sums.push(step.tokens[tokens].iter().sum());
        }
        self.step += 1;
        Ok(Ticket(self.step))
    }

    fn provide(&mut self, _: Ticket, masks: &Masks<'_>) -> Result<()> {
        hit(self.fault, Fault::PanicInProvide, "take masks");
        for (&want, word) in masks.wants.iter().zip(masks.words.iter()) {
            self.sums[want as usize] &= word;
        }
        Ok(())
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        hit(self.fault, Fault::PanicInWait, "wait");
        if ticket.0 != self.step {
            return Err(Error::contract(format!("ticket {} is not open", ticket.0)));
        }
        outputs.tokens.copy_from_slice(&self.sums);
        outputs.busy_s = 0.5;
        Ok(())
    }
}

impl Drop for Adder {
    fn drop(&mut self) {
        tracing::info!(kind = "executable", "dropped");
        hit(self.fault, Fault::PanicInDrop, "be dropped");
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        tracing::info!(kind = "backend", "dropped");
        hit(self.0, Fault::PanicInDrop, "be dropped");
    }
}
