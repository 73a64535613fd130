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

use std::fmt::{Display, Formatter};
use std::panic::{AssertUnwindSafe, catch_unwind};

use setu_core::{Backend, DType, ErrorKind};

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
}

impl Default for Options {
    fn default() -> Options {
        Options {
            f32_tolerance: 1e-4,
            half_tolerance: 1e-2,
            quantized_tolerance: 5e-2,
            allow_unsupported: false,
            only: None,
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

/// What became of each check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub checks: Vec<Check>,
}

/// A check that was run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Path such as `ops/linear/Q4_K`.
    pub name: String,
    pub outcome: Outcome,
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// What was found and what should have been.
    Failed(String),
    /// The backend doesn't provide what the check is about, and says so in these words.
    Unsupported(String),
}

impl Report {
    pub fn passed(&self) -> bool {
        !self.checks.iter().any(|check| matches!(check.outcome, Outcome::Failed(_)))
    }
}

/// Everything that didn't pass, then the count.
impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let mut counts = [0; 3];
        for check in &self.checks {
            match &check.outcome {
                Outcome::Passed => counts[0] += 1,
                Outcome::Failed(why) => {
                    counts[1] += 1;
                    writeln!(f, "FAILED {}: {why}", check.name)?;
                }
                Outcome::Unsupported(why) => {
                    counts[2] += 1;
                    writeln!(f, "unsupported {}: {why}", check.name)?;
                }
            }
        }
        write!(f, "{} passed, {} failed, {} unsupported", counts[0], counts[1], counts[2])
    }
}

/// Runs all checks, each on backends of its own.
pub fn conformance(make: &mut dyn FnMut() -> Box<dyn Backend>, options: &Options) -> Report {
    let mut suite = Suite { make, options, report: Report::default() };
    contract::check(&mut suite);
    ops::check(&mut suite);
    models::check(&mut suite);
    sampling::check(&mut suite);
    suite.report
}

/// Runs all checks of the default options.
///
/// # Panics
/// The backend doesn't conform; the message lists what failed.
pub fn assert_conforms(mut make: impl FnMut() -> Box<dyn Backend>) {
    let report = conformance(&mut make, &Options::default());
    assert!(report.passed(), "the backend doesn't conform\n{report}");
}

/// Why a check ended early.
#[derive(Debug)]
pub enum Stop {
    Failed(String),
    Unsupported(String),
}

impl From<setu_core::Error> for Stop {
    fn from(error: setu_core::Error) -> Stop {
        match error.kind() {
            ErrorKind::Unsupported => Stop::Unsupported(error.to_string()),
            _ => Stop::Failed(error.to_string()),
        }
    }
}

pub type Checked<T = ()> = Result<T, Stop>;

fn fail<T>(why: impl Into<String>) -> Checked<T> {
    Err(Stop::Failed(why.into()))
}

macro_rules! ensure {
    ($holds:expr, $($message:tt)*) => {
        if !$holds {
            return $crate::backend::fail(format!($($message)*));
        }
    };
}
use ensure;

struct Suite<'a> {
    make: &'a mut dyn FnMut() -> Box<dyn Backend>,
    options: &'a Options,
    report: Report,
}

impl Suite<'_> {
    /// Runs one check on a fresh backend; a panic is a failure of that check.
    fn check(&mut self, name: impl Into<String>, run: impl FnOnce(&mut dyn Backend, &Options) -> Checked) {
        let name = name.into();
        if self.options.only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            return;
        }
        let checked = catch_unwind(AssertUnwindSafe(|| run(&mut *(self.make)(), self.options)));
        let outcome = match checked {
            Ok(Ok(())) => Outcome::Passed,
            Ok(Err(Stop::Unsupported(why))) if self.options.allow_unsupported => Outcome::Unsupported(why),
            Ok(Err(Stop::Failed(why) | Stop::Unsupported(why))) => Outcome::Failed(why),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("with no message");
                Outcome::Failed(format!("panicked: {text}"))
            }
        };
        self.report.checks.push(Check { name, outcome });
    }
}
