//! What deadlines come to over many steps, in the conformance kit's engine in miniature.

use std::collections::HashMap;

use setu_core::prelude::*;
use setu_core::scheduler::Verdict;
use setu_scheduler_deadline::{Deadline, DeadlineConfig};
use setu_testkit::arena::{Arena, Arrival, DecodesFirst, InOrder, Moment, Watch, Workload};

/// What became of a session.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Waits,
    Rejected,
    /// When its first token came, in seconds after its arrival.
    Answered(f64),
}

/// Notes everybody's fate, by arrival.
struct Fates {
    arrivals: Vec<f64>,
    by_arrival: Vec<Fate>,
    arrival_of: HashMap<SessionId, usize>,
}

impl Watch for Fates {
    fn decided(&mut self, moment: &Moment<'_>) -> std::result::Result<(), String> {
        for (session, &arrival) in moment.view.sessions.iter().zip(moment.arrivals) {
            self.arrival_of.insert(session.id, arrival);
        }
        for choice in moment.choices.iter().filter(|choice| matches!(choice.verdict, Verdict::Reject { .. })) {
            self.by_arrival[moment.arrivals[choice.index]] = Fate::Rejected;
        }
        Ok(())
    }

    fn heard(&mut self, events: &[SessionEvent]) -> std::result::Result<(), String> {
        for event in events.iter().filter(|event| event.generated_tokens > 0) {
            let Some(&arrival) = self.arrival_of.get(&event.id) else { continue };
            if self.by_arrival[arrival] == Fate::Waits {
                self.by_arrival[arrival] = Fate::Answered(event.time_s - self.arrivals[arrival]);
            }
        }
        Ok(())
    }
}

fn fates(scheduler: &mut dyn Scheduler, workload: &Workload) -> Vec<Fate> {
    let mut fates = Fates {
        arrivals: workload.arrivals.iter().map(|arrival| arrival.at_s).collect(),
        by_arrival: vec![Fate::Waits; workload.arrivals.len()],
        arrival_of: HashMap::new(),
    };
    Arena::new(workload).run(scheduler, &mut DecodesFirst, &mut fates).unwrap_or_else(|story| panic!("{story}"));
    fates.by_arrival
}

fn deadline(config: &str) -> Deadline {
    Deadline::build(DeadlineConfig::from_json(config).unwrap()).unwrap()
}

/// `count` sessions, one every `every_s`, each with a prompt of `prompt` tokens and `ttft_s` for its first token.
fn stream(count: u32, every_s: f64, prompt: u32, ttft_s: f64) -> Vec<Arrival> {
    let arrival = |n| Arrival { at_s: f64::from(n) * every_s, ttft_s, ..Arrival::new(prompt, 4) };
    (0..count).map(arrival).collect()
}

fn workload(arrivals: Vec<Arrival>) -> Workload {
    let mut workload = Workload::new(arrivals, 4000).admissible();
    (workload.session_budget, workload.most_steps) = (64, 100_000);
    workload
}

#[test]
fn who_is_let_in_is_on_time_where_order_of_arrival_makes_all_late() {
    // A prompt takes some 19 ms and comes every 14: more than there is time for.
    for in_flight in [1, 2] {
        let mut load = workload(stream(400, 0.014, 250, 0.3));
        load.in_flight = in_flight;
        let on_time =
            |fates: &[Fate]| fates.iter().filter(|fate| matches!(fate, Fate::Answered(s) if *s <= 0.3)).count();
        let fates_by_deadline = fates(&mut deadline("{}"), &load);
        let late = fates_by_deadline.iter().filter(|fate| matches!(fate, Fate::Answered(s) if *s > 0.3 + 0.03)).count();
        let by_arrival = on_time(&fates(&mut InOrder::default(), &load));
        assert_eq!(late, 0, "{fates_by_deadline:?}");
        assert!(!fates_by_deadline.contains(&Fate::Waits), "everybody is told");
        assert!(on_time(&fates_by_deadline) > 2 * by_arrival, "{} to {by_arrival}", on_time(&fates_by_deadline));
    }
}

#[test]
fn a_long_prompt_is_not_starved_by_short_ones() {
    // Short prompts that take nearly all the time there is, and a long one that must have a share of it.
    let mut arrivals = stream(1000, 0.01, 125, 0.5);
    arrivals.push(Arrival { at_s: 1.0, ttft_s: 6.0, ..Arrival::new(6000, 4) });
    let load = workload(arrivals);
    let long = load.arrivals.iter().position(|arrival| arrival.prompt == 6000).unwrap();
    let relative_slack = r#"{"order": "relative_slack", "reject_early": false}"#;
    assert!(matches!(fates(&mut deadline(relative_slack), &load)[long], Fate::Answered(s) if s <= 6.0));
    let shortest_first = r#"{"order": "deadline", "remaining_weight": 100.0, "reject_early": false}"#;
    assert_eq!(fates(&mut deadline(shortest_first), &load)[long], Fate::Rejected);
}

#[test]
fn patience_ends_the_wait_of_one_without_a_deadline() {
    let mut arrivals = stream(1500, 0.014, 250, 0.3);
    arrivals.push(Arrival { at_s: 2.0, ..Arrival::new(250, 4) });
    let load = workload(arrivals);
    let patient = load.arrivals.iter().position(|arrival| arrival.ttft_s.is_infinite()).unwrap();
    for (patience_s, most_s) in [(1.0, 1.2), (5.0, 5.2)] {
        let fate = fates(&mut deadline(&format!(r#"{{"patience_s": {patience_s}}}"#)), &load)[patient];
        assert!(matches!(fate, Fate::Answered(s) if s <= most_s), "{fate:?}");
    }
    let fate = fates(&mut deadline(r#"{"patience_s": 1000.0}"#), &load)[patient];
    assert!(!matches!(fate, Fate::Answered(s) if s < 10.0), "the load leaves nothing over: {fate:?}");
}

#[test]
fn relegated_ones_run_where_time_is_left() {
    // Too much for a second, then nothing.
    let load = workload(stream(70, 0.014, 250, 0.1));
    let fates = fates(&mut deadline(r#"{"hopeless": "relegate"}"#), &load);
    let answered =
        |within_s: f64| fates.iter().filter(|fate| matches!(fate, Fate::Answered(s) if *s <= within_s)).count();
    assert_eq!(answered(f64::INFINITY), 70, "{fates:?}");
    assert!((35..70).contains(&answered(0.13)), "{fates:?}");
}
