//! The suite against the backend that computes as the reference does, and the suite's own teeth.

use setu_core::backend::{
    Backend, CompileOptions, DeviceInfo, Executable, ExecutableInfo, Masks, Step, StepOutputs, WeightData,
};
use setu_core::graph::Graph;
use setu_core::{Result, Ticket};
use setu_testkit::backend::{Options, Outcome, assert_conforms, conformance};
use setu_testkit::plain::PlainBackend;
use setu_testkit::steps::StepData;

#[test]
fn the_plain_backend_conforms() {
    assert_conforms(|| Box::new(PlainBackend::default()));
}

#[test]
fn it_does_so_with_other_numbers_of_steps_in_flight() {
    for max_in_flight in [1, 3] {
        for part in ["contract/", "sampling/"] {
            let options = Options { only: Some(part.to_owned()), ..Options::default() };
            let report = conformance(&mut || Box::new(PlainBackend { max_in_flight }), &options);
            assert!(report.passed() && report.checks.len() >= 5, "{report}");
        }
    }
}

/// What a broken backend does to a step, to its masks and to its outputs.
#[derive(Clone, Copy)]
struct Fault {
    step: fn(&mut StepData),
    masks: fn(&mut [u32]),
    outputs: fn(&mut StepOutputs<'_>),
}

const NONE: Fault = Fault { step: |_| (), masks: |_| (), outputs: |_| () };

struct Broken(Fault);

struct BrokenExecutable(Box<dyn Executable>, Fault);

impl Backend for Broken {
    fn devices(&self) -> Vec<DeviceInfo> {
        PlainBackend::default().devices()
    }

    fn compile(
        &mut self,
        graph: &Graph,
        data: &[WeightData<'_>],
        options: &CompileOptions,
    ) -> Result<Box<dyn Executable>> {
        Ok(Box::new(BrokenExecutable(PlainBackend::default().compile(graph, data, options)?, self.0)))
    }
}

impl Executable for BrokenExecutable {
    fn info(&self) -> ExecutableInfo {
        self.0.info()
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        let mut step = StepData::copy_of(step);
        (self.1.step)(&mut step);
        step.with(|step| self.0.submit(step))
    }

    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()> {
        let mut words = masks.words.to_vec();
        (self.1.masks)(&mut words);
        self.0.provide(ticket, &Masks::new(&masks.wants, &words, masks.words_per_mask))
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        self.0.wait(ticket, outputs)?;
        (self.1.outputs)(outputs);
        Ok(())
    }
}

#[test]
fn each_fault_is_found_by_the_check_for_it() {
    let scaled: fn(&mut StepOutputs<'_>) = |outputs| outputs.logits.iter_mut().for_each(|logit| *logit *= 1.001);
    let cases: [(&str, Fault); 9] = [
        ("ops/linear/F32", Fault { outputs: scaled, ..NONE }),
        ("models/llama/ragged steps", Fault { outputs: scaled, ..NONE }),
        ("models/windows/page copies", Fault { step: |step| step.copies.clear(), ..NONE }),
        (
            "sampling/carried tokens",
            Fault { step: |step| step.carries.iter_mut().for_each(|carry| carry.want = 0), ..NONE },
        ),
        (
            "sampling/parameters",
            Fault { step: |step| step.opened_slots.iter_mut().for_each(|slot| slot.seed ^= 1), ..NONE },
        ),
        (
            "sampling/reopened slots",
            Fault { step: |step| step.opened_slots.iter_mut().for_each(|slot| slot.output.clear()), ..NONE },
        ),
        ("sampling/masks", Fault { masks: |words| words.fill(u32::MAX), ..NONE }),
        (
            "sampling/greedy",
            Fault { outputs: |outputs| outputs.logprobs.iter_mut().for_each(|logprob| *logprob -= 1e-3), ..NONE },
        ),
        ("contract/steps that must be refused", Fault { step: |step| step.page_tables.truncate(1), ..NONE }),
    ];
    for (name, fault) in cases {
        let options = Options { only: Some(name.to_owned()), ..Options::default() };
        let sound = conformance(&mut || Box::new(Broken(NONE)), &options);
        assert!(sound.passed() && sound.checks.len() == 1, "{name}: {sound}");
        let report = conformance(&mut || Box::new(Broken(fault)), &options);
        assert!(matches!(report.checks[0].outcome, Outcome::Failed(_)), "{name} misses its fault");
    }
}
