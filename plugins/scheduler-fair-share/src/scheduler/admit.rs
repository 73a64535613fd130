//! Who gets pages and a place, and who has to give them up.
//!
//! Memory and places are shared out coarsely, by preemption where somebody has less than its share of them and
//! is a quantum behind; tokens are shared out finely, by order and pauses, which cost nothing. To preempt by
//! counters alone would have tenants take the same places from each other in every quantum.

use setu_core::admission::Shortage;
use setu_core::prelude::*;

use super::{FairShare, Obstacle, Walk, index_of, level_of};

/// Sessions for which a step looks for others to preempt, so that a decision stays cheap.
pub(super) const MOST_ATTEMPTS: u32 = 16;

impl FairShare {
    /// Finds room for a session without pages.
    pub(super) fn admit(
        &mut self,
        view: &StepView<'_>,
        position: usize,
        walk: &mut Walk,
        decisions: &mut Decisions<'_>,
    ) -> std::result::Result<(), Obstacle> {
        let index = index_of(self.order[position]);
        let session = &view.sessions[index];
        let account = self.rows[index].account as usize;
        let (level, blocked) = (self.accounts.get(account).now.level, self.accounts.get(account).now.blocked);
        let in_front = walk.blocked.filter(|&(blocked, _)| level > blocked).map(|(_, id)| id);
        if blocked || in_front.is_some() {
            return Err(Obstacle::Behind(in_front));
        }
        let shortage = self.shortage(view, session, walk.places);
        let Some(shortage) = shortage else {
            walk.places -= 1;
            return Ok(());
        };
        let obstacle = match self.make_room(view, position, shortage, walk, decisions) {
            Some(true) => {
                walk.places -= 1;
                return Ok(());
            }
            Some(false) => Obstacle::Returning,
            None => Obstacle::Lacks(shortage),
        };
        self.accounts.now(account).blocked = true;
        if matches!(shortage, Shortage::Pages { .. }) && walk.blocked.is_none() {
            walk.blocked = Some((level, session.id));
        }
        Err(obstacle)
    }

    fn shortage(&self, view: &StepView<'_>, session: &SessionView, places: u32) -> Option<Shortage> {
        if places == 0 {
            return Some(Shortage::Places { budget: view.session_budget });
        }
        self.room.shortage(view, session)
    }

    /// Preempts sessions of tenants ahead until the one at `position` has room, if that is justified. Says whether the
    /// room is there now or comes with a step in flight; `None` if nobody is to be preempted.
    fn make_room(
        &mut self,
        view: &StepView<'_>,
        position: usize,
        mut shortage: Shortage,
        walk: &mut Walk,
        decisions: &mut Decisions<'_>,
    ) -> Option<bool> {
        let index = index_of(self.order[position]);
        let session = &view.sessions[index];
        let account = self.rows[index].account as usize;
        if !self.accounts.get(account).now.waits || walk.attempts == 0 {
            return None;
        }
        if walk.returning {
            return Some(false);
        }
        walk.attempts -= 1;
        self.victims.clear();
        let mut places = walk.places;
        let mut now = true;
        let mut found = false;
        for other in (position + 1..self.order.len()).rev() {
            if level_of(self.order[other]) <= level_of(self.order[position]) {
                break;
            }
            let victim = index_of(self.order[other]);
            let row = self.rows[victim];
            if !row.holds || row.preempted || !self.may_take(view, account, row.account as usize, shortage) {
                continue;
            }
            let held = &view.sessions[victim];
            self.victims.push(victim as u32);
            self.room.change_by_held(view, held, 1);
            let standing = self.accounts.now(row.account as usize);
            standing.sessions -= 1;
            standing.pages -= u64::from(held.pages_held);
            places += 1;
            now &= held.steps_in_flight == 0;
            match self.shortage(view, session, places) {
                Some(still) => shortage = still,
                None => {
                    found = true;
                    break;
                }
            }
        }
        for &victim in &self.victims {
            let held = &view.sessions[victim as usize];
            let row = &mut self.rows[victim as usize];
            if !found || !now {
                self.room.change_by_held(view, held, -1);
            }
            if found {
                row.preempted = true;
                let (id, tenant) = (session.id, self.accounts.get(account).tenant.0);
                let ahead =
                    self.accounts.get(row.account as usize).now.counter - self.accounts.get(account).now.counter;
                let reason = format!("makes room for {id} of tenant {tenant}; its own is {ahead:.0} tokens ahead");
                decisions.preempt(held.id, Preemption::Recompute, &reason);
            } else {
                let standing = self.accounts.now(row.account as usize);
                standing.sessions += 1;
                standing.pages += u64::from(held.pages_held);
            }
        }
        if found && now {
            walk.places = places;
        }
        walk.returning = found && !now;
        found.then_some(now)
    }

    /// Whether a session of `account` may take what it lacks from one of `other`, which is at a higher level: if
    /// `account` holds less than its share, and `other` holds more; or if `other` pauses for it.
    fn may_take(&self, view: &StepView<'_>, account: usize, other: usize, shortage: Shortage) -> bool {
        let total_weight = self.accounts.total_weight();
        let (own, other) = (self.accounts.get(account), self.accounts.get(other));
        if own.now.named == 0 && other.now.counter >= own.now.counter + self.accounts.most_ahead() {
            return true;
        }
        let places = f64::from(view.session_budget) / total_weight;
        let pages = view.kv_groups.iter().map(|group| f64::from(group.total_pages)).sum::<f64>() / total_weight;
        let has_less = f64::from(own.now.sessions) < own.weight * places && (own.now.pages as f64) < own.weight * pages;
        let has_more = match shortage {
            Shortage::Places { .. } => f64::from(other.now.sessions) - 1.0 >= other.weight * places,
            _ => other.now.pages as f64 > other.weight * pages,
        };
        (own.now.sessions == 0 || has_less) && has_more
    }
}
