//! What the engine keeps about sessions beyond one step, so that no policy has to: whom they belong to, a small
//! number for tables, how long answers usually are, and whose a step's time was.

use std::collections::HashMap;

use setu_core::TenantId;
use setu_core::view::{SessionView, StepTimeModel, StepWork, TenantView};

/// Pairs of tenant and class whose answers' lengths are remembered. Beyond, the memory starts anew.
const MOST_LENGTHS: usize = 4096;

/// Weight of the latest answer in the expected length.
const LATEST: f64 = 0.1;

#[derive(Debug, Default)]
pub(super) struct Accounts {
    /// Those with live sessions; a session's view holds the index of its own.
    tenants: Vec<TenantView>,
    by_id: HashMap<TenantId, usize>,
    free_handles: Vec<u32>,
    handles: u32,
    /// Tokens that answers of a tenant and class came to, averaged with the latest weighing most.
    lengths: HashMap<(TenantId, u32), f64>,
}

impl Accounts {
    pub fn tenants(&self) -> &[TenantView] {
        &self.tenants
    }

    /// Takes a session in whose view is otherwise complete.
    pub fn enter(&mut self, view: &mut SessionView) {
        let index = *self.by_id.entry(view.tenant).or_insert_with(|| {
            let mut tenant = TenantView::new(view.tenant, view.tenant_weight);
            tenant.active_since_s = view.arrival_s;
            self.tenants.push(tenant);
            self.tenants.len() - 1
        });
        let tenant = &mut self.tenants[index];
        // The latest request knows best what the operator has configured.
        tenant.weight = view.tenant_weight;
        tenant.sessions += 1;
        view.tenant_index = index as u32;
        view.handle = self.free_handles.pop().unwrap_or_else(|| {
            self.handles += 1;
            self.handles - 1
        });
        view.expected_tokens = self.expected(view);
    }

    /// Lets go of a session that ended; `others` are those that still live.
    pub fn leave(&mut self, view: &SessionView, others: &mut [SessionView]) {
        self.free_handles.push(view.handle);
        let index = view.tenant_index as usize;
        self.tenants[index].sessions -= 1;
        if self.tenants[index].sessions > 0 {
            return;
        }
        self.by_id.remove(&view.tenant);
        self.tenants.swap_remove(index);
        if let Some(moved) = self.tenants.get(index) {
            self.by_id.insert(moved.id, index);
            let moved = moved.id;
            others.iter_mut().filter(|other| other.tenant == moved).for_each(|other| other.tenant_index = index as u32);
        }
    }

    /// Learns from an answer that came to its own end; `others` are the sessions that still live.
    pub fn answered(&mut self, view: &SessionView, others: &mut [SessionView]) {
        if self.lengths.len() >= MOST_LENGTHS {
            self.lengths.clear();
        }
        let tokens = f64::from(view.generated_tokens);
        let key = (view.tenant, view.class);
        self.lengths.entry(key).and_modify(|mean| *mean += LATEST * (tokens - *mean)).or_insert(tokens);
        for other in others.iter_mut().filter(|other| !other.has_run() && (other.tenant, other.class) == key) {
            other.expected_tokens = self.expected(other);
        }
    }

    fn expected(&self, view: &SessionView) -> u32 {
        let mean = self.lengths.get(&(view.tenant, view.class));
        mean.map_or(view.max_tokens, |mean| (mean.ceil() as u32).clamp(1, view.max_tokens.max(1)))
    }

    /// Counts who holds pages or takes part in a step.
    pub fn count_running(&mut self, views: &[SessionView]) {
        self.tenants.iter_mut().for_each(|tenant| tenant.running = 0);
        for view in views.iter().filter(|view| view.pages_held > 0 || view.steps_in_flight > 0) {
            self.tenants[view.tenant_index as usize].running += 1;
        }
    }

    /// Charges prompt tokens, computed and found in the cache, and seconds to a session and its tenant.
    pub fn charge(&mut self, view: &mut SessionView, prefill: u32, cached: u32, cost_s: f64) {
        view.service_s += cost_s;
        let tenant = &mut self.tenants[view.tenant_index as usize];
        tenant.prefill_tokens += u64::from(prefill);
        tenant.cached_tokens += u64::from(cached);
        tenant.service_s += cost_s;
    }

    /// Charges a generated token.
    pub fn charge_generated(&mut self, view: &mut SessionView) {
        view.expected_tokens = view.expected_tokens.max(view.generated_tokens);
        self.tenants[view.tenant_index as usize].generated_tokens += 1;
    }

    /// Checks the accounts against the live sessions. For tests.
    ///
    /// # Panics
    /// They don't agree.
    pub fn check_integrity(&self, views: &[SessionView]) {
        let mut handles = std::collections::HashSet::new();
        for view in views {
            assert!(handles.insert(view.handle), "handle {} is given twice", view.handle);
            assert_eq!(self.tenants[view.tenant_index as usize].id, view.tenant);
        }
        assert_eq!(handles.len() + self.free_handles.len(), self.handles as usize);
        for (index, tenant) in self.tenants.iter().enumerate() {
            assert_eq!(self.by_id.get(&tenant.id), Some(&index));
            let live = views.iter().filter(|view| view.tenant == tenant.id).count();
            assert!(live > 0 && live == tenant.sessions as usize, "{tenant:?}");
        }
    }
}

/// Seconds of a step that fall to one of its rows, `tokens` tokens behind `context`: in proportion to what the model
/// predicts for them, and to their number while it predicts nothing.
pub(super) fn share_s(
    model: &StepTimeModel,
    work: &StepWork,
    rows: usize,
    took_s: f64,
    tokens: u32,
    context: u32,
) -> f64 {
    let whole_s = model.predict(work);
    let share = if whole_s > 0.0 {
        (model.base_s / rows as f64 + model.chunk_s(tokens, context)) / whole_s
    } else {
        f64::from(tokens) / f64::from(work.tokens().max(1))
    };
    took_s * share
}

#[cfg(test)]
mod tests {
    use setu_core::SessionId;

    use super::*;

    fn view(id: u64, tenant: u32, class: u32) -> SessionView {
        let mut view = SessionView::default();
        view.id = SessionId(id);
        view.tenant = TenantId(tenant);
        view.class = class;
        view.max_tokens = 100;
        view
    }

    #[test]
    fn handles_and_tenants_stay_right_as_sessions_come_and_go() {
        let mut accounts = Accounts::default();
        let mut live: Vec<SessionView> = Vec::new();
        for turn in 0..3000u64 {
            let draw = |stream| setu_core::sampling::uniform(stream, turn);
            if draw(1) < 0.5 || live.is_empty() {
                let mut new = view(turn, (draw(2) * 9.0) as u32, 0);
                accounts.enter(&mut new);
                live.push(new);
            } else {
                let gone = live.swap_remove((draw(3) * live.len() as f64) as usize);
                accounts.leave(&gone, &mut live);
            }
            accounts.check_integrity(&live);
        }
        let most = accounts.handles;
        while let Some(gone) = live.pop() {
            accounts.leave(&gone, &mut live);
        }
        assert!(accounts.tenants().is_empty() && most < 3000);
    }

    #[test]
    fn expected_lengths_follow_what_answers_of_tenant_and_class_came_to() {
        let mut accounts = Accounts::default();
        let mut waiting = [view(1, 1, 7), view(2, 1, 8), view(3, 2, 7)];
        waiting.iter_mut().for_each(|view| accounts.enter(view));
        assert!(waiting.iter().all(|view| view.expected_tokens == 100));
        let mut done = view(4, 1, 7);
        done.generated_tokens = 20;
        accounts.answered(&done, &mut waiting);
        assert_eq!(waiting.map(|view| view.expected_tokens), [20, 100, 100]);
        done.generated_tokens = 40;
        accounts.answered(&done, &mut waiting);
        assert_eq!(waiting[0].expected_tokens, 22);
        done.generated_tokens = 100_000;
        (0..100).for_each(|_| accounts.answered(&done, &mut waiting));
        assert_eq!(waiting[0].expected_tokens, 100, "never more than it may generate");
    }

    #[test]
    fn the_rows_of_a_step_share_all_of_its_time() {
        let mut model = StepTimeModel::default();
        for known in [false, true] {
            if known {
                (model.base_s, model.prefill_token_s, model.decode_s) = (2e-3, 1e-4, 3e-4);
                (model.prefill_context_s, model.decode_context_s) = (1e-7, 2e-7);
            }
            let rows = [(1, 500), (300, 20), (1, 3), (7, 0)];
            let mut work = StepWork::default();
            rows.iter().for_each(|&(tokens, context)| work.add_chunk(tokens, context));
            let shares = rows.map(|(tokens, context)| share_s(&model, &work, rows.len(), 0.25, tokens, context));
            assert!((shares.iter().sum::<f64>() - 0.25).abs() < 1e-12 && shares[1] > shares[3], "{shares:?}");
        }
    }
}
