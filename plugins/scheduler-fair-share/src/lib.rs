//! Fair-share scheduler: weighted fair service among tenants, with an eye on cached prefixes.
//!
//! Each tenant has a counter of what it was served: tokens, each charged by its kind, divided by the
//! tenant's weight. Whoever has the least goes first. The counters and their lifting are those of VTC
//! (Sheng et al., "Fairness in Serving Large Language Models", OSDI '24, arXiv 2401.00588). VTC ignores
//! prefix locality; as in DLPM (Cao et al., "Locality-aware Fair Scheduling in LLM Serving",
//! arXiv 2501.14312) counters are therefore compared by whole quanta Q only: among tenants in the same
//! quantum sessions with the longest cached prefix go first. DLPM refills deficits of Q by rounds, which
//! is the same order; a round is a quantum here.
//!
//! Both papers let a session that runs go on to its end, so that what they bound depends on how much
//! fits into memory. Here a tenant more than 2 Q ahead of one that waits pauses (its sessions keep
//! their pages), which bounds the difference in quanta, steps and single sessions, whatever the batcher
//! prefers. Sessions are preempted only to let a tenant in that is a quantum behind and holds less
//! than its share of slots and pages, from one that holds more; or from one that pauses. One that was
//! preempted is then left alone until it is as far as it was and as far again, by a quantum at most, so that tenants
//! can't undo each other's prompts for ever.
//!
//! # The bound
//! A tenant *waits* if the step before passed one of its sessions over that could have run. Its counter c is
//! what it was charged over its weight, steps in flight included. S is the most that a step is charged, over the
//! least weight: its token budget in prompt tokens, and a generated one for each session; d steps are in flight.
//! R is the most that a session that was preempted is charged while it is left alone, over its weight: its prompt
//! again and up to a quantum of generated tokens. Where nobody is preempted R is 0.
//!
//! **Claim.** If f and g both wait throughout an interval, what they were served in it, each over its
//! weight, differs by at most 4 Q + 2 R + (2 d + 1) S.
//!
//! *Proof.* While a tenant waits its counter grows by what it is served and by nothing else. When it begins to,
//! it is lifted to within 2 Q of whoever is furthest ahead. Afterwards f gets chunks only as far as c_f, with
//! all of them charged in advance, stays within c_g + 2 Q, but for sessions that are left alone: of these it
//! is let have one, or as many as will stay within c_g + 2 Q to their end; and the other way round. So
//! |c_f − c_g| ≤ 2 Q + R throughout, and the difference changes by at most 4 Q + 2 R. What was served lags
//! behind the counters by what is in flight, at most d S at either end; and that a tenant waits is known one
//! step late, S. ∎
//!
//! What [`Scheduler::properties`](setu_core::Scheduler::properties) declares is 6 Q, which is no less where Q is at
//! least R + 2.5 S: with two steps of 512 tokens and 64 sessions, weights from 1, and memory that makes
//! preemption rare, that is a Q of 1,600. VTC's bound is in terms of the tokens that fit into memory, with
//! the same factor of two. A session that is aborted takes what was in flight for it out of its tenant's counter and
//! out of the claim. Cached tokens, where they are charged, add to S the charge of the prefixes that a step attaches.
//! Where a single token over the weight is charged more than Q, that charge takes the place of Q, as somebody must run.
//!
//! Only who waits has a claim. A prompt that is computed in every step, as fast as the batcher lets it, waits
//! for nobody, however slow that is; it counts as waiting only where another's decodes, which batchers put
//! first, gain more in the same steps.
//!
//! Read on in [`scheduler`], the order and who is admitted, and `accounts.rs`, the counters.

mod accounts;
pub mod config;
mod memory;
pub mod scheduler;

pub use config::FairShareConfig;
pub use scheduler::FairShare;

setu_core::export_plugin!(scheduler: FairShare);
