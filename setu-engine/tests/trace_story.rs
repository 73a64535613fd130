//! Stories of a record written by hand: what people read, word for word.

use setu_core::SessionId;
use setu_engine::trace::{Summarizer, Teller, TraceReader};

/// Three sessions: the second waits for pages, is preempted by the first and told so; the third is turned away.
fn trace() -> String {
    let mut lines = vec![
        r#"{"event":"trace","version":1,"engine":"0.1.0","time_s":10,"scheduler":"fcfs","batcher":"fixed_chunk","token_budget":512,"session_budget":8,"kv_groups":[{"page_tokens":16,"total_pages":64}]}"#.to_owned(),
        r#"{"event":"added","time_s":10,"session":"session_00000001","tenant":0,"prompt_tokens":600,"max_tokens":100,"expected_tokens":100}"#.to_owned(),
        r#"{"event":"added","time_s":10.1,"session":"session_00000002","tenant":3,"tenant_weight":2,"priority":7,"prompt_tokens":300,"max_tokens":40,"expected_tokens":24,"ttft_s":0.5,"itl_s":0.02}"#.to_owned(),
        r#"{"event":"planned","time_s":10.1,"step":1,"predicted_s":0,"pages":[{"free":20,"reclaimable":5}],"chunks":[{"session":"session_00000001","tokens":512,"pending":600,"capped":{"by":"batcher","reason":"chunk_tokens"}}],"waits":[{"session":"session_00000002","cause":"scheduler","reason":"its prompt needs 19 pages, 2 are left"}]}"#.to_owned(),
        r#"{"event":"finished","time_s":10.3,"step":1,"took_s":0.2,"prefill_tokens":512}"#.to_owned(),
        r#"{"event":"planned","time_s":10.3,"step":2,"predicted_s":0.05,"pages":[{"free":4,"reclaimable":0}],"chunks":[{"session":"session_00000001","tokens":88,"context":512}],"waits":[{"session":"session_00000002","cause":"scheduler","reason":"its prompt needs 19 pages, 4 are left"}]}"#.to_owned(),
        r#"{"event":"finished","time_s":10.34,"step":2,"predicted_s":0.05,"took_s":0.04,"prefill_tokens":88}"#.to_owned(),
        r#"{"event":"planned","time_s":10.34,"step":3,"predicted_s":0.09,"pages":[{"free":22,"reclaimable":3}],"chunks":[{"session":"session_00000001","tokens":1,"context":600},{"session":"session_00000002","tokens":256,"pending":268,"context":32,"cached":32,"reason":"oldest","capped":{"by":"pages","given":268,"pages":[{"needed":17,"available":16}]}}]}"#.to_owned(),
        r#"{"event":"finished","time_s":10.44,"step":3,"predicted_s":0.09,"took_s":0.1,"prefill_tokens":256,"decodes":1}"#.to_owned(),
        r#"{"event":"planned","time_s":10.44,"step":4,"predicted_s":0.02,"pages":[{"free":1,"reclaimable":0}],"chunks":[{"session":"session_00000001","tokens":1,"context":601},{"session":"session_00000002","tokens":12,"context":288}]}"#.to_owned(),
        r#"{"event":"finished","time_s":10.46,"step":4,"predicted_s":0.02,"took_s":0.02,"prefill_tokens":12,"decodes":1}"#.to_owned(),
    ];
    for token in 0..10 {
        let (step, time_s) = (5 + token, 10.46 + 0.01 * f64::from(token));
        lines.push(format!(r#"{{"event":"planned","time_s":{time_s},"step":{step},"predicted_s":0.009,"chunks":[{{"session":"session_00000002","tokens":1,"context":{}}}]}}"#, 300 + token));
        lines.push(format!(
            r#"{{"event":"finished","time_s":{},"step":{step},"predicted_s":0.009,"took_s":0.01,"decodes":1}}"#,
            time_s + 0.01
        ));
    }
    lines.extend([
        r#"{"event":"preempted","time_s":10.57,"step":15,"session":"session_00000002","cause":"pages","by":"session_00000001","tokens_lost":310,"pages":20}"#.to_owned(),
        r#"{"event":"planned","time_s":10.57,"step":15,"predicted_s":0.01,"pages":[{"free":0,"reclaimable":0}],"chunks":[{"session":"session_00000001","tokens":1,"context":602}],"waits":[{"session":"session_00000002","cause":"gave_way","by":"session_00000001"}]}"#.to_owned(),
        r#"{"event":"finished","time_s":10.58,"step":15,"predicted_s":0.01,"took_s":0.01,"decodes":1}"#.to_owned(),
        r#"{"event":"fault","time_s":10.6,"step":18,"kind":"scheduler","component":"fcfs","message":"panicked: out of ideas","replaced_by":"fcfs"}"#.to_owned(),
        r#"{"event":"planned","time_s":10.6,"step":18,"predicted_s":0.02,"pages":[{"free":20,"reclaimable":9}],"chunks":[{"session":"session_00000002","tokens":22,"context":288,"cached":288}]}"#.to_owned(),
        r#"{"event":"finished","time_s":10.625,"step":18,"predicted_s":0.02,"took_s":0.025,"prefill_tokens":22}"#.to_owned(),
        r#"{"event":"ended","time_s":10.625,"session":"session_00000002","outcome":"stop","stop_token":2,"prompt_tokens":300,"cached_tokens":32,"generated_tokens":11,"preemptions":1,"tokens_lost":310,"service_s":0.2}"#.to_owned(),
        r#"{"event":"ended","time_s":10.7,"session":"session_00000003","outcome":"rejected","reason":"the engine holds 2 sessions already","retry_after_s":1,"prompt_tokens":9}"#.to_owned(),
    ]);
    lines.join("\n")
}

fn story(session: u64) -> Option<String> {
    let text = trace();
    let mut reader = TraceReader::new(text.as_bytes()).unwrap();
    let mut teller = Teller::new(SessionId(session), reader.header());
    while let Some(record) = reader.read().unwrap() {
        teller.take(record);
    }
    assert_eq!(reader.skipped().to_string(), "");
    teller.finish().map(|story| story.to_string())
}

#[test]
fn a_session_that_waited_ran_and_was_preempted() {
    let expected = "\
session_00000002: a prompt of 300 tokens, at most 40 to generate (24 expected); tenant 3 of weight 2, priority 7; \
first token within 500.0 ms; between tokens at most 20.0 ms
        0 ms  arrived
        0 ms  waited 240.0 ms, 2 steps
              - 2 steps: the scheduler (fcfs) had it wait: its prompt needs 19 pages, 2 are left; at last: its prompt \
needs 19 pages, 4 are left (pages left then: 25 of 64)
    240.0 ms  computed 268 tokens of its prompt in 2 steps of 20.0 ms (at most 100.0 ms, predicted 55.0 ms); 32 \
tokens needn't be computed: they were in the prefix cache
              - 1 step: 256 of 268 tokens, the engine trimmed it; the 268 that the batcher gave needed 17 pages and \
16 could be given out
              - 1 step: the scheduler (fcfs) ran it: oldest
    360.0 ms  its first token was there, 140.0 ms ahead of its deadline
    360.0 ms  decoded 10 tokens in 10 steps of 10.0 ms (at most 10.0 ms, predicted 9.0 ms)
    470.0 ms  was preempted by session_00000001, which came before it and needed pages; it lost 20 pages with 310 \
computed tokens
    470.0 ms  waited 30.0 ms, 3 steps
              - 3 steps: it came behind session_00000001, which needed pages (pages left then: 0 of 64)
    500.0 ms  the scheduler fcfs was at fault and fcfs took over: panicked: out of ideas
    500.0 ms  computed 22 tokens again in 1 step of 25.0 ms (predicted 20.0 ms); 288 tokens needn't be computed: \
they were in the prefix cache
    525.0 ms  ended: token 2 ends answers; 11 tokens generated, 32 of 300 prompt tokens from the prefix cache, 1 \
preemption that cost 310 computed tokens, 200.0 ms of step time; longest gap between tokens 65.0 ms, 1 gap over its \
limit
";
    assert_eq!(story(2).unwrap(), expected);
}

#[test]
fn a_session_that_still_runs_when_the_record_ends() {
    let expected = "\
session_00000001: a prompt of 600 tokens, at most 100 to generate; tenant 0
        0 ms  arrived
    100.0 ms  computed 600 tokens of its prompt in 2 steps of 40.0 ms (at most 200.0 ms, predicted 50.0 ms)
              - 1 step: 512 of 600 tokens, the batcher (fixed_chunk) gave no more: chunk_tokens
    340.0 ms  its first token was there
    340.0 ms  decoded 3 tokens in 3 steps of 20.0 ms (at most 100.0 ms, predicted 40.0 ms)
              - 2 steps held prompts of others as well and took 20.0 ms
    600.0 ms  the scheduler fcfs was at fault and fcfs took over: panicked: out of ideas
    700.0 ms  the record ends here; the session was still live
";
    assert_eq!(story(1).unwrap(), expected);
}

#[test]
fn a_session_that_was_turned_away_and_one_that_never_was() {
    let expected = "\
session_00000003: it came before the record begins
    700.0 ms  was rejected: the engine holds 2 sessions already; trying again may help after 1000.0 ms; 0 tokens \
generated, 0 of 9 prompt tokens from the prefix cache
";
    assert_eq!(story(3).unwrap(), expected);
    assert_eq!(story(4), None);
}

#[test]
fn all_of_it_in_brief() {
    let text = trace();
    let mut reader = TraceReader::new(text.as_bytes()).unwrap();
    let mut summarizer = Summarizer::new(reader.header());
    while let Some(record) = reader.read().unwrap() {
        summarizer.take(record);
    }
    let summary = summarizer.finish().to_string();
    let (brief, fit) = summary.split_once("\n# Fitted to the 16 steps of this record.\n").unwrap();
    let expected = "\
700.0 ms, 3 sessions, 16 steps; scheduler fcfs, batcher fixed_chunk
steps took 10.0 ms in the median, p99 200.0 ms, at most 200.0 ms; predictions were off by 10.0 % in the median, p99 25.0 %
step 18: the scheduler fcfs was at fault and fcfs took over: panicked: out of ideas

session           tenant   prompt  cached generated       arrived       waited  first token        ended  how it ended
session_00000001       0      600       0         0       10.00 s     100.0 ms     340.0 ms            -  live
session_00000002       3      300      32        11       10.10 s     240.0 ms     360.0 ms     525.0 ms  stop, 1 preemption
session_00000003       0        9       0         0       10.70 s            -            -         0 ms  rejected
";
    assert_eq!(brief, expected);
    let lines: Vec<&str> = fit.lines().map(|line| line.split(" = ").next().unwrap()).collect();
    let keys = ["base_us", "prefill_token_us", "decode_us", "prefill_context_ns", "decode_context_ns"];
    assert_eq!(lines[..2], ["[backend]", "type"]);
    assert_eq!(lines[2..7], keys);
}
