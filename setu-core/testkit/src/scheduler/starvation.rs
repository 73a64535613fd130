//! Nobody is passed over forever. A victim meets rivals that never end, since each is followed by another like it: as
//! many at once as the engine holds and some that wait, more urgent, of another tenant, or so small that they always
//! fit where the victim doesn't. It must have ended, one way or another, before the workload's steps are used up.

use proptest::prelude::*;
use setu_core::view::SessionView;

use super::Make;
use crate::arena::{Arena, Arrival, DecodesFirst, End, PAGE, Watch, Workload, smallest};
use crate::policy::Options;
use crate::report::Checked;

/// Virtual time by which the victim must have ended.
const PATIENCE_S: f64 = 1200.0;

/// Seconds of a step, long so that patience takes few of them.
const STEP_S: f64 = 0.2;

pub fn check(make: Make<'_>, options: &Options) -> Checked {
    smallest((options.cases / 16).max(4), &siege(), |workload| {
        let mut scheduler = make();
        let mut victim = Victim { arrival: workload.arrivals.len() - 1, has_ended: false };
        let mut arena = Arena::new(&workload);
        let end = arena.run(&mut *scheduler, &mut DecodesFirst, &mut victim)?;
        if end == End::Enough || victim.has_ended {
            return Ok(());
        }
        let arrived_s = workload.arrivals[victim.arrival].at_s;
        let waited_s = arena.now_s() - arrived_s;
        Err(arena.story(&format!(
            "the session that arrived at {arrived_s:.3} s has not ended {waited_s:.0} s later, while others came and went"
        )))
    })
}

/// The last arrival.
struct Victim {
    arrival: usize,
    has_ended: bool,
}

impl Watch for Victim {
    fn ended(&mut self, arrival: usize, _: &SessionView) {
        self.has_ended |= arrival == self.arrival;
    }

    fn has_seen_enough(&self) -> bool {
        self.has_ended
    }
}

prop_compose! {
    fn siege()(
        (places, waiting, pages) in (1u32..6, 1usize..6, 4u32..40),
        (prompt, answer) in (1u32..40, 1u32..8),
        (urgent, other_tenant, large) in (any::<bool>(), any::<bool>(), any::<bool>()),
        weight in prop_oneof![Just(1.0), Just(0.1)],
        in_flight in 1usize..3,
    ) -> Workload {
        let rivals = (0..places as usize + waiting).map(|at| Arrival {
            // Not all at once, so that some end while others go on.
            at_s: at as f64 * STEP_S,
            priority: if urgent { 9 } else { 5 },
            repeats: true,
            ..Arrival::new(prompt, answer)
        });
        let victim = Arrival {
            at_s: 40.0 * STEP_S,
            priority: if urgent { 1 } else { 5 },
            tenant: u32::from(other_tenant),
            ..Arrival::new(if large { (pages - 1) * PAGE } else { prompt }, 3)
        };
        let mut workload = Workload::new(rivals.chain([victim]).collect(), pages);
        workload.session_budget = places;
        workload.in_flight = in_flight;
        workload.tenants = if other_tenant { vec![1.0, weight] } else { vec![1.0] };
        workload.step_time.base_s = STEP_S;
        workload.most_steps = (PATIENCE_S / STEP_S) as u64;
        workload.admissible()
    }
}
