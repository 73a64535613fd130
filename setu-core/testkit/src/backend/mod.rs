//! Holds a backend to the contract, linked in or loaded from a file.
//!
//! Every op of the set runs alone, over awkward shapes and in every format, against the
//! [reference](crate::reference); then whole small models with paged KV in shuffled pages, ragged
//! steps, window groups and page copies; then sampling, carried tokens, masks, and steps that must be
//! refused. Each check has a name, so that `setu plugins check` can list them.
//!
//! ```
//! use setu_testkit::backend::{Options, conformance};
//! use setu_testkit::plain::PlainBackend;
//!
//! let options = Options { only: Some("ops/rope".into()), ..Options::default() };
//! let report = conformance(&mut || Box::new(PlainBackend::default()), &options);
//! assert!(report.passed(), "{report}");
//! ```

mod contract;
mod graphs;
mod models;
mod ops;
pub mod rig;
mod sampling;

use setu_core::{Backend, DType};

pub use crate::report::{Check, Checked, Outcome, Report, Stop};
use crate::report::{Recorder, caught};
pub(crate) use crate::report::{ensure, fail};
use crate::weights::WeightSet;
use rig::Rig;

/// How closely and how completely a backend must conform.
#[derive(Clone, Debug)]
pub struct Options {
    /// Largest error where weights, K and V are F32, relative to the root mean square of the row.
    pub f32_tolerance: f64,
    /// The same for F16 and BF16, whose products a backend may round.
    pub half_tolerance: f64,
    /// The same for quantized weights, against which a backend may quantize activations to eight bits.
    pub quantized_tolerance: f64,
    /// Whether `Unsupported` is an answer to a graph, a format or an option.
    pub allow_unsupported: bool,
    /// Runs only the checks whose name contains this.
    pub only: Option<String>,
    /// Leaves out ops alone and other formats than F32, which whole models use as well.
    pub fast: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            f32_tolerance: 1e-4,
            half_tolerance: 1e-2,
            quantized_tolerance: 5e-2,
            allow_unsupported: false,
            only: None,
            fast: false,
        }
    }
}

impl Options {
    fn tolerance(&self, dtype: DType) -> f64 {
        match dtype {
            DType::F32 => self.f32_tolerance,
            DType::F16 | DType::BF16 => self.half_tolerance,
            _ => self.quantized_tolerance,
        }
    }
}

/// Runs all checks, each on backends of its own.
pub fn conformance(make: &mut dyn FnMut() -> Box<dyn Backend>, options: &Options) -> Report {
    let virtual_time = caught(|| is_virtual(&mut *make())).is_ok_and(|answer| answer.unwrap_or(false));
    let mut recorder = Recorder::new(options.only.as_deref());
    recorder.allow_unsupported = options.allow_unsupported;
    let mut suite = Suite { make, options, recorder, virtual_time };
    contract::check(&mut suite);
    ops::check(&mut suite);
    models::check(&mut suite);
    sampling::check(&mut suite);
    suite.recorder.report
}

/// Runs all checks of the default options.
///
/// # Panics
/// The backend doesn't conform; the message lists what failed.
pub fn assert_conforms(mut make: impl FnMut() -> Box<dyn Backend>) {
    let report = conformance(&mut make, &Options::default());
    assert!(report.passed(), "the backend doesn't conform\n{report}");
}

struct Suite<'a> {
    make: &'a mut dyn FnMut() -> Box<dyn Backend>,
    options: &'a Options,
    recorder: Recorder<'a>,
    /// Whether its steps execute nothing, so that there are no numbers to look at.
    virtual_time: bool,
}

impl Suite<'_> {
    /// Runs one check on a fresh backend; a panic is a failure of that check.
    fn check(&mut self, name: impl Into<String>, run: impl FnOnce(&mut dyn Backend, &Options) -> Checked) {
        self.recorder.check(name, || run(&mut *(self.make)(), self.options));
    }

    /// As [`check`](Suite::check), for what only the numbers that a step computes can tell.
    fn numeric(&mut self, name: impl Into<String>, run: impl FnOnce(&mut dyn Backend, &Options) -> Checked) {
        let name = name.into();
        let in_detail = name.starts_with("ops/") || name.contains(" in ");
        if self.virtual_time {
            self.recorder.not_tested(name, "its time is virtual: steps execute nothing");
        } else if self.options.fast && in_detail {
            self.recorder.not_tested(name, "left out to be fast");
        } else {
            self.check(name, run);
        }
    }
}

/// Whether the backend says of an executable that its steps take no real time. One that compiles nothing is held to
/// all checks, which then say so.
fn is_virtual(backend: &mut dyn Backend) -> Checked<bool> {
    let graph = graphs::llama(graphs::SMALL, true)?;
    let weights = WeightSet::random(&graph, DType::F32, 1);
    Ok(Rig::new(backend, &graph, &weights, rig::options())?.info.virtual_time)
}
