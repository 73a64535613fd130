//! Step views for tests of policies, and what a policy decided as plain data.
//!
//! ```
//! use setu_core::ids::SessionId;
//! use setu_core::scheduler::{Decisions, Scheduler};
//! use setu_core::view::StepView;
//! use setu_testkit::views::Scene;
//!
//! struct Everybody;
//!
//! impl Scheduler for Everybody {
//!     fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> setu_core::Result<()> {
//!         view.sessions.iter().for_each(|session| decisions.run(session.id));
//!         Ok(())
//!     }
//! }
//!
//! let mut scene = Scene::new(10.0);
//! scene.waiting(7, 1.0, 100);
//! assert_eq!(scene.schedule(&mut Everybody).running(), [7]);
//! ```

use setu_core::batcher::{Batcher, ChunkBuffer};
use setu_core::ids::{SessionId, TenantId};
use setu_core::rows::{Column, Rows};
use setu_core::scheduler::{DecisionBuffer, Scheduler, Verdict};
use setu_core::view::{
    Budgets, KvGroupView, SessionState, SessionView, StepOutcome, StepTimeModel, StepView, TenantView,
};

/// Everything that a policy sees, to be filled at will.
#[derive(Clone, Debug)]
pub struct Scene {
    pub now_s: f64,
    pub step: u64,
    pub budgets: Budgets,
    /// In order of arrival, as the engine keeps them.
    pub sessions: Vec<SessionView>,
    pub kv_groups: Vec<KvGroupView>,
    pub tenants: Vec<TenantView>,
    pub last_step: StepOutcome,
    pub step_time: StepTimeModel,
}

/// A scheduler's decisions, read back.
#[derive(Clone, Debug, PartialEq)]
pub struct Decided {
    /// Session id, verdict and reason, in the order in which they were made.
    pub decisions: Vec<(u64, Verdict, String)>,
    pub wake_at_s: f64,
}

impl Scene {
    /// No sessions, one KV group of 1,000 pages of 16 tokens, budgets of 2,048 tokens and 256 sessions.
    pub fn new(now_s: f64) -> Scene {
        Scene {
            now_s,
            step: 1,
            budgets: Budgets { tokens: 2048, sessions: 256, steps_in_flight: 0 },
            sessions: Vec::new(),
            kv_groups: vec![KvGroupView::new(16, 0, 1000)],
            tenants: vec![TenantView::new(TenantId(0), 1.0)],
            last_step: StepOutcome::default(),
            step_time: StepTimeModel::default(),
        }
    }

    /// Adds a session that has not run yet.
    pub fn waiting(&mut self, id: u64, arrival_s: f64, prompt_tokens: u32) -> &mut SessionView {
        let mut session = SessionView::default();
        session.id = SessionId(id);
        session.arrival_s = arrival_s;
        session.prompt_tokens = prompt_tokens;
        session.len_tokens = prompt_tokens;
        session.max_tokens = 1024;
        session.expected_tokens = 1024;
        session.handle = self.sessions.len() as u32;
        self.tenants[0].sessions += 1;
        self.sessions.push(session);
        self.sessions.last_mut().expect("just pushed")
    }

    /// Adds a session that has computed `scheduled` tokens of its prompt.
    pub fn prefilling(&mut self, id: u64, arrival_s: f64, prompt_tokens: u32, scheduled: u32) -> &mut SessionView {
        let pages = self.pages(scheduled);
        let session = self.waiting(id, arrival_s, prompt_tokens);
        session.set_state(SessionState::Prefilling);
        session.first_run_s = arrival_s;
        session.scheduled_tokens = scheduled;
        session.computed_tokens = scheduled;
        session.pages_held = pages;
        session
    }

    /// Adds a session that has computed its prompt and generated `generated` tokens, at least 1.
    pub fn decoding(&mut self, id: u64, arrival_s: f64, prompt_tokens: u32, generated: u32) -> &mut SessionView {
        let session = self.prefilling(id, arrival_s, prompt_tokens + generated, prompt_tokens + generated - 1);
        session.set_state(SessionState::Decoding);
        session.prompt_tokens = prompt_tokens;
        session.generated_tokens = generated;
        session
    }

    /// Gives the session added last to `tenant`, of this weight. Every session belongs to tenant 0 otherwise.
    pub fn of_tenant(&mut self, tenant: u32, weight: f64) {
        let tenant = TenantId(tenant);
        let index = self.tenants.iter().position(|known| known.id == tenant).unwrap_or_else(|| {
            self.tenants.push(TenantView::new(tenant, weight));
            self.tenants.len() - 1
        });
        if let Some(session) = self.sessions.last_mut() {
            self.tenants[session.tenant_index as usize].sessions -= 1;
            self.tenants[index].sessions += 1;
            (session.tenant, session.tenant_index, session.tenant_weight) = (tenant, index as u32, weight);
        }
    }

    /// The view that a policy gets.
    pub fn view(&self) -> StepView<'_> {
        let history = (&self.last_step, &self.step_time);
        let mut view = StepView::new(self.now_s, self.step, self.budgets, &self.sessions, &self.kv_groups, history);
        view.tenants = Rows::new(&self.tenants);
        view
    }

    /// Asks `scheduler`, with reasons recorded.
    ///
    /// # Panics
    /// The scheduler fails or writes a verb that doesn't exist.
    pub fn schedule(&self, scheduler: &mut dyn Scheduler) -> Decided {
        let mut buffer = DecisionBuffer::default();
        buffer.set_recording(true);
        buffer
            .fill(self.sessions.len(), |decisions| scheduler.schedule(&self.view(), decisions))
            .unwrap_or_else(|error| panic!("the scheduler failed: {error}"));
        let read = buffer.iter().map(|decision| {
            let decision = decision.unwrap_or_else(|verb| panic!("the verb {verb} doesn't exist"));
            (decision.id.0, decision.verdict, decision.reason.to_owned())
        });
        Decided { decisions: read.collect(), wake_at_s: buffer.wake_at_s() }
    }

    /// Asks `batcher` about all sessions in their order: pairs of session id and tokens.
    ///
    /// # Panics
    /// The batcher fails or names a session that isn't there.
    pub fn batch(&self, batcher: &mut dyn Batcher) -> Vec<(u64, u32)> {
        let ready: Vec<u32> = (0..self.sessions.len() as u32).collect();
        self.batch_of(batcher, &ready)
    }

    /// Asks `batcher` about the sessions at the indices `ready`.
    ///
    /// # Panics
    /// The batcher fails or names a session that isn't there.
    pub fn batch_of(&self, batcher: &mut dyn Batcher, ready: &[u32]) -> Vec<(u64, u32)> {
        let mut buffer = ChunkBuffer::default();
        buffer
            .fill(self.sessions.len(), |chunks| batcher.batch(&self.view(), Column::new(ready), chunks))
            .unwrap_or_else(|error| panic!("the batcher failed: {error}"));
        let id = |session: u32| self.sessions[session as usize].id.0;
        buffer.chunks().iter().map(|chunk| (id(chunk.session), chunk.tokens)).collect()
    }

    fn pages(&self, tokens: u32) -> u32 {
        self.kv_groups.iter().map(|group| tokens.div_ceil(group.page_tokens)).sum()
    }
}

impl Decided {
    /// The sessions that run, in order.
    pub fn running(&self) -> Vec<u64> {
        let running = self.decisions.iter().filter(|(_, verdict, _)| *verdict == Verdict::Run);
        running.map(|&(id, ..)| id).collect()
    }

    /// The sessions that are rejected, and why.
    pub fn rejected(&self) -> Vec<(u64, &str)> {
        let rejected = self.decisions.iter().filter(|(_, verdict, _)| matches!(verdict, Verdict::Reject { .. }));
        rejected.map(|(id, _, reason)| (*id, reason.as_str())).collect()
    }
}
