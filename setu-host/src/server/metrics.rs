//! What the server and its engines count, for Prometheus. Names and meanings follow vLLM's, with `setu_` before them, so
//! that its dashboards need another prefix and no more.
//!
//! [`METRICS`] is what there is: the recorder and `docs/metrics.md` take their descriptions from it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use metrics::{
    Histogram, SharedString, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use setu_engine::{Event, FinishReason, Finished, Health, Stats};

use super::app::App;
use super::error::{ApiError, ErrorBody};
use super::served::Served;
use super::text::blocking;

/// A turn of the engine that takes longer is not waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bounds of histograms of times in seconds.
const SECONDS: [f64; 18] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0];
/// Bounds of histograms of tokens.
const TOKENS: [f64; 13] =
    [1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 32_768.0, 131_072.0];

/// One thing that is counted.
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    /// What vLLM calls it, without `vllm:`; empty where vLLM has nothing like it.
    pub like: &'static str,
    pub help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Gauge,
    Counter,
    Histogram,
}

const fn metric(
    kind: Kind,
    name: &'static str,
    labels: &'static [&'static str],
    like: &'static str,
    help: &'static str,
) -> Metric {
    Metric { name, kind, labels, like, help }
}

const MODEL: &[&str] = &["model_name"];
const TENANT: &[&str] = &["model_name", "tenant"];

/// All that is counted.
#[rustfmt::skip]
pub const METRICS: &[Metric] = {
    use Kind::{Counter, Gauge, Histogram};
    &[
        metric(Gauge, "setu_num_requests_running", MODEL, "num_requests_running", "Sessions that run."),
        metric(Gauge, "setu_num_requests_waiting", MODEL, "num_requests_waiting", "Sessions that wait."),
        metric(Gauge, "setu_requests_in_progress", TENANT, "", "Sessions that run or wait, by whose they are."),
        metric(Gauge, "setu_kv_cache_usage_perc", MODEL, "kv_cache_usage_perc", "Part of the KV pages that is in use, from 0 to 1."),
        metric(Gauge, "setu_kv_pages_total", MODEL, "", "KV pages that there are."),
        metric(Counter, "setu_prefix_cache_hits_total", MODEL, "prefix_cache_hits", "Tokens that needn't be computed thanks to the prefix cache or another choice of the request, behind preemptions as well."),
        metric(Counter, "setu_num_preemptions_total", MODEL, "num_preemptions", "Preemptions."),
        metric(Counter, "setu_tokens_lost_total", MODEL, "", "Tokens that preemptions have had computed again."),
        metric(Counter, "setu_prefill_tokens_total", MODEL, "", "Tokens computed in chunks of more than one."),
        metric(Counter, "setu_decode_tokens_total", MODEL, "", "Tokens computed one at a time."),
        metric(Counter, "setu_steps_total", MODEL, "", "Steps of the engine."),
        metric(Counter, "setu_prompt_tokens_total", TENANT, "prompt_tokens", "Tokens of the prompts of sessions that ended well."),
        metric(Counter, "setu_prompt_tokens_cached_total", TENANT, "prompt_tokens_cached", "Of these, those that were found in the prefix cache."),
        metric(Counter, "setu_generation_tokens_total", TENANT, "generation_tokens", "Tokens generated for sessions that ended well."),
        metric(Counter, "setu_request_success_total", &["model_name", "tenant", "finished_reason"], "request_success", "Sessions that ended well, by how they ended: stop or length."),
        metric(Counter, "setu_request_failure_total", &["model_name", "tenant", "reason"], "request_success with the finished_reason abort", "Sessions that ended otherwise, by why: aborted, rejected or failed."),
        metric(Histogram, "setu_time_to_first_token_seconds", TENANT, "time_to_first_token_seconds", "Time from arrival to the first token."),
        metric(Histogram, "setu_inter_token_latency_seconds", TENANT, "inter_token_latency_seconds", "Time between two tokens of an answer."),
        metric(Histogram, "setu_request_time_per_output_token_seconds", TENANT, "request_time_per_output_token_seconds", "Mean time between two tokens of a session."),
        metric(Histogram, "setu_e2e_request_latency_seconds", TENANT, "e2e_request_latency_seconds", "Time from arrival to the end."),
        metric(Histogram, "setu_request_queue_time_seconds", TENANT, "request_queue_time_seconds", "Time from arrival until it first ran."),
        metric(Histogram, "setu_request_inference_time_seconds", TENANT, "request_inference_time_seconds", "Time from when it first ran to the end."),
        metric(Histogram, "setu_request_prefill_time_seconds", TENANT, "request_prefill_time_seconds", "Time from when it first ran to its first token."),
        metric(Histogram, "setu_request_decode_time_seconds", TENANT, "request_decode_time_seconds", "Time from the first token to the end."),
        metric(Histogram, "setu_request_prompt_tokens", TENANT, "request_prompt_tokens", "Tokens of a session's prompt."),
        metric(Histogram, "setu_request_generation_tokens", TENANT, "request_generation_tokens", "Tokens generated for a session."),
        metric(Gauge, "setu_backend_seconds_total", MODEL, "", "Time inside the backend."),
        metric(Gauge, "setu_engine_seconds_total", MODEL, "", "The engine's own time, in turns that worked."),
        metric(Gauge, "setu_mask_wait_seconds_total", MODEL, "", "Time that the engine waited for masks of answers that must have a form."),
        metric(Gauge, "setu_live_viewers", MODEL, "", "Viewers of `/live`."),
        metric(Gauge, "setu_component_seconds_total", &["model_name", "kind", "component"], "", "CPU time of a policy: the scheduler or the batcher."),
        metric(Counter, "setu_component_faults_total", &["model_name", "component"], "", "Faults for which a policy was replaced."),
        metric(Counter, "setu_rate_limited_total", &["tenant", "limit"], "", "Requests that a key's limits turned away, by the limit: requests, tokens or concurrent."),
        metric(Counter, "setu_unauthorized_total", &[], "", "Requests without a key or with a wrong one."),
        metric(Counter, "setu_model_loads_total", &["model_name", "outcome"], "", "Loads of models at their first use: loaded or failed."),
    ]
};

/// The counters of this process.
#[derive(Clone, Debug)]
pub struct Metrics {
    handle: PrometheusHandle,
}

impl Metrics {
    pub fn new() -> Metrics {
        static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
        Metrics { handle: HANDLE.get_or_init(install).clone() }
    }

    fn render(&self, stats: &[(Arc<str>, Stats)]) -> String {
        stats.iter().for_each(|(model, stats)| take(model, stats));
        self.handle.run_upkeep();
        self.handle.render()
    }
}

fn install() -> PrometheusHandle {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_tokens".to_owned()), &TOKENS));
    let recorder = builder.expect("there are bounds").build_recorder();
    let handle = recorder.handle();
    // Whoever embeds the server may have a recorder already; what is counted then goes there.
    if metrics::set_global_recorder(recorder).is_err() {
        tracing::warn!("another recorder of metrics is in place; /metrics stays empty");
    }
    for Metric { name, kind, help, .. } in METRICS {
        match kind {
            Kind::Gauge => describe_gauge!(*name, *help),
            Kind::Counter => describe_counter!(*name, *help),
            Kind::Histogram if name.ends_with("_seconds") => describe_histogram!(*name, Unit::Seconds, *help),
            Kind::Histogram => describe_histogram!(*name, *help),
        }
    }
    handle
}

/// The page that lists all that is counted.
pub fn markdown() -> String {
    let mut page =
        "<!-- Generated from the table in setu-host/src/server/metrics.rs; edit that. -->\n\n# Metrics\n\n".to_owned();
    page += "What `GET /metrics` tells, for Prometheus. Where vLLM has the like, its name stands beside, without `vllm:` in front (as of \
             [its list](https://docs.vllm.ai/en/stable/usage/metrics/)). A session is one answer: a request with `n` = 2 \
             makes two. [`grafana/setu.json`](grafana/setu.json) is a dashboard of them.\n\n\
             `model_name` is the model's first name, `tenant` the key's, or one of `[tenants]`; `default` stands for whoever names \
             none and `others` for all further ones. Times that only grow are gauges with names in `_total`, since counters are whole numbers \
             here; `rate` works on them all the same.\n\n\
             | name | type | labels | vLLM's | what |\n| --- | --- | --- | --- | --- |\n";
    for Metric { name, kind, labels, like, help } in METRICS {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Histogram => "histogram",
        };
        let labels = labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
        let like = match like.split_once(" with ") {
            _ if like.is_empty() => String::new(),
            Some((name, what)) => format!("`{name}` with {what}"),
            None => format!("`{like}`"),
        };
        let _ = writeln!(page, "| `{name}` | {kind} | {labels} | {like} | {help} |");
    }
    page
}

/// Takes what the engine of a model counts over.
fn take(model: &Arc<str>, stats: &Stats) {
    let model = || SharedString::from(model.clone());
    gauge!("setu_num_requests_running", "model_name" => model()).set(stats.running);
    gauge!("setu_num_requests_waiting", "model_name" => model()).set(stats.waiting);
    let pages = f64::from(stats.kv_pages_total.max(1));
    gauge!("setu_kv_cache_usage_perc", "model_name" => model()).set(f64::from(stats.kv_pages_used) / pages);
    gauge!("setu_kv_pages_total", "model_name" => model()).set(stats.kv_pages_total);
    let counters = [
        ("setu_prefix_cache_hits_total", stats.prefix_hit_tokens),
        ("setu_num_preemptions_total", stats.preemptions),
        ("setu_tokens_lost_total", stats.tokens_lost),
        ("setu_prefill_tokens_total", stats.prefill_tokens),
        ("setu_decode_tokens_total", stats.decode_tokens),
        ("setu_steps_total", stats.steps),
    ];
    for (name, count) in counters {
        counter!(name, "model_name" => model()).absolute(count);
    }
    // The facade's counters are whole numbers, and these are times that only grow.
    gauge!("setu_backend_seconds_total", "model_name" => model()).set(stats.backend_s);
    gauge!("setu_engine_seconds_total", "model_name" => model()).set(stats.engine_s);
    gauge!("setu_mask_wait_seconds_total", "model_name" => model()).set(stats.mask_wait_s);
    // Set where they are served; here it is only there from the start.
    gauge!("setu_live_viewers", "model_name" => model()).increment(0.0);
    let mut faults = BTreeMap::from([(stats.scheduler.as_str(), 0), (&stats.batcher, 0)]);
    stats.faults.iter().for_each(|fault| *faults.entry(&fault.component).or_default() += 1);
    for (name, count) in faults {
        counter!("setu_component_faults_total", "model_name" => model(), "component" => name.to_owned())
            .absolute(count);
    }
    let policies = [("scheduler", &stats.scheduler, stats.scheduler_s), ("batcher", &stats.batcher, stats.batcher_s)];
    for (kind, name, seconds) in policies {
        let labels = [("model_name", model()), ("kind", kind.into()), ("component", name.clone().into())];
        gauge!("setu_component_seconds_total", &labels).set(seconds);
    }
}

/// Counts a request that a key's limits turned away.
pub fn count_rate_limited(tenant: &str, limit: &'static str) {
    counter!("setu_rate_limited_total", "tenant" => tenant.to_owned(), "limit" => limit).increment(1);
}

/// Counts a request without a key that is known.
pub fn count_unauthorized() {
    counter!("setu_unauthorized_total").increment(1);
}

/// Counts a load of a model at its first use.
pub fn count_load(model: &Arc<str>, outcome: &'static str) {
    let model = SharedString::from(model.clone());
    counter!("setu_model_loads_total", "model_name" => model, "outcome" => outcome).increment(1);
}

/// Observes the sessions of one request. Those that haven't ended when it is dropped were aborted.
pub struct Watch {
    model: SharedString,
    tenant: SharedString,
    unfinished: usize,
    /// When each had its last token.
    last: Vec<Option<Instant>>,
    inter_token: Histogram,
}

impl Watch {
    /// Model and tenant label what is counted; there are few of each.
    pub fn new(served: &Served, tenant: &str, sessions: usize) -> Watch {
        let (model, tenant) = (SharedString::from(served.model.clone()), SharedString::from(tenant.to_owned()));
        let (model_name, of_tenant) = (model.clone(), tenant.clone());
        let inter_token =
            histogram!("setu_inter_token_latency_seconds", "model_name" => model_name, "tenant" => of_tenant);
        let watch = Watch { model, tenant, unfinished: sessions, last: vec![None; sessions], inter_token };
        gauge!("setu_requests_in_progress", &watch.labels()).increment(sessions as f64);
        watch
    }

    fn labels(&self) -> [(&'static str, SharedString); 2] {
        [("model_name", self.model.clone()), ("tenant", self.tenant.clone())]
    }

    /// Takes note of an event that came at `at`.
    pub fn saw(&mut self, index: usize, at: Instant, event: &Event) {
        match event {
            Event::Prompt(_) => {}
            Event::Token(_) => {
                if let Some(last) = self.last.get_mut(index).and_then(|last| last.replace(at)) {
                    self.inter_token.record(at.saturating_duration_since(last).as_secs_f64());
                }
            }
            Event::Finished(finished) => {
                self.unfinished = self.unfinished.saturating_sub(1);
                gauge!("setu_requests_in_progress", &self.labels()).decrement(1.0);
                self.ended(finished);
            }
        }
    }

    fn failed(&self, why: &'static str, sessions: usize) {
        let [model, tenant] = self.labels();
        let labels = [model, tenant, ("reason", why.into())];
        counter!("setu_request_failure_total", &labels).increment(sessions as u64);
    }

    fn ended(&self, finished: &Finished) {
        let how = match &finished.reason {
            FinishReason::Stop(_) => "stop",
            FinishReason::Length => "length",
            FinishReason::Aborted => return self.failed("aborted", 1),
            FinishReason::Rejected { .. } => return self.failed("rejected", 1),
            _ => return self.failed("failed", 1),
        };
        let labels = self.labels();
        let [model, tenant] = self.labels();
        counter!("setu_request_success_total", &[model, tenant, ("finished_reason", how.into())]).increment(1);
        let (usage, timing) = (&finished.usage, &finished.timing);
        let tokens = [
            ("setu_prompt_tokens_total", usage.prompt_tokens),
            ("setu_prompt_tokens_cached_total", usage.cached_tokens),
            ("setu_generation_tokens_total", usage.generated_tokens),
        ];
        for (name, tokens) in tokens {
            counter!(name, &labels).increment(tokens.into());
        }
        histogram!("setu_request_prompt_tokens", &labels).record(usage.prompt_tokens);
        histogram!("setu_request_generation_tokens", &labels).record(usage.generated_tokens);
        let decode_s = timing.end_s - timing.first_token_s;
        let seconds = [
            ("setu_request_queue_time_seconds", timing.run_s),
            ("setu_time_to_first_token_seconds", timing.first_token_s),
            ("setu_request_inference_time_seconds", timing.end_s - timing.run_s),
            ("setu_request_prefill_time_seconds", timing.first_token_s - timing.run_s),
            ("setu_request_decode_time_seconds", decode_s),
            ("setu_request_time_per_output_token_seconds", decode_s / (f64::from(usage.generated_tokens) - 1.0)),
            ("setu_e2e_request_latency_seconds", timing.end_s),
        ];
        // Where what it is the time of happened.
        for (name, seconds) in seconds.into_iter().filter(|(_, seconds)| seconds.is_finite()) {
            histogram!(name, &labels).record(seconds);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.unfinished > 0 {
            gauge!("setu_requests_in_progress", &self.labels()).decrement(self.unfinished as f64);
            self.failed("aborted", self.unfinished);
        }
    }
}

/// What is counted, for Prometheus.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "text/plain"), (status = 500, body = ErrorBody)
))]
pub async fn render(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    // One that hangs isn't waited for: what it last said stands.
    let asked = app.models.loaded().into_iter().filter(|(_, serving)| serving.engine().health(PATIENCE) == Health::Ok);
    let asked = asked.map(|(name, serving)| async move {
        blocking(move || serving.engine().stats()).await.map(|stats| (name, stats))
    });
    let stats = futures_util::future::try_join_all(asked).await?;
    let headers = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((headers, app.metrics.render(&stats)).into_response())
}
