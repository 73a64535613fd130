//! `/live`: the engine as it runs, as a stream of server-sent events for whoever looks.
//!
//! While anybody does, one task asks the engine a few times a second how it stands and writes that down once for all
//! viewers. Each viewer is handed the latest frame when its connection takes one: a slow one misses frames, and holds
//! up neither the engine nor others. The task ends with the last viewer, and the engine keeps nothing from then on.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::response::sse::Event;
use metrics::{SharedString, gauge};
use serde::{Deserialize, Serialize};
use setu_core::TenantId;
use setu_core::view::SessionState;
use setu_engine::Stats;
use setu_engine::kv::{PageMap, PageUse};
use setu_engine::live::{Snapshot, Watch, WatchedSession, WatchedStep};
use setu_engine::trace::Wait;
use tokio::sync::{oneshot, watch};
use utoipa::ToSchema;

use super::app::App;
use super::error::{ApiError, ErrorBody};
use super::served::State as LoadState;
use super::sse;
use crate::components::ComponentInUse;
use crate::serving::Serving;

/// Time between two frames.
const INTERVAL: Duration = Duration::from_millis(200);
/// Silence of the engine after which viewers are told that it is busy.
const PATIENCE: Duration = Duration::from_secs(1);
/// Seconds over which rates are averaged, and over which latencies are ordered.
const RATE_S: f64 = 1.0;
const LATENCY_S: f64 = 5.0;
/// Most viewers of a model at a time.
const MOST_VIEWERS: usize = 64;
/// Most that a frame shows; what is left out is counted.
const MOST_SESSIONS: usize = 256;
const MOST_STEPS: usize = 256;
const MOST_ROWS: usize = 4096;
const MOST_RUNS: usize = 4096;
/// Most gaps between tokens that are ordered.
const MOST_GAPS: usize = 1 << 15;

/// Whose engine to look at, and how long.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LiveQuery {
    /// The model; without it the first. One that isn't loaded can't be looked at, and isn't loaded for it.
    #[serde(default)]
    model: Option<String>,
    /// Ends the stream after as many frames; without it the stream goes on until one side goes away.
    #[serde(default)]
    #[param(minimum = 1)]
    frames: Option<u64>,
}

/// An event of the stream; `event` says which. The first is `engine`, and most others are frames.
#[derive(Clone, Serialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum LiveEvent {
    Engine(LiveEngine),
    Frame(Box<LiveFrame>),
    Busy(LiveBusy),
}

sse::stream_event! {
    /// An event as it is sent.
    LiveStreamEvent of LiveEvent
}

/// What stays as it is.
#[derive(Clone, Serialize, ToSchema)]
pub struct LiveEngine {
    model: String,
    version: &'static str,
    max_model_len: u32,
    weight_bytes: u64,
    /// Seconds from one frame to the next.
    interval_s: f64,
    components: Vec<ComponentInUse>,
}

/// The engine is in the midst of a step, and can't be asked.
#[derive(Clone, Copy, Serialize, ToSchema)]
pub struct LiveBusy {
    since_s: f64,
}

/// How things stand. Times are seconds on the engine's clock.
#[derive(Clone, Serialize, ToSchema)]
pub struct LiveFrame {
    time_s: f64,
    /// The step that was planned last.
    step: u64,
    viewers: usize,
    totals: LiveTotals,
    rates: LiveRates,
    /// In order of arrival.
    sessions: Vec<LiveSession>,
    sessions_left_out: usize,
    /// By KV group.
    kv: Vec<LiveKv>,
    /// Steps that ended since the frame before, oldest first.
    steps: Vec<LiveStep>,
    steps_left_out: u64,
    scheduler: LivePolicy,
    batcher: LivePolicy,
    faults: Vec<LiveFault>,
}

/// Counts since the start, and gauges.
#[derive(Clone, Serialize, ToSchema)]
struct LiveTotals {
    running: u32,
    waiting: u32,
    kv_pages_used: u32,
    kv_pages_total: u32,
    steps: u64,
    prefill_tokens: u64,
    decode_tokens: u64,
    /// Tokens that needn't be computed thanks to the prefix cache.
    prefix_hit_tokens: u64,
    preemptions: u64,
    added: u64,
    finished: u64,
    aborted: u64,
    rejected: u64,
    failed: u64,
    /// Time inside the backend, and the engine's own.
    backend_s: f64,
    engine_s: f64,
}

/// Rates over the last second and latencies over the last five; null where there was nothing to measure.
#[derive(Clone, Copy, Default, Serialize, ToSchema)]
struct LiveRates {
    steps_per_s: f64,
    /// Tokens of prompts that were computed.
    prefill_tokens_per_s: f64,
    generated_tokens_per_s: f64,
    ttft_p50_s: Option<f32>,
    ttft_p95_s: Option<f32>,
    itl_p50_s: Option<f32>,
    itl_p95_s: Option<f32>,
}

/// A live session.
#[derive(Clone, Serialize, ToSchema)]
struct LiveSession {
    id: u64,
    tenant: String,
    /// `waiting`, `prefilling`, `decoding`, `preempted` or `held`.
    state: &'static str,
    /// Why it isn't in the latest step: the cause, and what the policy says; null where it is.
    wait: Option<LiveWait>,
    /// Tokens that it computes in the latest step.
    chunk_tokens: u32,
    priority: Option<i32>,
    age_s: f64,
    prompt_tokens: u32,
    cached_tokens: u32,
    computed_tokens: u32,
    generated_tokens: u32,
    max_tokens: u32,
    pages_held: u32,
    pages_shared: u32,
    preemptions: u32,
}

/// Why a session waits.
#[derive(Clone, Serialize, ToSchema)]
struct LiveWait {
    /// As in the record of decisions: `scheduler`, `batcher`, `pages`, `step_tokens`, …
    cause: String,
    /// The policy's reason, empty where it gives none.
    reason: String,
    /// The session that it gave way to, or whose prompt it waits to share.
    by: Option<u64>,
}

/// The pages of a KV group, in their order.
#[derive(Clone, Serialize, ToSchema)]
struct LiveKv {
    page_tokens: u32,
    /// Tokens that a query reaches back, 0 for all.
    window_tokens: u32,
    total_pages: u32,
    free_pages: u32,
    /// Pages that only the prefix cache holds.
    cached_pages: u32,
    /// Pages that more than one holds.
    shared_pages: u32,
    /// Pages that a cell of the map stands for.
    cell_pages: u32,
    /// Neighbouring cells that hold the same: how many, how many hold them (0 where they are free, -1 where only the
    /// prefix cache does), and the id of the first session that does (0 for none).
    runs: Vec<(u32, i64, u64)>,
    cells_left_out: u32,
}

/// A step that is over.
#[derive(Clone, Serialize, ToSchema)]
struct LiveStep {
    number: u64,
    began_s: f64,
    took_s: f64,
    /// By the step-time model; 0 while it knows nothing.
    predicted_s: f64,
    failed: bool,
    /// For each session in it: its id, its tokens, the tokens before them, and 1 where they are a chunk of a prompt
    /// rather than one token of an answer.
    rows: Vec<(u64, u32, u32, u8)>,
    /// Sessions that lost their pages while it was planned, each with the one that needed them, or 0.
    preempted: Vec<(u64, u64)>,
}

/// A policy in use.
#[derive(Clone, Serialize, ToSchema)]
struct LivePolicy {
    key: String,
    /// CPU time that it took.
    spent_s: f64,
}

/// Something that a component did wrong.
#[derive(Clone, Serialize, ToSchema)]
struct LiveFault {
    kind: &'static str,
    component: String,
    message: String,
    step: u64,
}

/// What viewers share, by the model's name; kept while there is one.
#[derive(Debug, Default)]
pub struct Live {
    feeds: Mutex<HashMap<Arc<str>, Weak<Feed>>>,
}

/// A model that can be looked at.
#[derive(Clone)]
struct Watched {
    app: Arc<App>,
    model: Arc<str>,
    serving: Arc<Serving>,
}

/// The frames of one engine.
#[derive(Debug)]
struct Feed {
    frames: watch::Receiver<Option<Frame>>,
}

/// An event as it is sent, and which one it is.
#[derive(Clone, Debug)]
struct Frame {
    is_frame: bool,
    text: Arc<str>,
}

impl Live {
    /// The feed that others look at, or a new one.
    fn feed(&self, watched: &Watched) -> Result<Arc<Feed>, ApiError> {
        let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(feed) = feeds.get(&watched.model).and_then(Weak::upgrade) {
            if Arc::strong_count(&feed) > MOST_VIEWERS {
                return Err(ApiError::busy(format!("{MOST_VIEWERS} look already, which is the most"), Some(10.0)));
            }
            return Ok(feed);
        }
        let watch = watched.serving.engine().watch()?;
        let (sender, frames) = watch::channel(None);
        let feed = Arc::new(Feed { frames });
        feeds.insert(watched.model.clone(), Arc::downgrade(&feed));
        tokio::spawn(poll(watched.clone(), watch, sender, Arc::downgrade(&feed)));
        Ok(feed)
    }
}

/// Streams the engine's state: sessions, pages, steps, rates and components, a few times a second.
#[utoipa::path(get, path = "/live", params(LiveQuery), responses(
    (status = 200, content((LiveStreamEvent = "text/event-stream"))),
    (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)
))]
pub async fn stream(
    State(app): State<Arc<App>>,
    query: Result<Query<LiveQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|rejection| ApiError::new(StatusCode::BAD_REQUEST, rejection.body_text()))?;
    if query.frames == Some(0) {
        return Err(ApiError::invalid("frames", "`frames` must be at least 1"));
    }
    if app.is_draining() {
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is about to stop"));
    }
    let model = app.models.find(query.model.as_deref())?;
    let LoadState::Loaded(serving) = model.state() else {
        let message = format!("the model `{}` isn't loaded: a request that names it has it loaded", model.name);
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("model_unavailable");
        return Err(ApiError { retry_after_s: Some(1.0), ..error });
    };
    let watched = Watched { app: app.clone(), model: model.name.clone(), serving };
    let feed = app.live.feed(&watched)?;
    let mut left = query.frames.unwrap_or(u64::MAX);
    let engine = LiveEvent::Engine(LiveEngine::new(&watched.model, &watched.serving));
    Ok(sse::response(async_stream::stream! {
        yield sse::data(&engine);
        let mut frames = feed.frames.clone();
        frames.mark_unchanged();
        while left > 0 && frames.changed().await.is_ok() {
            let Some(frame) = frames.borrow_and_update().clone() else { continue };
            left -= u64::from(frame.is_frame);
            yield Event::default().data(&frame.text);
        }
    }))
}

/// Asks the engine how it stands, for as long as somebody wants to know.
async fn poll(watched: Watched, watch: Watch, frames: watch::Sender<Option<Frame>>, feed: Weak<Feed>) {
    let Watched { app, model, serving } = watched;
    let viewers = gauge!("setu_live_viewers", "model_name" => SharedString::from(model));
    let mut history = History::default();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let is_wanted = || feed.strong_count() > 0 && !app.is_draining();
    while is_wanted() {
        viewers.set(feed.strong_count() as f64);
        let (sender, mut answer) = oneshot::channel();
        if watch.look(history.last_step, move |snapshot| drop(sender.send(snapshot))).is_err() {
            break;
        }
        let asked = tokio::time::Instant::now();
        let snapshot = loop {
            tokio::select! {
                answer = &mut answer => break answer.ok(),
                () = tokio::time::sleep(PATIENCE) => {
                    if !is_wanted() {
                        break None;
                    }
                    let busy = LiveBusy { since_s: asked.elapsed().as_secs_f64() };
                    frames.send_replace(Some(Frame::new(&LiveEvent::Busy(busy))));
                }
            }
        };
        let Some(snapshot) = snapshot else { break };
        let frame = history.frame(&serving, snapshot, feed.strong_count());
        frames.send_replace(Some(Frame::new(&LiveEvent::Frame(Box::new(frame)))));
        ticks.tick().await;
    }
    viewers.set(0.0);
}

impl Frame {
    fn new(event: &LiveEvent) -> Frame {
        let text = serde_json::to_string(event).unwrap_or_else(|error| {
            tracing::error!(%error, "a frame can't be written");
            String::from("{}")
        });
        Frame { is_frame: matches!(event, LiveEvent::Frame(_)), text: text.into() }
    }
}

impl LiveEngine {
    fn new(model: &str, serving: &Serving) -> LiveEngine {
        LiveEngine {
            model: model.to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            max_model_len: serving.engine().limits().max_model_len,
            weight_bytes: serving.weight_bytes(),
            interval_s: INTERVAL.as_secs_f64(),
            components: serving.components().to_vec(),
        }
    }
}

/// What frames tell of the seconds before them.
#[derive(Default)]
struct History {
    last_step: u64,
    generated: u64,
    counts: VecDeque<Counts>,
    /// Latencies with the time at which they were measured.
    first_tokens_s: VecDeque<(f64, f32)>,
    gaps_s: VecDeque<(f64, f32)>,
    /// Names of the tenants of the latest frame.
    tenants: HashMap<TenantId, String>,
}

#[derive(Clone, Copy)]
struct Counts {
    time_s: f64,
    steps: u64,
    prefill: u64,
    generated: u64,
}

impl History {
    fn frame(&mut self, serving: &Serving, snapshot: Snapshot, viewers: usize) -> LiveFrame {
        let Snapshot { time_s, step, stats, sessions, pages, steps } = snapshot;
        self.last_step = steps.last().map_or(self.last_step, |step| step.number);
        let rates = self.rates(time_s, &stats, &steps);
        let shown = &sessions[..sessions.len().min(MOST_SESSIONS)];
        let wanted: HashSet<TenantId> = shown.iter().map(|session| session.tenant).collect();
        self.tenants.retain(|id, _| wanted.contains(id));
        if wanted.iter().any(|id| !self.tenants.contains_key(id)) {
            self.tenants = serving.tenants().names(&wanted);
        }
        let (steps, steps_left_out) = latest(&steps);
        let fault = |fault: &setu_engine::Fault| LiveFault {
            kind: fault.kind.name(),
            component: fault.component.clone(),
            message: fault.message.clone(),
            step: fault.step,
        };
        LiveFrame {
            time_s,
            step,
            viewers,
            totals: LiveTotals::from(&stats),
            rates,
            sessions: shown.iter().map(|session| self.session(session)).collect(),
            sessions_left_out: sessions.len() - shown.len(),
            kv: pages.iter().map(|map| LiveKv::new(map, &sessions)).collect(),
            steps,
            steps_left_out,
            faults: stats.faults.iter().map(fault).collect(),
            scheduler: LivePolicy { key: stats.scheduler, spent_s: stats.scheduler_s },
            batcher: LivePolicy { key: stats.batcher, spent_s: stats.batcher_s },
        }
    }

    fn rates(&mut self, time_s: f64, stats: &Stats, steps: &[Arc<WatchedStep>]) -> LiveRates {
        for step in steps {
            let end_s = step.began_s + step.took_s;
            self.generated += (step.first_tokens_s.len() + step.gaps_s.len()) as u64;
            self.first_tokens_s.extend(step.first_tokens_s.iter().map(|&seconds| (end_s, seconds)));
            self.gaps_s.extend(step.gaps_s.iter().map(|&seconds| (end_s, seconds)));
        }
        for latencies in [&mut self.first_tokens_s, &mut self.gaps_s] {
            let old = latencies.partition_point(|&(at_s, _)| at_s < time_s - LATENCY_S);
            latencies.drain(..old.max(latencies.len().saturating_sub(MOST_GAPS)));
        }
        let now = Counts { time_s, steps: stats.steps, prefill: stats.prefill_tokens, generated: self.generated };
        self.counts.push_back(now);
        // The first is the latest of those that are old enough.
        while self.counts.get(1).is_some_and(|second| second.time_s <= time_s - RATE_S) {
            self.counts.pop_front();
        }
        let then = self.counts.front().copied().unwrap_or(now);
        let per_s = |count: u64, before: u64| {
            let seconds = now.time_s - then.time_s;
            if seconds > 0.0 { (count - before) as f64 / seconds } else { 0.0 }
        };
        let [ttft_p50_s, ttft_p95_s] = percentiles(&self.first_tokens_s);
        let [itl_p50_s, itl_p95_s] = percentiles(&self.gaps_s);
        LiveRates {
            steps_per_s: per_s(now.steps, then.steps),
            prefill_tokens_per_s: per_s(now.prefill, then.prefill),
            generated_tokens_per_s: per_s(now.generated, then.generated),
            ttft_p50_s,
            ttft_p95_s,
            itl_p50_s,
            itl_p95_s,
        }
    }

    fn session(&self, session: &WatchedSession) -> LiveSession {
        let wait = |wait: &Wait| LiveWait {
            cause: serde_json::to_value(wait.cause)
                .ok()
                .and_then(|cause| cause.as_str().map(str::to_owned))
                .unwrap_or_default(),
            reason: wait.reason.clone(),
            by: wait.by.map(|id| id.0),
        };
        LiveSession {
            id: session.id.0,
            tenant: self.tenants.get(&session.tenant).cloned().unwrap_or_default(),
            state: state_name(session.state),
            wait: session.wait.as_ref().map(wait),
            chunk_tokens: session.chunk_tokens,
            priority: session.priority,
            age_s: session.age_s,
            prompt_tokens: session.prompt_tokens,
            cached_tokens: session.cached_tokens,
            computed_tokens: session.computed_tokens,
            generated_tokens: session.generated_tokens,
            max_tokens: session.max_tokens,
            pages_held: session.pages_held,
            pages_shared: session.pages_shared,
            preemptions: session.preemptions,
        }
    }
}

impl From<&Stats> for LiveTotals {
    fn from(stats: &Stats) -> LiveTotals {
        LiveTotals {
            running: stats.running,
            waiting: stats.waiting,
            kv_pages_used: stats.kv_pages_used,
            kv_pages_total: stats.kv_pages_total,
            steps: stats.steps,
            prefill_tokens: stats.prefill_tokens,
            decode_tokens: stats.decode_tokens,
            prefix_hit_tokens: stats.prefix_hit_tokens,
            preemptions: stats.preemptions,
            added: stats.added,
            finished: stats.finished,
            aborted: stats.aborted,
            rejected: stats.rejected,
            failed: stats.failed,
            backend_s: stats.backend_s,
            engine_s: stats.engine_s,
        }
    }
}

impl LiveKv {
    fn new(map: &PageMap, sessions: &[WatchedSession]) -> LiveKv {
        let run = |run: &setu_engine::kv::PageRun| match run.page {
            PageUse::Free => (run.cells, 0, 0),
            PageUse::Cached => (run.cells, -1, 0),
            PageUse::Held { refs, holder } => {
                let holder = holder.and_then(|index| sessions.get(index as usize));
                (run.cells, i64::from(refs), holder.map_or(0, |session| session.id.0))
            }
        };
        let shown = map.runs.len().min(MOST_RUNS);
        LiveKv {
            page_tokens: map.page_tokens,
            window_tokens: map.window_tokens,
            total_pages: map.total_pages,
            free_pages: map.free_pages,
            cached_pages: map.cached_pages,
            shared_pages: map.shared_pages,
            cell_pages: map.cell_pages,
            runs: map.runs[..shown].iter().map(run).collect(),
            cells_left_out: map.runs[shown..].iter().map(|run| run.cells).sum(),
        }
    }
}

/// The latest of `steps` that fit into a frame, and how many do not.
fn latest(steps: &[Arc<WatchedStep>]) -> (Vec<LiveStep>, u64) {
    let mut rows = 0;
    let fits = |step: &&Arc<WatchedStep>| {
        rows += step.rows.len();
        rows <= MOST_ROWS
    };
    let shown = steps.iter().rev().take(MOST_STEPS).take_while(fits).count();
    let left_out = steps.len() - shown;
    let step = |step: &Arc<WatchedStep>| LiveStep {
        number: step.number,
        began_s: step.began_s,
        took_s: step.took_s,
        predicted_s: step.predicted_s,
        failed: step.failed,
        rows: step.rows.iter().map(|row| (row.session.0, row.tokens, row.context, u8::from(row.prefill))).collect(),
        preempted: step.preempted.iter().map(|lost| (lost.session.0, lost.by.map_or(0, |by| by.0))).collect(),
    };
    (steps[left_out..].iter().map(step).collect(), left_out as u64)
}

/// The median and the value that one in twenty exceeds.
fn percentiles(latencies: &VecDeque<(f64, f32)>) -> [Option<f32>; 2] {
    let mut sorted: Vec<f32> = latencies.iter().map(|&(_, seconds)| seconds).collect();
    sorted.sort_by(f32::total_cmp);
    [0.5, 0.95].map(|part| sorted.get((sorted.len() as f64 * part) as usize).copied())
}

fn state_name(state: SessionState) -> &'static str {
    match state {
        SessionState::Waiting => "waiting",
        SessionState::Prefilling => "prefilling",
        SessionState::Decoding => "decoding",
        SessionState::Preempted => "preempted",
        _ => "held",
    }
}
