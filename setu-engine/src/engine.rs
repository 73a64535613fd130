//! The engine's thread and the handle to it.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded, unbounded};
use setu_core::backend::ExecutableInfo;
use setu_core::batcher::Batcher;
use setu_core::ids::SessionId;
use setu_core::scheduler::Scheduler;
use setu_core::{Error, Result};

use crate::clock::Clock;
use crate::core::{Core, Parts, Settings, Turn};
use crate::live::{Look, Watch};
use crate::request::{Arrival, Event, EventSink, Limits, Request};
use crate::stats::Stats;
use crate::trace::Tracer;

/// A running engine. Dropping it ends its sessions and its thread.
///
/// Any thread may add sessions; one thread, the engine's, owns all state and runs the loop.
pub struct Engine {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
    heartbeat: Arc<Heartbeat>,
    stopped: Arc<AtomicBool>,
    limits: Limits,
    info: ExecutableInfo,
    next_id: AtomicU64,
    seeds: AtomicU64,
}

/// A session in the engine. Dropping it aborts the session.
#[derive(Debug)]
pub struct Handle {
    pub id: SessionId,
    /// Which of the request's `n` answers it is.
    pub choice: u32,
    /// The seed that its tokens are drawn with.
    pub seed: u64,
    commands: Sender<Command>,
}

/// A session whose events its owner waits for. Dropping it aborts the session.
#[derive(Debug)]
pub struct Session {
    handle: Handle,
    events: Receiver<Event>,
}

pub(crate) enum Command {
    Add(Vec<Arrival>),
    Abort(SessionId),
    SwapScheduler(String, Box<dyn Scheduler>),
    SwapBatcher(String, Box<dyn Batcher>),
    PreemptAll,
    ClearPrefixCache,
    SetTracer(Option<Tracer>),
    Stats(Sender<Stats>),
    Watch(bool),
    Look(Look),
    Stop,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Command")
    }
}

/// What the watchdog and health checks look at.
#[derive(Debug)]
struct Heartbeat {
    start: Instant,
    /// Milliseconds since `start` when the present turn began; 0 while idle.
    busy_since_ms: AtomicU64,
}

/// Whether the engine's thread makes progress.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Health {
    Ok,
    /// The present turn has taken this long.
    Hanging {
        seconds: f64,
    },
    /// The thread is gone.
    Stopped,
}

impl Engine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// The parts don't fit together, or no thread can be started.
    pub fn start(parts: Parts, settings: Settings) -> Result<Engine> {
        let watchdog_s = settings.engine.watchdog_s;
        let clock = if parts.executable.info().virtual_time { Clock::simulated() } else { Clock::real() };
        let core = Core::new(parts, settings, clock)?;
        let (limits, info) = (core.limits().clone(), core.info().clone());
        let (commands, inbox) = unbounded();
        let heartbeat = Arc::new(Heartbeat { start: Instant::now(), busy_since_ms: AtomicU64::new(0) });
        let stopped = Arc::new(AtomicBool::new(false));
        let (beat, stop) = (heartbeat.clone(), stopped.clone());
        let no_thread = |error| Error::internal(format!("the engine's thread can't be started: {error}"));
        let builder = std::thread::Builder::new().name("setu-engine".to_owned());
        let thread = builder.spawn(move || {
            // Set even if the loop panics, so that health tells the truth.
            let _stopped = SetOnDrop(stop);
            run(core, &inbox, &beat);
        });
        let thread = thread.map_err(no_thread)?;
        if watchdog_s > 0.0 {
            let (beat, stop) = (heartbeat.clone(), stopped.clone());
            let builder = std::thread::Builder::new().name("setu-watchdog".to_owned());
            builder.spawn(move || watch(&beat, &stop, watchdog_s)).map_err(no_thread)?;
        }
        Ok(Engine {
            commands,
            thread: Some(thread),
            heartbeat,
            stopped,
            limits,
            info,
            next_id: AtomicU64::new(1),
            seeds: AtomicU64::new(fresh_seed()),
        })
    }

    /// What requests are checked against.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What the backend made of the graph.
    pub fn executable_info(&self) -> &ExecutableInfo {
        &self.info
    }

    /// Adds a request: one session for each of its `n` answers, in order.
    ///
    /// Answer i of a request with seed s is drawn with the seed s + i.
    ///
    /// # Errors
    /// The request is invalid, see [`Request::validate`], or the engine has stopped. What the engine or the
    /// scheduler refuses later arrives as [`Event::Finished`].
    ///
    /// # Examples
    /// ```no_run
    /// # fn example(engine: &setu_engine::Engine) -> setu_core::Result<()> {
    /// use setu_engine::{Event, Request, SamplingParams};
    ///
    /// let mut params = SamplingParams::default();
    /// params.max_tokens = Some(16);
    /// let sessions = engine.add_session(Request::new(vec![504, 3575, 282], params))?;
    /// for event in sessions[0].events() {
    ///     if let Event::Token(token) = event {
    ///         println!("{}", token.token);
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn add_session(&self, request: Request) -> Result<Vec<Session>> {
        let mut receivers = Vec::new();
        let handles = self.add_session_with(request, |_| {
            let (sender, events) = unbounded();
            receivers.push(events);
            Box::new(sender)
        })?;
        Ok(handles.into_iter().zip(receivers).map(|(handle, events)| Session { handle, events }).collect())
    }

    /// As [`add_session`](Engine::add_session), with events handed to what `sink` returns for each choice.
    ///
    /// # Errors
    /// As [`add_session`](Engine::add_session).
    pub fn add_session_with(
        &self,
        mut request: Request,
        mut sink: impl FnMut(u32) -> Box<dyn EventSink>,
    ) -> Result<Vec<Handle>> {
        request.validate(&self.limits)?;
        let n = request.params.n;
        let base = request.params.seed.unwrap_or_else(|| {
            // Numbers in JSON are exact up to here, so that a client can give back what it was told.
            mix(self.seeds.fetch_add(1, Ordering::Relaxed)) >> 11
        });
        let mut texts = std::mem::take(&mut request.text).into_iter();
        let mut constraints = std::mem::take(&mut request.constraints).into_iter();
        let request = Arc::new(request);
        let mut handles = Vec::with_capacity(n as usize);
        let mut arrivals = Vec::with_capacity(n as usize);
        for choice in 0..n {
            let id = SessionId(self.next_id.fetch_add(1, Ordering::Relaxed));
            let seed = base.wrapping_add(choice.into());
            let (text, constraint, events) = (texts.next(), constraints.next(), sink(choice));
            arrivals.push(Arrival { id, request: request.clone(), seed, text, constraint, events });
            handles.push(Handle { id, choice, seed, commands: self.commands.clone() });
        }
        self.send(Command::Add(arrivals))?;
        Ok(handles)
    }

    /// Ends a session; its owner receives [`Event::Finished`].
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn abort(&self, id: SessionId) -> Result<()> {
        self.send(Command::Abort(id))
    }

    /// Puts another scheduler in use, between two steps.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn swap_scheduler(&self, name: &str, scheduler: Box<dyn Scheduler>) -> Result<()> {
        self.send(Command::SwapScheduler(name.to_owned(), scheduler))
    }

    /// Puts another batcher in use, between two steps.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn swap_batcher(&self, name: &str, batcher: Box<dyn Batcher>) -> Result<()> {
        self.send(Command::SwapBatcher(name.to_owned(), batcher))
    }

    /// Preempts every session that holds pages.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn preempt_all(&self) -> Result<()> {
        self.send(Command::PreemptAll)
    }

    /// Forgets all cached prefixes that no session holds.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn clear_prefix_cache(&self) -> Result<()> {
        self.send(Command::ClearPrefixCache)
    }

    /// Reports every step and decision to `tracer` from now on.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn set_tracer(&self, tracer: Option<Tracer>) -> Result<()> {
        self.send(Command::SetTracer(tracer))
    }

    /// Where the engine stands, as of the end of its present turn.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn stats(&self) -> Result<Stats> {
        let (sender, receiver) = bounded(1);
        self.send(Command::Stats(sender))?;
        receiver.recv().map_err(|_| stopped())
    }

    /// Has the engine keep its latest steps for whoever looks at it, until the watch is dropped.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn watch(&self) -> Result<Watch> {
        Watch::new(self.commands.clone())
    }

    /// Whether the engine makes progress; `Hanging` once a turn takes longer than `patience`.
    pub fn health(&self, patience: Duration) -> Health {
        if self.stopped.load(Ordering::Acquire) {
            return Health::Stopped;
        }
        match self.heartbeat.busy_s() {
            Some(seconds) if seconds > patience.as_secs_f64() => Health::Hanging { seconds },
            _ => Health::Ok,
        }
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|_| stopped())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Session {
    /// Waits for the next event; `None` once the engine is gone.
    pub fn recv(&self) -> Option<Event> {
        self.events.recv().ok()
    }

    /// Waits for the next event for at most `timeout`.
    pub fn recv_timeout(&self, timeout: Duration) -> Option<Event> {
        self.events.recv_timeout(timeout).ok()
    }

    /// All events, up to and including [`Event::Finished`].
    pub fn events(&self) -> impl Iterator<Item = Event> {
        let mut finished = false;
        std::iter::from_fn(move || {
            let event = if finished { None } else { self.recv() };
            finished = matches!(event, Some(Event::Finished(_)));
            event
        })
    }
}

impl Deref for Session {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

impl Handle {
    /// Asks the engine to end it. What it has generated until then still arrives.
    pub fn abort(&self) {
        let _ = self.commands.send(Command::Abort(self.id));
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.abort();
    }
}

pub(crate) fn stopped() -> Error {
    Error::internal("the engine has stopped")
}

/// The engine's loop.
fn run(mut core: Core, inbox: &Receiver<Command>, heartbeat: &Heartbeat) {
    let mut idle_until = Some(f64::INFINITY);
    let clock = core.clock().clone();
    loop {
        if let Some(until_s) = idle_until {
            heartbeat.rest();
            let wait = until_s - clock.now_s();
            let command = if wait.is_finite() && clock.is_virtual() {
                match inbox.try_recv() {
                    Ok(command) => Some(command),
                    Err(TryRecvError::Empty) => {
                        clock.advance_to(until_s);
                        None
                    }
                    Err(TryRecvError::Disconnected) => return,
                }
            } else if wait.is_finite() && wait < 1e6 {
                match inbox.recv_timeout(Duration::from_secs_f64(wait.max(0.0))) {
                    Ok(command) => Some(command),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            } else {
                match inbox.recv() {
                    Ok(command) => Some(command),
                    Err(_) => return,
                }
            };
            heartbeat.work();
            if command.is_some_and(|command| !obey(&mut core, command)) {
                return;
            }
        }
        heartbeat.work();
        while let Ok(command) = inbox.try_recv() {
            if !obey(&mut core, command) {
                return;
            }
        }
        idle_until = match core.turn() {
            Turn::Worked => None,
            Turn::Idle { until_s } => Some(until_s),
        };
    }
}

/// Carries a command out; says whether to go on.
fn obey(core: &mut Core, command: Command) -> bool {
    match command {
        Command::Add(arrivals) => core.add(arrivals),
        Command::Abort(id) => core.abort(id),
        Command::SwapScheduler(name, scheduler) => core.swap_scheduler(&name, scheduler),
        Command::SwapBatcher(name, batcher) => core.swap_batcher(&name, batcher),
        Command::PreemptAll => core.preempt_all(),
        Command::ClearPrefixCache => core.clear_prefix_cache(),
        Command::SetTracer(tracer) => core.set_tracer(tracer),
        Command::Watch(begins) => core.watch(begins),
        Command::Look(look) => core.look(look),
        Command::Stats(reply) => drop(reply.send(core.stats().clone())),
        Command::Stop => return false,
    }
    true
}

/// Logs turns that take too long. A call can't be interrupted; this at least says where time goes.
fn watch(heartbeat: &Heartbeat, stopped: &AtomicBool, patience_s: f64) {
    let mut reported = false;
    while !stopped.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(200));
        let hanging = heartbeat.busy_s().filter(|&busy_s| busy_s > patience_s);
        if let (Some(busy_s), false) = (hanging, reported) {
            tracing::error!(busy_s, "the engine's thread has not finished its turn; a component hangs");
        }
        reported = hanging.is_some();
    }
}

impl Heartbeat {
    fn work(&self) {
        let now_ms = self.start.elapsed().as_millis() as u64;
        self.busy_since_ms.store(now_ms.max(1), Ordering::Release);
    }

    fn rest(&self) {
        self.busy_since_ms.store(0, Ordering::Release);
    }

    fn busy_s(&self) -> Option<f64> {
        let since_ms = self.busy_since_ms.load(Ordering::Acquire);
        let now_ms = self.start.elapsed().as_millis() as u64;
        (since_ms != 0).then(|| now_ms.saturating_sub(since_ms) as f64 * 1e-3)
    }
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A seed that differs from run to run.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

/// SplitMix64's finaliser (Steele et al., 2014): neighbouring inputs give unrelated seeds.
pub(crate) fn mix(seed: u64) -> u64 {
    let seed = (seed ^ seed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let seed = (seed ^ seed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    seed ^ seed >> 31
}
