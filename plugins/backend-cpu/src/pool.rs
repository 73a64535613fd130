//! Threads that run a whole step together.
//!
//! A step has some hundred phases of a few microseconds, so threads are woken once a step and share out the
//! tasks of one phase after the other. A phase ends when its tasks are done, not when all threads have come:
//! where cores are shared with other processes, a thread that has lost its core holds nobody up
//! unless it was in the middle of a task, and skips what was done without it. Whoever waits for the last task
//! spins first, because it takes microseconds, and then offers its core to others. Between steps threads spin
//! for a moment and then sleep.

use std::cell::Cell;
use std::ops::{Range, RangeInclusive};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use setu_core::{Error, Result};

/// Looks at a phase's state before a waiting thread offers its core to others.
const SPINS: u32 = 4_000;
/// How long a thread stays awake without work.
const IDLE: Duration = Duration::from_micros(150);

/// Set in the gate of a job that is over.
const CLOSED: u32 = 1 << 31;

/// A caller's thread and its helpers.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    team: Team,
    /// Counts jobs; a helper runs when it changes.
    epoch: AtomicU32,
    job: AtomicPtr<Job<'static>>,
    /// Helpers at work on the job, and [`CLOSED`] when it takes no more.
    gate: AtomicU32,
    closing: AtomicBool,
    sleeping: Vec<AtomicBool>,
}

/// What a job does on each thread.
struct Job<'a> {
    run: &'a (dyn Fn(&Worker<'_>) + Sync),
}

/// How far the job is.
#[derive(Debug)]
struct Team {
    threads: usize,
    /// The phase's number in the high half, its first task that nobody has taken in the low one.
    state: Padded<AtomicU64>,
    /// Tasks of the phase that are done.
    done: Padded<AtomicUsize>,
    /// For each thread the last phase in which tasks of its span were taken, in the high half, and how many were.
    spans: Vec<Padded<AtomicU64>>,
    failed: AtomicBool,
}

/// Keeps what threads hammer on in cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded<T>(T);

/// A thread of a running job.
#[derive(Debug)]
pub struct Worker<'a> {
    pub index: usize,
    team: &'a Team,
    /// The phase that this thread comes to next.
    phase: Cell<u32>,
}

/// Unwinds a thread whose team has failed; the job's caller sees the first panic instead.
struct TeamFailed;

impl Worker<'_> {
    pub fn threads(&self) -> usize {
        self.team.threads
    }

    /// A phase of the job: `total` tasks, which threads take `grain` at a time. Returns when all are done; what they
    /// wrote, all threads see from then on.
    ///
    /// Every thread of the job makes the same sequence of calls. A thread may be late and find its phase over, so
    /// memory that phases write may be read in tasks only, and `total` must come from elsewhere or from atomics.
    pub fn share(&self, total: usize, grain: usize, mut run: impl FnMut(Range<usize>)) {
        let (team, phase) = (self.team, self.next_phase());
        let (this, next_phase) = (u64::from(phase) << 32, u64::from(phase + 1) << 32);
        let mut spins = 0;
        loop {
            let state = team.state.0.load(Ordering::Acquire);
            if state >> 32 != this >> 32 {
                return;
            }
            let start = (state - this) as usize;
            if start < total {
                let end = total.min(start + grain);
                let taken = this + end as u64;
                if team.state.0.compare_exchange_weak(state, taken, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue;
                }
                run(start..end);
                spins = 0;
                if team.finish(end - start, total, phase) {
                    return;
                }
            } else if total == 0 {
                // Whoever comes first ends the phase.
                let _ = team.state.0.compare_exchange(state, next_phase, Ordering::AcqRel, Ordering::Relaxed);
            } else {
                team.pause(&mut spins);
            }
        }
    }

    /// As [`share`](Worker::share), for tasks whose memory lies side by side: every thread goes through a [span](span)
    /// of its own front to back before it helps others, half of what is left of it at a time within `grains`, and calls
    /// `wait` again and again when nothing is left to take.
    pub fn share_spans(
        &self,
        total: usize,
        grains: RangeInclusive<usize>,
        mut run: impl FnMut(Range<usize>),
        mut wait: impl FnMut(),
    ) {
        let (team, phase) = (self.team, self.next_phase());
        if total == 0 {
            let this = u64::from(phase) << 32;
            let _ = team.state.0.compare_exchange(this, this + (1 << 32), Ordering::AcqRel, Ordering::Relaxed);
            return;
        }
        for owner in (self.index..team.threads).chain(0..self.index) {
            let (span, taken) = (span(owner, team.threads, total), &team.spans[owner].0);
            loop {
                let seen = taken.load(Ordering::Acquire);
                let start = match ((seen >> 32) as u32).cmp(&phase) {
                    std::cmp::Ordering::Less => span.start,
                    std::cmp::Ordering::Equal => span.start + seen as u32 as usize,
                    std::cmp::Ordering::Greater => return,
                };
                if start >= span.end {
                    break;
                }
                let end = span.end.min(start + ((span.end - start) / 2).clamp(*grains.start(), *grains.end()));
                let next = u64::from(phase) << 32 | (end - span.start) as u64;
                if taken.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue;
                }
                run(start..end);
                if team.finish(end - start, total, phase) {
                    return;
                }
            }
        }
        let mut spins = 0;
        while team.state.0.load(Ordering::Acquire) >> 32 == u64::from(phase) {
            wait();
            team.pause(&mut spins);
        }
    }

    fn next_phase(&self) -> u32 {
        self.phase.replace(self.phase.get() + 1)
    }
}

/// The tasks out of `total` that thread `index` of `threads` begins with in [`Worker::share_spans`].
pub fn span(index: usize, threads: usize, total: usize) -> Range<usize> {
    total * index / threads..total * (index + 1) / threads
}

impl Team {
    /// Counts tasks as done, and ends the phase with the last one.
    fn finish(&self, tasks: usize, total: usize, phase: u32) -> bool {
        let last = self.done.0.fetch_add(tasks, Ordering::AcqRel) + tasks == total;
        if last {
            self.done.0.store(0, Ordering::Relaxed);
            self.state.0.store(u64::from(phase + 1) << 32, Ordering::Release);
        }
        last
    }

    /// Passes a moment of waiting for tasks of others.
    fn pause(&self, spins: &mut u32) {
        *spins += 1;
        if *spins < SPINS {
            std::hint::spin_loop();
        } else if self.failed.load(Ordering::Relaxed) {
            // The task of a thread that panicked is never done.
            resume_unwind(Box::new(TeamFailed));
        } else {
            std::thread::yield_now();
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller's among them.
    ///
    /// # Errors
    /// The system gives no threads.
    pub fn new(threads: usize) -> Result<Pool> {
        let helpers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            team: Team {
                threads: helpers + 1,
                state: Padded::default(),
                done: Padded::default(),
                spans: (0..=helpers).map(|_| Padded::default()).collect(),
                failed: AtomicBool::new(false),
            },
            epoch: AtomicU32::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            gate: AtomicU32::new(CLOSED),
            closing: AtomicBool::new(false),
            sleeping: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut pool = Pool { shared, helpers: Vec::with_capacity(helpers) };
        for index in 1..=helpers {
            let shared = pool.shared.clone();
            let spawned =
                std::thread::Builder::new().name(format!("setu-cpu-{index}")).spawn(move || shared.help(index));
            pool.helpers.push(spawned.map_err(|error| {
                Error::exhausted(format!("cannot start thread {index} of {threads} of the CPU backend: {error}"))
            })?);
        }
        Ok(pool)
    }

    /// Runs `job` on every thread at once and returns when all are done.
    ///
    /// # Panics
    /// With the first panic of the job.
    pub fn run(&mut self, job: impl Fn(&Worker<'_>) + Sync) {
        let shared = &*self.shared;
        let mut job = Job { run: &job };
        shared.team.state.0.store(0, Ordering::Relaxed);
        shared.team.done.0.store(0, Ordering::Relaxed);
        shared.team.spans.iter().for_each(|taken| taken.0.store(0, Ordering::Relaxed));
        shared.team.failed.store(false, Ordering::Relaxed);
        shared.job.store((&raw mut job).cast(), Ordering::Relaxed);
        shared.gate.store(0, Ordering::Release);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (helper, sleeping) in self.helpers.iter().zip(&shared.sleeping) {
            if sleeping.swap(false, Ordering::SeqCst) {
                Thread::unpark(helper.thread());
            }
        }
        let mine = shared.work(&job, 0);
        // Helpers that haven't come yet needn't any more.
        shared.gate.fetch_or(CLOSED, Ordering::AcqRel);
        let mut spins = 0;
        while shared.gate.load(Ordering::Acquire) != CLOSED {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Err(panic) = mine
            && !panic.is::<TeamFailed>()
        {
            resume_unwind(panic);
        }
        assert!(!shared.team.failed.load(Ordering::Relaxed), "a thread of the CPU backend panicked");
    }
}

impl Shared {
    /// A helper's life.
    fn help(&self, index: usize) {
        let mut seen = 0;
        loop {
            let epoch = self.next_epoch(seen, &self.sleeping[index - 1]);
            if self.closing.load(Ordering::Relaxed) {
                return;
            }
            seen = epoch;
            if !self.enter() {
                continue;
            }
            // This job may be a later one; none comes while this thread is inside.
            seen = self.epoch.load(Ordering::Acquire);
            // SAFETY: `run` stores a job before it opens the gate, and stays until those who entered have left.
            let job = unsafe { &*self.job.load(Ordering::Relaxed) };
            // The caller reports a panic; its message was printed by the panic hook.
            drop(self.work(job, index));
            self.gate.fetch_sub(1, Ordering::Release);
        }
    }

    /// Takes part in the job, if it is still open.
    fn enter(&self) -> bool {
        let entered = |gate: u32| (gate & CLOSED == 0).then_some(gate + 1);
        self.gate.fetch_update(Ordering::AcqRel, Ordering::Relaxed, entered).is_ok()
    }

    fn work(&self, job: &Job<'_>, index: usize) -> std::thread::Result<()> {
        let result =
            catch_unwind(AssertUnwindSafe(|| (job.run)(&Worker { index, team: &self.team, phase: Cell::new(0) })));
        if result.is_err() {
            self.team.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Waits for an epoch other than `seen`.
    fn next_epoch(&self, seen: u32, sleeping: &AtomicBool) -> u32 {
        let mut idle_since = None;
        loop {
            for _ in 0..256 {
                let epoch = self.epoch.load(Ordering::Acquire);
                if epoch != seen {
                    return epoch;
                }
                std::hint::spin_loop();
            }
            if idle_since.get_or_insert_with(Instant::now).elapsed() > IDLE {
                sleeping.store(true, Ordering::SeqCst);
                while self.epoch.load(Ordering::SeqCst) == seen {
                    std::thread::park();
                }
                sleeping.store(false, Ordering::Relaxed);
            } else {
                std::thread::yield_now();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A helper's panics were reported by `run`.
            drop(helper.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_and_phases_follow_one_another() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads).unwrap();
            for round in 0..50 {
                let counts: Vec<AtomicUsize> = (0..37).map(|_| AtomicUsize::new(0)).collect();
                pool.run(|worker| {
                    for phase in 0..40 {
                        let run = |tasks: Range<usize>| {
                            for task in tasks {
                                // A task seen out of phase would have been counted too often or too rarely.
                                assert_eq!(counts[task].fetch_add(1, Ordering::Relaxed), phase);
                            }
                        };
                        if phase % 3 == round % 3 {
                            worker.share_spans(counts.len(), 1 + round % 5..=1 + round % 7 + round % 5, run, || {});
                            worker.share_spans(0, 1..=1, |_| panic!("there are no tasks"), || {});
                        } else {
                            worker.share(counts.len(), 1 + round % 5, run);
                            worker.share(0, 1, |_| panic!("there are no tasks"));
                        }
                        worker.share_spans(
                            1,
                            1..=1,
                            |tasks| assert_eq!(tasks, 0..1, "fewer tasks than threads"),
                            || {},
                        );
                    }
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 40));
            }
        }
    }

    #[test]
    fn threads_begin_with_spans_of_their_own() {
        for threads in [1, 2, 3, 7] {
            for total in [1, 2, 6, 37] {
                let spans: Vec<_> = (0..threads).map(|index| span(index, threads, total)).collect();
                assert_eq!((spans[0].start, spans[threads - 1].end), (0, total));
                assert!(spans.windows(2).all(|two| two[0].end == two[1].start));
            }
        }
        let mut pool = Pool::new(2).unwrap();
        let begun = AtomicUsize::new(0);
        pool.run(|worker| {
            let mut first = true;
            let run = |tasks: Range<usize>| {
                if std::mem::take(&mut first) {
                    assert_eq!(tasks, 32 * worker.index..32 * worker.index + 16, "half of the own span");
                    begun.fetch_add(1, Ordering::SeqCst);
                    while begun.load(Ordering::SeqCst) < 2 {
                        std::thread::yield_now();
                    }
                }
            };
            worker.share_spans(64, 1..=64, run, || {});
        });
    }

    #[test]
    fn sleepers_wake() {
        let mut pool = Pool::new(2).unwrap();
        for pause_us in [0, 50, 150, 1000, 20_000] {
            std::thread::sleep(Duration::from_micros(pause_us));
            let met = AtomicUsize::new(0);
            pool.run(|worker| {
                // Two tasks that wait for each other need two threads.
                worker.share(2, 1, |_| {
                    met.fetch_add(1, Ordering::SeqCst);
                    while met.load(Ordering::SeqCst) < 2 {
                        std::thread::yield_now();
                    }
                });
            });
            assert_eq!(met.load(Ordering::Relaxed), 2);
        }
    }

    #[test]
    fn a_panic_ends_the_job_and_not_the_pool() {
        let mut pool = Pool::new(3).unwrap();
        for guilty in 0..30 {
            let job = AssertUnwindSafe(|| {
                pool.run(|worker| {
                    worker.share(30, 1, |tasks| assert!(tasks.start != guilty, "task {guilty} fails"));
                    worker.share_spans(30, 1..=2, |_| {}, || {});
                    worker.share(30, 1, |_| {});
                });
            });
            assert!(catch_unwind(job).is_err());
            let ran = AtomicUsize::new(0);
            pool.run(|worker| {
                worker.share(30, 1, |_| {
                    ran.fetch_add(1, Ordering::Relaxed);
                });
            });
            assert_eq!(ran.load(Ordering::Relaxed), 30);
        }
    }
}
