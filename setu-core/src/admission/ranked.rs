//! Admission where some sessions may take the pages and the places of others.
//!
//! Every session that runs has a level, and every session that wants in has a power: those that run at a
//! level under its power need not be left anything, and are preempted where it doesn't fit otherwise, the
//! last of them first, no more of them than it takes, and only if that lets it in. What those at its power
//! or above need, and a page for each to grow into, stays set aside; but nobody is preempted for pages that
//! may be grown into some day, since whoever then is last in the order gives way anyway. A policy in which a session never runs at a level under its
//! power is so free of thrashing: who took a place from another can't lose it to the same.

use std::ops::RangeInclusive;

use super::{Room, Shortage, claim};
use crate::view::{SessionView, StepView};

/// See the [module](self). Kept between steps for its memory.
///
/// For each step: [`begin`](Ranked::begin), [`runs`](Ranked::runs) and [`returns`](Ranked::returns) for those
/// whom it concerns, then [`admit`](Ranked::admit) for those that want in, in the order of the policy.
#[derive(Clone, Debug, Default)]
pub struct Ranked {
    room: Room,
    levels: u32,
    groups: usize,
    /// What is set aside for those that run: for each level from the least, for each KV group, at this level and
    /// (once summed) above.
    claims: Vec<i64>,
    /// How many run at each level and (once summed) above, and how many were admitted: each has a spare page.
    members: Vec<i64>,
    admitted: i64,
    summed: bool,
    places: i64,
    /// Those that run and weren't considered as victims: index and level, the last to be preempted first.
    running: Vec<(u32, u32)>,
    victims: Vec<(u32, u32)>,
    /// Sessions that run or were admitted.
    inside: usize,
    returning: bool,
}

/// What became of a session that wants in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It may run.
    Free,
    /// It may run once [`Ranked::victims`] are preempted; those are out of the account already. Where `at_once` is
    /// false, steps in flight still use what they leave, and running it in this step would take from others.
    ByPreemption { at_once: bool },
    /// Those that were preempted in an earlier step are about to leave what it needs.
    Soon(Shortage),
    /// There is no room for it.
    Full(Shortage),
}

impl Ranked {
    /// Begins a step in which levels go from 0 to `levels` - 1.
    pub fn begin(&mut self, view: &StepView<'_>, levels: u32) {
        self.room.open(view);
        self.levels = levels.max(1);
        self.groups = view.kv_groups.len();
        self.claims.clear();
        self.claims.resize(self.groups * self.levels as usize, 0);
        self.members.clear();
        self.members.resize(self.levels as usize, 0);
        self.admitted = 0;
        self.summed = false;
        self.places = i64::from(view.session_budget);
        self.running.clear();
        self.victims.clear();
        self.inside = 0;
        self.returning = false;
    }

    /// Counts the session at `index`, which runs. To be called in the policy's order, from the most urgent, and
    /// before anybody is admitted.
    pub fn runs(&mut self, view: &StepView<'_>, index: u32, level: u32) {
        let Some(session) = view.sessions.get(index as usize) else { return };
        let level = self.known(level);
        self.places -= 1;
        self.inside += 1;
        self.running.push((index, level));
        self.change_claims(view, session, level..=level, 1);
    }

    /// Counts a session that was preempted and that steps in flight still compute.
    pub fn returns(&mut self) {
        self.places -= 1;
        self.returning = true;
    }

    /// Admits `session` if there is room, or if preempting those that run at levels under `power` makes room.
    ///
    /// It is admitted whatever it needs where nobody else runs, or a prompt as long as the pool would wait forever.
    pub fn admit(&mut self, view: &StepView<'_>, session: &SessionView, power: u32) -> Entry {
        self.sum_claims();
        self.victims.clear();
        let power = self.known(power);
        let entry = match self.shortage(view, session, power) {
            None => Entry::Free,
            Some(_) if self.inside == 0 => Entry::Free,
            Some(_) if self.fits_into_spare_pages(view, session, power) => Entry::Free,
            Some(shortage) if self.returning => Entry::Soon(shortage),
            Some(_) => match self.make_room(view, session, power) {
                Some(shortage) => Entry::Full(shortage),
                None => Entry::ByPreemption { at_once: !self.victims_in_flight(view) },
            },
        };
        if matches!(entry, Entry::Free | Entry::ByPreemption { .. }) {
            self.room.take(view, session);
            self.places -= 1;
            self.admitted += 1;
            self.inside += 1;
        }
        entry
    }

    /// Whom to preempt for the session admitted last, as indices into the view's sessions.
    pub fn victims(&self) -> impl Iterator<Item = u32> + '_ {
        self.victims.iter().map(|&(index, _)| index)
    }

    fn shortage(&self, view: &StepView<'_>, session: &SessionView, power: u32) -> Option<Shortage> {
        if self.places <= 0 {
            return Some(Shortage::Places { budget: view.session_budget });
        }
        let first = power as usize * self.groups;
        let aside = self.claims.get(first..first + self.groups).unwrap_or_default();
        self.room.shortage_beside(view, session, aside)
    }

    /// Whether only the pages that others may grow into are missing, and somebody less urgent would give way to them.
    fn fits_into_spare_pages(&mut self, view: &StepView<'_>, session: &SessionView, power: u32) -> bool {
        let somebody_gives_way = self.running.last().is_some_and(|&(_, level)| level < power);
        if !somebody_gives_way || self.places <= 0 {
            return false;
        }
        let spare = self.admitted + self.members.get(power as usize).copied().unwrap_or(0);
        self.room.change_by(spare);
        let fits = self.shortage(view, session, power).is_none();
        self.room.change_by(-spare);
        fits
    }

    /// Fills `victims` with those whose preemption lets `session` in, or tells what it lacks even so.
    ///
    /// Whoever was looked at once and spared isn't looked at again in this step, so that a step costs each but once.
    fn make_room(&mut self, view: &StepView<'_>, session: &SessionView, power: u32) -> Option<Shortage> {
        let mut shortage = None;
        while let Some((index, level)) = self.running.pop_if(|(_, level)| *level < power) {
            self.victims.push((index, level));
            self.vacate(view, index, 1);
            shortage = self.shortage(view, session, power);
            if shortage.is_none() {
                break;
            }
        }
        if self.victims.is_empty() {
            return self.shortage(view, session, power);
        }
        if shortage.is_some() {
            while let Some(victim) = self.victims.pop() {
                self.vacate(view, victim.0, -1);
                self.running.push(victim);
            }
            return shortage;
        }
        // The last one chosen made it fit; of the others, the more urgent are spared first.
        const SPARED: u32 = u32::MAX;
        for position in (0..self.victims.len() - 1).rev() {
            let index = self.victims[position].0;
            self.vacate(view, index, -1);
            if self.shortage(view, session, power).is_some() {
                self.vacate(view, index, 1);
            } else {
                self.victims[position].0 = SPARED;
            }
        }
        self.victims.retain(|&(index, _)| index != SPARED);
        for position in 0..self.victims.len() {
            let (index, level) = self.victims[position];
            self.inside -= 1;
            if let Some(victim) = view.sessions.get(index as usize) {
                self.change_claims(view, victim, 0..=level, -1);
            }
        }
        None
    }

    /// Adds what the session at `index` holds to what is left, or takes it back.
    fn vacate(&mut self, view: &StepView<'_>, index: u32, sign: i64) {
        self.places += sign;
        if let Some(session) = view.sessions.get(index as usize) {
            self.room.change_by_held(view, session, sign);
        }
    }

    fn victims_in_flight(&self, view: &StepView<'_>) -> bool {
        let in_flight = |index| view.sessions.get(index as usize).is_some_and(|session| session.steps_in_flight > 0);
        self.victims().any(in_flight)
    }

    /// Adds what `session` claims, times `sign`, to some levels.
    fn change_claims(&mut self, view: &StepView<'_>, session: &SessionView, levels: RangeInclusive<u32>, sign: i64) {
        for level in levels {
            self.members[level as usize] += sign;
            for (index, group) in view.kv_groups.iter().enumerate() {
                self.claims[level as usize * self.groups + index] += sign * claim(view, group, session);
            }
        }
    }

    fn sum_claims(&mut self) {
        if !std::mem::replace(&mut self.summed, true) {
            for at in (0..self.claims.len().saturating_sub(self.groups)).rev() {
                self.claims[at] += self.claims[at + self.groups];
            }
            for level in (1..self.members.len()).rev() {
                self.members[level - 1] += self.members[level];
            }
        }
    }

    /// The level itself, or the highest where it is none of those announced.
    fn known(&self, level: u32) -> u32 {
        level.min(self.levels.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{Budgets, KvGroupView, SessionState, StepOutcome, StepTimeModel};

    /// One that holds `pages` pages of 16 tokens and has room in the last of them.
    fn running(pages: u32) -> SessionView {
        let mut session = SessionView::default();
        session.set_state(SessionState::Decoding);
        session.len_tokens = 16 * pages - 8;
        session.scheduled_tokens = session.len_tokens - 1;
        session.pages_held = pages;
        session
    }

    fn waiting(pages: u32) -> SessionView {
        let mut session = SessionView::default();
        session.len_tokens = 16 * pages;
        session
    }

    /// Admits those in `wants`, (pages, power), beside those in `runs`, (pages, level), from the most urgent, with
    /// `free` pages and `places` for sessions. For each: what became of it, and whom it preempts.
    fn admitted(
        free: u32,
        places: u32,
        runs: &[(u32, u32)],
        wants: &[(u32, u32)],
        in_flight: u32,
    ) -> Vec<(Entry, Vec<u32>)> {
        let sessions: Vec<SessionView> = runs
            .iter()
            .map(|&(pages, _)| {
                let mut session = running(pages);
                session.steps_in_flight = in_flight;
                session
            })
            .collect();
        let mut group = KvGroupView::new(16, 0, 100);
        group.free_pages = free;
        let history = (StepOutcome::default(), StepTimeModel::default());
        let budgets = Budgets { tokens: 64, sessions: places, steps_in_flight: in_flight };
        let groups = [group];
        let view = StepView::new(0.0, 1, budgets, &sessions, &groups, (&history.0, &history.1));
        let mut ranked = Ranked::default();
        ranked.begin(&view, 4);
        for (index, &(_, level)) in (0..).zip(runs) {
            ranked.runs(&view, index, level);
        }
        let admit = |&(pages, power): &(u32, u32)| {
            let entry = ranked.admit(&view, &waiting(pages), power);
            let victims = if matches!(entry, Entry::ByPreemption { .. }) { ranked.victims().collect() } else { vec![] };
            (entry, victims)
        };
        wants.iter().map(admit).collect()
    }

    #[test]
    fn room_is_made_by_the_last_of_the_lower_and_by_no_more_than_it_takes() {
        let preempts = Entry::ByPreemption { at_once: true };
        let full = |needed, left| Entry::Full(Shortage::Pages { needed, left });
        type Case = (u32, &'static [(u32, u32)], (u32, u32), Entry, &'static [u32]);
        let cases: [Case; 7] = [
            (9, &[(4, 1)], (8, 1), Entry::Free, &[]),
            // The page to grow into is not preempted for, but it isn't given away either to one of the same level.
            (8, &[(4, 1)], (8, 1), full(8, 7), &[]),
            (8, &[(4, 0)], (8, 1), Entry::Free, &[]),
            (4, &[(4, 0), (4, 0)], (8, 1), preempts, &[1]),
            (2, &[(4, 1), (4, 0), (1, 0)], (7, 1), full(7, 6), &[]),
            // The last one alone wouldn't do; with the one before it, it isn't needed any more.
            (2, &[(6, 0), (1, 0)], (7, 1), preempts, &[0]),
            (2, &[(6, 2), (6, 1), (6, 0)], (13, 2), preempts, &[2, 1]),
        ];
        for (free, runs, want, entry, victims) in cases {
            let found = admitted(free, 9, runs, &[want], 0);
            assert_eq!(found, [(entry, victims.to_vec())], "{free} free, {runs:?}, {want:?}");
        }
    }

    #[test]
    fn places_are_taken_as_pages_are() {
        let runs = [(1, 2), (1, 1), (1, 0)];
        let full = Entry::Full(Shortage::Places { budget: 3 });
        let preempts = Entry::ByPreemption { at_once: true };
        let found = admitted(50, 3, &runs, &[(1, 2), (1, 1), (1, 0)], 0);
        assert_eq!(found, [(preempts, vec![2]), (full, vec![]), (full, vec![])]);
        let found = admitted(50, 3, &runs, &[(1, 3), (1, 3), (1, 3), (1, 3)], 0);
        assert_eq!(found, [(preempts, vec![2]), (preempts, vec![1]), (preempts, vec![0]), (full, vec![])]);
    }

    #[test]
    fn what_a_step_in_flight_uses_comes_back_later() {
        let found = admitted(0, 9, &[(4, 0)], &[(2, 1), (3, 1)], 1);
        assert_eq!(found[0], (Entry::ByPreemption { at_once: false }, vec![0]));
        assert_eq!(found[1].0, Entry::Full(Shortage::Pages { needed: 3, left: 1 }));
        // Nobody runs: one is admitted whatever it needs.
        assert_eq!(admitted(0, 9, &[], &[(5, 0), (1, 0)], 1)[0].0, Entry::Free);
    }
}
