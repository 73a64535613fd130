//! What the record of decisions holds: one [`Record`] for each thing that was decided or came of it.
//!
//! Times are seconds on the engine's clock; what is not set is left out, and so is what says nothing (zeros,
//! empty texts). A reader ignores fields and events that it doesn't know, so both may be added within a version.

use serde::{Deserialize, Serialize};
use setu_core::ids::SessionId;
use setu_core::view::{KvGroupView, StepTimeModel, StepWork};

/// Version of the record. It changes when something that is written today would mean something else.
pub const VERSION: u32 = 1;

/// An entry of the record: a line of the file, told apart by its field `event`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Record {
    /// The first entry.
    Trace(Header),
    /// A session entered the engine, or was in it when the record began.
    Added(Added),
    /// A step was planned: who runs, who doesn't, and why.
    Planned(Planned),
    /// A step was waited for.
    Finished(StepFinished),
    /// The step-time model, now and then: when it first knows something, and every 64 steps.
    StepTime(StepTime),
    /// A session lost its pages.
    Preempted(Preempted),
    /// A session ended.
    Ended(Ended),
    /// A policy did wrong and was replaced.
    Fault(PolicyFault),
    /// A policy was replaced on the operator's wish.
    Swapped(Swapped),
    /// The scheduler took longer for a step than `[engine] policy_budget_us`.
    Overran(Overran),
    /// An event of a later version.
    #[serde(other)]
    Unknown,
}

impl Record {
    /// When it was recorded; a session's arrival may lie before the record begins.
    pub fn time_s(&self) -> Option<f64> {
        match self {
            Record::Trace(header) => Some(header.time_s),
            Record::Planned(planned) => Some(planned.time_s),
            Record::Finished(finished) => Some(finished.time_s),
            Record::StepTime(step_time) => Some(step_time.time_s),
            Record::Preempted(preempted) => Some(preempted.time_s),
            Record::Ended(ended) => Some(ended.time_s),
            Record::Fault(fault) => Some(fault.time_s),
            Record::Swapped(swapped) => Some(swapped.time_s),
            Record::Overran(overran) => Some(overran.time_s),
            Record::Added(_) | Record::Unknown => None,
        }
    }
}

/// What holds for the whole record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// See [`VERSION`].
    pub version: u32,
    /// The engine's version.
    #[serde(default)]
    pub engine: String,
    pub time_s: f64,
    /// Keys of the policies in use.
    #[serde(default)]
    pub scheduler: String,
    #[serde(default)]
    pub batcher: String,
    /// Most tokens, and most sessions, that a step may hold.
    #[serde(default)]
    pub token_budget: u32,
    #[serde(default)]
    pub session_budget: u32,
    #[serde(default)]
    pub kv_groups: Vec<KvGroup>,
}

/// A KV group's measures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvGroup {
    pub page_tokens: u32,
    /// Tokens that a query reaches back, 0 for all.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub window_tokens: u32,
    pub total_pages: u32,
}

/// A session as it came in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Added {
    /// Of its arrival.
    pub time_s: f64,
    #[serde(with = "name")]
    pub session: SessionId,
    #[serde(default)]
    pub tenant: u32,
    #[serde(default = "one")]
    pub tenant_weight: f64,
    /// Left out where the request names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub class: u32,
    pub prompt_tokens: u32,
    #[serde(default)]
    pub max_tokens: u32,
    /// See [`SessionView::expected_tokens`](setu_core::view::SessionView::expected_tokens).
    #[serde(default)]
    pub expected_tokens: u32,
    /// From arrival to the latest time for the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft_s: Option<f64>,
    /// Longest gap between two tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub itl_s: Option<f64>,
    /// From arrival to the latest time for the last token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_s: Option<f64>,
    /// It reads its prompt and generates nothing.
    #[serde(default, skip_serializing_if = "is_false")]
    pub prompt_only: bool,
    /// The session whose prompt it shares once that is computed.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "name_of_some")]
    pub shares_prompt_of: Option<SessionId>,
}

/// A step as it was planned.
///
/// A session is named in `waits` when it begins to wait and when the reason changes; until it is named again,
/// in whichever list, what was said last holds for every step. A plan that runs nobody and changes no wait leaves
/// no entry, though it has a number.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    pub time_s: f64,
    pub step: u64,
    /// By the step-time model; 0 while it knows nothing.
    #[serde(default)]
    pub predicted_s: f64,
    /// Steps submitted before and not yet waited for.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub in_flight: u32,
    /// The backend refused it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub refused: bool,
    /// By KV group, pages that hold nothing and pages that only the prefix cache holds, before the step took its own.
    #[serde(default)]
    pub pages: Vec<FreePages>,
    /// In the order of the step's rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chunks: Vec<ChunkRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits: Vec<Wait>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreePages {
    pub free: u32,
    pub reclaimable: u32,
}

/// What a session computes in a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChunkRecord {
    #[serde(with = "name")]
    pub session: SessionId,
    pub tokens: u32,
    /// Tokens that it had to compute; left out where the chunk holds them all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<u32>,
    /// Tokens before the chunk.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub context: u32,
    /// Of the context, what needn't be computed since it was in the prefix cache, or in another choice of the same
    /// request. In the first chunk behind it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cached: u32,
    /// Why the scheduler runs it, where it says so.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Why the chunk doesn't hold all that is pending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capped: Option<Cap>,
}

/// Why a chunk isn't longer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cap {
    pub by: CapCause,
    /// The policy's reason.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// With `pages`: tokens that the batcher gave.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub given: u32,
    /// With `pages`: by KV group, what those tokens needed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pages: Vec<PagesShort>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CapCause {
    /// The scheduler's cap for this step.
    Scheduler,
    Batcher,
    /// The step holds as many tokens as it may.
    StepTokens,
    /// The engine trimmed it: no pages were left.
    Pages,
    #[serde(other)]
    Unknown,
}

/// New pages that a chunk needed in a KV group, and those that could be given out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesShort {
    pub needed: u32,
    pub available: u32,
}

/// Why a session isn't in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wait {
    #[serde(with = "name")]
    pub session: SessionId,
    pub cause: WaitCause,
    /// The policy's reason.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// With `gave_way` and `prompt`: for whom, or whose.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "name_of_some")]
    pub by: Option<SessionId>,
    /// With `pages`: by KV group, what its chunk needed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pages: Vec<PagesShort>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum WaitCause {
    /// The scheduler had it wait.
    Scheduler,
    /// The scheduler did not name it.
    Unnamed,
    /// Another session is computing the prompt that both share.
    Prompt,
    /// A step from before it lost its pages has not been waited for.
    InFlight,
    /// All sampler slots are taken.
    Slots,
    /// The batcher gave it nothing.
    Batcher,
    /// The step holds as many tokens as it may.
    StepTokens,
    /// The step holds as many sessions as it may.
    StepSessions,
    /// Its chunk needed more pages than could be given out.
    Pages,
    /// It came behind one that needed pages.
    GaveWay,
    #[serde(other)]
    Unknown,
}

/// A step as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepFinished {
    pub time_s: f64,
    pub step: u64,
    #[serde(default)]
    pub predicted_s: f64,
    /// From its submission, or from the end of the step before it if that came later.
    pub took_s: f64,
    /// See [`StepWork`].
    #[serde(default)]
    pub prefill_tokens: u32,
    #[serde(default)]
    pub decodes: u32,
    #[serde(default)]
    pub prefill_context: u64,
    #[serde(default)]
    pub decode_context: u64,
}

impl StepFinished {
    /// What the step-time model knows of the step.
    pub fn work(&self) -> StepWork {
        let mut work = StepWork::default();
        work.prefill_tokens = self.prefill_tokens;
        work.decodes = self.decodes;
        work.prefill_context = self.prefill_context;
        work.decode_context = self.decode_context;
        work
    }
}

/// The coefficients of the [`StepTimeModel`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepTime {
    pub time_s: f64,
    pub step: u64,
    pub base_s: f64,
    pub prefill_token_s: f64,
    pub decode_s: f64,
    pub prefill_context_s: f64,
    pub decode_context_s: f64,
    /// Steps that it was fitted to.
    pub steps: u64,
    pub relative_error: f64,
    pub ratio_p95: f64,
}

impl StepTime {
    pub(crate) fn new(time_s: f64, step: u64, model: &StepTimeModel) -> StepTime {
        StepTime {
            time_s,
            step,
            base_s: model.base_s,
            prefill_token_s: model.prefill_token_s,
            decode_s: model.decode_s,
            prefill_context_s: model.prefill_context_s,
            decode_context_s: model.decode_context_s,
            steps: model.steps,
            relative_error: model.relative_error,
            ratio_p95: model.ratio_p95,
        }
    }
}

/// A session lost its pages, and computes again what the prefix cache doesn't keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preempted {
    pub time_s: f64,
    /// The step that was being planned.
    pub step: u64,
    #[serde(with = "name")]
    pub session: SessionId,
    pub cause: PreemptionCause,
    /// With `pages` and `slot`: who needed them.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "name_of_some")]
    pub by: Option<SessionId>,
    /// The scheduler's reason.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(default)]
    pub tokens_lost: u32,
    /// Pages that it held, all KV groups together.
    #[serde(default)]
    pub pages: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PreemptionCause {
    /// Another session, in front of it in the order, needed pages.
    Pages,
    /// It paused, and another needed its sampler slot.
    Slot,
    /// The scheduler said so.
    Scheduler,
    /// The operator said so.
    Operator,
    /// The step that was to copy its pages failed.
    CopyLost,
    #[serde(other)]
    Unknown,
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    pub time_s: f64,
    #[serde(with = "name")]
    pub session: SessionId,
    pub outcome: Outcome,
    /// The token that stopped it, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_token: Option<u32>,
    /// Why it was rejected, or what failed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<f64>,
    #[serde(default)]
    pub prompt_tokens: u32,
    /// Of the prompt, those found in the prefix cache when it first ran.
    #[serde(default)]
    pub cached_tokens: u32,
    #[serde(default)]
    pub generated_tokens: u32,
    #[serde(default)]
    pub preemptions: u32,
    /// Computed tokens that preemptions threw away.
    #[serde(default)]
    pub tokens_lost: u32,
    /// Seconds of step time that fell to it, by the step-time model.
    #[serde(default)]
    pub service_s: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// At a token or a text that ends answers.
    Stop,
    /// At its `max_tokens` or the model's length.
    Length,
    /// Its owner ended it.
    Aborted,
    /// The scheduler, or the engine's full queue, turned it away.
    Rejected,
    Failed,
    #[serde(other)]
    Unknown,
}

/// A policy did wrong.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyFault {
    pub time_s: f64,
    pub step: u64,
    /// `scheduler` or `batcher`.
    pub kind: String,
    pub component: String,
    pub message: String,
    /// Who takes over; left out where nobody is left and the engine stops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced_by: Option<String>,
}

/// A policy was put in use by the operator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Swapped {
    pub time_s: f64,
    pub step: u64,
    /// `scheduler` or `batcher`.
    pub kind: String,
    pub component: String,
}

/// The scheduler took long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Overran {
    pub time_s: f64,
    pub step: u64,
    /// CPU time of all its calls for the step.
    pub took_s: f64,
}

impl From<&KvGroupView> for KvGroup {
    fn from(view: &KvGroupView) -> KvGroup {
        KvGroup { page_tokens: view.page_tokens, window_tokens: view.window_tokens, total_pages: view.total_pages }
    }
}

impl From<&KvGroupView> for FreePages {
    fn from(view: &KvGroupView) -> FreePages {
        FreePages { free: view.free_pages, reclaimable: view.reclaimable_pages }
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !flag
}

fn one() -> f64 {
    1.0
}

/// Session ids by the name that logs show.
pub(super) mod name {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use setu_core::ids::SessionId;

    pub fn serialize<S: Serializer>(id: &SessionId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SessionId, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        let number = text.strip_prefix("session_").and_then(|digits| u64::from_str_radix(digits, 16).ok());
        number.map(SessionId).ok_or_else(|| de::Error::custom(format!("{text:?} is no session's name")))
    }
}

mod name_of_some {
    use serde::{Deserialize, Deserializer, Serializer};
    use setu_core::ids::SessionId;

    #[derive(Deserialize)]
    struct Named(#[serde(with = "super::name")] SessionId);

    pub fn serialize<S: Serializer>(id: &Option<SessionId>, serializer: S) -> Result<S::Ok, S::Error> {
        match id {
            Some(id) => super::name::serialize(id, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SessionId>, D::Error> {
        Ok(Option::<Named>::deserialize(deserializer)?.map(|named| named.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_read_back_as_written() {
        let chunk = ChunkRecord {
            session: SessionId(10),
            tokens: 4,
            pending: Some(9),
            capped: Some(Cap {
                by: CapCause::Pages,
                reason: String::new(),
                given: 8,
                pages: vec![PagesShort { needed: 2, available: 1 }],
            }),
            ..ChunkRecord::default()
        };
        let wait = Wait {
            session: SessionId(u64::MAX),
            cause: WaitCause::GaveWay,
            reason: "\"quoted\"\n".to_owned(),
            by: Some(SessionId(10)),
            pages: Vec::new(),
        };
        let records = [
            (Record::Trace(Header { version: VERSION, ..Header::default() }), r#"{"event":"trace","version":1,"#),
            (
                Record::Added(Added { session: SessionId(1), ttft_s: Some(0.5), ..Added::default() }),
                r#"{"event":"added","time_s":0.0,"session":"session_00000001","tenant":0,"#,
            ),
            (
                Record::Planned(Planned { step: 3, chunks: vec![chunk], waits: vec![wait], ..Planned::default() }),
                r#"{"event":"planned","time_s":0.0,"step":3,"predicted_s":0.0,"pages":[],"chunks":[{"session":"session_0000000a","tokens":4,"pending":9,"capped":{"by":"pages","given":8,"#,
            ),
            (
                Record::Finished(StepFinished { took_s: 0.1 + 0.2, ..StepFinished::default() }),
                r#"{"event":"finished","#,
            ),
        ];
        for (record, begins) in records {
            let line = serde_json::to_string(&record).unwrap();
            assert!(line.starts_with(begins), "{line}");
            assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record);
        }
    }

    #[test]
    fn what_a_later_version_adds_is_read_over() {
        let cases = [
            (r#"{"event":"levitated","height_m":[1,2]}"#, Some(Record::Unknown)),
            (
                r#"{"event":"swapped","time_s":1,"step":2,"kind":"scheduler","component":"first","mood":{"a":[]}}"#,
                Some(Record::Swapped(Swapped {
                    time_s: 1.0,
                    step: 2,
                    kind: "scheduler".to_owned(),
                    component: "first".to_owned(),
                })),
            ),
            (r#"{"event":"ended","time_s":1,"session":"7","outcome":"stop"}"#, None),
            (r#"{"time_s":1}"#, None),
        ];
        for (line, expected) in cases {
            assert_eq!(serde_json::from_str::<Record>(line).ok(), expected, "{line}");
        }
        let line = r#"{"event":"ended","time_s":1,"session":"session_7","outcome":"evaporated"}"#;
        let Ok(Record::Ended(ended)) = serde_json::from_str(line) else { panic!("not read") };
        assert_eq!((ended.outcome, ended.session), (Outcome::Unknown, SessionId(7)));
    }
}
