//! Two tenants that want more than there is.

use std::fmt::Write;
use std::path::Path;

use setu_core::ids::TenantId;
use setu_core::rows::Rows;
use setu_core::scheduler::{Charges, Decisions, Scheduler, SchedulerProperties, SessionEvent};
use setu_core::view::{SessionView, StepView};
use setu_core::{Registries, Result};
use setu_engine::simulation::{self, Prompt, Report, TimedRequest};

use super::plot::{Chart, Legend, Style, thinned};
use super::world::{self, Chosen, Device, Dice, parts_of, without_faults};
use super::{Section, quantile};

pub const NAME: &str = "fairness";

const FLOOD: TenantId = TenantId(1);
const MODEST: TenantId = TenantId(2);
const FCFS: Chosen<'static> = ("fcfs", r#"{"queue_timeout_s": 0}"#);
const FAIR: Chosen<'static> = ("fair_share", r#"{"queue_timeout_s": 0}"#);
const BATCHER: Chosen<'static> = ("fixed_chunk", "{}");

/// A run with what the scheduler heard.
pub struct Run {
    pub report: Report,
    pub events: Vec<SessionEvent>,
    pub properties: SchedulerProperties,
}

/// Simulates `requests` under a scheduler.
///
/// # Errors
/// It isn't there or was at fault.
pub fn run(registries: &Registries, device: &Device, scheduler: Chosen<'_>, requests: &[TimedRequest]) -> Result<Run> {
    run_of(registries, device, (scheduler.0, world::build(&registries.schedulers, scheduler)?), requests)
}

/// As [`run`], with a scheduler that is built already.
fn run_of(
    registries: &Registries,
    device: &Device,
    (name, policy): (&str, Box<dyn Scheduler>),
    requests: &[TimedRequest],
) -> Result<Run> {
    let properties = policy.properties();
    let (policy, heard) = simulation::record_events(policy);
    let batcher = world::build(&registries.batchers, BATCHER)?;
    let parts = parts_of(registries, device, (name, policy), (BATCHER.0, batcher))?;
    let report = without_faults(simulation::run(parts, device.settings(), requests)?)?;
    Ok(Run { report, events: heard.try_iter().collect(), properties })
}

/// Requests of both tenants, all at once: `flood` of the one in front of `modest` of the other.
pub fn backlog(flood: u32, modest: u32, weights: (f64, f64), dice: &mut Dice) -> Vec<TimedRequest> {
    let mut request = |tenant, weight| {
        let mut request = TimedRequest::new(0.0, Prompt::own(dice.between(100, 400)), dice.between(40, 160));
        (request.tenant, request.tenant_weight) = (tenant, weight);
        request
    };
    let flood: Vec<TimedRequest> = (0..flood).map(|_| request(FLOOD, weights.0)).collect();
    flood.into_iter().chain((0..modest).map(|_| request(MODEST, weights.1))).collect()
}

/// How far the flooding tenant is ahead of the modest one in what it was served over its weight, after each event
/// while both have more waiting than can run.
pub fn difference(run: &Run, device: &Device, requests: &[TimedRequest], charges: Charges) -> Vec<(f64, f64)> {
    let until_s = [FLOOD, MODEST].map(|tenant| backlogged_until_s(run, device, requests, tenant));
    let until_s = until_s[0].min(until_s[1]);
    let weight = |tenant| requests.iter().find(|request| request.tenant == tenant).map_or(1.0, |one| one.tenant_weight);
    let (flood, modest) = (weight(FLOOD), weight(MODEST));
    let mut ahead = 0.0;
    let events = run.events.iter().take_while(|event| event.time_s <= until_s);
    let steps = events.map(|event| {
        let charge = charges.prefill * f64::from(event.prefill_tokens)
            + charges.cached * f64::from(event.cached_tokens)
            + charges.generated * f64::from(event.generated_tokens);
        ahead += if event.tenant == FLOOD { charge / flood } else { -charge / modest };
        (event.time_s, ahead)
    });
    steps.collect()
}

/// When a tenant has no more sessions left than can run at once.
fn backlogged_until_s(run: &Run, device: &Device, requests: &[TimedRequest], tenant: TenantId) -> f64 {
    let of_tenant = run.report.sessions.iter().zip(requests).filter(|(_, request)| request.tenant == tenant);
    let mut ends_s: Vec<f64> = of_tenant.map(|(session, _)| session.end_s).collect();
    ends_s.sort_unstable_by(f64::total_cmp);
    let left = device.max_sessions as usize + 1;
    ends_s.len().checked_sub(left).map_or(0.0, |place| ends_s[place])
}

/// The widest span of the difference: no interval within saw it change by more.
pub fn span(difference: &[(f64, f64)]) -> f64 {
    let values = || difference.iter().map(|point| point.1);
    values().fold(0.0, f64::max) - values().fold(0.0, f64::min)
}

/// What the policies of this experiment charge.
///
/// # Errors
/// There is no `fair_share`.
pub fn charges(registries: &Registries) -> Result<Charges> {
    let properties = world::build(&registries.schedulers, FAIR)?.properties();
    Ok(properties.charges.unwrap_or(Charges { prefill: 1.0, cached: 0.0, generated: 2.0 }))
}

pub fn experiment(out: &Path) -> Result<Option<Section>> {
    let registries = Registries::linked_in();
    let mut text = String::new();
    backlogged(&registries, out, &mut text)?;
    modest(&registries, out, &mut text)?;
    locality(&registries, &mut text)?;
    Ok(Some(Section { name: NAME, title: "Fair shares: a flooding and a modest tenant", text }))
}

/// Both tenants always wait for more.
fn backlogged(registries: &Registries, out: &Path, text: &mut String) -> Result<()> {
    let device = Device::gpu();
    let charges = charges(registries)?;
    text.push_str(
        "### Two backlogged tenants\n\nBoth tenants always have more waiting than can run; the flooding one came first, with three times as many \
         sessions. What each is served is counted as `fair_share` charges it, over the tenant's weight.\n\n\
         | scheduler | weights | widest difference, charged tokens | declared bound |\n| --- | --- | ---: | ---: |\n",
    );
    let mut chart = Chart::new(
        "How far the flooding tenant is ahead, both backlogged",
        "time, s",
        "difference of service over weight, charged tokens",
    );
    chart.legend = Legend::MiddleRight;
    let mut bound = 0.0;
    for (scheduler, weights, name) in
        [(FCFS, (1.0, 1.0), "fcfs"), (FAIR, (1.0, 1.0), "fair_share, 1 : 1"), (FAIR, (1.0, 3.0), "fair_share, 1 : 3")]
    {
        let requests = backlog(1200, 400, weights, &mut Dice::new(1));
        let run = run(registries, &device, scheduler, &requests)?;
        let difference = difference(&run, &device, &requests, charges);
        let declared = run.properties.fair_within_tokens;
        bound = declared.unwrap_or(bound);
        let shown = declared.map_or("none".to_owned(), |bound| format!("{bound:.0}"));
        let _ = writeln!(text, "| {name} | {} : {} | {:.0} | {shown} |", weights.0, weights.1, span(&difference));
        chart.add(name, Style::Line, difference);
    }
    let most = 1.25 * bound;
    // The rest of what goes through the roof tells nothing.
    for series in &mut chart.series {
        let inside = series.points.iter().take_while(|point| point.1.abs() <= most).count();
        series.points.truncate(inside);
        series.points = thinned(&series.points, 1500);
    }
    chart.limit("declared bound", bound);
    chart.most_y = Some(most);
    let file = format!("{NAME}-difference.svg");
    chart.write(&out.join(&file))?;
    let _ = writeln!(
        text,
        "\n![Difference of service]({file})\n\nTo be seen: first come, first served lets the flooding tenant run away; under `fair_share` the \
         difference stays within the declared bound for as long as both wait, whatever the weights.\n"
    );
    Ok(())
}

/// A tenant that asks for little, beside one that floods the engine.
fn modest(registries: &Registries, out: &Path, text: &mut String) -> Result<()> {
    let device = Device::gpu();
    let mut dice = Dice::new(2);
    let mut requests = backlog(1500, 0, (1.0, 1.0), &mut dice);
    requests.iter_mut().for_each(|request| request.arrival_s = 5.0);
    let mut at_s = 0.0;
    while at_s < 60.0 {
        at_s += dice.pause_s(1.0);
        let mut request = TimedRequest::new(at_s, Prompt::own(dice.between(100, 400)), dice.between(40, 160));
        request.tenant = MODEST;
        requests.push(request);
    }
    text.push_str(
        "### A modest tenant beside a flood\n\nOne tenant sends a request a second. At 5 s another sends 1,500 at once.\n\n\
         | scheduler | modest tenant's TTFT p50, s | p99, s | all done after, s |\n| --- | ---: | ---: | ---: |\n",
    );
    let mut chart = Chart::new("Time to first token of the modest tenant", "arrival, s", "TTFT, s");
    chart.legend = Legend::UpperRight;
    chart.log_y = true;
    for scheduler in [FCFS, FAIR] {
        let report = run(registries, &device, scheduler, &requests)?.report;
        let sessions = report.sessions.iter().zip(&requests).filter(|(_, request)| request.tenant == MODEST);
        let points: Vec<(f64, f64)> =
            sessions.map(|(session, _)| (session.arrival_s, session.ttft_s().unwrap_or(f64::INFINITY))).collect();
        let ttft_s: Vec<f64> = points.iter().map(|point| point.1).collect();
        let (p50_s, p99_s) = (quantile(&ttft_s, 0.5), quantile(&ttft_s, 0.99));
        let _ = writeln!(text, "| {} | {p50_s:.2} | {p99_s:.2} | {:.0} |", scheduler.0, report.end_s);
        chart.add(scheduler.0, Style::Marked, points);
    }
    let file = format!("{NAME}-ttft.svg");
    chart.write(&out.join(&file))?;
    let _ = writeln!(
        text,
        "\n![TTFT of the modest tenant]({file})\n\nTo be seen: the flood is not felt by the tenant that asks for less than its share, and the whole \
         takes no longer.\n"
    );
    Ok(())
}

/// Prompts that share prefixes: what fairness costs the cache.
fn locality(registries: &Registries, text: &mut String) -> Result<()> {
    // Room for a few of the prefixes only.
    let device = Device { kv_pages: 1024, max_sessions: 16, ..Device::gpu() };
    let mut dice = Dice::new(3);
    let mut request = |tenant: TenantId| {
        let group = 100 * tenant.0 + dice.between(0, 9);
        let prompt = Prompt { tokens: 2048 + dice.between(20, 60), shared_tokens: 2048, group };
        let mut request = TimedRequest::new(0.0, prompt, dice.between(10, 30));
        request.tenant = tenant;
        request
    };
    let requests: Vec<TimedRequest> = (0..800).map(|n| request(if n % 4 == 3 { MODEST } else { FLOOD })).collect();
    let charges = charges(registries)?;
    text.push_str(
        "### Shared prefixes\n\nPrompts of 2,048 shared and some own tokens, ten prefixes a tenant, and pages for seven of them at a time. \
         Without locality `fair_share` isn't shown what the cache holds, as the plain virtual token counter doesn't look at it.\n\n\
         | scheduler | prompt tokens found in the cache | all done after, s | widest difference, charged tokens | declared bound |\n\
         | --- | ---: | ---: | ---: | ---: |\n",
    );
    let wide = ("fair_share", r#"{"queue_timeout_s": 0, "quantum_tokens": 16384}"#);
    for (name, scheduler, blind) in [
        ("fcfs", FCFS, false),
        ("fair_share without locality", FAIR, true),
        ("fair_share", FAIR, false),
        ("fair_share, quantum 16,384", wide, false),
    ] {
        let mut policy = world::build(&registries.schedulers, scheduler)?;
        if blind {
            policy = Box::new(Blind { policy, sessions: Vec::new() });
        }
        let run = run_of(registries, &device, (scheduler.0, policy), &requests)?;
        let difference = difference(&run, &device, &requests, charges);
        let prompts: u64 = run.report.sessions.iter().map(|session| u64::from(session.usage.prompt_tokens)).sum();
        let cached: u64 = run.report.sessions.iter().map(|session| u64::from(session.usage.cached_tokens)).sum();
        let bound = run.properties.fair_within_tokens.map_or("none".to_owned(), |bound| format!("{bound:.0}"));
        let _ = writeln!(
            text,
            "| {name} | {:.0} % | {:.1} | {:.0} | {bound} |",
            100.0 * cached as f64 / prompts as f64,
            run.report.end_s,
            span(&difference)
        );
    }
    text.push_str(
        "\nTo be seen: sessions whose prefix is cached go first, as far as fairness allows, which spares most of the work; a larger quantum \
         spares more and allows a wider difference.\n",
    );
    Ok(())
}

/// A scheduler that isn't shown what the prefix cache holds.
struct Blind {
    policy: Box<dyn Scheduler>,
    sessions: Vec<SessionView>,
}

impl Scheduler for Blind {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        self.sessions.clear();
        self.sessions.extend(view.sessions.iter().copied());
        self.sessions.iter_mut().for_each(|session| session.cached_tokens = 0);
        let mut seen = *view;
        seen.sessions = Rows::new(&self.sessions);
        self.policy.schedule(&seen, decisions)
    }

    fn observe(&mut self, events: Rows<'_, SessionEvent>) {
        self.policy.observe(events);
    }

    fn properties(&self) -> SchedulerProperties {
        self.policy.properties()
    }
}
