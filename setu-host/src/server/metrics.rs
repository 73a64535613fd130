//! What the server and its engine count, for Prometheus. Names and meanings follow vLLM's, with `setu_` before them, so
//! that its dashboards need another prefix and no more.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use metrics::{SharedString, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use setu_engine::{Event, FinishReason, Finished, Health, Stats};

use super::app::App;
use super::error::{ApiError, ErrorBody};
use super::served::Served;
use super::text::blocking;
use crate::request::RequestOptions;

/// A turn of the engine that takes longer is not waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bounds of histograms of times in seconds.
const SECONDS: [f64; 18] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0];
/// Bounds of histograms of tokens.
const TOKENS: [f64; 13] =
    [1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 32_768.0, 131_072.0];

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
    describe();
    handle
}

fn describe() {
    describe_gauge!("setu_num_requests_running", "Sessions that run.");
    describe_gauge!("setu_num_requests_waiting", "Sessions that wait.");
    describe_gauge!("setu_kv_cache_usage_perc", "Part of the KV pages that is in use, from 0 to 1.");
    describe_counter!("setu_prefix_cache_hits_total", "Tokens that needn't be computed thanks to the prefix cache.");
    describe_counter!("setu_num_preemptions_total", "Preemptions.");
    describe_counter!("setu_prefill_tokens_total", "Tokens computed in chunks of more than one.");
    describe_counter!("setu_decode_tokens_total", "Tokens computed one at a time.");
    describe_counter!("setu_steps_total", "Steps of the engine.");
    describe_counter!("setu_prompt_tokens_total", "Tokens of the prompts of requests that ended.");
    describe_counter!("setu_generation_tokens_total", "Tokens generated for requests that ended.");
    describe_counter!("setu_request_success_total", "Sessions that ended well, by how they ended.");
    describe_counter!("setu_request_failure_total", "Sessions that ended otherwise, by why.");
    let seconds = [
        ("setu_time_to_first_token_seconds", "Time from arrival to the first token."),
        ("setu_inter_token_latency_seconds", "Time between two tokens of an answer."),
        ("setu_e2e_request_latency_seconds", "Time from arrival to the end."),
        ("setu_request_queue_time_seconds", "Time from arrival until it first ran."),
        ("setu_request_prefill_time_seconds", "Time from when it first ran to its first token."),
        ("setu_request_decode_time_seconds", "Time from the first token to the end."),
    ];
    seconds.into_iter().for_each(|(name, text)| describe_histogram!(name, Unit::Seconds, text));
    describe_histogram!("setu_request_prompt_tokens", "Tokens of a request's prompt.");
    describe_histogram!("setu_request_generation_tokens", "Tokens generated for a session.");
    describe_gauge!("setu_backend_seconds_total", "Time inside the backend.");
    describe_gauge!("setu_engine_seconds_total", "The engine's own time.");
    describe_gauge!("setu_component_seconds_total", "CPU time of a policy.");
    describe_gauge!("setu_live_viewers", "Viewers of /live.");
    describe_counter!("setu_component_faults_total", "Faults for which a component was replaced.");
}

/// Takes what the engine counts over.
fn take(model: &Arc<str>, stats: &Stats) {
    let model = || SharedString::from(model.clone());
    gauge!("setu_num_requests_running", "model_name" => model()).set(stats.running);
    gauge!("setu_num_requests_waiting", "model_name" => model()).set(stats.waiting);
    let pages = f64::from(stats.kv_pages_total.max(1));
    gauge!("setu_kv_cache_usage_perc", "model_name" => model()).set(f64::from(stats.kv_pages_used) / pages);
    counter!("setu_prefix_cache_hits_total", "model_name" => model()).absolute(stats.prefix_hit_tokens);
    counter!("setu_num_preemptions_total", "model_name" => model()).absolute(stats.preemptions);
    counter!("setu_prefill_tokens_total", "model_name" => model()).absolute(stats.prefill_tokens);
    counter!("setu_decode_tokens_total", "model_name" => model()).absolute(stats.decode_tokens);
    counter!("setu_steps_total", "model_name" => model()).absolute(stats.steps);
    // The facade's counters are whole numbers, and these are times that only grow.
    gauge!("setu_backend_seconds_total", "model_name" => model()).set(stats.backend_s);
    gauge!("setu_engine_seconds_total", "model_name" => model()).set(stats.engine_s);
    let component = |kind: &'static str, name: &str, seconds: f64| {
        gauge!("setu_component_seconds_total", "model_name" => model(), "kind" => kind, "component" => name.to_owned())
            .set(seconds);
    };
    component("scheduler", &stats.scheduler, stats.scheduler_s);
    component("batcher", &stats.batcher, stats.batcher_s);
    let mut faults: std::collections::BTreeMap<&str, u64> = std::collections::BTreeMap::new();
    stats.faults.iter().for_each(|fault| *faults.entry(&fault.component).or_default() += 1);
    for (name, count) in faults {
        counter!("setu_component_faults_total", "model_name" => model(), "component" => name.to_owned())
            .absolute(count);
    }
}

/// Observes the sessions of one request.
#[derive(Debug)]
pub struct Watch {
    model: Arc<str>,
    tenant: Arc<str>,
    last: Vec<Option<Instant>>,
}

impl Watch {
    /// Model and tenant label what is counted; there are few of each.
    pub fn new(served: &Served, options: &RequestOptions) -> Watch {
        let tenant = served.serving.tenants().label(options.tenant.as_deref());
        Watch { model: served.model.clone(), tenant: tenant.into(), last: Vec::new() }
    }

    pub fn saw(&mut self, index: usize, event: &Event) {
        match event {
            Event::Prompt(_) => {}
            Event::Token(_) => {
                if self.last.len() <= index {
                    self.last.resize(index + 1, None);
                }
                let now = Instant::now();
                if let Some(last) = self.last[index].replace(now) {
                    self.seconds("setu_inter_token_latency_seconds", (now - last).as_secs_f64());
                }
            }
            Event::Finished(finished) => self.ended(finished),
        }
    }

    fn ended(&self, finished: &Finished) {
        let (model, tenant) = (|| SharedString::from(self.model.clone()), || SharedString::from(self.tenant.clone()));
        let outcome = match &finished.reason {
            FinishReason::Stop(_) => Ok("stop"),
            FinishReason::Length => Ok("length"),
            FinishReason::Aborted => Err("aborted"),
            FinishReason::Rejected { .. } => Err("rejected"),
            _ => Err("failed"),
        };
        match outcome {
            Ok(how) => {
                counter!("setu_request_success_total", "finished_reason" => how, "model_name" => model(), "tenant" => tenant()).increment(1);
            }
            Err(why) => {
                counter!("setu_request_failure_total", "reason" => why, "model_name" => model(), "tenant" => tenant())
                    .increment(1);
                return;
            }
        }
        let (usage, timing) = (&finished.usage, &finished.timing);
        counter!("setu_prompt_tokens_total", "model_name" => model(), "tenant" => tenant())
            .increment(usage.prompt_tokens.into());
        counter!("setu_generation_tokens_total", "model_name" => model(), "tenant" => tenant())
            .increment(usage.generated_tokens.into());
        histogram!("setu_request_prompt_tokens", "model_name" => model(), "tenant" => tenant())
            .record(usage.prompt_tokens);
        histogram!("setu_request_generation_tokens", "model_name" => model(), "tenant" => tenant())
            .record(usage.generated_tokens);
        self.seconds("setu_request_queue_time_seconds", timing.run_s);
        self.seconds("setu_time_to_first_token_seconds", timing.first_token_s);
        self.seconds("setu_request_prefill_time_seconds", timing.first_token_s - timing.run_s);
        self.seconds("setu_request_decode_time_seconds", timing.end_s - timing.first_token_s);
        self.seconds("setu_e2e_request_latency_seconds", timing.end_s);
    }

    /// Records a time, where what it is the time of happened.
    fn seconds(&self, name: &'static str, seconds: f64) {
        if seconds.is_finite() {
            let (model, tenant) = (SharedString::from(self.model.clone()), SharedString::from(self.tenant.clone()));
            histogram!(name, "model_name" => model, "tenant" => tenant).record(seconds);
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
