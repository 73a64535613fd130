//! The ABI as a plugin of each version has it compiled in: copies of every structure that crosses by reference.
//!
//! Today's types are read and written through the copies. A field that moves, shrinks or vanishes fails
//! here, and so does one that is added without raising [`ABI`]: then the minor number goes up, and what was
//! stays as it is for as long as its version is loaded. The structures of 0.1 stand whole; of 0.2 what it added.

use std::mem::{align_of, offset_of, size_of};

use setu_core::abi::{ABI, AbiVersion};
use setu_core::backend::{Carry, Masks, PageCopy, PageTables, SlotOpen, Step, StepOutputs, Want};
use setu_core::batcher::{Chunk, ChunkBuffer, Chunks};
use setu_core::rows::{Column, ColumnMut, Rows};
use setu_core::sampling::SamplingParams;
use setu_core::scheduler::{DecisionBuffer, Decisions, EventKind, Preemption, SessionEvent, Verdict};
use setu_core::view::{
    Budgets, KvGroupView, SessionState, SessionView, StepOutcome, StepTimeModel, StepView, StepWork, TenantView,
};
use setu_core::{SessionId, TenantId};

/// The structures of ABI 0.1.
mod v0_1 {
    #[repr(C)]
    pub struct Rows {
        pub first: *const u8,
        pub len: usize,
        pub stride: usize,
    }

    #[repr(C)]
    pub struct Column {
        pub first: *const u8,
        pub len: usize,
    }

    #[repr(C)]
    pub struct SessionView {
        pub id: u64,
        pub tenant: u32,
        pub priority: i32,
        /// Weight, arrival, first run, last token, deadlines of first token, gap and all.
        pub floats: [f64; 7],
        /// Prompt, cached, len, scheduled, computed, generated, most, pages held and shared, preemptions,
        /// tokens lost, steps in flight, state, adapter.
        pub counts: [u32; 14],
    }

    #[repr(C)]
    pub struct StepView {
        pub now_s: f64,
        pub step: u64,
        /// Budgets of tokens and sessions, steps in flight, reserved.
        pub counts: [u32; 4],
        pub sessions: Rows,
        pub kv_groups: Rows,
        pub last_step: *const u8,
        pub step_time: *const u8,
    }

    #[repr(C)]
    pub struct SessionEvent {
        pub id: u64,
        pub tenant: u32,
        pub kind: u32,
        pub time_s: f64,
        /// Prefill, cached, generated, reserved.
        pub counts: [u32; 4],
    }

    #[repr(C)]
    pub struct Decisions {
        pub rows: *mut Decision,
        pub capacity: u32,
        pub len: u32,
        pub text: *mut u8,
        pub text_capacity: u32,
        pub text_len: u32,
        pub wake_at_s: f64,
        pub dropped: u32,
        pub recording: u32,
    }

    #[repr(C)]
    #[derive(Clone, Copy)]
    pub struct Decision {
        pub id: u64,
        pub value: f64,
        /// Verb, start and length of the reason, argument of the verb.
        pub counts: [u32; 4],
    }

    #[repr(C)]
    pub struct Chunks {
        pub rows: *mut [u32; 2],
        pub capacity: u32,
        pub len: u32,
        pub wake_at_s: f64,
        pub dropped: u32,
        pub reserved: u32,
    }
}

/// What ABI 0.2 added, behind the structures of 0.1.
mod v0_2 {
    use super::v0_1;

    #[repr(C)]
    pub struct SessionView {
        pub before: v0_1::SessionView,
        /// Tenant index, handle, class, expected tokens, chunk cap, reserved.
        pub counts: [u32; 6],
        pub service_s: f64,
    }

    #[repr(C)]
    pub struct StepView {
        pub before: v0_1::StepView,
        pub tenants: v0_1::Rows,
    }

    #[repr(C)]
    pub struct TenantView {
        pub id: u32,
        /// Sessions, running, reserved.
        pub sessions: [u32; 3],
        /// Weight, active since.
        pub floats: [f64; 2],
        /// Tokens of prefill, cached, generated.
        pub tokens: [u64; 3],
        pub service_s: f64,
    }

    #[repr(C)]
    pub struct SessionEvent {
        pub before: v0_1::SessionEvent,
        pub cost_s: f64,
    }

    #[repr(C)]
    pub struct Chunks {
        /// `reserved` says since 0.2 whether reasons are recorded.
        pub before: v0_1::Chunks,
        pub notes: *mut [u32; 3],
        pub note_capacity: u32,
        pub note_len: u32,
        pub text: *mut u8,
        pub text_capacity: u32,
        pub text_len: u32,
    }
}

/// `today` as a plugin of an older version sees it.
fn seen<Today, Old>(today: &Today) -> &Old {
    assert!(size_of::<Today>() >= size_of::<Old>() && align_of::<Today>() >= align_of::<Old>());
    // SAFETY: both are repr(C) and hold plain data or pointers; that the prefix is the same is what the
    // tests find out.
    unsafe { &*std::ptr::from_ref(today).cast() }
}

fn seen_mut<Today, Old>(today: &mut Today) -> &mut Old {
    assert!(size_of::<Today>() >= size_of::<Old>() && align_of::<Today>() >= align_of::<Old>());
    // SAFETY: as for `seen`.
    unsafe { &mut *std::ptr::from_mut(today).cast() }
}

#[test]
fn sizes_are_those_of_the_version() {
    assert_eq!(ABI, AbiVersion { major: 0, minor: 2 }, "a new version: keep these copies, and add its own");
    let sizes = [
        ("Rows", size_of::<Rows<'_, u8>>(), size_of::<v0_1::Rows>()),
        ("Column", size_of::<Column<'_, u8>>(), size_of::<v0_1::Column>()),
        ("ColumnMut", size_of::<ColumnMut<'_, u8>>(), size_of::<v0_1::Column>()),
        ("SessionView", size_of::<SessionView>(), size_of::<v0_2::SessionView>()),
        ("StepView", size_of::<StepView<'_>>(), size_of::<v0_2::StepView>()),
        ("SessionEvent", size_of::<SessionEvent>(), size_of::<v0_2::SessionEvent>()),
        ("Decisions", size_of::<Decisions<'_>>(), size_of::<v0_1::Decisions>()),
        ("Chunks", size_of::<Chunks<'_>>(), size_of::<v0_2::Chunks>()),
        ("TenantView", size_of::<TenantView>(), size_of::<v0_2::TenantView>()),
        ("Chunk", size_of::<Chunk>(), 8),
        ("KvGroupView", size_of::<KvGroupView>(), 20),
        ("StepWork", size_of::<StepWork>(), 24),
        ("StepTimeModel", size_of::<StepTimeModel>(), 64),
        ("StepOutcome", size_of::<StepOutcome>(), 48),
        ("Carry", size_of::<Carry>(), 8),
        ("Want", size_of::<Want>(), 20),
        ("PageCopy", size_of::<PageCopy>(), 12),
        ("PageTables", size_of::<PageTables<'_>>(), 48),
        ("SlotOpen", size_of::<SlotOpen<'_>>(), 128),
        ("Step", size_of::<Step<'_>>(), 192),
        ("Masks", size_of::<Masks<'_>>(), 40),
        ("StepOutputs", size_of::<StepOutputs<'_>>(), 96),
    ];
    for (name, today, then) in sizes {
        assert_eq!(today, then, "{name} has changed: raise the ABI version if it grew, and take it back if not");
    }
}

#[test]
fn public_fields_stay_where_they_are() {
    macro_rules! offsets {
        ($($type:ty { $($field:ident: $offset:expr),* $(,)? })*) => {
            [$($((stringify!($type), stringify!($field), offset_of!($type, $field), $offset)),*),*]
        };
    }
    let offsets = offsets! {
        KvGroupView { page_tokens: 0, window_tokens: 4, total_pages: 8, free_pages: 12, reclaimable_pages: 16 }
        StepWork { prefill_tokens: 0, decodes: 4, prefill_context: 8, decode_context: 16 }
        StepTimeModel {
            base_s: 0, prefill_token_s: 8, decode_s: 16, prefill_context_s: 24, decode_context_s: 32, steps: 40,
            relative_error: 48, ratio_p95: 56,
        }
        StepOutcome {
            step: 0, predicted_s: 8, took_s: 16, prefill_tokens: 24, decodes: 28, prefill_context: 32,
            decode_context: 40,
        }
        Chunk { session: 0, tokens: 4 }
        Carry { token: 0, want: 4 }
        Want { row: 0, index: 4, flags: 8, top: 12, target: 16 }
        PageCopy { group: 0, from: 4, to: 8 }
        PageTables<'_> { offsets: 0, pages: 16, skipped: 32 }
        SlotOpen<'_> {
            slot: 0, top_k: 4, min_tokens: 8, temperature: 12, top_p: 16, min_p: 20, typical_p: 24,
            repetition_penalty: 28, presence_penalty: 32, frequency_penalty: 36, seed: 40, suppressed: 48,
            bias_tokens: 64, bias_values: 80, prompt: 96, output: 112,
        }
        Step<'_> {
            number: 0, row_offsets: 8, positions: 24, slots: 40, tokens: 56, carries: 72, page_tables: 96, copies: 120,
            opened_slots: 144, wants: 168,
        }
        Masks<'_> { wants: 0, words: 16, words_per_mask: 32 }
        StepOutputs<'_> {
            tokens: 0, logprobs: 16, top_tokens: 32, top_logprobs: 48, logits: 64, top_stride: 80, busy_s: 88,
        }
    };
    for (type_name, field, today, then) in offsets {
        assert_eq!(today, then, "{type_name}.{field} has moved");
    }
}

#[test]
fn a_step_view_reads_as_it_did() {
    let mut session = SessionView::default();
    session.id = SessionId(1);
    session.tenant = TenantId(2);
    session.priority = -3;
    session.tenant_weight = 4.0;
    session.arrival_s = 5.0;
    session.first_run_s = 6.0;
    session.last_token_s = 7.0;
    session.ttft_deadline_s = 8.0;
    session.itl_limit_s = 9.0;
    session.total_deadline_s = 10.0;
    session.prompt_tokens = 11;
    session.cached_tokens = 12;
    session.len_tokens = 13;
    session.scheduled_tokens = 14;
    session.computed_tokens = 15;
    session.generated_tokens = 16;
    session.max_tokens = 17;
    session.pages_held = 18;
    session.pages_shared = 19;
    session.preemptions = 20;
    session.tokens_lost = 21;
    session.steps_in_flight = 22;
    session.set_state(SessionState::Held);
    session.adapter = 24;
    let sessions = [SessionView::default(), session];
    let groups = [KvGroupView::new(16, 0, 100)];
    let (outcome, model) = (StepOutcome::default(), StepTimeModel::default());
    let budgets = Budgets { tokens: 30, sessions: 31, steps_in_flight: 32 };
    let view = StepView::new(33.0, 34, budgets, &sessions, &groups, (&outcome, &model));

    let old: &v0_1::StepView = seen(&view);
    assert_eq!((old.now_s, old.step, old.counts), (33.0, 34, [30, 31, 32, 0]));
    assert_eq!((old.sessions.len, old.kv_groups.len, old.kv_groups.stride), (2, 1, size_of::<KvGroupView>()));
    assert_eq!(old.kv_groups.first, groups.as_ptr().cast());
    assert_eq!(old.last_step, std::ptr::from_ref(&outcome).cast());
    assert_eq!(old.step_time, std::ptr::from_ref(&model).cast());
    // SAFETY: the second row of two, at the stride that the view tells.
    let old: &v0_1::SessionView = unsafe { &*old.sessions.first.byte_add(old.sessions.stride).cast() };
    assert_eq!((old.id, old.tenant, old.priority), (1, 2, -3));
    assert_eq!(old.floats, [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]);
    assert_eq!(old.counts, [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 4, 24]);
}

#[test]
fn what_0_2_added_to_views_stays_where_it_is() {
    let mut session = SessionView::default();
    session.tenant_index = 1;
    session.handle = 2;
    session.class = 3;
    session.expected_tokens = 4;
    session.chunk_cap = 5;
    session.service_s = 6.0;
    let old: &v0_2::SessionView = seen(&session);
    assert_eq!((old.counts, old.service_s), ([1, 2, 3, 4, 5, 0], 6.0));

    let mut tenant = TenantView::new(TenantId(1), 2.0);
    tenant.sessions = 3;
    tenant.running = 4;
    tenant.active_since_s = 5.0;
    tenant.prefill_tokens = 6;
    tenant.cached_tokens = 7;
    tenant.generated_tokens = 8;
    tenant.service_s = 9.0;
    let tenants = [tenant];
    let (outcome, model) = (StepOutcome::default(), StepTimeModel::default());
    let budgets = Budgets { tokens: 1, sessions: 1, steps_in_flight: 0 };
    let mut view = StepView::new(0.0, 1, budgets, &[], &[], (&outcome, &model));
    view.tenants = Rows::new(&tenants);
    let old: &v0_2::StepView = seen(&view);
    assert_eq!((old.tenants.len, old.tenants.stride), (1, size_of::<v0_2::TenantView>()));
    // SAFETY: the one row that the view tells of.
    let old: &v0_2::TenantView = unsafe { &*old.tenants.first.cast() };
    assert_eq!((old.id, old.sessions, old.floats), (1, [3, 4, 0], [2.0, 5.0]));
    assert_eq!((old.tokens, old.service_s), ([6, 7, 8], 9.0));

    let mut event = SessionEvent::new(EventKind::Overran, SessionId(0), TenantId(0), 1.0);
    event.cost_s = 2.0;
    let old: &v0_2::SessionEvent = seen(&event);
    assert_eq!((old.before.kind, old.cost_s), (5, 2.0));
}

#[test]
fn an_event_reads_as_it_did() {
    let mut event = SessionEvent::new(EventKind::Preempted, SessionId(1), TenantId(2), 3.0);
    event.prefill_tokens = 4;
    event.cached_tokens = 5;
    event.generated_tokens = 6;
    let old: &v0_1::SessionEvent = seen(&event);
    assert_eq!((old.id, old.tenant, old.kind, old.time_s, old.counts), (1, 2, 4, 3.0, [4, 5, 6, 0]));
}

#[test]
fn what_an_old_scheduler_writes_is_understood() {
    let mut buffer = DecisionBuffer::default();
    buffer.set_recording(true);
    buffer.fill(3, |decisions| {
        let old: &mut v0_1::Decisions = seen_mut(decisions);
        assert_eq!((old.capacity, old.len, old.text_capacity, old.text_len), (22, 0, 22 * 64, 0));
        assert_eq!((old.wake_at_s, old.dropped, old.recording), (f64::INFINITY, 0, 1));
        let rows = [
            v0_1::Decision { id: 7, value: 0.0, counts: [0, 0, 0, 0] },
            v0_1::Decision { id: 8, value: 0.0, counts: [2, 0, 3, 2] },
            v0_1::Decision { id: 9, value: 2.5, counts: [3, 1, 2, 0] },
            v0_1::Decision { id: 10, value: 0.0, counts: [1, 0, 0, 0] },
        ];
        // SAFETY: there is room for 22 rows and 22 × 64 bytes of text.
        unsafe {
            old.rows.copy_from_nonoverlapping(rows.as_ptr(), rows.len());
            old.text.copy_from_nonoverlapping(b"why".as_ptr(), 3);
        }
        (old.len, old.text_len, old.wake_at_s, old.dropped) = (4, 3, 11.0, 12);
    });
    let read: Vec<_> = buffer.iter().map(|decision| decision.unwrap()).collect();
    let read: Vec<_> = read.iter().map(|decision| (decision.id.0, decision.verdict, decision.reason)).collect();
    let expected = [
        (7, Verdict::Run, ""),
        (8, Verdict::Preempt(Preemption::Keep), "why"),
        (9, Verdict::Reject { retry_after_s: Some(2.5) }, "hy"),
        (10, Verdict::Wait, ""),
    ];
    assert_eq!(read, expected);
    assert_eq!((buffer.wake_at_s(), buffer.dropped()), (11.0, 12));
}

#[test]
fn what_an_old_batcher_writes_is_understood() {
    let mut buffer = ChunkBuffer::default();
    buffer.fill(3, |chunks| {
        let old: &mut v0_1::Chunks = seen_mut(chunks);
        assert_eq!((old.capacity, old.len, old.dropped, old.reserved), (19, 0, 0, 0));
        // SAFETY: there is room for 19 rows.
        unsafe { old.rows.copy_from_nonoverlapping([[5, 6], [7, 8]].as_ptr(), 2) };
        (old.len, old.wake_at_s, old.dropped) = (2, 9.0, 10);
    });
    assert_eq!(buffer.chunks(), [Chunk { session: 5, tokens: 6 }, Chunk { session: 7, tokens: 8 }]);
    assert_eq!((buffer.wake_at_s(), buffer.dropped()), (9.0, 10));
}

#[test]
fn what_a_0_2_policy_writes_is_understood() {
    let mut buffer = DecisionBuffer::default();
    buffer.fill(1, |decisions| decisions.run_capped(SessionId(7), 64, "capped"));
    let read: Vec<_> = buffer.iter().map(|decision| decision.unwrap()).collect();
    assert_eq!((read[0].verdict, read[0].chunk_cap, read[0].reason), (Verdict::Run, 64, "capped"));

    let mut buffer = ChunkBuffer::default();
    buffer.set_recording(true);
    buffer.fill(3, |chunks| {
        let old: &mut v0_2::Chunks = seen_mut(chunks);
        assert_eq!((old.before.reserved, old.note_capacity, old.note_len), (1, 19, 0));
        assert_eq!((old.text_capacity, old.text_len), (19 * 64, 0));
        // SAFETY: there is room for 19 notes and 19 × 64 bytes of text.
        unsafe {
            old.notes.write([5, 1, 2]);
            old.text.copy_from_nonoverlapping(b"why".as_ptr(), 3);
        }
        (old.note_len, old.text_len) = (1, 3);
    });
    assert_eq!(buffer.reasons().collect::<Vec<_>>(), [(5, "hy")]);
}

#[test]
fn columns_and_rows_read_as_they_did() {
    let mut numbers = [1u32, 2, 3];
    let column = Column::new(&numbers);
    let old: &v0_1::Column = seen(&column);
    assert_eq!((old.first, old.len), (numbers.as_ptr().cast(), 3));
    let at = numbers.as_ptr();
    let column = ColumnMut::new(&mut numbers);
    let old: &v0_1::Column = seen(&column);
    assert_eq!((old.first, old.len), (at.cast(), 3));
    let wants = [Want::new(1, 2, Want::SAMPLE), Want::new(3, 4, Want::SCORE)];
    let rows = Rows::new(&wants);
    let old: &v0_1::Rows = seen(&rows);
    assert_eq!((old.first, old.len, old.stride), (wants.as_ptr().cast(), 2, 20));
    let params = SamplingParams::default();
    let slot = SlotOpen::new(3, &params, 4, (&[5], &[6.0]), &[7], (&[8], &[9]));
    assert_eq!((slot.slot, slot.seed, slot.bias_values[0], slot.output[0]), (3, 4, 6.0, 9));
}
