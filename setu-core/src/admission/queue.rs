//! From an order of sessions to decisions: who runs, who waits for what, who is preempted for whom.
//!
//! Who runs goes on. Who waits is admitted in order when all that it has yet to compute fits, by [`Ranked`], and
//! nobody overtakes one that doesn't.

use super::ranked::{Entry, Ranked};
use crate::ids::SessionId;
use crate::scheduler::{Decisions, Preemption};
use crate::view::{SessionState, SessionView, StepView};

/// A session that runs or wants to, in its place in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Index into the view's sessions.
    pub index: u32,
    /// At which it runs: those of less power can't take its place.
    pub level: u32,
    /// It takes the places of those that run at levels under this.
    pub power: u32,
    pub runs: bool,
    /// It was preempted, and steps in flight still use its pages and its place.
    pub returns: bool,
}

impl Candidate {
    pub fn new(session: &SessionView, index: u32, level: u32, power: u32) -> Candidate {
        let runs = matches!(session.state(), SessionState::Prefilling | SessionState::Decoding);
        Candidate { index, level, power, runs, returns: !runs && session.steps_in_flight > 0 }
    }
}

/// See the [module](self). Kept between steps for its memory.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    ranked: Ranked,
    /// By index into the view.
    preempted: Vec<bool>,
}

impl Queue {
    /// Decides about `candidates`, the most urgent first, with levels from 0 to `levels` - 1. `why` says in a few
    /// words how urgent one is, such as "of priority 3"; it is asked only where somebody reads the reasons.
    pub fn decide(
        &mut self,
        view: &StepView<'_>,
        candidates: &[Candidate],
        levels: u32,
        decisions: &mut Decisions<'_>,
        why: impl Fn(&SessionView, &Candidate) -> String,
    ) {
        self.preempted.clear();
        self.preempted.resize(view.sessions.len(), false);
        self.ranked.begin(view, levels);
        for candidate in candidates {
            if candidate.runs {
                self.ranked.runs(view, candidate.index, candidate.level);
            } else if candidate.returns {
                self.ranked.returns();
            }
        }
        let recording = decisions.is_recording();
        let mut runs = false;
        // The first that has to wait, and one who has to only until a step in flight is done.
        let mut blocker: Option<(SessionId, &Candidate)> = None;
        let mut next = None;
        for candidate in candidates {
            if !candidate.runs && blocker.is_some() && !recording {
                continue;
            }
            let Some(session) = view.sessions.get(candidate.index as usize) else { continue };
            if self.preempted[candidate.index as usize] {
                // Nor is it overtaken by those behind it.
                blocker = blocker.or(Some((session.id, candidate)));
                continue;
            }
            if !candidate.runs {
                let waits_for = match blocker {
                    Some((id, before)) => {
                        let urgency = view.sessions.get(before.index as usize).map(|session| why(session, before));
                        decisions.wait(session.id, &format!("behind {id} {}", urgency.unwrap_or_default()));
                        continue;
                    }
                    None => self.admit(view, session, candidate, decisions, &why),
                };
                match waits_for {
                    None => {}
                    Some(reason) => {
                        blocker = Some((session.id, candidate));
                        match reason {
                            Wait::Until(reason) if recording => decisions.wait(session.id, &reason),
                            Wait::Until(_) => {}
                            Wait::ForVictims => next = Some((session.id, candidate)),
                        }
                        continue;
                    }
                }
            }
            runs = true;
            if recording {
                decisions.run_because(session.id, &why(session, candidate));
            } else {
                decisions.run(session.id);
            }
        }
        match next {
            // Nobody else runs from whom it could take pages, so it may begin with those there are.
            Some((id, _)) if !runs => decisions.run(id),
            Some((id, _)) if recording => {
                decisions.wait(id, "a step in flight still uses what those preempted for it leave");
            }
            _ => {}
        }
    }

    /// Admits a session that waits, or says why not.
    fn admit(
        &mut self,
        view: &StepView<'_>,
        session: &SessionView,
        candidate: &Candidate,
        decisions: &mut Decisions<'_>,
        why: &impl Fn(&SessionView, &Candidate) -> String,
    ) -> Option<Wait> {
        let recording = decisions.is_recording();
        let told = |reason: String| Some(Wait::Until(reason));
        match self.ranked.admit(view, session, candidate.power) {
            Entry::Free => None,
            Entry::ByPreemption { at_once } => {
                let reason =
                    if recording { format!("for {} {}", session.id, why(session, candidate)) } else { String::new() };
                for victim in self.ranked.victims() {
                    self.preempted[victim as usize] = true;
                    decisions.preempt(view.sessions[victim as usize].id, Preemption::Recompute, &reason);
                }
                (!at_once).then_some(Wait::ForVictims)
            }
            _ if !recording => told(String::new()),
            Entry::Soon(shortage) => told(format!("{shortage}, and those just preempted are about to leave theirs")),
            Entry::Full(shortage) => told(shortage.to_string()),
        }
    }
}

enum Wait {
    Until(String),
    ForVictims,
}
