//! Stories in sentences. Times at the left count from the session's arrival.

use std::fmt::{Display, Formatter, Result};

use super::numbers::{counted, time};
use super::story::{CapPart, Chapter, Phase, ReasonPart, Run, Story, WaitPart, Waiting};
use super::{Added, CapCause, Ended, FreePages, Outcome, PagesShort, Preempted, PreemptionCause, Wait, WaitCause};

/// Chapters that are told from the beginning and from the end where there are many more.
const FIRST_CHAPTERS: usize = 40;
const LAST_CHAPTERS: usize = 12;

/// Kinds of reason that one list tells.
const MOST_REASONS: usize = 6;

impl Display for Story {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match &self.added {
            Some(added) => writeln!(f, "{}: {}", self.session, request(added))?,
            None => writeln!(f, "{}: it came before the record begins", self.session)?,
        }
        let mut told_first_token = false;
        if let Some(added) = &self.added {
            let whose = added.shares_prompt_of.map(|leader| format!("; it shares the prompt of {leader}"));
            self.line(f, added.time_s, &format!("arrived{}", whose.unwrap_or_default()))?;
        }
        let left_out = FIRST_CHAPTERS..self.chapters.len().saturating_sub(LAST_CHAPTERS);
        for (number, chapter) in self.chapters.iter().enumerate() {
            let start_s = chapter.from_s();
            if let Some(first_s) = self.first_token_s.filter(|&first_s| !told_first_token && first_s <= start_s) {
                told_first_token = true;
                self.first_token(f, first_s)?;
            }
            if left_out.contains(&number) {
                if number == left_out.start {
                    let lines = counted(left_out.len() as u64, "chapter");
                    writeln!(f, "{:14}{lines} of this kind left out; --json tells them", "")?;
                }
                continue;
            }
            self.chapter(f, chapter)?;
        }
        if let Some(first_s) = self.first_token_s.filter(|_| !told_first_token) {
            self.first_token(f, first_s)?;
        }
        match &self.ended {
            Some(ended) => self.line(f, ended.time_s, &self.end(ended)),
            None => self.line(f, self.until_s, "the record ends here; the session was still live"),
        }
    }
}

impl Story {
    fn line(&self, f: &mut Formatter<'_>, at_s: f64, text: &str) -> Result {
        let arrival_s = self.added.as_ref().map_or(self.header.time_s, |added| added.time_s);
        writeln!(f, "{:>12}  {text}", time(at_s - arrival_s))
    }

    fn first_token(&self, f: &mut Formatter<'_>, first_s: f64) -> Result {
        let mut text = "its first token was there".to_owned();
        if let Some((arrival_s, limit_s)) = self.added.as_ref().and_then(|added| Some((added.time_s, added.ttft_s?))) {
            let late_s = first_s - arrival_s - limit_s;
            let how = if late_s > 0.0 { "late for" } else { "ahead of" };
            text.push_str(&format!(", {} {how} its deadline", time(late_s.abs())));
        }
        self.line(f, first_s, &text)
    }

    fn chapter(&self, f: &mut Formatter<'_>, chapter: &Chapter) -> Result {
        match chapter {
            Chapter::Waited(waiting) => self.waiting(f, waiting),
            Chapter::Ran(run) => self.run(f, run),
            Chapter::Preempted(preempted) => self.line(f, preempted.time_s, &self.preemption(preempted)),
            Chapter::Fault(fault) => {
                let who = fault.replaced_by.as_deref().unwrap_or("nobody");
                let text = format!(
                    "the {} {} was at fault and {who} took over: {}",
                    fault.kind, fault.component, fault.message
                );
                self.line(f, fault.time_s, &text)
            }
            Chapter::Swapped(swapped) => {
                self.line(f, swapped.time_s, &format!("{} became the {}", swapped.component, swapped.kind))
            }
        }
    }

    fn waiting(&self, f: &mut Formatter<'_>, waiting: &Waiting) -> Result {
        let lasted = time(waiting.to_s - waiting.from_s);
        self.line(f, waiting.from_s, &format!("waited {lasted}, {}", counted(waiting.steps, "step")))?;
        self.waits(f, &waiting.causes)
    }

    fn waits(&self, f: &mut Formatter<'_>, parts: &[WaitPart]) -> Result {
        bullets(f, parts, |part| {
            let mut text = format!("{}: {}", counted(part.steps, "step"), self.wait(&part.first));
            if part.last != part.first {
                let last = if part.last.reason.is_empty() { self.wait(&part.last) } else { part.last.reason.clone() };
                text.push_str(&format!("; at last: {last}"));
            }
            if matches!(part.first.cause, WaitCause::Scheduler | WaitCause::Pages | WaitCause::GaveWay) {
                text.push_str(&self.pages_then(&part.pages));
            }
            text
        })
    }

    fn wait(&self, wait: &Wait) -> String {
        let reason = reason(&wait.reason);
        let other = || wait.by.map_or_else(|| "another session".to_owned(), |by| by.to_string());
        let (scheduler, batcher) = (&self.header.scheduler, &self.header.batcher);
        match wait.cause {
            WaitCause::Scheduler => format!("the scheduler ({scheduler}) had it wait{reason}"),
            WaitCause::Unnamed => format!("the scheduler ({scheduler}) did not name it"),
            WaitCause::Prompt => format!("{} was computing the prompt that they share", other()),
            WaitCause::InFlight => "a step from before it lost its pages was still in flight".to_owned(),
            WaitCause::Slots => {
                format!("all {} sampler slots ([engine] max_sessions) were taken", self.header.session_budget)
            }
            WaitCause::Batcher => format!("the batcher ({batcher}) gave it nothing{reason}"),
            WaitCause::StepTokens => format!("the step's tokens went to others{}", budget(self.header.token_budget)),
            WaitCause::StepSessions => format!("the step's sessions were others{}", budget(self.header.session_budget)),
            WaitCause::Pages => format!("its chunk {}", pages_short(&wait.pages)),
            WaitCause::GaveWay => format!("it came behind {}, which needed pages", other()),
            WaitCause::Unknown => format!("for a reason that this version doesn't know{reason}"),
        }
    }

    /// The pages that could be given out when something was decided.
    fn pages_then(&self, pages: &[FreePages]) -> String {
        let free = |pages: &FreePages| u64::from(pages.free) + u64::from(pages.reclaimable);
        let groups = pages.iter().zip(&self.header.kv_groups);
        let groups: Vec<String> =
            groups.map(|(pages, group)| format!("{} of {}", free(pages), group.total_pages)).collect();
        if groups.is_empty() { String::new() } else { format!(" (pages left then: {})", groups.join(", ")) }
    }

    fn run(&self, f: &mut Formatter<'_>, run: &Run) -> Result {
        let tokens = match run.phase {
            Phase::Prefill => format!("computed {} of its prompt", counted(run.tokens, "token")),
            Phase::Recompute => format!("computed {} again", counted(run.tokens, "token")),
            Phase::Decode => format!("decoded {}", counted(run.tokens, "token")),
        };
        let mut text = format!("{tokens} in {}", counted(run.steps, "step"));
        if run.took_s.count() > 0 {
            text.push_str(&format!(" of {}", time(run.took_s.quantile(0.5))));
            let mut notes = Vec::new();
            match run.took_s.count() {
                1 => {}
                // With fewer the p99 would be the longest under another name.
                2..100 => notes.push(format!("at most {}", time(run.took_s.quantile(1.0)))),
                _ => notes.push(format!("p99 {}", time(run.took_s.quantile(0.99)))),
            }
            if run.predicted_s > 0.0 {
                notes.push(format!("predicted {}", time(run.predicted_s)));
            }
            if !notes.is_empty() {
                text.push_str(&format!(" ({})", notes.join(", ")));
            }
        }
        if run.cached_tokens > 0 {
            let cached = counted(run.cached_tokens, "token");
            text.push_str(&format!("; {cached} needn't be computed: they were in the prefix cache"));
        }
        self.line(f, run.from_s, &text)?;
        let beside = run.beside_prompts_s.count();
        // Where all steps held prompts of others there is nothing to tell apart.
        if run.phase == Phase::Decode && beside > 0 && beside < run.took_s.count() {
            let took = time(run.beside_prompts_s.quantile(0.5));
            bullet(f, &format!("{} held prompts of others as well and took {took}", counted(beside as u64, "step")))?;
        }
        bullets(f, &run.caps, |part| self.cap(part))?;
        bullets(f, &run.reasons, |ReasonPart { steps, first }| {
            format!("{}: the scheduler ({}) ran it: {first}", counted(*steps, "step"), self.header.scheduler)
        })?;
        if !run.passed_over.is_empty() {
            bullet(f, "and was passed over in steps between:")?;
            self.waits(f, &run.passed_over)?;
        }
        Ok(())
    }

    fn cap(&self, part: &CapPart) -> String {
        let reason = reason(&part.first.reason);
        let why = match part.first.by {
            CapCause::Scheduler => format!("the scheduler ({}) capped it{reason}", self.header.scheduler),
            CapCause::Batcher => format!("the batcher ({}) gave no more{reason}", self.header.batcher),
            CapCause::StepTokens => format!("the step was full{}", budget(self.header.token_budget)),
            CapCause::Pages => format!(
                "the engine trimmed it; the {} that the batcher gave {}",
                part.first.given,
                pages_short(&part.first.pages)
            ),
            CapCause::Unknown => format!("for a reason that this version doesn't know{reason}"),
        };
        let first = if part.steps == 1 { "" } else { "at first " };
        format!("{}: {first}{} of {} tokens, {why}", counted(part.steps, "step"), part.tokens, part.pending)
    }

    fn preemption(&self, preempted: &Preempted) -> String {
        let other = || preempted.by.map_or_else(|| "another session".to_owned(), |by| by.to_string());
        let why = match preempted.cause {
            PreemptionCause::Pages => format!("by {}, which came before it and needed pages", other()),
            PreemptionCause::Slot => format!("by {}, which needed its sampler slot while it paused", other()),
            PreemptionCause::Scheduler => {
                format!("by the scheduler ({}){}", self.header.scheduler, reason(&preempted.reason))
            }
            PreemptionCause::Operator => "by the operator".to_owned(),
            PreemptionCause::CopyLost => "since the step failed that was to copy its pages".to_owned(),
            PreemptionCause::Unknown => "for a reason that this version doesn't know".to_owned(),
        };
        let (pages, lost) =
            (counted(preempted.pages.into(), "page"), counted(preempted.tokens_lost.into(), "computed token"));
        format!("was preempted {why}; it lost {pages} with {lost}")
    }

    fn end(&self, ended: &Ended) -> String {
        let mut text = match ended.outcome {
            Outcome::Stop => match ended.stop_token {
                Some(token) => format!("ended: token {token} ends answers"),
                None => "ended: its answer came to a stop string".to_owned(),
            },
            Outcome::Length => {
                if self.added.as_ref().is_some_and(|added| added.prompt_only) {
                    "ended: its prompt was read".to_owned()
                } else {
                    "ended: it may generate no more".to_owned()
                }
            }
            Outcome::Aborted => "ended: its owner ended it".to_owned(),
            Outcome::Rejected => format!("was rejected{}", reason(&ended.reason)),
            Outcome::Failed => format!("failed{}", reason(&ended.reason)),
            Outcome::Unknown => "ended for a reason that this version doesn't know".to_owned(),
        };
        if let Some(retry_s) = ended.retry_after_s {
            text.push_str(&format!("; trying again may help after {}", time(retry_s)));
        }
        text.push_str(&format!(
            "; {} generated, {} of {} prompt tokens from the prefix cache",
            counted(ended.generated_tokens.into(), "token"),
            ended.cached_tokens,
            ended.prompt_tokens
        ));
        if ended.preemptions > 0 {
            let lost = counted(ended.tokens_lost.into(), "computed token");
            text.push_str(&format!(", {} that cost {lost}", counted(ended.preemptions.into(), "preemption")));
        }
        if ended.service_s > 0.0 {
            text.push_str(&format!(", {} of step time", time(ended.service_s)));
        }
        if self.longest_gap_s > 0.0 {
            text.push_str(&format!("; longest gap between tokens {}", time(self.longest_gap_s)));
        }
        if self.late_gaps > 0 {
            text.push_str(&format!(", {} over its limit", counted(self.late_gaps, "gap")));
        }
        if let Some((arrival_s, limit_s)) = self.added.as_ref().and_then(|added| Some((added.time_s, added.total_s?))) {
            let late_s = ended.time_s - arrival_s - limit_s;
            let how = if late_s > 0.0 { "late for" } else { "ahead of" };
            text.push_str(&format!("; {} {how} its deadline", time(late_s.abs())));
        }
        text
    }
}

/// What was asked for.
fn request(added: &Added) -> String {
    let mut text = format!("a prompt of {}", counted(added.prompt_tokens.into(), "token"));
    if !added.prompt_only {
        text.push_str(&format!(", at most {} to generate", added.max_tokens));
        if added.expected_tokens != added.max_tokens {
            text.push_str(&format!(" ({} expected)", added.expected_tokens));
        }
    }
    text.push_str(&format!("; tenant {}", added.tenant));
    if added.tenant_weight != 1.0 {
        text.push_str(&format!(" of weight {}", added.tenant_weight));
    }
    if let Some(priority) = added.priority {
        text.push_str(&format!(", priority {priority}"));
    }
    if added.class != 0 {
        text.push_str(&format!(", class {}", added.class));
    }
    let limits =
        [("first token within", added.ttft_s), ("between tokens at most", added.itl_s), ("all within", added.total_s)];
    for (what, limit_s) in limits.into_iter().filter_map(|(what, limit_s)| Some((what, limit_s?))) {
        text.push_str(&format!("; {what} {}", time(limit_s)));
    }
    text
}

fn reason(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

fn budget(budget: u32) -> String {
    if budget == 0 { String::new() } else { format!(" ({budget})") }
}

fn pages_short(pages: &[PagesShort]) -> String {
    let short = pages.iter().filter(|pages| pages.needed > pages.available);
    let needs: Vec<String> =
        short.map(|pages| format!("{} pages and {} could be given out", pages.needed, pages.available)).collect();
    if needs.is_empty() {
        // What others gave up is there once the steps in flight that use it are over.
        return "needed pages that steps in flight still used".to_owned();
    }
    format!("needed {}", needs.join(", "))
}

fn bullet(f: &mut Formatter<'_>, text: &str) -> Result {
    writeln!(f, "{:14}- {text}", "")
}

fn bullets<T>(f: &mut Formatter<'_>, parts: &[T], text: impl Fn(&T) -> String) -> Result {
    parts.iter().take(MOST_REASONS).try_for_each(|part| bullet(f, &text(part)))?;
    match parts.len().saturating_sub(MOST_REASONS) {
        0 => Ok(()),
        more => bullet(f, &format!("{} more; --json tells them", counted(more as u64, "reason"))),
    }
}
