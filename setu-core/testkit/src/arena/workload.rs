//! What comes to an arena: sessions, and the limits that they share. Random ones shrink towards few, small and plain.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use setu_core::view::{StepTimeModel, UNSET_PRIORITY};

/// Tokens of a page.
pub const PAGE: u32 = 16;

/// Sessions and what they run on.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Weight of each tenant.
    pub tenants: Vec<f64>,
    /// In order of time.
    pub arrivals: Vec<Arrival>,
    /// KV groups: window in tokens, 0 for none, and pages.
    pub groups: Vec<(u32, u32)>,
    pub token_budget: u32,
    pub session_budget: u32,
    /// Steps that run while the next is planned, and one.
    pub in_flight: usize,
    /// How long steps take.
    pub step_time: StepTimeModel,
    /// Steps after which policies are told how long steps take.
    pub known_after: u64,
    /// Where the arena ends at the latest.
    pub most_steps: u64,
}

/// A session to come.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub at_s: f64,
    /// Index of the tenant.
    pub tenant: u32,
    pub priority: i32,
    pub class: u32,
    pub prompt: u32,
    /// Tokens after which it ends by itself, at most `max_tokens`.
    pub answer: u32,
    pub max_tokens: u32,
    /// Which text its prompt begins with, and how many tokens of it; 0 for one of its own.
    pub prefix: u32,
    pub prefix_tokens: u32,
    /// Seconds from its arrival.
    pub ttft_s: f64,
    pub itl_s: f64,
    pub total_s: f64,
    pub abort_s: f64,
    /// It is a further choice of the request before it, and held until that one's prompt is computed.
    pub follows: bool,
    /// When it ends, another like it arrives.
    pub repeats: bool,
}

impl Arrival {
    /// A session of tenant 0 that is there from the start.
    pub fn new(prompt: u32, answer: u32) -> Arrival {
        Arrival {
            at_s: 0.0,
            tenant: 0,
            priority: UNSET_PRIORITY,
            class: 0,
            prompt,
            answer,
            max_tokens: answer,
            prefix: 0,
            prefix_tokens: 0,
            ttft_s: f64::INFINITY,
            itl_s: f64::INFINITY,
            total_s: f64::INFINITY,
            abort_s: f64::INFINITY,
            follows: false,
            repeats: false,
        }
    }
}

impl Workload {
    /// `arrivals` of one tenant on `pages` pages: steps of some 10 ms, one at a time.
    pub fn new(arrivals: Vec<Arrival>, pages: u32) -> Workload {
        let mut step_time = StepTimeModel::default();
        (step_time.base_s, step_time.prefill_token_s, step_time.decode_s) = (4e-3, 5e-5, 4e-4);
        (step_time.prefill_context_s, step_time.decode_context_s) = (2e-8, 1e-7);
        (step_time.steps, step_time.ratio_p95) = (1000, 1.0);
        Workload {
            tenants: vec![1.0],
            arrivals,
            groups: vec![(0, pages)],
            token_budget: 256,
            session_budget: 8,
            in_flight: 1,
            step_time,
            known_after: 0,
            most_steps: 4000,
        }
    }

    /// Puts the arrivals in order and cuts what no engine admits: sessions longer than the pages.
    #[must_use]
    pub fn admissible(mut self) -> Workload {
        let capacity = |&(window, pages): &(u32, u32)| {
            let enough = if window == 0 { u32::MAX } else { (window - 1).div_ceil(PAGE) + 1 };
            if pages >= enough { u32::MAX } else { pages.saturating_mul(PAGE) }
        };
        let capacity = self.groups.iter().map(capacity).min().unwrap_or(u32::MAX).max(2);
        let tenants = self.tenants.len() as u32;
        for arrival in &mut self.arrivals {
            arrival.tenant %= tenants.max(1);
            arrival.prompt = arrival.prompt.clamp(1, capacity - 1);
            arrival.max_tokens = arrival.max_tokens.clamp(1, capacity - arrival.prompt);
            arrival.answer = arrival.answer.clamp(1, arrival.max_tokens);
            arrival.prefix_tokens = arrival.prefix_tokens.min(arrival.prompt);
        }
        self.arrivals.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
        if let Some(first) = self.arrivals.first_mut() {
            first.follows = false;
        }
        self
    }
}

prop_compose! {
    /// Any session.
    fn arrival()(
        (at, tenant, priority, class) in (0u32..60, 0u32..3, option::weighted(0.7, 0i32..=10), 0u32..3),
        (prompt, answer, more) in (prop_oneof![4 => 1u32..80, 1 => 80u32..700], 1u32..16, 0u32..8),
        (prefix, prefix_tokens) in (0u32..3, 0u32..120),
        (ttft, itl, total, abort) in (late(), late(), late(), late()),
        follows in prop::bool::weighted(0.1),
    ) -> Arrival {
        let prefix_tokens = if prefix == 0 { 0 } else { prefix_tokens };
        Arrival {
            at_s: f64::from(at) * 0.01, tenant, class, prompt, answer, prefix, prefix_tokens, follows,
            priority: priority.unwrap_or(UNSET_PRIORITY), max_tokens: answer + more,
            ttft_s: ttft, itl_s: itl, total_s: total, abort_s: abort, repeats: false,
        }
    }
}

/// A span of time after which something is late, mostly never.
fn late() -> impl Strategy<Value = f64> {
    prop_oneof![6 => Just(f64::INFINITY), 1 => (0u32..100).prop_map(|ticks| f64::from(ticks) * 0.01)]
}

fn groups() -> impl Strategy<Value = Vec<(u32, u32)>> {
    let pages = || 1u32..48;
    prop_oneof![
        4 => pages().prop_map(|pages| vec![(0, pages)]),
        1 => (pages(), pages()).prop_map(|(first, second)| vec![(0, first), (0, second)]),
        1 => (pages(), pages()).prop_map(|(first, second)| vec![(0, first), (40, second)]),
        1 => pages().prop_map(|pages| vec![(24, pages)]),
    ]
}

prop_compose! {
    /// Anything that an engine may meet.
    pub fn any_workload()(
        tenants in vec(prop_oneof![Just(1.0), Just(0.5), Just(4.0)], 1..4),
        arrivals in vec(arrival(), 1..20),
        groups in groups(),
        token_budget in prop_oneof![Just(2048u32), Just(256), Just(64), Just(7), Just(1)],
        session_budget in 1u32..10,
        in_flight in 1usize..3,
        known_after in prop_oneof![Just(0u64), Just(20)],
    ) -> Workload {
        let workload = Workload { tenants, groups, token_budget, session_budget, in_flight, known_after,
            ..Workload::new(arrivals, 0) };
        workload.admissible()
    }
}
