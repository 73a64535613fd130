//! More load than the device bears, and some of it urgent.

use std::fmt::Write;
use std::path::Path;

use setu_core::{Registries, Result};
use setu_engine::simulation::{Prompt, Report, TimedRequest};

use super::plot::{Chart, Legend, Style};
use super::world::{Chosen, Device, Dice, Policies, simulate};
use super::{Section, quantile};

pub const NAME: &str = "priority";

/// Priorities, with their share of the requests.
const CLASSES: [(i32, f64); 4] = [(9, 0.1), (7, 0.2), (5, 0.4), (1, 0.3)];
const SCHEDULERS: [(&str, Chosen<'static>); 4] = [
    ("fcfs", ("fcfs", r#"{"queue_timeout_s": 0}"#)),
    ("priority, no ageing", ("priority", r#"{"queue_timeout_s": 0, "ageing_s": 0}"#)),
    ("priority, ageing 30 s", ("priority", r#"{"queue_timeout_s": 0, "ageing_s": 30}"#)),
    ("priority, ageing 5 s", ("priority", r#"{"queue_timeout_s": 0, "ageing_s": 5}"#)),
];
const BATCHER: Chosen<'static> = ("fixed_chunk", "{}");

/// Arrivals at random for `seconds`, `per_s` on average.
fn workload(per_s: f64, seconds: f64) -> Vec<TimedRequest> {
    let mut dice = Dice::new(4);
    let mut requests = Vec::new();
    let mut at_s = dice.pause_s(per_s);
    while at_s < seconds {
        let mut request = TimedRequest::new(at_s, Prompt::own(dice.between(200, 1200)), dice.between(50, 250));
        let mut place = dice.even();
        let class = CLASSES.iter().find(|(_, share)| {
            place -= share;
            place < 0.0
        });
        request.priority = class.map(|(priority, _)| *priority);
        requests.push(request);
        at_s += dice.pause_s(per_s);
    }
    requests
}

/// Requests a second that the device gets done when there are always enough.
///
/// # Errors
/// A component isn't there.
fn capacity(registries: &Registries, device: &Device) -> Result<f64> {
    let mut requests = workload(100.0, 10.0);
    requests.iter_mut().for_each(|request| request.arrival_s = 0.0);
    let policies = Policies { scheduler: SCHEDULERS[0].1, batcher: BATCHER };
    Ok(requests.len() as f64 / simulate(registries, device, policies, &requests)?.end_s)
}

fn ttft_s(report: &Report, requests: &[TimedRequest], priority: Option<i32>) -> Vec<f64> {
    let of_class = report.sessions.iter().zip(requests).filter(|(_, request)| request.priority == priority);
    of_class.map(|(session, _)| session.ttft_s().unwrap_or(f64::INFINITY)).collect()
}

pub fn experiment(out: &Path) -> Result<Option<Section>> {
    let registries = Registries::linked_in();
    let device = Device::gpu();
    let load = 1.3 * capacity(&registries, &device)?;
    let requests = workload(load, 120.0);
    let mut text = format!(
        "For two minutes requests arrive at 1.3 times what the device gets done ({load:.1} a second, {} in all), each with one of four priorities; \
         then they stop and what has queued up is worked off. TTFT in seconds, p50 / p99, by priority with its share of the requests.\n\n| scheduler |",
        requests.len()
    );
    for (priority, share) in CLASSES {
        let _ = write!(text, " {priority} ({:.0} %) |", share * 100.0);
    }
    text.push_str(" longest wait, s | preemptions | all done after, s |\n| --- |");
    text.push_str(&" ---: |".repeat(CLASSES.len() + 3));
    text.push('\n');
    let mut chart = Chart::new("Time to first token by priority, at 1.3 × capacity", "priority", "TTFT p99, s");
    chart.legend = Legend::LowerLeft;
    chart.log_y = true;
    for (name, scheduler) in SCHEDULERS {
        let report = simulate(&registries, &device, Policies { scheduler, batcher: BATCHER }, &requests)?;
        let _ = write!(text, "| {name} |");
        let mut points = Vec::new();
        for (priority, _) in CLASSES {
            let ttft_s = ttft_s(&report, &requests, Some(priority));
            let (p50_s, p99_s) = (quantile(&ttft_s, 0.5), quantile(&ttft_s, 0.99));
            let _ = write!(text, " {p50_s:.2} / {p99_s:.2} |");
            points.push((f64::from(priority), p99_s));
        }
        let waits = report.sessions.iter().filter_map(|session| session.ttft_s());
        let longest_s = waits.fold(0.0, f64::max);
        let _ = writeln!(text, " {longest_s:.1} | {} | {:.0} |", report.stats.preemptions, report.end_s);
        chart.add(name, Style::Marked, points);
    }
    let file = format!("{NAME}.svg");
    chart.write(&out.join(&file))?;
    let _ = writeln!(
        text,
        "\n![TTFT by priority]({file})\n\nTo be seen: under overload somebody has to wait. First come, first served has everybody do so; strict \
         priorities spare the urgent entirely and leave the rest to wait until the load is gone; ageing lets those who have waited long through, \
         at the price of the urgent, the more the faster it is.\n"
    );
    Ok(Some(Section { name: NAME, title: "Priorities: an overloaded device", text }))
}
