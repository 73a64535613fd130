//! The story of an arena in lines, for whoever has to find out what went wrong.

use std::collections::VecDeque;
use std::fmt::Write;

use setu_core::batcher::Chunk;
use setu_core::ids::SessionId;
use setu_core::scheduler::{Decision, Preemption, Verdict};
use setu_core::view::{Budgets, KvGroupView, SessionState, SessionView, UNSET_PRIORITY};

use super::Workload;

/// Steps that are told; a story is about its end.
const STEPS: usize = 8;

/// Sessions that are told of in a list.
const SESSIONS: usize = 24;

/// What has happened lately.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Whom the scheduler named to run in the step being planned, in order.
    pub order: Vec<SessionId>,
    arrived: VecDeque<(SessionId, usize, f64)>,
    steps: VecDeque<Step>,
    more_steps: bool,
}

#[derive(Debug)]
struct Step {
    number: u64,
    now_s: f64,
    budgets: Budgets,
    free: Vec<(u32, u32)>,
    seen: Vec<(SessionId, SessionState, u32, u32)>,
    decided: Vec<(SessionId, Verdict, u32, String)>,
    given: Vec<(Option<SessionId>, u32)>,
    explained: Vec<(SessionId, String)>,
    granted: Vec<(SessionId, u32)>,
    preempted: Vec<SessionId>,
}

impl Told {
    pub fn arrived(&mut self, id: SessionId, arrival: usize, at_s: f64) {
        if self.arrived.len() == 4 * SESSIONS {
            self.arrived.pop_front();
        }
        self.arrived.push_back((id, arrival, at_s));
    }

    pub fn step(&mut self, number: u64, now_s: f64, budgets: Budgets, groups: &[KvGroupView], views: &[SessionView]) {
        if self.steps.len() == STEPS {
            self.steps.pop_front();
            self.more_steps = true;
        }
        let seen = views.iter().map(|view| (view.id, view.state(), view.scheduled_tokens, view.len_tokens));
        self.steps.push_back(Step {
            number,
            now_s,
            budgets,
            free: groups.iter().map(|group| (group.available_pages(), group.total_pages)).collect(),
            seen: seen.collect(),
            decided: Vec::new(),
            given: Vec::new(),
            explained: Vec::new(),
            granted: Vec::new(),
            preempted: Vec::new(),
        });
    }

    pub fn decided(&mut self, decision: &Decision<'_>) {
        if let Some(step) = self.steps.back_mut() {
            step.decided.push((decision.id, decision.verdict, decision.chunk_cap, decision.reason.to_owned()));
        }
    }

    pub fn given(&mut self, chunk: &Chunk, id: Option<SessionId>) {
        if let Some(step) = self.steps.back_mut() {
            step.given.push((id, chunk.tokens));
        }
    }

    pub fn explained(&mut self, id: SessionId, reason: &str) {
        if let Some(step) = self.steps.back_mut() {
            step.explained.push((id, reason.to_owned()));
        }
    }

    pub fn granted(&mut self, id: SessionId, tokens: u32) {
        if let Some(step) = self.steps.back_mut() {
            step.granted.push((id, tokens));
        }
    }

    pub fn preempted(&mut self, id: SessionId) {
        if let Some(step) = self.steps.back_mut() {
            step.preempted.push(id);
        }
    }

    /// Everything in lines, what is wrong first.
    pub fn story(&self, workload: &Workload, wrong: &str) -> String {
        let mut text = format!("{wrong}\n");
        if workload.tenants.len() > 1 {
            let weights = workload.tenants.iter().enumerate().map(|(tenant, weight)| format!("{tenant}: {weight}"));
            line(&mut text, "tenants by weight", weights.collect());
        }
        let told_of = |id: &SessionId| self.steps.iter().any(|step| step.seen.iter().any(|seen| seen.0 == *id));
        for &(id, arrival, at_s) in self.arrived.iter().filter(|(id, ..)| told_of(id)).take(SESSIONS) {
            let _ = writeln!(text, "{id} arrives at {at_s:.3} s{}", request(workload, arrival));
        }
        if self.more_steps {
            text.push_str("… the last steps:\n");
        }
        self.steps.iter().for_each(|step| step.tell(&mut text));
        text.truncate(text.trim_end().len());
        text
    }
}

fn request(workload: &Workload, arrival: usize) -> String {
    let spec = &workload.arrivals[arrival];
    let mut text = format!(": prompt {}, answer {}", spec.prompt, spec.answer);
    let mut add = |name: &str, value: f64| {
        if value.is_finite() {
            let _ = write!(text, ", {name} {value:.2} s");
        }
    };
    add("first token within", spec.ttft_s);
    add("tokens within", spec.itl_s);
    add("all within", spec.total_s);
    add("aborted after", spec.abort_s);
    if workload.tenants.len() > 1 {
        let _ = write!(text, ", tenant {}", spec.tenant);
    }
    if spec.priority != UNSET_PRIORITY {
        let _ = write!(text, ", priority {}", spec.priority);
    }
    if spec.prefix_tokens > 0 {
        let _ = write!(text, ", the first {} tokens of text {}", spec.prefix_tokens, spec.prefix);
    }
    if spec.follows {
        text.push_str(", a choice of the request before");
    }
    if spec.repeats {
        text.push_str(", and again when it ends");
    }
    text
}

impl Step {
    fn tell(&self, text: &mut String) {
        let Budgets { tokens, sessions, steps_in_flight } = self.budgets;
        let free = self.free.iter().map(|(free, total)| format!("{free} of {total}")).collect::<Vec<_>>().join(" and ");
        let flight = if steps_in_flight > 0 { ", a step in flight" } else { "" };
        let (number, now_s) = (self.number, self.now_s);
        let _ = writeln!(
            text,
            "step {number} at {now_s:.3} s: {tokens} tokens of {sessions} sessions may run, {free} pages are free{flight}"
        );
        let seen = self.seen.iter().map(|(id, state, scheduled, len)| {
            format!("{id} {} {scheduled}/{len}", format!("{state:?}").to_lowercase())
        });
        line(text, "  sees", seen.collect());
        line(text, "  decides", self.decided.iter().map(decision).collect());
        let given = self.given.iter().map(|(id, tokens)| {
            let id = id.map_or("nobody".to_owned(), |id| id.to_string());
            let why = self.explained.iter().find(|(about, _)| about.to_string() == id);
            format!("{id} {tokens}{}", why.map_or(String::new(), |(_, reason)| format!(" ({reason})")))
        });
        line(text, "  gives", given.collect());
        if self.granted.iter().map(|&(id, tokens)| (Some(id), tokens)).ne(self.given.iter().copied()) {
            line(text, "  runs", self.granted.iter().map(|(id, tokens)| format!("{id} {tokens}")).collect());
        }
        line(text, "  takes the pages of", self.preempted.iter().map(SessionId::to_string).collect());
    }
}

fn decision((id, verdict, cap, reason): &(SessionId, Verdict, u32, String)) -> String {
    let what = match verdict {
        Verdict::Run if *cap > 0 => format!("run {id} up to {cap}"),
        Verdict::Run => format!("run {id}"),
        Verdict::Wait => format!("wait {id}"),
        Verdict::Preempt(Preemption::Keep) => format!("pause {id}"),
        Verdict::Preempt(_) => format!("preempt {id}"),
        Verdict::Reject { retry_after_s: Some(retry) } => format!("reject {id} for {retry:.3} s"),
        Verdict::Reject { .. } => format!("reject {id}"),
    };
    if reason.is_empty() { what } else { format!("{what} ({reason})") }
}

fn line(text: &mut String, head: &str, items: Vec<String>) {
    if items.is_empty() {
        return;
    }
    let others = items.len().saturating_sub(SESSIONS);
    let shown = items[..items.len() - others].join(", ");
    let more = if others > 0 { format!(" and {others} more") } else { String::new() };
    let _ = writeln!(text, "{head} {shown}{more}");
}
