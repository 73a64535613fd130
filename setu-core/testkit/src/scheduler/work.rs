//! Somebody runs whenever somebody could, and nobody in front of somebody more urgent.

use proptest::prelude::*;
use setu_core::admission::Room;
use setu_core::rows::Rows;
use setu_core::scheduler::Verdict;
use setu_core::view::{KvGroupView, SessionState, SessionView};

use crate::arena::{Moment, Watch, Workload, any_workload, smallest};
use crate::policy::Options;
use crate::report::Checked;

/// Nobody may be left to run where no step is in flight and a session could.
pub struct Conserving;

impl Watch for Conserving {
    fn decided(&mut self, moment: &Moment<'_>) -> Result<(), String> {
        if moment.view.steps_in_flight > 0 {
            return Ok(());
        }
        let chosen = |wanted: fn(Verdict) -> bool| {
            moment.choices.iter().filter(move |choice| wanted(choice.verdict)).map(|choice| choice.index)
        };
        if chosen(|verdict| verdict == Verdict::Run).any(|index| moment.can_run[index]) {
            return Ok(());
        }
        let rejected: Vec<usize> = chosen(|verdict| matches!(verdict, Verdict::Reject { .. })).collect();
        let idle = (0..moment.can_run.len()).find(|index| moment.can_run[*index] && !rejected.contains(index));
        match idle {
            None => Ok(()),
            Some(index) => Err(format!("nobody runs, and {} could", moment.view.sessions[index].id)),
        }
    }
}

/// Runs `test` with workloads in which every session has a priority.
pub fn by_priority(options: &Options, test: impl FnMut(Workload) -> Result<(), String>) -> Checked {
    let with_priorities =
        (any_workload(), prop::collection::vec(1i32..10, 20)).prop_map(|(mut workload, priorities)| {
            for (arrival, priority) in workload.arrivals.iter_mut().zip(priorities) {
                arrival.priority = priority;
            }
            workload
        });
    smallest(options.cases, &with_priorities, test)
}

/// Whoever runs has nobody more urgent behind, and nobody more urgent waits who would fit into what is left by those
/// that are as urgent.
#[derive(Default)]
pub struct StrictPriority {
    room: Room,
}

impl Watch for StrictPriority {
    fn decided(&mut self, moment: &Moment<'_>) -> Result<(), String> {
        let view = &moment.view;
        let running: Vec<&SessionView> = moment
            .choices
            .iter()
            .filter(|choice| choice.verdict == Verdict::Run && moment.can_run[choice.index])
            .map(|choice| &view.sessions[choice.index])
            .collect();
        for (place, session) in running.iter().enumerate() {
            if let Some(urgent) = running[place + 1..].iter().find(|urgent| urgent.priority > session.priority) {
                return Err(format!(
                    "{} of priority {} runs in front of {} of priority {}",
                    session.id, session.priority, urgent.id, urgent.priority
                ));
            }
        }
        let rejected = |index| {
            moment
                .choices
                .iter()
                .any(|choice| choice.index == index && matches!(choice.verdict, Verdict::Reject { .. }))
        };
        for (index, urgent) in view.sessions.iter().enumerate() {
            let waits = moment.can_run[index] && running.iter().all(|session| session.id != urgent.id);
            let lesser = running.iter().find(|session| session.priority < urgent.priority);
            let Some(lesser) = lesser.filter(|_| waits && !rejected(index)) else { continue };
            if self.could(moment, urgent) {
                return Err(format!(
                    "{} of priority {} runs and {} of priority {} waits, which would fit in its place",
                    lesser.id, lesser.priority, urgent.id, urgent.priority
                ));
            }
        }
        Ok(())
    }
}

impl StrictPriority {
    /// Whether `urgent` fits beside all that are as urgent and live, whoever less urgent has to give way.
    fn could(&mut self, moment: &Moment<'_>, urgent: &SessionView) -> bool {
        let view = &moment.view;
        let mut groups: Vec<KvGroupView> = view.kv_groups.iter().copied().collect();
        let mut places = view.session_budget;
        // What a step in flight uses comes back only with it, and what is shared perhaps never.
        let leaves = |session: &SessionView| session.steps_in_flight == 0 && session.pages_shared == 0;
        let gives_way = |session: &SessionView| session.priority < urgent.priority && leaves(session);
        // What one that doesn't go on has may be meant for others: it fits if all of it does.
        let mut whole = *urgent;
        (whole.scheduled_tokens, whole.computed_tokens, whole.pages_held) = (0, 0, 0);
        for session in view.sessions.iter() {
            let own = session.id == urgent.id;
            let stays = session.priority >= urgent.priority && session.state() != SessionState::Held;
            if !own && (stays || (session.pages_held > 0 && !gives_way(session))) {
                places = places.saturating_sub(1);
            }
            // The view tells the pages of all groups together.
            if let [group] = &mut groups[..]
                && (gives_way(session) || (own && leaves(session)))
            {
                group.free_pages += session.pages_held;
            }
        }
        let mut freed = *view;
        freed.kv_groups = Rows::new(&groups);
        self.room.open(&freed);
        for session in view.sessions.iter().filter(|session| session.id != urgent.id) {
            if session.priority >= urgent.priority && session.state() != SessionState::Held {
                self.room.take(&freed, session);
            }
        }
        places > 0 && self.room.fits(&freed, &whole)
    }
}
