//! Sessions with deadlines, from a light load to twice what the device bears.

use std::fmt::Write;
use std::path::Path;

use setu_core::{Registries, Result};
use setu_engine::request::{Deadlines, FinishReason};
use setu_engine::simulation::{Prompt, Report, TimedRequest};

use super::plot::{Chart, Legend, Style};
use super::world::{Chosen, Device, Dice, Policies, simulate};
use super::{Section, quantile};

pub const NAME: &str = "deadline";

/// Loads, as shares of what the device gets done.
const LOADS: [f64; 9] = [0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0];
const SECONDS: f64 = 300.0;
const SCHEDULERS: [(&str, Chosen<'static>); 4] = [
    ("fcfs", ("fcfs", r#"{"queue_timeout_s": 0}"#)),
    ("priority", ("priority", r#"{"queue_timeout_s": 0}"#)),
    ("deadline, relative slack", ("deadline", r#"{"order": "relative_slack"}"#)),
    ("deadline", ("deadline", "{}")),
];
const BATCHER: Chosen<'static> = ("fixed_chunk", "{}");

/// Applications with their deadlines: chats that want to begin soon, agents that want to be done soon, batches that have time.
const CHAT: u32 = 1;
const AGENT: u32 = 2;
const BATCH: u32 = 3;

fn deadlines(class: u32) -> Deadlines {
    let mut deadlines = Deadlines::default();
    match class {
        CHAT => deadlines.ttft_s = 1.0,
        AGENT => deadlines.total_s = 15.0,
        _ => deadlines.total_s = 90.0,
    }
    deadlines
}

fn request(at_s: f64, dice: &mut Dice) -> TimedRequest {
    let place = dice.even();
    let (class, prompt, output, priority) = if place < 0.5 {
        (CHAT, dice.between(100, 600), dice.between(50, 250), 9)
    } else if place < 0.8 {
        (AGENT, dice.between(800, 4000), dice.between(30, 120), 6)
    } else {
        (BATCH, dice.between(1000, 6000), dice.between(100, 400), 2)
    };
    let mut request = TimedRequest::new(at_s, Prompt::own(prompt), output);
    (request.class, request.priority, request.deadlines) = (class, Some(priority), deadlines(class));
    request
}

fn workload(per_s: f64, seconds: f64) -> Vec<TimedRequest> {
    let mut dice = Dice::new(5);
    let mut requests = Vec::new();
    let mut at_s = dice.pause_s(per_s);
    while at_s < seconds {
        requests.push(request(at_s, &mut dice));
        at_s += dice.pause_s(per_s);
    }
    requests
}

fn capacity(registries: &Registries, device: &Device) -> Result<f64> {
    let mut dice = Dice::new(6);
    let requests: Vec<TimedRequest> =
        (0..1000).map(|_| TimedRequest { deadlines: Deadlines::default(), ..request(0.0, &mut dice) }).collect();
    let policies = Policies { scheduler: SCHEDULERS[0].1, batcher: BATCHER };
    Ok(requests.len() as f64 / simulate(registries, device, policies, &requests)?.end_s)
}

/// The share of sessions that meet their deadlines.
fn goodput(report: &Report, requests: &[TimedRequest]) -> f64 {
    let pairs = report.sessions.iter().zip(requests);
    pairs.filter(|(session, request)| session.meets(&request.deadlines)).count() as f64 / requests.len() as f64
}

/// How long the sessions that were rejected had waited.
fn rejected_after_s(report: &Report) -> Vec<f64> {
    let rejected = report.sessions.iter().filter(|session| matches!(session.reason, FinishReason::Rejected { .. }));
    rejected.map(|session| session.end_s - session.arrival_s).collect()
}

pub fn experiment(out: &Path) -> Result<Option<Section>> {
    let registries = Registries::linked_in();
    let device = Device::gpu();
    let capacity = capacity(&registries, &device)?;
    let mut text = format!(
        "Chats (half of the requests) want their first token within 1 s, agents (30 %) all of a short answer to a long prompt within 15 s, batches their \
         answer within 90 s. Requests arrive at random for {SECONDS} s; the device gets {capacity:.1} of them done a second. `priority` has them at \
         9, 6 and 2. The share of requests that meet their deadlines:\n\n| load |"
    );
    for (name, _) in SCHEDULERS {
        let _ = write!(text, " {name} |");
    }
    text.push_str(" rejected by `deadline` | after p50 / p99, s |\n| ---: |");
    text.push_str(&" ---: |".repeat(SCHEDULERS.len() + 2));
    text.push('\n');
    let mut chart = Chart::new("Sessions that meet their deadlines", "load, share of capacity", "share of sessions");
    chart.legend = Legend::LowerLeft;
    let mut points = [const { Vec::new() }; SCHEDULERS.len()];
    for load in LOADS {
        let requests = workload(load * capacity, SECONDS);
        let _ = write!(text, "| {load:.2} |");
        let mut rejections = String::new();
        for (index, (_, scheduler)) in SCHEDULERS.into_iter().enumerate() {
            let report = simulate(&registries, &device, Policies { scheduler, batcher: BATCHER }, &requests)?;
            let share = goodput(&report, &requests);
            let _ = write!(text, " {:.1} % |", share * 100.0);
            points[index].push((load, share));
            let after_s = rejected_after_s(&report);
            rejections = format!(
                " {:.1} % | {:.2} / {:.2} |",
                100.0 * after_s.len() as f64 / requests.len() as f64,
                quantile(&after_s, 0.5),
                quantile(&after_s, 0.99)
            );
        }
        let _ = writeln!(text, "{rejections}");
    }
    for ((name, _), points) in SCHEDULERS.into_iter().zip(points) {
        chart.add(name, Style::Marked, points);
    }
    let file = format!("{NAME}.svg");
    chart.write(&out.join(&file))?;
    let _ = writeln!(
        text,
        "\n![Share of sessions that meet their deadlines]({file})\n\nTo be seen: past the device's capacity first come, first served works on what is late already and \
         soon meets hardly any deadline at all; fixed priorities save the chats and go on with batches that are late; `deadline` spends the device on what can \
         still be met. Relative slack gives long work its turn instead, at the price of the short, of which more would have been done.\n"
    );
    Ok(Some(Section { name: NAME, title: "Deadlines: from a light load to twice the capacity", text }))
}
