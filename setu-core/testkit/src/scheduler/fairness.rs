//! Tenants that always wait for more are served alike. Each keeps a crowd of sessions of its own kind waiting, and what
//! each is served over its weight, in tokens as the scheduler charges them, is compared over every stretch of
//! steps in which both were left with sessions that could have run.

use proptest::collection::vec;
use proptest::prelude::*;
use setu_core::scheduler::{Charges, EventKind, SchedulerProperties, SessionEvent};
use setu_core::view::{SessionState, SessionView};

use super::{Make, run};
use crate::arena::{Arrival, Watch, Workload, smallest};
use crate::policy::Options;
use crate::report::Checked;

/// Charge of a prompt token and of a generated one where the scheduler doesn't say, and of cached ones none.
const PLAIN: Charges = Charges { prefill: 1.0, cached: 0.0, generated: 1.0 };

pub fn check(make: Make<'_>, options: &Options, properties: &SchedulerProperties) -> Checked {
    let bound = properties.fair_within_tokens.unwrap_or(f64::INFINITY);
    let charges = properties.charges.unwrap_or(PLAIN);
    smallest((options.cases / 8).max(8), &floods(bound), |workload| {
        let mut watch = Served::new(workload.tenants.clone(), bound, charges);
        run(make(), workload, &mut watch)
    })
}

struct Served {
    weights: Vec<f64>,
    bound: f64,
    charges: Charges,
    /// By tenant.
    served: Vec<f64>,
    waits: Vec<bool>,
    /// For each pair of tenants the least and the most by which the first was ahead while both have waited.
    leads: Vec<Option<(f64, f64)>>,
}

impl Served {
    fn new(weights: Vec<f64>, bound: f64, charges: Charges) -> Served {
        let tenants = weights.len();
        let leads = vec![None; tenants * tenants];
        Served { weights, bound, charges, served: vec![0.0; tenants], waits: vec![false; tenants], leads }
    }
}

impl Watch for Served {
    fn heard(&mut self, events: &[SessionEvent]) -> Result<(), String> {
        for event in events.iter().filter(|event| event.kind() == EventKind::Advanced) {
            let tenant = event.tenant.0 as usize;
            self.served[tenant] += (f64::from(event.prefill_tokens) * self.charges.prefill
                + f64::from(event.cached_tokens) * self.charges.cached
                + f64::from(event.generated_tokens) * self.charges.generated)
                / self.weights[tenant];
        }
        let tenants = self.weights.len();
        for (first, second) in (0..tenants).flat_map(|first| (0..first).map(move |second| (first, second))) {
            let lead = self.served[first] - self.served[second];
            let pair = &mut self.leads[first * tenants + second];
            if !self.waits[first] || !self.waits[second] {
                *pair = None;
                continue;
            }
            let (least, most) = pair.unwrap_or((lead, lead));
            let (least, most) = (least.min(lead), most.max(lead));
            *pair = Some((least, most));
            if most - least > self.bound {
                let (ahead, behind) = if lead == most { (first, second) } else { (second, first) };
                return Err(format!(
                    "while both waited for more, tenant {ahead} was served {:.0} tokens over its weight more than tenant \
                     {behind}; {:.0} are declared",
                    most - least,
                    self.bound
                ));
            }
        }
        Ok(())
    }

    fn planned(&mut self, sessions: &[SessionView], tokens: &[u32]) -> Result<(), String> {
        self.waits.fill(false);
        for (session, _) in sessions.iter().zip(tokens).filter(|&(_, &tokens)| tokens == 0) {
            let waits = matches!(session.state(), SessionState::Waiting | SessionState::Preempted);
            self.waits[session.tenant.0 as usize] |= waits;
        }
        Ok(())
    }
}

/// Two or three tenants, each with sessions of one kind that follow each other without end, for as many steps as it
/// takes to serve several times `bound`.
fn floods(bound: f64) -> impl Strategy<Value = Workload> {
    let kind = (prop_oneof![3 => 1u32..100, 1 => 100u32..600], 1u32..40, 0u32..64);
    let tenant = (prop_oneof![Just(1.0), Just(2.0), Just(4.0)], kind, 3usize..10);
    let limits = (prop_oneof![Just(64u32), Just(256), Just(2048)], 2u32..12, 40u32..200, 1usize..3);
    (vec(tenant, 2..4), limits).prop_map(move |(tenants, (token_budget, session_budget, pages, in_flight))| {
        let mut arrivals = Vec::new();
        for (tenant, &(_, (prompt, answer, prefix), sessions)) in (0..).zip(&tenants) {
            // More than may run at once, so that some always wait.
            arrivals.extend((0..sessions + session_budget as usize).map(|_| Arrival {
                tenant,
                prefix: tenant + 1,
                prefix_tokens: prefix,
                repeats: true,
                ..Arrival::new(prompt, answer)
            }));
        }
        let mut workload = Workload::new(arrivals, pages);
        workload.tenants = tenants.iter().map(|&(weight, ..)| weight).collect();
        (workload.token_budget, workload.session_budget, workload.in_flight) =
            (token_budget, session_budget, in_flight);
        // A step serves at least a token of each session that runs.
        let weight: f64 = workload.tenants.iter().sum();
        workload.most_steps = (4.0 * bound * weight / f64::from(session_budget)).clamp(500.0, 4000.0) as u64;
        workload.admissible()
    })
}
