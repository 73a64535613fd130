//! One session's way through the engine, gathered from the record: alike steps become one chapter, each wait
//! one line for each kind of reason.
//!
//! A [`Teller`] takes the record in entry by entry and keeps what concerns its session alone, so that records of
//! any length can be told.

use serde::Serialize;
use setu_core::ids::SessionId;

use super::numbers::{Spread, shape};
use super::record::name;
use super::{
    Added, Cap, ChunkRecord, Ended, FreePages, Header, Planned, PolicyFault, Preempted, Record, StepFinished, Swapped,
    Wait, WaitCause,
};

/// What became of a session. Shown as sentences; serialized for programs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Story {
    #[serde(serialize_with = "name::serialize")]
    pub session: SessionId,
    /// Missing where the record doesn't hold the beginning.
    pub added: Option<Added>,
    pub chapters: Vec<Chapter>,
    /// When its first token was there.
    pub first_token_s: Option<f64>,
    /// The longest time from one token to the next, and how many were over the session's limit.
    pub longest_gap_s: f64,
    pub late_gaps: u64,
    /// Missing where the record ends before the session.
    pub ended: Option<Ended>,
    /// Time of the record's last entry.
    pub until_s: f64,
    /// What holds for the whole record.
    pub header: Header,
}

/// A part of a session's life.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Chapter {
    Waited(Waiting),
    Ran(Run),
    Preempted(Preempted),
    /// A policy was replaced while the session lived.
    Fault(PolicyFault),
    Swapped(Swapped),
}

impl Chapter {
    /// When it begins.
    pub fn from_s(&self) -> f64 {
        match self {
            Chapter::Waited(waiting) => waiting.from_s,
            Chapter::Ran(run) => run.from_s,
            Chapter::Preempted(preempted) => preempted.time_s,
            Chapter::Fault(fault) => fault.time_s,
            Chapter::Swapped(swapped) => swapped.time_s,
        }
    }
}

/// Steps that held nothing of the session.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Waiting {
    pub from_s: f64,
    pub to_s: f64,
    pub steps: u64,
    pub causes: Vec<WaitPart>,
}

/// Steps that a session waited for one kind of reason.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WaitPart {
    pub steps: u64,
    /// What was said first and last; they differ in numbers at most.
    pub first: Wait,
    pub last: Wait,
    /// By KV group, the pages that could be given out when it was said first.
    pub pages: Vec<FreePages>,
}

/// Steps that computed tokens of the session, of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Run {
    pub phase: Phase,
    /// When the first of its steps was planned, and when the last was waited for.
    pub from_s: f64,
    pub to_s: f64,
    pub steps: u64,
    pub tokens: u64,
    /// Tokens that needn't be computed.
    pub cached_tokens: u64,
    /// Sizes of the smallest and the largest chunk.
    pub least_tokens: u32,
    pub most_tokens: u32,
    /// What the steps took, and the mean of what was predicted for those for which something was.
    pub took_s: Spread,
    pub predicted_s: f64,
    /// What those of the steps took that held prompts of others as well.
    pub beside_prompts_s: Spread,
    /// Why chunks were not longer.
    pub caps: Vec<CapPart>,
    /// Why the scheduler ran it, where it said so.
    pub reasons: Vec<ReasonPart>,
    /// Steps between that held nothing of it.
    pub passed_over: Vec<WaitPart>,
    #[serde(skip)]
    predictions: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Computes the prompt.
    Prefill,
    /// Computes again what a preemption threw away.
    Recompute,
    /// A token a step.
    Decode,
}

/// Steps whose chunks were capped for one kind of reason.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CapPart {
    pub steps: u64,
    /// The first of them: tokens computed, tokens pending and why.
    pub tokens: u32,
    pub pending: u32,
    pub first: Cap,
}

/// Steps that the scheduler gave one kind of reason for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReasonPart {
    pub steps: u64,
    pub first: String,
}

/// Gathers the story of one session.
#[derive(Debug)]
pub struct Teller {
    story: Story,
    /// The wait that goes on, and the step since when.
    wait: Option<(Wait, u64)>,
    /// The waits since it last ran.
    waiting: Option<Waiting>,
    /// Steps in flight that it takes part in.
    flights: Vec<Flight>,
    /// Tokens that were ever computed of it.
    reached: u64,
    last_token_s: Option<f64>,
    /// The step planned last.
    step: u64,
    seen: bool,
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    step: u64,
    /// Index of its chapter.
    chapter: usize,
    /// Tokens that the step-time model counts as prefill.
    prefill_tokens: u32,
    samples: bool,
}

impl Teller {
    pub fn new(session: SessionId, header: &Header) -> Teller {
        let story = Story {
            session,
            added: None,
            chapters: Vec::new(),
            first_token_s: None,
            longest_gap_s: 0.0,
            late_gaps: 0,
            ended: None,
            until_s: header.time_s,
            header: header.clone(),
        };
        Teller {
            story,
            wait: None,
            waiting: None,
            flights: Vec::new(),
            reached: 0,
            last_token_s: None,
            step: 0,
            seen: false,
        }
    }

    /// Takes in the record's next entry.
    pub fn take(&mut self, record: Record) {
        if let Some(time_s) = record.time_s() {
            self.story.until_s = time_s;
        }
        match record {
            Record::Added(added) if added.session == self.story.session => {
                self.seen = true;
                self.story.added = Some(added);
            }
            Record::Planned(planned) => self.planned(&planned),
            Record::Finished(finished) => self.finished(&finished),
            Record::Preempted(preempted) if preempted.session == self.story.session => {
                self.seen = true;
                self.step = self.step.max(preempted.step);
                self.end_wait(preempted.time_s, preempted.step);
                self.tell_waiting();
                self.story.chapters.push(Chapter::Preempted(preempted));
            }
            Record::Ended(ended) if ended.session == self.story.session => {
                self.seen = true;
                self.end_wait(ended.time_s, self.step.saturating_add(1));
                self.tell_waiting();
                self.story.ended = Some(ended);
            }
            Record::Fault(fault) if self.is_live() => self.story.chapters.push(Chapter::Fault(fault)),
            Record::Swapped(swapped) if self.is_live() => self.story.chapters.push(Chapter::Swapped(swapped)),
            _ => {}
        }
    }

    /// The story, if the record knows the session.
    pub fn finish(mut self) -> Option<Story> {
        let now_s = self.story.until_s;
        self.end_wait(now_s, self.step.saturating_add(1));
        self.tell_waiting();
        // A wait is told once it is over, what happened meanwhile at once.
        self.story.chapters.sort_by(|one, other| one.from_s().total_cmp(&other.from_s()));
        self.seen.then_some(self.story)
    }

    fn is_live(&self) -> bool {
        self.seen && self.story.ended.is_none()
    }

    fn planned(&mut self, planned: &Planned) {
        self.step = planned.step;
        let session = self.story.session;
        if let Some(chunk) = planned.chunks.iter().find(|chunk| chunk.session == session) {
            self.seen = true;
            self.end_wait(planned.time_s, planned.step);
            self.run(planned, chunk);
        } else if let Some(wait) = planned.waits.iter().find(|wait| wait.session == session) {
            self.seen = true;
            self.end_wait(planned.time_s, planned.step);
            let since_s = self.waits_since().unwrap_or(planned.time_s);
            let waiting =
                self.waiting.get_or_insert_with(|| Waiting { from_s: since_s, to_s: since_s, ..Waiting::default() });
            let alike = |part: &&mut WaitPart| is_alike(&part.last, wait);
            match waiting.causes.iter_mut().find(alike) {
                Some(part) => part.last = wait.clone(),
                None => waiting.causes.push(WaitPart {
                    steps: 0,
                    first: wait.clone(),
                    last: wait.clone(),
                    pages: planned.pages.clone(),
                }),
            }
            self.wait = Some((wait.clone(), planned.step));
        }
    }

    /// Since when it waits: before it ran, since it arrived.
    fn waits_since(&self) -> Option<f64> {
        let ran = self.story.chapters.iter().any(|chapter| matches!(chapter, Chapter::Ran(_)));
        self.story.added.as_ref().filter(|_| !ran).map(|added| added.time_s)
    }

    /// Ends the wait that goes on with `step`.
    fn end_wait(&mut self, now_s: f64, step: u64) {
        if let (Some((wait, since)), Some(waiting)) = (self.wait.take(), &mut self.waiting) {
            let steps = step.saturating_sub(since);
            waiting.to_s = now_s;
            waiting.steps += steps;
            if let Some(part) = waiting.causes.iter_mut().find(|part| is_alike(&part.last, &wait)) {
                part.steps += steps;
            }
        }
    }

    /// Makes a chapter of the waits since it last ran.
    fn tell_waiting(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.story.chapters.push(Chapter::Waited(waiting));
        }
    }

    fn run(&mut self, planned: &Planned, chunk: &ChunkRecord) {
        let phase = self.phase_of(chunk);
        self.reached = self.reached.max(u64::from(chunk.context) + u64::from(chunk.tokens));
        let goes_on = matches!(self.story.chapters.last(), Some(Chapter::Ran(run)) if run.phase == phase);
        if !goes_on {
            self.tell_waiting();
            self.story.chapters.push(Chapter::Ran(Run::new(phase, planned.time_s)));
        }
        let chapter = self.story.chapters.len() - 1;
        let Chapter::Ran(run) = &mut self.story.chapters[chapter] else { return };
        run.pass_over(self.waiting.take());
        run.add(chunk);
        if !planned.refused {
            let prompt_only = self.story.added.as_ref().is_some_and(|added| added.prompt_only);
            self.flights.push(Flight {
                step: planned.step,
                chapter,
                prefill_tokens: if chunk.tokens > 1 { chunk.tokens } else { 0 },
                samples: chunk.pending.is_none() && !prompt_only,
            });
        }
    }

    fn phase_of(&self, chunk: &ChunkRecord) -> Phase {
        let in_prompt = self.story.added.as_ref().map(|added| chunk.context < added.prompt_tokens);
        if u64::from(chunk.context) < self.reached {
            Phase::Recompute
        } else if chunk.tokens == 1 && !in_prompt.unwrap_or(false) {
            Phase::Decode
        } else {
            Phase::Prefill
        }
    }

    fn finished(&mut self, finished: &StepFinished) {
        let Some(at) = self.flights.iter().position(|flight| flight.step == finished.step) else { return };
        let flight = self.flights.remove(at);
        if let Chapter::Ran(run) = &mut self.story.chapters[flight.chapter] {
            run.finished(finished, finished.prefill_tokens > flight.prefill_tokens);
        }
        if !flight.samples {
            return;
        }
        self.story.first_token_s.get_or_insert(finished.time_s);
        if let Some(last_s) = self.last_token_s {
            let gap_s = finished.time_s - last_s;
            self.story.longest_gap_s = self.story.longest_gap_s.max(gap_s);
            let limit_s = self.story.added.as_ref().and_then(|added| added.itl_s);
            self.story.late_gaps += u64::from(limit_s.is_some_and(|limit_s| gap_s > limit_s));
        }
        self.last_token_s = Some(finished.time_s);
    }
}

impl Run {
    fn new(phase: Phase, from_s: f64) -> Run {
        Run {
            phase,
            from_s,
            to_s: from_s,
            steps: 0,
            tokens: 0,
            cached_tokens: 0,
            least_tokens: u32::MAX,
            most_tokens: 0,
            took_s: Spread::default(),
            predicted_s: 0.0,
            beside_prompts_s: Spread::default(),
            caps: Vec::new(),
            reasons: Vec::new(),
            passed_over: Vec::new(),
            predictions: 0,
        }
    }

    fn add(&mut self, chunk: &ChunkRecord) {
        self.steps += 1;
        self.tokens += u64::from(chunk.tokens);
        self.cached_tokens += u64::from(chunk.cached);
        self.least_tokens = self.least_tokens.min(chunk.tokens);
        self.most_tokens = self.most_tokens.max(chunk.tokens);
        if let Some(cap) = &chunk.capped {
            let alike =
                |part: &&mut CapPart| part.first.by == cap.by && shape(&part.first.reason).eq(shape(&cap.reason));
            match self.caps.iter_mut().find(alike) {
                Some(part) => part.steps += 1,
                None => {
                    let pending = chunk.pending.unwrap_or(chunk.tokens);
                    self.caps.push(CapPart { steps: 1, tokens: chunk.tokens, pending, first: cap.clone() });
                }
            }
        }
        if !chunk.reason.is_empty() {
            let alike = |part: &&mut ReasonPart| shape(&part.first).eq(shape(&chunk.reason));
            match self.reasons.iter_mut().find(alike) {
                Some(part) => part.steps += 1,
                None => self.reasons.push(ReasonPart { steps: 1, first: chunk.reason.clone() }),
            }
        }
    }

    /// Takes in what it waited for between two of its steps.
    fn pass_over(&mut self, waiting: Option<Waiting>) {
        for part in waiting.into_iter().flat_map(|waiting| waiting.causes) {
            match self.passed_over.iter_mut().find(|known| is_alike(&known.last, &part.first)) {
                Some(known) => {
                    known.steps += part.steps;
                    known.last = part.last;
                }
                None => self.passed_over.push(part),
            }
        }
    }

    fn finished(&mut self, finished: &StepFinished, beside_prompts: bool) {
        self.to_s = finished.time_s;
        self.took_s.add(finished.took_s);
        if beside_prompts {
            self.beside_prompts_s.add(finished.took_s);
        }
        if finished.predicted_s > 0.0 {
            self.predictions += 1;
            self.predicted_s += (finished.predicted_s - self.predicted_s) / self.predictions as f64;
        }
    }
}

/// Whether two waits are for one kind of reason.
fn is_alike(one: &Wait, other: &Wait) -> bool {
    // Whose pages or prompt it was doesn't make a kind of its own: there may be many.
    let whose = one.cause == WaitCause::GaveWay || one.by == other.by;
    one.cause == other.cause && whose && shape(&one.reason).eq(shape(&other.reason))
}
