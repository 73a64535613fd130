//! Who fits: the arithmetic of pages that schedulers share.
//!
//! A session is admitted when all that it has yet to compute fits into the pages that those before it
//! leave. Admitting chunk by chunk instead would fill the pages with half-computed prompts that then
//! preempt each other.
//!
//! [`Room`] is for policies in which whoever runs goes on; [`ranked`] for those in which a session may take
//! the pages or the place of another.

pub mod queue;
pub mod ranked;

use std::fmt;

use crate::scheduler::Decisions;
use crate::view::{KvGroupView, SessionView, StepView};

/// Pages that are left for the sessions not looked at yet. Kept between steps for its memory.
///
/// ```
/// # use setu_core::admission::Room;
/// # use setu_core::view::{SessionState, StepView};
/// # fn order(room: &mut Room, view: &StepView<'_>) {
/// room.open(view);
/// for session in view.sessions.iter() {
///     let running = matches!(session.state(), SessionState::Prefilling | SessionState::Decoding);
///     if running || room.fits(view, session) {
///         room.take(view, session);
///     }
/// }
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Room {
    /// By KV group; under zero where those that run may come to need more than there is.
    left: Vec<i64>,
}

impl Room {
    /// All pages that can be given out.
    pub fn open(&mut self, view: &StepView<'_>) {
        self.left.clear();
        self.left.extend(view.kv_groups.iter().map(|group| i64::from(group.available_pages())));
    }

    /// Whether all that `session` has yet to compute fits.
    pub fn fits(&self, view: &StepView<'_>, session: &SessionView) -> bool {
        self.shortage(view, session).is_none()
    }

    /// What `session` lacks to fit, if anything.
    pub fn shortage(&self, view: &StepView<'_>, session: &SessionView) -> Option<Shortage> {
        self.shortage_beside(view, session, &[])
    }

    /// As [`shortage`](Room::shortage) where the pages `aside`, by KV group, are others'; no entry is none.
    fn shortage_beside(&self, view: &StepView<'_>, session: &SessionView, aside: &[i64]) -> Option<Shortage> {
        view.kv_groups.iter().zip(&self.left).enumerate().find_map(|(index, (group, &left))| {
            let needed = pages_needed(view, group, session);
            let left = left.saturating_sub(aside.get(index).copied().unwrap_or(0)).max(0);
            (i64::from(needed) > left).then_some(Shortage::Pages { needed, left: left.try_into().unwrap_or(u32::MAX) })
        })
    }

    /// Sets aside what `session` needs, and a page more, so that its answer can grow without preempting anybody.
    pub fn take(&mut self, view: &StepView<'_>, session: &SessionView) {
        for (group, left) in view.kv_groups.iter().zip(&mut self.left) {
            *left = left.saturating_sub(claim(view, group, session));
        }
    }

    /// Adds `pages` to what is left in every group.
    fn change_by(&mut self, pages: i64) {
        self.left.iter_mut().for_each(|left| *left = left.saturating_add(pages));
    }

    /// Adds the pages that preempting `session` frees, times `sign`, so that -1 takes back what 1 added.
    pub fn change_by_held(&mut self, view: &StepView<'_>, session: &SessionView, sign: i64) {
        let in_all: u64 = view.kv_groups.iter().map(|group| pages_used(view, group, session)).sum();
        let alone = u64::from(session.pages_held.saturating_sub(session.pages_shared));
        for (group, left) in view.kv_groups.iter().zip(&mut self.left) {
            // The view tells pages of all groups together: each frees its part of those that are not shared.
            let freed = (alone * pages_used(view, group, session)).checked_div(in_all).unwrap_or(0);
            *left = left.saturating_add(sign * i64::try_from(freed).unwrap_or(i64::MAX));
        }
    }
}

/// Rejects `session` if it has waited for `timeout_s` without ever running, and asks to be called when it will
/// have; 0 is no limit. Tells whether it did.
pub fn expired(view: &StepView<'_>, session: &SessionView, timeout_s: f64, decisions: &mut Decisions<'_>) -> bool {
    if timeout_s == 0.0 || session.has_run() {
        return false;
    }
    let expires_s = session.arrival_s + timeout_s;
    if expires_s > view.now_s {
        decisions.wake_at(expires_s);
        return false;
    }
    let waited_s = session.waited_s(view.now_s);
    let reason = format!("waited {waited_s:.1} s without running; the scheduler's queue_timeout_s is {timeout_s} s");
    decisions.reject(session.id, &reason, None);
    true
}

/// What a session lacks; the text is a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Shortage {
    /// Pages of a KV group.
    Pages { needed: u32, left: u32 },
    /// One of the `budget` places of a step.
    Places { budget: u32 },
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shortage::Pages { needed, left: 1 } => write!(f, "it needs {needed} pages, 1 is left"),
            Shortage::Pages { needed, left } => write!(f, "it needs {needed} pages, {left} are left"),
            Shortage::Places { budget: 1 } => write!(f, "the one session that may run at once does"),
            Shortage::Places { budget } => write!(f, "all {budget} sessions that may run at once do"),
        }
    }
}

/// New pages of `group` for all that `session` has yet to compute; behind a window, no more than stay in use.
pub fn pages_needed(view: &StepView<'_>, group: &KvGroupView, session: &SessionView) -> u32 {
    let tokens = session.pending_tokens().saturating_sub(session.cached_ahead());
    group.pages_for(session, tokens.min(reach(view, group)))
}

/// What is set aside for a session: what it needs, and a page to grow into.
fn claim(view: &StepView<'_>, group: &KvGroupView, session: &SessionView) -> i64 {
    i64::from(pages_needed(view, group, session)) + 1
}

/// Pages of `group` that what `session` has computed takes.
fn pages_used(view: &StepView<'_>, group: &KvGroupView, session: &SessionView) -> u64 {
    u64::from(session.scheduled_tokens.min(reach(view, group)).div_ceil(group.page_tokens.max(1)))
}

/// Most tokens whose pages a session keeps in use.
fn reach(view: &StepView<'_>, group: &KvGroupView) -> u32 {
    if group.window_tokens == 0 { u32::MAX } else { group.window_tokens.saturating_add(view.token_budget) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{Budgets, StepOutcome, StepTimeModel};

    fn session(len: u32, scheduled: u32, pages_held: u32, pages_shared: u32) -> SessionView {
        let mut session = SessionView::default();
        session.len_tokens = len;
        session.scheduled_tokens = scheduled;
        session.pages_held = pages_held;
        session.pages_shared = pages_shared;
        session
    }

    /// Calls `check` with a room over `groups`.
    fn with_room(groups: &[KvGroupView], check: impl FnOnce(&StepView<'_>, &mut Room)) {
        let history = (StepOutcome::default(), StepTimeModel::default());
        let budgets = Budgets { tokens: 64, sessions: 8, steps_in_flight: 0 };
        let view = StepView::new(0.0, 1, budgets, &[], groups, (&history.0, &history.1));
        let mut room = Room::default();
        room.open(&view);
        check(&view, &mut room);
    }

    #[test]
    fn what_is_taken_is_what_is_needed_and_a_page() {
        with_room(&[KvGroupView::new(16, 0, 5)], |view, room| {
            assert!(room.fits(view, &session(80, 0, 0, 0)));
            room.take(view, &session(17, 0, 0, 0));
            assert!(room.fits(view, &session(32, 0, 0, 0)));
            let shortage = room.shortage(view, &session(33, 0, 0, 0));
            assert_eq!(shortage, Some(Shortage::Pages { needed: 3, left: 2 }));
            assert_eq!(shortage.unwrap().to_string(), "it needs 3 pages, 2 are left");
            room.take(view, &session(160, 0, 0, 0));
            assert_eq!(room.shortage(view, &session(1, 0, 0, 0)), Some(Shortage::Pages { needed: 1, left: 0 }));
            assert!(room.fits(view, &session(12, 11, 1, 0)), "the page that it holds has room");
        });
    }

    #[test]
    fn a_window_bounds_what_is_needed_and_what_is_freed() {
        // A window of 32 tokens and a step of 64 keep at most 6 pages in use; 1000 tokens take 63 otherwise.
        with_room(&[KvGroupView::new(16, 0, 100), KvGroupView::new(16, 32, 7)], |view, room| {
            assert!(room.fits(view, &session(1000, 0, 0, 0)));
            room.take(view, &session(1000, 0, 0, 0));
            assert_eq!(room.left, [36, 0]);
            room.change_by_held(view, &session(1000, 1000, 69, 0), 1);
            assert_eq!(room.left, [36 + 63, 6]);
            room.change_by_held(view, &session(1000, 1000, 69, 0), -1);
            // Half of its pages are others' as well.
            room.change_by_held(view, &session(192, 192, 18, 9), 1);
            assert_eq!(room.left, [36 + 6, 3]);
        });
    }

    #[test]
    fn numbers_that_no_engine_writes_are_harmless() {
        let huge = KvGroupView { free_pages: u32::MAX, reclaimable_pages: u32::MAX, ..KvGroupView::new(0, 1, 0) };
        with_room(&[huge, KvGroupView::new(u32::MAX, u32::MAX, 0)], |view, room| {
            let mut hostile = session(u32::MAX, 7, u32::MAX, 0);
            room.take(view, &hostile);
            room.change_by_held(view, &hostile, 1);
            hostile.scheduled_tokens = u32::MAX;
            hostile.pages_shared = u32::MAX;
            room.change_by_held(view, &hostile, 1);
            hostile.pages_held = 0;
            hostile.cached_tokens = u32::MAX;
            room.take(view, &hostile);
            assert!(room.left.iter().all(|left| left.abs() < 1 << 40), "{room:?}");
        });
    }
}
