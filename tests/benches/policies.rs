//! What a decision costs: every scheduler and batcher that is linked in, at 10, 1,000 and 10,000 live sessions.
//!
//! `cargo bench -p setu-tests --bench policies [NAME]` prints the median and the 99th percentile of 300 calls, of all
//! or of those whose name contains NAME.

use std::time::Instant;

use setu_core::batcher::ChunkBuffer;
use setu_core::rows::{Column, Rows};
use setu_core::scheduler::DecisionBuffer;
use setu_core::{Batcher, Registries, Scheduler};
use setu_host as _;
use setu_testkit::policy::speed::{Crowd, RUNNING};
use setu_tests::figures::median;

const CALLS: usize = 300;
const WARM_UP: usize = 20;

/// Live sessions, and how many of them run at most.
const CROWDS: [(usize, usize); 4] = [(10, RUNNING), (1000, RUNNING), (10_000, RUNNING), (10_000, 1024)];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test` runs benches with `--test`: only that they start is checked then.
    if arguments.iter().any(|argument| argument == "--test") {
        return;
    }
    let wanted = arguments.into_iter().find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let registries = Registries::linked_in();
    println!(
        "µs a decision: median and 99th percentile of {CALLS} calls, by live sessions (and those of them that run)"
    );
    let heads = CROWDS.map(|(sessions, running)| format!("{:>18}", format!("{sessions} ({})", running.min(sessions))));
    println!("{:28}{}", "", heads.concat());
    for entry in registries.schedulers.list().iter().filter(|entry| entry.key.contains(&wanted)) {
        report("scheduler", &entry.key, |crowd| schedule(&mut *(entry.build)("{}").expect("its defaults"), crowd));
    }
    for entry in registries.batchers.list().iter().filter(|entry| entry.key.contains(&wanted)) {
        report("batcher", &entry.key, |crowd| batch(&mut *(entry.build)("{}").expect("its defaults"), crowd));
    }
}

fn report(kind: &str, key: &str, run: impl Fn(Crowd) -> Vec<f64>) {
    let figures = CROWDS.map(|(sessions, running)| {
        let mut times = run(Crowd::new(sessions, running));
        let middle = median(&mut times);
        format!("{middle:>10.1}{:>8.1}", times[times.len() * 99 / 100])
    });
    println!("  {kind:<10}{key:<16}{}", figures.concat());
}

fn schedule(scheduler: &mut dyn Scheduler, mut crowd: Crowd) -> Vec<f64> {
    let mut decisions = DecisionBuffer::default();
    timed(|| {
        let mut events = crowd.obey(&decisions);
        events.extend(crowd.go_on());
        let started = Instant::now();
        scheduler.observe(Rows::new(&events));
        let view = crowd.scene.view();
        decisions.fill(view.sessions.len(), |decisions| scheduler.schedule(&view, decisions)).expect("a decision");
        started
    })
}

fn batch(batcher: &mut dyn Batcher, mut crowd: Crowd) -> Vec<f64> {
    let mut chunks = ChunkBuffer::default();
    let ready: Vec<u32> = (0..crowd.scene.sessions.len() as u32).collect();
    crowd.scene.budgets.sessions = ready.len() as u32;
    crowd.scene.budgets.tokens += ready.len() as u32;
    timed(|| {
        crowd.go_on();
        let started = Instant::now();
        batcher.observe(&crowd.scene.last_step);
        let view = crowd.scene.view();
        chunks.fill(ready.len(), |chunks| batcher.batch(&view, Column::new(&ready), chunks)).expect("chunks");
        started
    })
}

/// µs from the instant that each call of `call` tells until its end.
fn timed(mut call: impl FnMut() -> Instant) -> Vec<f64> {
    (0..WARM_UP + CALLS).map(|_| call().elapsed().as_secs_f64() * 1e6).skip(WARM_UP).collect()
}
