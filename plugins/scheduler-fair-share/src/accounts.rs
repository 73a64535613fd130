//! What tenants were served, and how far each may go in the next step.
//!
//! A counter holds charged tokens over the tenant's weight. Only differences matter, and only while
//! somebody has to wait: who is alone, or gets all he asks for, neither gains nor loses by what he is
//! served meanwhile. So a tenant's counter is lifted when it begins to contend, to the least of those
//! that contend already (VTC's lift: being idle or modest earns no credit), or to the greatest where nobody did.

use std::collections::HashMap;

use setu_core::prelude::*;

use crate::config::FairShareConfig;

/// Steps for which a tenant goes on to contend after the last one that passed a session of it over. With few
/// slots tenants wait by turns; without this each turn would even out what the one before was owed.
const CONTENDS_STEPS: u64 = 64;

/// Tenants without live sessions that are remembered at most, since they may be ahead still. When there are
/// more, all are forgotten: what one can gain by that is two quanta.
const MOST_IDLE: usize = 1024;

/// Weights beyond are taken as these.
const LEAST_WEIGHT: f64 = 1e-6;
const MOST_WEIGHT: f64 = 1e6;

/// One tenant.
#[derive(Debug)]
pub(crate) struct Account {
    pub tenant: TenantId,
    pub weight: f64,
    /// The counter without what is in flight.
    settled: f64,
    /// The last step in which it had live sessions.
    seen: u64,
    /// The last step in which it waited.
    waited: u64,
    contends_until: u64,
    pub now: Standing,
}

/// How a tenant stands in the step that is planned.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    /// The counter, what is in flight included.
    pub counter: f64,
    /// Charge of what is in flight.
    pub in_flight: f64,
    /// It had no live sessions in the step before.
    pub returns: bool,
    /// It has a session that wasn't there in the step before.
    pub newcomer: bool,
    /// The step before passed one of its sessions over that could have run.
    pub passed_over: bool,
    /// The step before gave one of its prompts less than all.
    pub wants_more: bool,
    /// Charge, over the weight, of what the step before gave it, and of that to sessions that decode.
    pub gain: f64,
    pub decode_gain: f64,
    pub waits: bool,
    /// One of its sessions can run now.
    pub runnable: bool,
    /// Sessions with pages, and their pages.
    pub sessions: u32,
    pub pages: u64,
    /// By quanta; who is behind has a lower one.
    pub level: u32,
    /// Place of the counter inside its quantum, as a fraction of 2^32.
    pub fraction: u32,
    /// Charge that it may yet be given in this step, and whether that is less than a step could come to.
    pub allowance: f64,
    pub limited: bool,
    /// Charge that its sessions that are left alone may come to, whatever the allowance.
    pub promised: f64,
    /// Of this, kept for its sessions that decode.
    pub decodes_due: f64,
    /// One of its sessions has to wait for pages or a slot, and so all behind it.
    pub blocked: bool,
    /// Sessions that run in this step.
    pub named: u32,
}

#[derive(Debug)]
pub(crate) struct Accounts {
    charges: Charges,
    quantum: f64,
    accounts: Vec<Account>,
    by_id: HashMap<TenantId, u32>,
    /// By the index in the view's tenants, a guess that is checked.
    by_index: Vec<u32>,
    active: Vec<u32>,
    total_weight: f64,
    step: u64,
    /// Least counter of those that contended in the step before.
    least: f64,
    /// The two least counters of tenants that wait, and whose the first is.
    waiting: (f64, f64, usize),
}

impl Accounts {
    pub fn new(config: &FairShareConfig) -> Accounts {
        Accounts {
            charges: Charges {
                prefill: config.prefill_token_weight,
                cached: config.cached_token_weight,
                generated: config.generated_token_weight,
            },
            quantum: f64::from(config.quantum_tokens),
            accounts: Vec::new(),
            by_id: HashMap::new(),
            by_index: Vec::new(),
            active: Vec::new(),
            total_weight: 0.0,
            step: 0,
            least: f64::INFINITY,
            waiting: (f64::INFINITY, f64::INFINITY, usize::MAX),
        }
    }

    pub fn charges(&self) -> Charges {
        self.charges
    }

    /// How far a tenant may be ahead of one that waits.
    pub fn most_ahead(&self) -> f64 {
        2.0 * self.quantum
    }

    pub fn get(&self, account: usize) -> &Account {
        &self.accounts[account]
    }

    pub fn now(&mut self, account: usize) -> &mut Standing {
        &mut self.accounts[account].now
    }

    /// Sum of the weights of those that have live sessions.
    pub fn total_weight(&self) -> f64 {
        self.total_weight
    }

    /// A tenant that waits and is less ahead than `account`, the least.
    pub fn rival(&self, account: usize) -> Option<&Account> {
        let (.., least) = self.waiting;
        self.accounts.get(least).filter(|_| least != account)
    }

    /// Charges what a step that was waited for served.
    pub fn charge(&mut self, event: &SessionEvent) {
        // Whoever has no account was never seen, or isn't ahead of anybody any more.
        let Some(&account) = self.by_id.get(&event.tenant) else { return };
        let account = &mut self.accounts[account as usize];
        account.settled += (f64::from(event.prefill_tokens) * self.charges.prefill
            + f64::from(event.cached_tokens) * self.charges.cached
            + f64::from(event.generated_tokens) * self.charges.generated)
            / account.weight;
    }

    /// Begins a step: nobody has been seen yet.
    pub fn open(&mut self) {
        self.forget_idle();
        self.step += 1;
        self.active.clear();
        self.total_weight = 0.0;
    }

    /// The account of `session`'s tenant.
    pub fn of(&mut self, view: &StepView<'_>, session: &SessionView) -> usize {
        let index = session.tenant_index as usize;
        let guess = self.by_index.get(index).map_or(usize::MAX, |&account| account as usize);
        let account = match self.accounts.get(guess) {
            Some(account) if account.tenant == session.tenant => guess,
            _ => self.find(view, session),
        };
        let found = &mut self.accounts[account];
        if found.seen != self.step {
            let tenant = view.tenants.get(index).filter(|tenant| tenant.id == session.tenant);
            let weight = tenant.map_or(session.tenant_weight, |tenant| tenant.weight);
            found.weight = if weight.is_nan() { 1.0 } else { weight.clamp(LEAST_WEIGHT, MOST_WEIGHT) };
            found.now = Standing { returns: found.seen + 1 != self.step, ..Standing::default() };
            found.seen = self.step;
            self.active.push(account as u32);
            self.total_weight += found.weight;
        }
        account
    }

    fn find(&mut self, view: &StepView<'_>, session: &SessionView) -> usize {
        let account = *self.by_id.entry(session.tenant).or_insert_with(|| {
            let (tenant, now) = (session.tenant, Standing::default());
            let (weight, settled) = (1.0, 0.0);
            self.accounts.push(Account { tenant, weight, settled, seen: 0, waited: 0, contends_until: 0, now });
            self.accounts.len() as u32 - 1
        });
        let index = session.tenant_index as usize;
        if index < view.tenants.len().min(view.sessions.len()) {
            if self.by_index.len() <= index {
                self.by_index.resize(index + 1, u32::MAX);
            }
            self.by_index[index] = account;
        }
        account as usize
    }

    /// Takes stock once all sessions were seen: who waits, whose counter is lifted, who may go how far.
    /// `step_charge` is more than any tenant can be charged for a step.
    pub fn close(&mut self, step_charge: f64) {
        let (mut least, mut most, mut crowd) = (f64::INFINITY, f64::NEG_INFINITY, 0.0f64);
        for &account in &self.active {
            let account = &mut self.accounts[account as usize];
            account.now.counter = account.settled + account.now.in_flight / account.weight;
            crowd = crowd.max(account.now.decode_gain);
            if account.contends_until >= self.step && !account.now.returns {
                least = least.min(account.now.counter);
            }
        }
        let somebody_contends = least.is_finite();
        let most_ahead = self.most_ahead();
        for &account in &self.active {
            let account = &mut self.accounts[account as usize];
            // What it was served while nobody else wanted it is no debt.
            if account.now.returns && somebody_contends && account.now.counter > least + most_ahead {
                account.shift(least + most_ahead);
            }
            most = most.max(account.now.counter);
        }
        self.waiting = (f64::INFINITY, f64::INFINITY, usize::MAX);
        for &index in &self.active {
            let account = &mut self.accounts[index as usize];
            // Batchers put decodes first: a prompt can be served in every step and yet be crowded out.
            let crowded = account.now.wants_more && account.now.gain < crowd;
            account.now.waits = account.now.passed_over || crowded;
            let contends = account.contends_until >= self.step && !account.now.returns;
            if !contends && (account.now.waits || (account.now.newcomer && somebody_contends)) {
                account.lift(if somebody_contends { least } else { most });
            }
            if account.now.waits {
                if account.waited + 1 != self.step {
                    account.lift(most - most_ahead);
                }
                account.waited = self.step;
                account.contends_until = self.step + CONTENDS_STEPS;
            }
            if account.now.waits && account.now.runnable {
                let (first, second, whose) = &mut self.waiting;
                if account.now.counter < *first {
                    (*second, *first, *whose) = (*first, account.now.counter, index as usize);
                } else {
                    *second = second.min(account.now.counter);
                }
            }
        }
        self.least = if somebody_contends { least } else { f64::INFINITY };
        self.grant(step_charge, most);
    }

    /// Says how far each may go, and at which level it stands.
    fn grant(&mut self, step_charge: f64, most: f64) {
        let (first, second, whose) = self.waiting;
        let least = if first.is_finite() { first } else { most };
        let base = (least / self.quantum).floor();
        for &index in &self.active {
            let rival = if index as usize == whose { second } else { first };
            let most_ahead = self.most_ahead();
            let account = &mut self.accounts[index as usize];
            account.now.allowance = (rival + most_ahead - account.now.counter) * account.weight;
            account.now.limited = account.now.allowance < step_charge;
            let quanta = account.now.counter / self.quantum;
            account.now.level = (quanta.floor() - base + 1.0).max(0.0) as u32;
            account.now.fraction = ((quanta - quanta.floor()) * 2f64.powi(32)) as u32;
        }
    }

    /// Lets go of tenants without sessions that aren't ahead of anybody, and of all of those if they are many.
    fn forget_idle(&mut self) {
        let enough = 2 * MOST_IDLE + 2 * self.active.len();
        if self.accounts.len() <= enough {
            return;
        }
        let (step, least) = (self.step, self.least);
        self.accounts.retain(|account| account.seen == step || account.settled > least);
        if self.accounts.len() > MOST_IDLE + self.active.len() {
            self.accounts.retain(|account| account.seen == step);
        }
        self.by_index.clear();
        self.by_id.clear();
        let index = self.accounts.iter().enumerate();
        self.by_id.extend(index.map(|(index, account)| (account.tenant, index as u32)));
    }
}

impl Account {
    fn lift(&mut self, to: f64) {
        if self.now.counter < to {
            self.shift(to);
        }
    }

    fn shift(&mut self, to: f64) {
        self.settled += to - self.now.counter;
        self.now.counter = to;
    }
}

#[cfg(test)]
mod tests {
    use setu_testkit::views::Scene;

    use super::*;

    fn accounts() -> Accounts {
        Accounts::new(&FairShareConfig { quantum_tokens: 100, ..FairShareConfig::default() })
    }

    /// Plans a step in which `tenants` have a session each, of weight 1; `waits` says who was passed over.
    fn step(accounts: &mut Accounts, tenants: &[u32], waits: &[u32]) {
        let mut scene = Scene::new(0.0);
        for &tenant in tenants {
            scene.waiting(u64::from(tenant), 0.0, 10);
            scene.of_tenant(tenant, 1.0);
        }
        let view = scene.view();
        accounts.open();
        for session in &scene.sessions {
            let account = accounts.of(&view, session);
            let now = accounts.now(account);
            now.runnable = true;
            now.newcomer = now.returns;
            now.passed_over = waits.contains(&session.tenant.0);
        }
        accounts.close(f64::INFINITY);
    }

    fn serve(accounts: &mut Accounts, tenant: u32, tokens: u32) {
        let mut event = SessionEvent::new(EventKind::Advanced, SessionId(0), TenantId(tenant), 0.0);
        event.prefill_tokens = tokens;
        accounts.charge(&event);
    }

    fn counter(accounts: &Accounts, tenant: u32) -> f64 {
        accounts.get(accounts.by_id[&TenantId(tenant)] as usize).now.counter
    }

    #[test]
    fn being_idle_earns_nothing_and_being_alone_costs_nothing() {
        let mut accounts = accounts();
        step(&mut accounts, &[1], &[]);
        serve(&mut accounts, 1, 5000);
        // Nobody contends: who arrives and has to wait is not owed what the other was served alone.
        step(&mut accounts, &[1, 2], &[]);
        step(&mut accounts, &[1, 2], &[2]);
        assert_eq!((counter(&accounts, 1), counter(&accounts, 2)), (5000.0, 5000.0));
        serve(&mut accounts, 1, 70);
        step(&mut accounts, &[1, 2], &[1, 2]);
        assert_eq!((counter(&accounts, 1), counter(&accounts, 2)), (5070.0, 5000.0));
        // A third that returns is lifted to the least of those that contend.
        step(&mut accounts, &[1, 2, 3], &[1, 2]);
        assert_eq!(counter(&accounts, 3), 5000.0);
    }

    #[test]
    fn debts_outlast_absence_while_others_contend() {
        let mut accounts = accounts();
        step(&mut accounts, &[1, 2, 3], &[1, 2, 3]);
        serve(&mut accounts, 1, 150);
        serve(&mut accounts, 3, 1000);
        (0..5).for_each(|_| step(&mut accounts, &[2], &[2]));
        step(&mut accounts, &[1, 2, 3], &[2]);
        assert_eq!([1, 2, 3].map(|tenant| counter(&accounts, tenant)), [150.0, 0.0, 200.0], "at most two quanta");
    }

    #[test]
    fn who_begins_to_wait_is_owed_two_quanta_at_most() {
        let mut accounts = accounts();
        step(&mut accounts, &[1, 2], &[1, 2]);
        // For a while 2 gets all that it asks for, and 1 much more.
        serve(&mut accounts, 1, 1000);
        step(&mut accounts, &[1, 2], &[]);
        assert_eq!(counter(&accounts, 2), 0.0);
        step(&mut accounts, &[1, 2], &[2]);
        assert_eq!((counter(&accounts, 1), counter(&accounts, 2)), (1000.0, 800.0));
    }

    #[test]
    fn waiting_by_turns_keeps_what_is_owed() {
        let mut accounts = accounts();
        step(&mut accounts, &[1, 2], &[1, 2]);
        for _ in 0..10 {
            serve(&mut accounts, 1, 5);
            step(&mut accounts, &[1, 2], &[2]);
            serve(&mut accounts, 2, 3);
            step(&mut accounts, &[1, 2], &[1]);
        }
        assert_eq!((counter(&accounts, 1), counter(&accounts, 2)), (50.0, 30.0));
    }

    #[test]
    fn allowances_reach_two_quanta_beyond_the_least_that_waits() {
        let mut accounts = accounts();
        step(&mut accounts, &[1, 2, 3], &[1, 2, 3]);
        serve(&mut accounts, 2, 30);
        serve(&mut accounts, 3, 130);
        step(&mut accounts, &[1, 2, 3], &[1, 2]);
        let standing = |tenant: u32| &accounts.get(accounts.by_id[&TenantId(tenant)] as usize).now;
        assert_eq!([1, 2, 3].map(|tenant| standing(tenant).allowance), [230.0, 170.0, 70.0]);
        assert_eq!([1, 2, 3].map(|tenant| standing(tenant).level), [1, 1, 2]);
    }

    #[test]
    fn tenants_that_come_and_go_are_forgotten() {
        let mut accounts = accounts();
        for tenant in 0..100_000u32 {
            // Each leaves ahead of the one that stays.
            step(&mut accounts, &[u32::MAX, tenant], &[u32::MAX, tenant]);
            serve(&mut accounts, tenant, 90);
            assert!(accounts.accounts.len() <= 2 * MOST_IDLE + 8 && accounts.by_id.len() == accounts.accounts.len());
        }
    }

    #[test]
    fn weights_that_are_none_are_taken_as_some() {
        for weight in [f64::NAN, 0.0, -1.0, f64::INFINITY, f64::NEG_INFINITY] {
            let mut accounts = accounts();
            let mut scene = Scene::new(0.0);
            scene.waiting(1, 0.0, 10);
            scene.of_tenant(7, weight);
            accounts.open();
            accounts.of(&scene.view(), &scene.sessions[0]);
            serve(&mut accounts, 7, u32::MAX);
            accounts.close(f64::INFINITY);
            assert!(counter(&accounts, 7).is_finite());
        }
    }
}
