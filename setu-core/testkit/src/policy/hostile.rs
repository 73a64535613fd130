//! Views whose numbers no engine would write. Their structure is that of real ones: ids and handles are unique, tenants
//! are there or, as in an older engine, none is.

use proptest::collection::vec;
use proptest::prelude::*;
use setu_core::ids::{SessionId, TenantId};
use setu_core::scheduler::{EventKind, SessionEvent};
use setu_core::view::{Budgets, KvGroupView, SessionState, SessionView, StepOutcome, StepTimeModel, TenantView};

use crate::views::Scene;

fn count() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0u32), Just(1), Just(17), Just(4096), Just(u32::MAX - 1), Just(u32::MAX), 0u32..100]
}

fn number() -> impl Strategy<Value = f64> {
    let values = [0.0, 1.0, -1.0, 1e-308, 1e300, -1e300, f64::MAX, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
    prop_oneof![2 => prop::sample::select(values.to_vec()), 1 => 0.0..10.0]
}

fn state() -> impl Strategy<Value = SessionState> {
    use SessionState::{Decoding, Held, Preempted, Prefilling, Waiting};
    prop::sample::select(vec![Waiting, Prefilling, Decoding, Preempted, Held])
}

prop_compose! {
    fn session()(
        (state, priority, tenant) in (state(), prop_oneof![Just(i32::MIN), Just(i32::MAX), -20i32..20], 0u32..4),
        counts in vec(count(), 16),
        numbers in vec(number(), 8),
    ) -> SessionView {
        let mut view = SessionView::default();
        view.set_state(state);
        (view.priority, view.tenant) = (priority, TenantId(tenant));
        let [a, b, c, d, e, f, g, h] = [0, 1, 2, 3, 4, 5, 6, 7].map(|at| counts[at]);
        (view.prompt_tokens, view.cached_tokens, view.len_tokens, view.scheduled_tokens) = (a, b, c, d);
        (view.computed_tokens, view.generated_tokens, view.max_tokens, view.pages_held) = (e, f, g, h);
        let [a, b, c, d, e, f, g, h] = [8, 9, 10, 11, 12, 13, 14, 15].map(|at| counts[at]);
        (view.pages_shared, view.preemptions, view.tokens_lost, view.steps_in_flight) = (a, b, c, d);
        (view.class, view.expected_tokens, view.chunk_cap, view.adapter) = (e, f, g, h);
        let [a, b, c, d, e, f, g, h] = [0, 1, 2, 3, 4, 5, 6, 7].map(|at| numbers[at]);
        (view.tenant_weight, view.arrival_s, view.first_run_s, view.last_token_s) = (a, b, c, d);
        (view.ttft_deadline_s, view.itl_limit_s, view.total_deadline_s, view.service_s) = (e, f, g, h);
        view
    }
}

prop_compose! {
    fn group()(counts in vec(count(), 5)) -> KvGroupView {
        let mut group = KvGroupView::new(counts[0], counts[1], counts[2]);
        (group.free_pages, group.reclaimable_pages) = (counts[3], counts[4]);
        group
    }
}

prop_compose! {
    /// A view of a few sessions.
    pub fn scene()(
        mut sessions in vec(session(), 0..6),
        kv_groups in vec(group(), 0..3),
        (tokens, budget, steps_in_flight) in (count(), count(), 0u32..3),
        (step, now_s, with_tenants) in (prop_oneof![Just(0u64), Just(1), Just(u64::MAX)], number(), prop::bool::weighted(0.8)),
        numbers in vec(number(), 12),
        counts in vec(count(), 4),
    ) -> Scene {
        let mut scene = Scene::new(now_s);
        for (at, session) in sessions.iter_mut().enumerate() {
            (session.id, session.handle) = (SessionId(at as u64 + 1), at as u32);
            session.tenant_index = session.tenant.0;
        }
        scene.tenants.clear();
        if with_tenants {
            scene.tenants.extend((0..4).map(|id| {
                let mut tenant = TenantView::new(TenantId(id), numbers[id as usize]);
                (tenant.sessions, tenant.running) = (counts[id as usize], counts[0]);
                (tenant.active_since_s, tenant.service_s) = (numbers[4], numbers[5]);
                (tenant.prefill_tokens, tenant.generated_tokens) = (u64::MAX, u64::from(counts[1]));
                tenant
            }));
        }
        let mut model = StepTimeModel::default();
        (model.base_s, model.prefill_token_s, model.decode_s) = (numbers[6], numbers[7], numbers[8]);
        (model.prefill_context_s, model.decode_context_s, model.ratio_p95) = (numbers[9], numbers[10], numbers[11]);
        model.steps = u64::MAX;
        let mut last = StepOutcome::default();
        (last.step, last.predicted_s, last.took_s) = (step, numbers[0], numbers[1]);
        (last.prefill_tokens, last.decodes, last.prefill_context) = (counts[2], counts[3], u64::MAX);
        scene.budgets = Budgets { tokens, sessions: budget, steps_in_flight };
        (scene.step, scene.sessions, scene.kv_groups, scene.step_time, scene.last_step) =
            (step, sessions, kv_groups, model, last);
        scene
    }
}

prop_compose! {
    /// Events, also of sessions that nobody has heard of.
    pub fn events()(
        events in vec((0u32..7, 0u64..8, 0u32..5, number(), number(), count()), 0..6),
    ) -> Vec<SessionEvent> {
        let kinds = [EventKind::Added, EventKind::Advanced, EventKind::Finished, EventKind::Aborted,
            EventKind::Preempted, EventKind::Overran, EventKind::Other];
        let event = |(kind, id, tenant, time_s, cost_s, tokens): (u32, u64, u32, f64, f64, u32)| {
            let mut event = SessionEvent::new(kinds[kind as usize], SessionId(id), TenantId(tenant), time_s);
            (event.prefill_tokens, event.cached_tokens, event.generated_tokens) = (tokens, tokens, tokens);
            event.cost_s = cost_s;
            event
        };
        events.into_iter().map(event).collect()
    }
}
