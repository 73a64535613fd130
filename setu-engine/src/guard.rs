//! Runs policies that are not trusted.
//!
//! A [`Guard`] calls its component, times it on the thread's CPU clock, catches panics, and has every
//! answer checked by the caller. A component at fault is quarantined: never called or dropped again,
//! replaced by the fallback for good, and the fault is logged, counted and listed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use setu_core::component::Kind;
use setu_core::{Error, ErrorKind, Result};

/// A component with the one that takes over if it fails.
pub struct Guarded<C: ?Sized> {
    pub name: String,
    pub component: Box<C>,
    pub fallback_name: String,
    pub fallback: Box<C>,
}

impl<C: ?Sized> Guarded<C> {
    pub fn new(name: &str, component: Box<C>, fallback_name: &str, fallback: Box<C>) -> Guarded<C> {
        Guarded { name: name.to_owned(), component, fallback_name: fallback_name.to_owned(), fallback }
    }
}

/// Something that a component did wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kind: Kind,
    /// The component's name.
    pub component: String,
    pub message: String,
    /// The step being planned.
    pub step: u64,
}

/// How long a policy may take, and how often it may take longer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeBudget {
    /// CPU time of all calls for one step; zero for no limit.
    pub per_step: Duration,
    /// Overruns among the last 16 steps that count as a fault.
    pub overruns: u32,
}

pub(crate) struct Guard<C: ?Sized> {
    kind: Kind,
    name: String,
    component: Option<Box<C>>,
    fallback: Option<(String, Box<C>)>,
    budget: TimeBudget,
    /// The step of the latest call, and what calls for it took.
    step: u64,
    step_spent: Duration,
    /// One bit for each of the last 16 steps that overran, the latest in bit 0.
    overran: u16,
    pub spent: Duration,
}

impl<C: ?Sized> Guard<C> {
    pub fn new(kind: Kind, guarded: Guarded<C>, budget: TimeBudget) -> Guard<C> {
        Guard {
            kind,
            name: guarded.name,
            component: Some(guarded.component),
            fallback: Some((guarded.fallback_name, guarded.fallback)),
            budget,
            step: 0,
            step_spent: Duration::ZERO,
            overran: 0,
            spent: Duration::ZERO,
        }
    }

    /// Name of the component in use.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Calls the component in use for step `step`.
    ///
    /// # Errors
    /// The call's own, a panic, or too many overruns: what [`quarantine`](Guard::quarantine) is to be told.
    pub fn call<R>(&mut self, step: u64, call: impl FnOnce(&mut C) -> Result<R>) -> Result<R> {
        let component = self.component.as_deref_mut().ok_or_else(|| Error::internal("no component is left"))?;
        let started = thread_cpu_time();
        let result = catch_unwind(AssertUnwindSafe(|| call(component)))
            .unwrap_or_else(|payload| Err(Error::new(ErrorKind::Panicked, panic_message(payload))));
        let took = thread_cpu_time().saturating_sub(started);
        self.spent += took;
        if self.step != step {
            self.step = step;
            self.step_spent = Duration::ZERO;
            self.overran <<= 1;
        }
        self.step_spent += took;
        let result = result?;
        if self.overran & 1 == 0 && !self.budget.per_step.is_zero() && self.step_spent > self.budget.per_step {
            self.overran |= 1;
            let (took_us, budget_us) = (self.step_spent.as_micros() as u64, self.budget.per_step.as_micros() as u64);
            let (kind, component, count) = (self.kind.name(), &self.name, self.overran.count_ones());
            tracing::warn!(kind, component, took_us, budget_us, "a policy took longer than its budget for a step");
            if count >= self.budget.overruns {
                return Err(Error::contract(format!(
                    "{count} of the last 16 steps took longer than {budget_us} µs, the last {took_us} µs"
                )));
            }
        }
        Ok(result)
    }

    /// What the calls for the latest step took, if that is over the budget.
    pub fn overran(&self) -> Option<Duration> {
        (self.overran & 1 == 1).then_some(self.step_spent)
    }

    /// Whether a component is left to call.
    pub fn is_usable(&self) -> bool {
        self.component.is_some()
    }

    /// Replaces the component by the fallback. Says whether there was one left to take over.
    pub fn quarantine(&mut self, error: &Error, step: u64) -> (Fault, bool) {
        let fault = Fault { kind: self.kind, component: self.name.clone(), message: error.message().to_owned(), step };
        // Its state may be broken, so not even its drop may run.
        std::mem::forget(self.component.take());
        let replaced = self.fallback.take().map(|(name, fallback)| {
            tracing::error!(
                kind = self.kind.name(),
                component = self.name,
                fallback = name,
                step,
                error = error.message(),
                "the component is at fault and is replaced by the fallback"
            );
            self.name = name;
            self.component = Some(fallback);
            self.overran = 0;
            self.step_spent = Duration::ZERO;
        });
        if replaced.is_none() {
            tracing::error!(kind = self.kind.name(), step, error = error.message(), "the fallback is at fault as well");
        }
        (fault, replaced.is_some())
    }

    /// Puts another component in use; the one before becomes the fallback if none is left.
    pub fn swap(&mut self, name: String, component: Box<C>) {
        let before = self.component.replace(component);
        let before_name = std::mem::replace(&mut self.name, name);
        if self.fallback.is_none() {
            self.fallback = before.map(|before| (before_name, before));
        } else if let Some(before) = before {
            // A drop is the component's code like any other.
            if catch_unwind(AssertUnwindSafe(|| drop(before))).is_err() {
                tracing::error!(
                    kind = self.kind.name(),
                    component = before_name,
                    "the component panicked when dropped"
                );
            }
        }
        self.overran = 0;
        self.step_spent = Duration::ZERO;
    }
}

impl<C: ?Sized> Drop for Guard<C> {
    fn drop(&mut self) {
        let component = self.component.take();
        let fallback = self.fallback.take();
        if catch_unwind(AssertUnwindSafe(|| drop((component, fallback)))).is_err() {
            tracing::error!(kind = self.kind.name(), component = self.name, "the component panicked when dropped");
        }
    }
}

/// The text of a panic.
pub(crate) fn panic_message(payload: Box<dyn std::any::Any + Send>) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    // A payload's drop may panic in turn.
    std::mem::forget(payload);
    format!("panicked: {}", text.as_deref().unwrap_or("(no message)"))
}

/// CPU time of the calling thread; what others take from it doesn't count.
pub(crate) fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    if result == 0 { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) } else { Duration::ZERO }
}
