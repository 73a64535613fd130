//! What a conformance suite found: the same for every kind of component, for people and for programs.

use std::fmt::{Display, Formatter};
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::{Value, json};
use setu_core::ErrorKind;

/// What became of each check.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub checks: Vec<Check>,
    /// What was measured on the way.
    pub figures: Vec<Figure>,
}

/// A check that was run, or could have been.
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
    /// What was found and what should have been; the smallest example that was found, where there is one.
    Failed(String),
    /// The component doesn't provide what the check is about, and says so in these words.
    Unsupported(String),
    /// The check wasn't run, and why.
    NotTested(String),
}

/// A number that tells how well a check was passed.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// The check's name.
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
}

impl Report {
    /// Whether nothing failed.
    pub fn passed(&self) -> bool {
        !self.checks.iter().any(|check| matches!(check.outcome, Outcome::Failed(_)))
    }

    /// Checks that passed, failed, are unsupported and were not tested.
    pub fn counts(&self) -> [usize; 4] {
        let mut counts = [0; 4];
        for check in &self.checks {
            counts[match check.outcome {
                Outcome::Passed => 0,
                Outcome::Failed(_) => 1,
                Outcome::Unsupported(_) => 2,
                Outcome::NotTested(_) => 3,
            }] += 1;
        }
        counts
    }

    /// Everything, for programs.
    pub fn to_json(&self) -> Value {
        let checks = self.checks.iter().map(|check| {
            let (outcome, why) = check.outcome.named();
            json!({ "name": check.name, "outcome": outcome, "why": why })
        });
        let figures = self.figures.iter();
        let figures = figures.map(|figure| json!({ "name": figure.name, "value": figure.value, "unit": figure.unit }));
        json!({
            "passed": self.passed(), "checks": checks.collect::<Vec<_>>(), "figures": figures.collect::<Vec<_>>(),
        })
    }
}

impl Outcome {
    fn named(&self) -> (&'static str, Option<&str>) {
        match self {
            Outcome::Passed => ("passed", None),
            Outcome::Failed(why) => ("failed", Some(why)),
            Outcome::Unsupported(why) => ("unsupported", Some(why)),
            Outcome::NotTested(why) => ("not tested", Some(why)),
        }
    }
}

/// Everything that didn't pass and everything that was measured, then the count.
impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let alike = |a: &Check, b: &Check| matches!(a.outcome, Outcome::NotTested(_)) && a.outcome == b.outcome;
        for checks in self.checks.chunk_by(alike) {
            let (outcome, Some(why)) = checks[0].outcome.named() else { continue };
            let outcome = if outcome == "failed" { "FAILED" } else { outcome };
            let others = if checks.len() > 1 { format!(" and {} more", checks.len() - 1) } else { String::new() };
            writeln!(f, "{outcome} {}{others}: {}", checks[0].name, why.replace('\n', "\n    "))?;
        }
        for figure in &self.figures {
            writeln!(f, "measured {}: {:.3} {}", figure.name, figure.value, figure.unit)?;
        }
        let [passed, failed, unsupported, not_tested] = self.counts();
        write!(f, "{passed} passed, {failed} failed, {unsupported} unsupported, {not_tested} not tested")
    }
}

/// Why a check ended early.
#[derive(Clone, Debug)]
pub enum Stop {
    Failed(String),
    Unsupported(String),
    NotTested(String),
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

pub(crate) fn fail<T>(why: impl Into<String>) -> Checked<T> {
    Err(Stop::Failed(why.into()))
}

macro_rules! ensure {
    ($holds:expr, $($message:tt)*) => {
        if !$holds {
            return $crate::report::fail(format!($($message)*));
        }
    };
}
pub(crate) use ensure;

/// Runs checks and keeps what became of them.
#[derive(Debug)]
pub(crate) struct Recorder<'a> {
    /// Runs only the checks whose name contains this.
    pub only: Option<&'a str>,
    /// Whether `Unsupported` is an answer.
    pub allow_unsupported: bool,
    pub report: Report,
}

impl<'a> Recorder<'a> {
    pub fn new(only: Option<&'a str>) -> Recorder<'a> {
        Recorder { only, allow_unsupported: false, report: Report::default() }
    }

    /// Whether anybody wants to know about a check of this name.
    pub fn wants(&self, name: &str) -> bool {
        self.only.is_none_or(|only| name.contains(only))
    }

    /// Runs one check; a panic is a failure of it.
    pub fn check(&mut self, name: impl Into<String>, run: impl FnOnce() -> Checked) {
        let name = name.into();
        if !self.wants(&name) {
            return;
        }
        let checked = caught(run).unwrap_or_else(|panic| Err(Stop::Failed(panic)));
        let outcome = match checked {
            Ok(()) => Outcome::Passed,
            Err(Stop::Unsupported(why)) if self.allow_unsupported => Outcome::Unsupported(why),
            Err(Stop::Failed(why) | Stop::Unsupported(why)) => Outcome::Failed(why),
            Err(Stop::NotTested(why)) => Outcome::NotTested(why),
        };
        self.report.checks.push(Check { name, outcome });
    }

    /// Takes note of a check that isn't run.
    pub fn not_tested(&mut self, name: impl Into<String>, why: impl Into<String>) {
        let why = why.into();
        self.check(name, || Err(Stop::NotTested(why)));
    }

    pub fn measured(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.report.figures.push(Figure { name: name.into(), value, unit });
    }
}

/// Calls a component, turning a panic into words.
pub(crate) fn caught<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("with no message").to_owned();
        // A payload's drop may panic in turn.
        std::mem::forget(panic);
        format!("panicked: {text}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_is_told_and_counted() {
        let mut recorder = Recorder::new(None);
        recorder.check("a/good", || Ok(()));
        recorder.check("a/bad", || fail("step 1\n  chunk of 9 tokens"));
        recorder.check("a/panics", || panic!("no {}", "way"));
        recorder.check("a/missing", || Err(Stop::Unsupported("no Q4_K".into())));
        recorder.not_tested("b/one", "not declared");
        recorder.not_tested("b/two", "not declared");
        recorder.not_tested("b/three", "no checkpoint");
        recorder.measured("time/10 sessions", 0.25, "ms");
        let report = recorder.report;
        assert_eq!(report.counts(), [1, 3, 0, 3]);
        assert!(!report.passed());
        let lines = [
            "FAILED a/bad: step 1\n      chunk of 9 tokens",
            "FAILED a/panics: panicked: no way",
            "FAILED a/missing: no Q4_K",
            "not tested b/one and 1 more: not declared",
            "not tested b/three: no checkpoint",
            "measured time/10 sessions: 0.250 ms",
            "1 passed, 3 failed, 0 unsupported, 3 not tested",
        ];
        assert_eq!(report.to_string(), lines.join("\n"));
        assert_eq!(report.to_json()["checks"][1]["outcome"], "failed");
        assert_eq!(report.to_json()["figures"][0]["value"], 0.25);
    }

    #[test]
    fn only_what_is_asked_for_is_run() {
        let mut recorder = Recorder::new(Some("good"));
        recorder.allow_unsupported = true;
        recorder.check("a/good", || Err(Stop::Unsupported("not here".into())));
        recorder.check("a/bad", || panic!("is run"));
        assert_eq!(recorder.report.counts(), [0, 0, 1, 0]);
    }
}
