//! Threads that run a whole step together.
//!
//! A step has some hundred phases of a few microseconds, so threads are woken once a step and meet at a
//! barrier between phases. Whoever waits spins first, because the others are microseconds away, and gives
//! its core up when they aren't: cores may be shared with other processes. Between steps threads
//! spin for a moment and then sleep.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use setu_core::{Error, Result};

/// Looks at the barrier before a waiting thread offers its core to others.
const SPINS: u32 = 4_000;
/// How long a thread stays awake without work.
const IDLE: Duration = Duration::from_micros(150);

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
    /// Helpers still at work on the job.
    working: AtomicUsize,
    closing: AtomicBool,
    sleeping: Vec<AtomicBool>,
}

/// What a job does on each thread.
struct Job<'a> {
    run: &'a (dyn Fn(Worker<'_>) + Sync),
}

/// The threads' meeting point.
#[derive(Debug)]
struct Team {
    threads: usize,
    arrived: Padded<AtomicUsize>,
    generation: Padded<AtomicU32>,
    next_task: Padded<AtomicUsize>,
    failed: AtomicBool,
}

/// Keeps what threads hammer on in cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded<T>(T);

/// A thread of a running job.
#[derive(Clone, Copy, Debug)]
pub struct Worker<'a> {
    pub index: usize,
    team: &'a Team,
}

/// Unwinds a thread whose team has failed; the job's caller sees the first panic instead.
struct TeamFailed;

impl Worker<'_> {
    pub fn threads(&self) -> usize {
        self.team.threads
    }

    /// The next `grain` of `total` tasks of this phase that nobody has taken, or `None` if all are taken.
    pub fn claim(&self, total: usize, grain: usize) -> Option<std::ops::Range<usize>> {
        let start = self.team.next_task.0.fetch_add(grain, Ordering::Relaxed);
        (start < total).then(|| start..total.min(start + grain))
    }

    /// Waits until all threads are here. What they wrote before it, all see after it; tasks are counted anew.
    pub fn barrier(&self) {
        let team = self.team;
        if team.threads == 1 {
            team.next_task.0.store(0, Ordering::Relaxed);
            return;
        }
        let generation = team.generation.0.load(Ordering::Relaxed);
        if team.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == team.threads {
            team.arrived.0.store(0, Ordering::Relaxed);
            team.next_task.0.store(0, Ordering::Relaxed);
            team.generation.0.store(generation.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while team.generation.0.load(Ordering::Acquire) == generation {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            // A thread that panicked never arrives.
            if team.failed.load(Ordering::Relaxed) {
                resume_unwind(Box::new(TeamFailed));
            }
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
                arrived: Padded::default(),
                generation: Padded::default(),
                next_task: Padded::default(),
                failed: AtomicBool::new(false),
            },
            epoch: AtomicU32::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            working: AtomicUsize::new(0),
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
    pub fn run(&mut self, job: impl Fn(Worker<'_>) + Sync) {
        let shared = &*self.shared;
        let mut job = Job { run: &job };
        shared.team.arrived.0.store(0, Ordering::Relaxed);
        shared.team.next_task.0.store(0, Ordering::Relaxed);
        shared.team.failed.store(false, Ordering::Relaxed);
        shared.working.store(self.helpers.len(), Ordering::Relaxed);
        shared.job.store((&raw mut job).cast(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (helper, sleeping) in self.helpers.iter().zip(&shared.sleeping) {
            if sleeping.swap(false, Ordering::SeqCst) {
                Thread::unpark(helper.thread());
            }
        }
        let mine = shared.work(&job, 0);
        let mut spins = 0;
        while shared.working.load(Ordering::Acquire) > 0 {
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
            // SAFETY: `run` stored a job before it counted the epoch up, and stays until `working` is 0.
            let job = unsafe { &*self.job.load(Ordering::Relaxed) };
            // The caller reports a panic; its message was printed by the panic hook.
            drop(self.work(job, index));
            self.working.fetch_sub(1, Ordering::Release);
        }
    }

    fn work(&self, job: &Job<'_>, index: usize) -> std::thread::Result<()> {
        let result = catch_unwind(AssertUnwindSafe(|| (job.run)(Worker { index, team: &self.team })));
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
    fn every_task_runs_once_and_barriers_order_phases() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads).unwrap();
            for _ in 0..50 {
                let counts: Vec<AtomicUsize> = (0..37).map(|_| AtomicUsize::new(0)).collect();
                pool.run(|worker| {
                    for phase in 0..40 {
                        while let Some(tasks) = worker.claim(counts.len(), 3) {
                            for task in tasks {
                                // A task seen out of phase would have been counted too often or too rarely.
                                assert_eq!(counts[task].fetch_add(1, Ordering::Relaxed), phase);
                            }
                        }
                        worker.barrier();
                    }
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 40));
            }
        }
    }

    #[test]
    fn sleepers_wake() {
        let mut pool = Pool::new(3).unwrap();
        for pause_us in [0, 50, 150, 1000, 20_000] {
            std::thread::sleep(Duration::from_micros(pause_us));
            let ran = AtomicUsize::new(0);
            pool.run(|worker| {
                worker.barrier();
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), 3);
        }
    }

    #[test]
    fn a_panic_ends_the_job_and_not_the_pool() {
        let mut pool = Pool::new(3).unwrap();
        for guilty in 0..3 {
            let job = AssertUnwindSafe(|| {
                pool.run(|worker| {
                    assert!(worker.index != guilty, "thread {guilty} fails");
                    worker.barrier();
                });
            });
            assert!(catch_unwind(job).is_err());
            let ran = AtomicUsize::new(0);
            pool.run(|worker| {
                worker.barrier();
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), 3);
        }
    }
}
