//! Masks of constrained sessions, computed beside the running step.
//!
//! As soon as a token of such a session is known, its constraint goes to a thread of the crew, which tells it the
//! token and has it write the mask of the next one. Meanwhile the engine plans and submits the step that samples that
//! one: a forward pass needs no mask, only sampling does. The engine waits for masks where it waits for the step.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crossbeam_channel::{Receiver, Sender, unbounded};
use setu_core::backend::Masks;
use setu_core::ids::SessionId;
use setu_core::{Error, Result};

use super::Core;
use crate::constraint::Constraint;
use crate::guard::panic_message;
use crate::request::FinishReason;

/// What is known of a constrained session's next token.
pub(crate) enum NextToken {
    /// The crew works at it.
    Asked,
    /// The constraint, and the mask that it wrote; empty before the first.
    Known(Box<dyn Constraint>, Vec<u32>),
}

/// The crew, and memory for what it writes.
#[derive(Debug, Default)]
pub(super) struct MaskDesk {
    crew: Option<Crew>,
    spare: Vec<Vec<u32>>,
    /// Wants of a step and their masks, one behind the other.
    wants: Vec<u32>,
    words: Vec<u32>,
}

/// Threads that end when this is dropped.
#[derive(Debug)]
struct Crew {
    jobs: Sender<Job>,
    done: Receiver<Done>,
}

struct Job {
    session: SessionId,
    constraint: Box<dyn Constraint>,
    token: Option<u32>,
    words: Vec<u32>,
}

struct Done {
    session: SessionId,
    words: Vec<u32>,
    /// The constraint, where the answer may go on.
    result: Result<Option<Box<dyn Constraint>>>,
}

impl Crew {
    fn start(threads: u32) -> Result<Crew> {
        let (jobs, inbox) = unbounded::<Job>();
        let (outbox, done) = unbounded();
        for index in 0..threads {
            let (inbox, outbox) = (inbox.clone(), outbox.clone());
            let work = move || inbox.iter().for_each(|job| drop(outbox.send(job.run())));
            let builder = std::thread::Builder::new().name(format!("setu-mask-{index}"));
            let started = builder.spawn(work);
            started.map_err(|error| Error::internal(format!("a thread for masks can't be started: {error}")))?;
        }
        Ok(Crew { jobs, done })
    }
}

impl Job {
    fn run(self) -> Done {
        let Job { session, mut constraint, token, mut words } = self;
        let written = catch_unwind(AssertUnwindSafe(|| {
            token.map_or(Ok(()), |token| constraint.accept(token))?;
            constraint.allow(&mut words)
        }));
        let result = match written {
            Ok(Ok(true)) if words.iter().all(|&word| word == 0) => {
                Err(Error::invalid("the answer can't go on: its constraint allows no token"))
            }
            Ok(result) => result.map(|goes_on| goes_on.then_some(constraint)),
            Err(payload) => {
                // Its state may be broken, so not even its drop may run.
                std::mem::forget(constraint);
                Err(Error::internal(format!("constraining the answer {}", panic_message(payload))))
            }
        };
        Done { session, words, result }
    }
}

impl Core {
    /// Has the mask of a session's next token computed, behind `token` where it has one already.
    pub(super) fn ask_mask(&mut self, index: usize, token: Option<u32>) {
        let session = &mut self.sessions[index];
        let Some(NextToken::Known(constraint, mut words)) = session.next_token.take() else { return };
        if words.is_empty() {
            words = self.masks.spare.pop().unwrap_or_default();
        }
        words.clear();
        words.resize(self.limits.vocab_size.div_ceil(32) as usize, 0);
        session.next_token = Some(NextToken::Asked);
        let job = Job { session: session.id, constraint, token, words };
        let crew = match self.masks.crew.take() {
            Some(crew) => Ok(crew),
            None => Crew::start(self.settings.engine.mask_threads),
        };
        let sent = crew.and_then(|crew| {
            let sent = crew.jobs.send(job);
            self.masks.crew = Some(crew);
            sent.map_err(|_| Error::internal("the threads for masks are gone"))
        });
        if let Err(error) = sent {
            self.end(index, FinishReason::Failed(error));
        }
    }

    /// Takes in what the crew has done by now, so that answers that are complete take part in no further step.
    pub(super) fn take_masks(&mut self) {
        while let Some(done) = self.masks.crew.as_ref().and_then(|crew| crew.done.try_recv().ok()) {
            self.take_mask(done);
        }
    }

    fn take_mask(&mut self, done: Done) {
        let Done { session, words, result } = done;
        let Some(&index) = self.index.get(&session) else {
            self.masks.spare.push(words);
            return;
        };
        let reason = match result {
            Ok(Some(constraint)) => {
                self.sessions[index].next_token = Some(NextToken::Known(constraint, words));
                return;
            }
            Ok(None) => FinishReason::Stop(None),
            Err(error) => FinishReason::Failed(error),
        };
        self.masks.spare.push(words);
        self.end(index, reason);
    }

    /// Gives the oldest step in flight the masks that it waits for.
    ///
    /// # Errors
    /// The backend's, or the crew is gone.
    pub(super) fn provide_masks(&mut self) -> Result<()> {
        let Some(flight) = self.flights.front().filter(|flight| !flight.masked.is_empty()) else { return Ok(()) };
        let ticket = flight.ticket;
        let masked = flight.masked.clone();
        let started = std::time::Instant::now();
        for &(_, session) in &masked {
            while let Some(&index) = self.index.get(&session) {
                if !matches!(self.sessions[index].next_token, Some(NextToken::Asked)) {
                    break;
                }
                let crew = self.masks.crew.as_ref();
                let done = crew.and_then(|crew| crew.done.recv().ok());
                self.take_mask(done.ok_or_else(|| Error::internal("the threads for masks are gone"))?);
            }
        }
        self.stats.mask_wait_s += started.elapsed().as_secs_f64();
        let words_per_mask = self.limits.vocab_size.div_ceil(32);
        let (mut wants, mut words) = (std::mem::take(&mut self.masks.wants), std::mem::take(&mut self.masks.words));
        wants.clear();
        words.clear();
        for &(want, session) in &masked {
            wants.push(want);
            match self.index.get(&session).map(|&index| &self.sessions[index].next_token) {
                Some(Some(NextToken::Known(_, mask))) => words.extend_from_slice(mask),
                // It has ended meanwhile, and what is sampled for it is dropped.
                _ => words.extend(std::iter::repeat_n(u32::MAX, words_per_mask as usize)),
            }
        }
        let masks = Masks::new(&wants, &words, words_per_mask);
        let result = self.call_backend(|executable| executable.provide(ticket, &masks));
        (self.masks.wants, self.masks.words) = (wants, words);
        result
    }
}
