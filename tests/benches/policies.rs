//! What a decision costs: every scheduler and batcher that is linked in, at 10, 1,000 and 10,000 live sessions.
//!
//! `cargo bench -p setu-tests --bench policies` prints the median and the 99th percentile of 200 calls.

use std::time::Instant;

use setu_core::batcher::ChunkBuffer;
use setu_core::rows::{Column, Rows};
use setu_core::sampling::uniform;
use setu_core::scheduler::{DecisionBuffer, EventKind, SessionEvent};
use setu_core::{Batcher, Registries, Scheduler};
use setu_host as _;
use setu_testkit::views::Scene;
use setu_tests::figures::median;

const CALLS: usize = 200;
const SIZES: [usize; 3] = [10, 1000, 10_000];

fn main() {
    // `cargo test` runs benches with `--test`: only that they start is checked then.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let registries = Registries::linked_in();
    println!("µs a decision, median and 99th percentile of {CALLS} calls; half of the sessions decode, half wait");
    for entry in registries.schedulers.list() {
        report("scheduler", &entry.key, |scene| {
            let mut scheduler = (entry.build)("{}").expect("its defaults");
            schedule(&mut *scheduler, scene)
        });
    }
    for entry in registries.batchers.list() {
        report("batcher", &entry.key, |scene| {
            let mut batcher = (entry.build)("{}").expect("its defaults");
            batch(&mut *batcher, scene)
        });
    }
}

fn report(kind: &str, key: &str, run: impl Fn(&mut Scene) -> Vec<f64>) {
    let mut line = format!("  {kind:<10}{key:<16}");
    for size in SIZES {
        let mut times = run(&mut scene(size));
        let middle = median(&mut times);
        let worst = times[times.len() * 99 / 100];
        line.push_str(&format!("{size:>8}: {middle:>8.1} {worst:>8.1}"));
    }
    println!("{line}");
}

/// Live sessions of 50 tenants and all priorities with deadlines, of which half decode and half wait.
fn scene(sessions: usize) -> Scene {
    let mut scene = Scene::new(100.0);
    scene.budgets.sessions = 256;
    scene.step_time.base_s = 2e-3;
    scene.step_time.prefill_token_s = 1e-4;
    scene.step_time.decode_s = 1e-4;
    scene.step_time.ratio_p95 = 1.1;
    scene.kv_groups[0].total_pages = 1 << 20;
    scene.kv_groups[0].free_pages = 4000;
    for id in 0..sessions as u64 {
        let arrival_s = 99.0 * id as f64 / sessions as f64;
        let prompt = 20 + (uniform(1, id) * 2000.0) as u32;
        let session =
            if id % 2 == 0 { scene.decoding(id, arrival_s, prompt, 5) } else { scene.waiting(id, arrival_s, prompt) };
        session.priority = (uniform(2, id) * 11.0) as i32;
        session.cached_tokens = if id % 3 == 0 { prompt / 2 / 16 * 16 } else { 0 };
        session.ttft_deadline_s = if id % 4 == 0 { f64::INFINITY } else { 1e4 * (1.0 + uniform(3, id)) };
        session.total_deadline_s = 2.0 * session.ttft_deadline_s;
        scene.of_tenant((uniform(4, id) * 50.0) as u32, 1.0);
    }
    scene
}

fn schedule(scheduler: &mut dyn Scheduler, scene: &mut Scene) -> Vec<f64> {
    let mut buffer = DecisionBuffer::default();
    let event = |kind: EventKind, index: usize| {
        let session = &scene.sessions[index];
        let mut event = SessionEvent::new(kind, session.id, session.tenant, scene.now_s);
        event.generated_tokens = u32::from(kind == EventKind::Advanced);
        event
    };
    let added: Vec<SessionEvent> = (0..scene.sessions.len()).map(|index| event(EventKind::Added, index)).collect();
    // A step serves as many sessions as have a place in it.
    let served = scene.sessions.len().min(scene.budgets.sessions as usize);
    let advanced: Vec<SessionEvent> = (0..served).map(|index| event(EventKind::Advanced, index)).collect();
    scheduler.observe(Rows::new(&added));
    let mut times = Vec::new();
    for call in 0..CALLS + 20 {
        let started = Instant::now();
        scheduler.observe(Rows::new(&advanced));
        buffer
            .fill(scene.sessions.len(), |decisions| scheduler.schedule(&scene.view(), decisions))
            .expect("a decision");
        if call >= 20 {
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
        scene.step += 1;
        scene.now_s += 1e-3;
    }
    times
}

fn batch(batcher: &mut dyn Batcher, scene: &mut Scene) -> Vec<f64> {
    let mut buffer = ChunkBuffer::default();
    let ready: Vec<u32> = (0..scene.sessions.len() as u32).collect();
    let mut times = Vec::new();
    for call in 0..CALLS + 20 {
        let started = Instant::now();
        batcher.observe(&scene.last_step);
        buffer.fill(ready.len(), |chunks| batcher.batch(&scene.view(), Column::new(&ready), chunks)).expect("chunks");
        if call >= 20 {
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
        scene.step += 1;
        scene.now_s += 1e-3;
    }
    times
}
