//! A whole record in brief: a line for each session, what steps took, what went wrong, and the step-time model
//! that fits the steps.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::{Display, Formatter, Result};

use serde::Serialize;
use setu_core::ids::SessionId;
use setu_core::view::StepTimeModel;

use super::numbers::{Spread, counted, time};
use super::record::name;
use super::{Added, Ended, Header, Outcome, Planned, PolicyFault, Record, StepFinished, Swapped};
use crate::step_time::StepTimeFit;

/// Steps that may be in flight.
const MOST_FLIGHTS: usize = 64;

/// What a record comes to. Shown as text; serialized for programs.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub header: Header,
    pub until_s: f64,
    pub sessions: Vec<SessionLine>,
    pub steps: u64,
    pub took_s: Spread,
    /// |predicted − took| / took of the steps for which something was predicted.
    pub relative_error: Spread,
    pub overruns: u64,
    pub faults: Vec<PolicyFault>,
    pub swaps: Vec<Swapped>,
    /// Fitted to all steps.
    #[serde(serialize_with = "as_sim")]
    pub step_time: StepTimeModel,
}

/// A session in brief. Times are seconds on the engine's clock.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SessionLine {
    #[serde(serialize_with = "name::serialize")]
    pub session: SessionId,
    pub tenant: u32,
    pub arrival_s: f64,
    pub first_run_s: Option<f64>,
    pub first_token_s: Option<f64>,
    pub ended_s: Option<f64>,
    pub outcome: Option<Outcome>,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub generated_tokens: u32,
    pub preemptions: u32,
}

/// Gathers the summary.
#[derive(Debug)]
pub struct Summarizer {
    summary: Summary,
    /// In order of appearance, since ids are given out in it.
    sessions: BTreeMap<SessionId, SessionLine>,
    /// Steps in flight with the sessions whose first token they sample.
    flights: VecDeque<(u64, Vec<SessionId>)>,
    fit: StepTimeFit,
}

impl Summarizer {
    pub fn new(header: &Header) -> Summarizer {
        let summary = Summary {
            header: header.clone(),
            until_s: header.time_s,
            sessions: Vec::new(),
            steps: 0,
            took_s: Spread::default(),
            relative_error: Spread::default(),
            overruns: 0,
            faults: Vec::new(),
            swaps: Vec::new(),
            step_time: StepTimeModel::default(),
        };
        Summarizer { summary, sessions: BTreeMap::new(), flights: VecDeque::new(), fit: StepTimeFit::default() }
    }

    /// Takes in the record's next entry.
    pub fn take(&mut self, record: Record) {
        if let Some(time_s) = record.time_s() {
            self.summary.until_s = time_s;
        }
        match record {
            Record::Added(added) => self.added(&added),
            Record::Planned(planned) => self.planned(&planned),
            Record::Finished(finished) => self.finished(&finished),
            Record::Preempted(preempted) => self.line(preempted.session, preempted.time_s).preemptions += 1,
            Record::Ended(ended) => self.ended(&ended),
            Record::Fault(fault) => self.summary.faults.push(fault),
            Record::Swapped(swapped) => self.summary.swaps.push(swapped),
            Record::Overran(_) => self.summary.overruns += 1,
            _ => {}
        }
    }

    pub fn finish(mut self) -> Summary {
        self.summary.sessions = self.sessions.into_values().collect();
        self.summary.step_time = *self.fit.model();
        self.summary
    }

    fn line(&mut self, session: SessionId, now_s: f64) -> &mut SessionLine {
        self.sessions.entry(session).or_insert(SessionLine {
            session,
            tenant: 0,
            arrival_s: now_s,
            first_run_s: None,
            first_token_s: None,
            ended_s: None,
            outcome: None,
            prompt_tokens: 0,
            cached_tokens: 0,
            generated_tokens: 0,
            preemptions: 0,
        })
    }

    fn added(&mut self, added: &Added) {
        let line = self.line(added.session, added.time_s);
        (line.tenant, line.prompt_tokens) = (added.tenant, added.prompt_tokens);
    }

    fn planned(&mut self, planned: &Planned) {
        let mut first = Vec::new();
        for chunk in &planned.chunks {
            let line = self.line(chunk.session, planned.time_s);
            line.first_run_s.get_or_insert(planned.time_s);
            if line.first_token_s.is_none() && chunk.pending.is_none() {
                first.push(chunk.session);
            }
        }
        if !first.is_empty() && !planned.refused {
            if self.flights.len() == MOST_FLIGHTS {
                self.flights.pop_front();
            }
            self.flights.push_back((planned.step, first));
        }
    }

    fn finished(&mut self, finished: &StepFinished) {
        let summary = &mut self.summary;
        summary.steps += 1;
        summary.took_s.add(finished.took_s);
        if finished.predicted_s > 0.0 && finished.took_s > 0.0 {
            summary.relative_error.add((finished.predicted_s - finished.took_s).abs() / finished.took_s);
        }
        self.fit.learn(&finished.work(), finished.took_s);
        if let Some(at) = self.flights.iter().position(|(step, _)| *step == finished.step) {
            let (_, sessions) = self.flights.remove(at).unwrap_or_default();
            for session in sessions {
                self.line(session, finished.time_s).first_token_s.get_or_insert(finished.time_s);
            }
        }
    }

    fn ended(&mut self, ended: &Ended) {
        let line = self.line(ended.session, ended.time_s);
        line.ended_s = Some(ended.time_s);
        line.outcome = Some(ended.outcome);
        line.prompt_tokens = ended.prompt_tokens;
        line.cached_tokens = ended.cached_tokens;
        line.generated_tokens = ended.generated_tokens;
        line.preemptions = ended.preemptions;
        if ended.generated_tokens == 0 {
            // A step that read its prompt and sampled nothing.
            line.first_token_s = None;
        }
    }
}

impl Display for Summary {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Header { scheduler, batcher, time_s, .. } = &self.header;
        let (sessions, steps) = (counted(self.sessions.len() as u64, "session"), counted(self.steps, "step"));
        let lasted = time(self.until_s - time_s);
        writeln!(f, "{lasted}, {sessions}, {steps}; scheduler {scheduler}, batcher {batcher}")?;
        if self.steps > 0 {
            let [median, p99, most] = [0.5, 0.99, 1.0].map(|share| time(self.took_s.quantile(share)));
            write!(f, "steps took {median} in the median, p99 {p99}, at most {most}")?;
            if self.relative_error.count() > 0 {
                let [median, p99] = [0.5, 0.99].map(|share| self.relative_error.quantile(share) * 100.0);
                write!(f, "; predictions were off by {median:.1} % in the median, p99 {p99:.1} %")?;
            }
            writeln!(f)?;
        }
        if self.overruns > 0 {
            writeln!(f, "the scheduler overran [engine] policy_budget_us in {}", counted(self.overruns, "step"))?;
        }
        for PolicyFault { step, kind, component, message, replaced_by, .. } in &self.faults {
            let who = replaced_by.as_deref().unwrap_or("nobody");
            writeln!(f, "step {step}: the {kind} {component} was at fault and {who} took over: {message}")?;
        }
        for Swapped { step, kind, component, .. } in &self.swaps {
            writeln!(f, "step {step}: {component} became the {kind}")?;
        }
        if !self.sessions.is_empty() {
            let arrived = ["arrived", "waited", "first token", "ended"];
            writeln!(
                f,
                "\n{:<16}  {:>6}  {:>7} {:>7} {:>9}  {:>12} {:>12} {:>12} {:>12}  how it ended",
                "session", "tenant", "prompt", "cached", "generated", arrived[0], arrived[1], arrived[2], arrived[3]
            )?;
        }
        self.sessions.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        writeln!(f)?;
        if self.step_time.is_known() {
            let steps = counted(self.step_time.steps, "step");
            writeln!(f, "# Fitted to the {steps} of this record.\n{}", sim_table(&self.step_time))
        } else {
            writeln!(f, "# Too few steps to fit a step-time model to.")
        }
    }
}

impl Display for SessionLine {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let since = |at_s: Option<f64>| at_s.map_or_else(|| "-".to_owned(), |at_s| time(at_s - self.arrival_s));
        let end = match self.outcome {
            Some(Outcome::Stop) => "stop",
            Some(Outcome::Length) => "length",
            Some(Outcome::Aborted) => "aborted",
            Some(Outcome::Rejected) => "rejected",
            Some(Outcome::Failed) => "failed",
            Some(Outcome::Unknown) => "unknown",
            None => "live",
        };
        write!(
            f,
            "{:<16}  {:>6}  {:>7} {:>7} {:>9}  {:>12} {:>12} {:>12} {:>12}  {end}",
            self.session.to_string(),
            self.tenant,
            self.prompt_tokens,
            self.cached_tokens,
            self.generated_tokens,
            time(self.arrival_s),
            since(self.first_run_s),
            since(self.first_token_s),
            since(self.ended_s)
        )?;
        match self.preemptions {
            0 => Ok(()),
            preemptions => write!(f, ", {}", counted(preemptions.into(), "preemption")),
        }
    }
}

/// The model as settings of a simulated backend.
fn sim_table(model: &StepTimeModel) -> String {
    let settings = sim_settings(model).map(|(key, value)| format!("{key} = {value:?}\n"));
    format!("[backend]\ntype = \"sim\"\n{}", settings.concat())
}

fn sim_settings(model: &StepTimeModel) -> [(&'static str, f64); 5] {
    // Digits beyond these are noise.
    let rounded = |value: f64| format!("{value:.4e}").parse().unwrap_or(value);
    [
        // A step of no time at all is none that the simulator takes.
        ("base_us", rounded(model.base_s * 1e6).max(1e-3)),
        ("prefill_token_us", rounded(model.prefill_token_s * 1e6)),
        ("decode_us", rounded(model.decode_s * 1e6)),
        ("prefill_context_ns", rounded(model.prefill_context_s * 1e9)),
        ("decode_context_ns", rounded(model.decode_context_s * 1e9)),
    ]
}

fn as_sim<S: serde::Serializer>(model: &StepTimeModel, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(sim_settings(model).into_iter().filter(|_| model.is_known()))
}
