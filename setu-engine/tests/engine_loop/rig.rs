//! A core that is turned by hand, and what each of its sessions must answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use crossbeam_channel::{Receiver, unbounded};
use setu_batcher_fixed_chunk::{FixedChunk, FixedChunkConfig};
use setu_core::backend::{Backend, CompileOptions, Executable};
use setu_core::batcher::Batcher;
use setu_core::component::Component;
use setu_core::graph::{ActivationKind, Graph, GraphBuilder, KvGroupKind, KvLayer, RopeStyle, RopeTable, Shard};
use setu_core::ids::SessionId;
use setu_core::sampling::{SamplingParams, SlotState, log_sum_exp, top_logprobs};
use setu_core::scheduler::Scheduler;
use setu_core::{DType, Error, KvDType, Result};
use setu_engine::clock::Clock;
use setu_engine::config::{EngineConfig, KvConfig};
use setu_engine::core::{Core, Parts, Settings, Turn};
use setu_engine::request::Arrival;
use setu_engine::{Constraint, Event, FinishReason, Finished, Guarded, Request, TokenLogprob};
use setu_scheduler_fcfs::{Fcfs, FcfsConfig};
use setu_testkit::plain::PlainBackend;
use setu_testkit::reference::ReferenceModel;
use setu_testkit::weights::WeightSet;

pub const VOCAB: u32 = 29;
pub const EOS: u32 = 3;
pub const MAX_LEN: u32 = 96;
/// Tokens that a query of the second layer of [`windowed`] reaches back.
pub const WINDOW: u32 = 9;

/// A model small enough to be evaluated from scratch for every token.
pub struct Model {
    pub graph: Graph,
    pub weights: WeightSet,
    pub reference: ReferenceModel,
}

/// Two layers of full attention.
pub fn full() -> Arc<Model> {
    model(&[KvGroupKind::Full, KvGroupKind::Full])
}

/// A layer of full attention and one that sees a window.
pub fn windowed() -> Arc<Model> {
    model(&[KvGroupKind::Full, KvGroupKind::SlidingWindow { tokens: WINDOW }])
}

fn model(layers: &[KvGroupKind]) -> Arc<Model> {
    let graph = graph(layers).unwrap();
    let weights = WeightSet::random(&graph, DType::F32, 5);
    let reference = ReferenceModel::new(&graph, &weights.data(), KvDType::F32).unwrap();
    Arc::new(Model { graph, weights, reference })
}

fn graph(layers: &[KvGroupKind]) -> Result<Graph> {
    let (hidden, heads, head_dim) = (8, 2, 4);
    let mut g = GraphBuilder::new("tiny", VOCAB, MAX_LEN);
    let inv_freq = (0..head_dim / 2).map(|pair| 100f64.powf(-f64::from(pair) / 2.0)).collect();
    let rope = g.rope_table(RopeTable { inv_freq, magnitude: 1.0 });
    let square = [hidden as usize, hidden as usize];
    let table = g.weight("embed", "embed", &[VOCAB as usize, hidden as usize], Shard::Replicated);
    let mut x = g.embed("embed", table)?;
    let mut groups: Vec<KvGroupKind> = Vec::new();
    for (index, &kind) in layers.iter().enumerate() {
        let group = groups.iter().position(|&known| known == kind).unwrap_or_else(|| {
            groups.push(kind);
            g.kv_group(&format!("group {}", groups.len()), kind) as usize
        });
        x = g.scope(format!("layers.{index}"), |g| {
            let gains = g.weight("norm", "norm", &[hidden as usize], Shard::Replicated);
            let normed = g.rms_norm("norm", x, gains, 1e-5)?;
            let mut qkv = Vec::new();
            for name in ["q", "k", "v"] {
                let weight = g.weight(name, name, &square, Shard::Column);
                let part = g.linear(name, normed, weight, None)?;
                let roped = format!("rope_{name}");
                qkv.push(if name == "v" { part } else { g.rope(&roped, part, rope, head_dim, RopeStyle::Half)? });
            }
            let layer = g.kv_layer(KvLayer { group: group as u32, heads, k_dim: head_dim, v_dim: head_dim });
            let attended = g.attention("attend", [qkv[0], qkv[1], qkv[2]], layer, heads, 1.0)?;
            let fed = g.gated("gated", ActivationKind::Silu, attended, normed)?;
            let weight = g.weight("o", "o", &square, Shard::Row);
            let out = g.linear("o", fed, weight, None)?;
            let out = g.add("add", attended, out)?;
            g.add("residual", x, out)
        })?;
    }
    let x = g.select("select", x)?;
    let head = g.weight("head", "head", &[VOCAB as usize, hidden as usize], Shard::Column);
    let logits = g.linear("head", x, head, None)?;
    g.output("logits", logits);
    g.finish()
}

/// What a session answered, or has to.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<Option<TokenLogprob>>,
    pub prompt_logprobs: Option<Vec<TokenLogprob>>,
    pub reason: FinishReason,
}

impl Model {
    /// Evaluates the whole sequence anew for every token, as no engine would.
    pub fn answer(&self, ask: &Ask) -> Answer {
        let params = &ask.params;
        let mut state = slot(ask);
        let mut sequence = ask.prompt.clone();
        let mut logits = self.logits(&sequence);
        let prompt_logprobs = params.prompt_logprobs.map(|top| {
            let pairs = ask.prompt[1..].iter().zip(&logits);
            pairs.map(|(&token, row)| token_logprob(row, token, top)).collect()
        });
        let mut answer = Answer { tokens: vec![], logprobs: vec![], prompt_logprobs, reason: FinishReason::Length };
        let room = MAX_LEN - ask.prompt.len() as u32;
        let most = if ask.prompt_only { 0 } else { params.max_tokens.unwrap_or(room).min(room) };
        for _ in 0..most {
            let row = logits.pop().unwrap();
            let mut processed = row.clone();
            let mask = ask.form.map(|form| form.mask(&answer.tokens));
            if mask == Some(None) {
                answer.reason = FinishReason::Stop(None);
                break;
            }
            state.process(&mut processed, mask.flatten().as_deref());
            let token = state.sample(&processed, sequence.len() as u64).unwrap();
            state.see_output(token);
            if (token == EOS && !params.ignore_eos) || params.stop_token_ids.contains(&token) {
                answer.reason = FinishReason::Stop(Some(token));
                break;
            }
            answer.tokens.push(token);
            answer.logprobs.push(params.logprobs.map(|top| token_logprob(&row, token, top)));
            sequence.push(token);
            logits = self.logits(&sequence);
        }
        answer
    }

    fn logits(&self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let logits = self.reference.logits(tokens).unwrap();
        logits.rows().map(|row| row.iter().map(|&logit| logit as f32).collect()).collect()
    }
}

fn slot(ask: &Ask) -> SlotState {
    let params = &ask.params;
    let eos: &[u32] = if params.ignore_eos { &[] } else { &[EOS] };
    let mut state = SlotState {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        typical_p: params.typical_p,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        seed: ask.seed,
        min_tokens: params.min_tokens,
        suppressed: eos.iter().chain(&params.stop_token_ids).copied().collect(),
        logit_bias: params.logit_bias.clone(),
        ..SlotState::default()
    };
    state.see_prompt(&ask.prompt);
    state
}

fn token_logprob(row: &[f32], token: u32, top: u32) -> TokenLogprob {
    let logprob = (f64::from(row[token as usize]) - log_sum_exp(row)) as f32;
    TokenLogprob { token, logprob, top: top_logprobs(row, top as usize) }
}

/// A request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ask {
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    pub seed: u64,
    pub prompt_only: bool,
    pub tenant: u32,
    pub form: Option<Form>,
}

/// A form that answers can have: what may come next depends on all that came before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Form {
    /// Tokens after which an answer is complete.
    pub tokens: usize,
    /// What goes wrong at a token, if anything.
    pub fault: Option<(usize, FormFault)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormFault {
    Refuses,
    Panics,
    AllowsNothing,
    /// It takes this many milliseconds for every mask from then on.
    Dawdles(u64),
}

impl Form {
    pub fn new(tokens: usize) -> Form {
        Form { tokens, fault: None }
    }

    pub fn failing(tokens: usize, at: usize, fault: FormFault) -> Form {
        Form { tokens, fault: Some((at, fault)) }
    }

    /// The mask behind `output`; none where it is complete.
    pub fn mask(&self, output: &[u32]) -> Option<Vec<u32>> {
        let state = output.iter().fold(output.len() as u32, |state, &token| state.wrapping_mul(31) + token);
        let allowed = (0..VOCAB).filter(|token| (token * 7 + state) % 3 == 0);
        (output.len() < self.tokens).then(|| vec![allowed.fold(0, |word, token| word | 1 << token)])
    }
}

struct Formed {
    form: Form,
    output: Vec<u32>,
}

impl Constraint for Formed {
    fn accept(&mut self, token: u32) -> Result<()> {
        let mask = self.form.mask(&self.output).expect("nothing comes behind the end");
        assert!(mask[0] >> token & 1 == 1, "{token} was not allowed behind {:?}", self.output);
        self.output.push(token);
        Ok(())
    }

    fn allow(&mut self, mask: &mut [u32]) -> Result<bool> {
        assert!(mask.iter().all(|&word| word == 0));
        match self.form.fault {
            Some((at, FormFault::Dawdles(ms))) if at <= self.output.len() => {
                std::thread::sleep(std::time::Duration::from_millis(ms));
            }
            Some((at, fault)) if at == self.output.len() => match fault {
                FormFault::Refuses => return Err(Error::invalid("no more")),
                FormFault::Panics => panic!("the form breaks"),
                FormFault::AllowsNothing | FormFault::Dawdles(_) => return Ok(true),
            },
            _ => {}
        }
        let Some(allowed) = self.form.mask(&self.output) else { return Ok(false) };
        mask.copy_from_slice(&allowed);
        Ok(true)
    }
}

impl Ask {
    pub fn new(prompt: &[u32], max_tokens: u32) -> Ask {
        let mut ask = Ask { prompt: prompt.to_vec(), ..Ask::default() };
        ask.params.max_tokens = Some(max_tokens);
        ask
    }

    /// The request with answers of this form.
    #[must_use]
    pub fn formed(self, form: Form) -> Ask {
        Ask { form: Some(form), ..self }
    }

    /// What has one of its answers take the form.
    pub fn constraint(&self) -> Option<Box<dyn Constraint>> {
        self.form.map(|form| -> Box<dyn Constraint> { Box::new(Formed { form, output: vec![] }) })
    }

    #[must_use]
    pub fn with(mut self, set: impl FnOnce(&mut SamplingParams)) -> Ask {
        set(&mut self.params);
        self
    }

    /// The request with a temperature of 1 and this seed.
    #[must_use]
    pub fn sampled(self, seed: u64) -> Ask {
        let mut ask = self.with(|params| params.temperature = 1.0);
        ask.seed = seed;
        ask
    }

    /// The request that one of its choices is alone.
    #[must_use]
    pub fn choice(&self, choice: u32) -> Ask {
        let mut ask = self.clone();
        ask.seed += u64::from(choice);
        ask
    }
}

/// How a rig is set up.
#[derive(Clone, Debug)]
pub struct Setup {
    pub chunk: u32,
    pub max_step_tokens: u32,
    pub page_tokens: u32,
    /// Pages of each KV group.
    pub pages: Vec<u32>,
    pub steps_in_flight: u32,
    pub prefix_cache: bool,
    pub max_sessions: u32,
    pub max_queue: u32,
    pub policy_budget_us: u32,
    pub policy_overruns: u32,
    pub queue_timeout_s: f64,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            chunk: 16,
            max_step_tokens: 512,
            page_tokens: 4,
            pages: vec![256, 256],
            steps_in_flight: 2,
            prefix_cache: true,
            max_sessions: 40,
            max_queue: 1000,
            policy_budget_us: 0,
            policy_overruns: 8,
            queue_timeout_s: 0.0,
        }
    }
}

impl Setup {
    pub fn settings(&self) -> Settings {
        let engine = EngineConfig {
            max_step_tokens: self.max_step_tokens,
            max_sessions: self.max_sessions,
            max_queue: self.max_queue,
            max_steps_in_flight: self.steps_in_flight,
            mask_threads: 2,
            policy_budget_us: self.policy_budget_us,
            policy_overruns: self.policy_overruns,
            watchdog_s: 0.0,
        };
        let kv =
            KvConfig { page_tokens: self.page_tokens, memory: 0, dtype: KvDType::F32, prefix_cache: self.prefix_cache };
        Settings { engine, kv, max_model_len: MAX_LEN }
    }

    pub fn compile(&self, model: &Model) -> Box<dyn Executable> {
        let mut options = CompileOptions::new(512, self.max_sessions, MAX_LEN);
        options.page_tokens = self.page_tokens;
        options.kv_dtype = KvDType::F32;
        options.kv_pages = self.pages[..model.graph.kv_groups.len()].to_vec();
        PlainBackend::default().compile(&model.graph, &model.weights.data(), &options).unwrap()
    }

    pub fn parts(&self, model: &Model) -> Parts {
        Parts {
            graph: model.graph.clone(),
            executable: self.compile(model),
            scheduler: Guarded::new("fcfs", self.fcfs(), "fcfs, again", self.fcfs()),
            batcher: Guarded::new("fixed_chunk", self.fixed_chunk(), "fixed_chunk, again", self.fixed_chunk()),
            eos: vec![EOS],
            keep_alive: Vec::new(),
        }
    }

    pub fn fcfs(&self) -> Box<dyn Scheduler> {
        Box::new(Fcfs::build(FcfsConfig { queue_timeout_s: self.queue_timeout_s }).unwrap())
    }

    pub fn fixed_chunk(&self) -> Box<dyn Batcher> {
        Box::new(FixedChunk::build(FixedChunkConfig { chunk_tokens: self.chunk, max_tokens: 0 }).unwrap())
    }
}

/// A core with its sessions, on a clock that each turn moves by a millisecond.
pub struct Rig {
    pub core: Core,
    pub model: Arc<Model>,
    /// Nanoseconds.
    pub clock: Arc<AtomicU64>,
    next_id: u64,
    live: HashMap<SessionId, Receiver<Event>>,
    events: HashMap<SessionId, Vec<Event>>,
}

impl Rig {
    pub fn new(model: &Arc<Model>, setup: &Setup) -> Rig {
        Rig::of(model, setup, setup.parts(model))
    }

    pub fn of(model: &Arc<Model>, setup: &Setup, parts: Parts) -> Rig {
        let clock = Arc::new(AtomicU64::new(0));
        let core = Core::new(parts, setup.settings(), Clock::Virtual(clock.clone())).unwrap();
        Rig { core, model: model.clone(), clock, next_id: 1, live: HashMap::new(), events: HashMap::new() }
    }

    /// Adds a request: the ids of its choices.
    pub fn add(&mut self, ask: &Ask) -> Vec<SessionId> {
        let sinks = (0..ask.params.n).map(|_| None).collect();
        self.add_with_text(ask, sinks)
    }

    pub fn add_with_text(&mut self, ask: &Ask, sinks: Vec<Option<Box<dyn setu_engine::TextSink>>>) -> Vec<SessionId> {
        let mut request = Request::new(ask.prompt.clone(), ask.params.clone());
        request.prompt_only = ask.prompt_only;
        request.tenant.0 = ask.tenant;
        request.validate(self.core.limits()).unwrap();
        let request = Arc::new(request);
        let mut arrivals = Vec::new();
        for (choice, text) in (0..).zip(sinks) {
            let id = SessionId(self.next_id);
            self.next_id += 1;
            let (events, receiver) = unbounded();
            arrivals.push(Arrival {
                id,
                request: request.clone(),
                seed: ask.seed + choice,
                text,
                constraint: ask.constraint(),
                events: Box::new(events),
            });
            self.live.insert(id, receiver);
        }
        let ids = arrivals.iter().map(|arrival| arrival.id).collect();
        self.core.add(arrivals);
        ids
    }

    pub fn turn(&mut self) -> Turn {
        self.clock.fetch_add(1_000_000, Ordering::AcqRel);
        let turn = self.core.turn();
        self.core.check_integrity();
        turn
    }

    pub fn now_s(&self) -> f64 {
        self.clock.load(Ordering::Acquire) as f64 * 1e-9
    }

    /// Turns until no session is left, sleeping where the core is idle, and calls `between` between turns.
    pub fn run_with(&mut self, mut between: impl FnMut(&mut Rig, u32)) {
        let mut turns = 0;
        while self.core.has_sessions() {
            if let Turn::Idle { until_s } = self.turn() {
                assert!(until_s.is_finite() || !self.core.has_sessions(), "the core sleeps with sessions");
                if until_s.is_finite() {
                    self.clock.fetch_max((until_s * 1e9) as u64, Ordering::AcqRel);
                }
            }
            turns += 1;
            assert!(turns < 20_000, "sessions never end: {:?}", self.core.stats());
            between(self, turns);
        }
        self.settle();
    }

    pub fn run(&mut self) {
        self.run_with(|_, _| ());
    }

    /// Turns until nothing is in flight.
    pub fn settle(&mut self) {
        while self.turn() == Turn::Worked {}
        assert_eq!(self.core.stats().kv_pages_used, 0, "pages are lost");
    }

    /// What a session that has ended answered.
    pub fn answer(&mut self, id: SessionId) -> Answer {
        self.ended(id).0
    }

    /// All events of a session until now.
    pub fn events_of(&mut self, id: SessionId) -> Vec<Event> {
        self.events.remove(&id).into_iter().flatten().chain(self.live[&id].try_iter()).collect()
    }

    pub fn ended(&mut self, id: SessionId) -> (Answer, Finished) {
        let events = self.events_of(id);
        let mut answer =
            Answer { tokens: vec![], logprobs: vec![], prompt_logprobs: None, reason: FinishReason::Aborted };
        let mut finished = None;
        for event in events {
            assert!(finished.is_none(), "{id} goes on after its end");
            match event {
                Event::Prompt(logprobs) => {
                    assert!(
                        answer.prompt_logprobs.is_none() && answer.tokens.is_empty(),
                        "{id}: prompt told late or twice"
                    );
                    answer.prompt_logprobs = Some(logprobs);
                }
                Event::Token(event) => {
                    answer.tokens.push(event.token);
                    answer.logprobs.push(event.logprob);
                }
                Event::Finished(end) => finished = Some(end),
            }
        }
        let finished = finished.unwrap_or_else(|| panic!("{id} has not ended"));
        answer.reason = finished.reason.clone();
        (answer, finished)
    }

    pub fn has_ended(&mut self, id: SessionId) -> bool {
        let events = self.events.entry(id).or_default();
        events.extend(self.live[&id].try_iter());
        matches!(events.last(), Some(Event::Finished(_)))
    }

    /// Goes away as the owner of a session.
    pub fn forget(&mut self, id: SessionId) {
        self.live.remove(&id);
    }

    /// Compares what the sessions of `ids` answered with what each choice of `ask` must.
    pub fn check(&mut self, ask: &Ask, ids: &[SessionId], what: &str) {
        for (choice, &id) in (0..).zip(ids) {
            let expected = self.model.answer(&ask.choice(choice));
            assert_eq!(self.answer(id), expected, "{what}: choice {choice} of {ask:?}");
        }
    }
}

/// Runs `work` on a thread of its own and fails if it takes minutes.
pub fn without_hanging<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    result.recv_timeout(std::time::Duration::from_secs(300)).expect("done, without a hang or a panic")
}
