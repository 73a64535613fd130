//! The record of decisions: who was admitted, who ran and how much, who waited and why, what it took.
//!
//! The engine tells a [`Tracer`] of everything that it decides, as a [`Record`] each; without one it composes
//! nothing. [`writer`] makes a file of the record, [`TraceReader`] reads it back. A [`Teller`] makes one session's
//! [`Story`] of it, a [`Summarizer`] the [`Summary`] of all.
//!
//! # The file
//! Each line is a JSON object; its `event` says which of [`Record`]'s variants it is, whose fields follow. The first
//! is `trace` ([`Header`]) and holds the [`VERSION`]. Sessions appear by the name that logs show. Fields and events
//! that a reader doesn't know it skips.
//!
//! ```json
//! {"event":"trace","version":1,"engine":"0.1.0","time_s":0.0,"scheduler":"fcfs","batcher":"fixed_chunk",…}
//! {"event":"added","time_s":0.001,"session":"session_00000001","tenant":0,"prompt_tokens":20,"max_tokens":5,…}
//! {"event":"planned","time_s":0.001,"step":1,"predicted_s":0.0,"pages":[{"free":9,"reclaimable":0}],
//!  "chunks":[{"session":"session_00000001","tokens":8,"pending":20,"capped":{"by":"batcher","reason":"chunk_tokens"}}],
//!  "waits":[{"session":"session_00000002","cause":"scheduler","reason":"behind one that waits"}]}
//! {"event":"finished","time_s":0.009,"step":1,"predicted_s":0.0,"took_s":0.008,"prefill_tokens":8,…}
//! {"event":"ended","time_s":0.09,"session":"session_00000001","outcome":"length","generated_tokens":5,…}
//! ```

mod file;
mod numbers;
mod record;
mod sentences;
mod story;
mod summary;

pub use file::{Skipped, TraceReader, writer};
pub use numbers::Spread;
pub use record::{
    Added, Cap, CapCause, ChunkRecord, Ended, FreePages, Header, KvGroup, Outcome, Overran, PagesShort, Planned,
    PolicyFault, Preempted, PreemptionCause, Record, StepFinished, StepTime, Swapped, VERSION, Wait, WaitCause,
};
pub use story::{CapPart, Chapter, Phase, ReasonPart, Run, Story, Teller, WaitPart, Waiting};
pub use summary::{SessionLine, Summarizer, Summary};

/// Receives the record, on the engine's thread.
pub type Tracer = Box<dyn FnMut(&Record) + Send>;
