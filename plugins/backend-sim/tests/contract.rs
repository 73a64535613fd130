//! Steps without arithmetic: their time, their tokens, their pages.

use setu_backend_sim::{SimBackend, SimConfig};
use setu_core::backend::{Backend, CompileOptions, Executable, NO_TOKEN, Want};
use setu_core::component::Component;
use setu_core::config::Config;
use setu_core::graph::{Graph, GraphBuilder, KvGroupKind, KvLayer, Shard};
use setu_core::{Error, ErrorKind, Result};
use setu_testkit::backend::rig::{Rig, options};
use setu_testkit::steps::{Outputs, SlotData, StepData};

const VOCAB: u32 = 60;

fn backend(config: &str) -> SimBackend {
    SimBackend::build(SimConfig::from_json(config).unwrap()).unwrap()
}

fn graph(kinds: &[KvGroupKind]) -> Graph {
    let build = || -> Result<Graph> {
        let mut g = GraphBuilder::new("two groups", VOCAB, 128);
        let table = g.weight("embed", "embed", &[VOCAB as usize, 4], Shard::Replicated);
        let mut x = g.embed("embed", table)?;
        for (index, &kind) in kinds.iter().enumerate() {
            let group = g.kv_group(&format!("group {index}"), kind);
            let layer = g.kv_layer(KvLayer { group, heads: 1, k_dim: 4, v_dim: 4 });
            x = g.attention(&format!("attend {index}"), [x, x, x], layer, 1, 1.0)?;
        }
        let x = g.select("select", x)?;
        let head = g.weight("head", "head", &[VOCAB as usize, 4], Shard::Replicated);
        let x = g.linear("head", x, head, None)?;
        g.output("logits", x);
        g.finish()
    };
    build().unwrap()
}

/// Compiled without any weight.
fn compile(config: &str, graph: &Graph, options: &CompileOptions) -> Result<Box<dyn Executable>> {
    backend(config).compile(graph, &[], options)
}

fn run(exec: &mut dyn Executable, step: &StepData) -> (Outputs, f64) {
    let ticket = step.with(|step| exec.submit(step)).unwrap();
    let mut outputs = Outputs::of(step, VOCAB);
    let mut lent = outputs.lend();
    exec.wait(ticket, &mut lent).unwrap();
    let busy_s = lent.busy_s;
    (outputs, busy_s)
}

/// Two sequences, a prompt of 10 tokens and the 21st token of another.
fn mixed_step(rig: &mut Rig<'_>) -> StepData {
    let mut long = rig.random_sequence(21);
    let mut step = rig.step();
    rig.add(&mut step, &mut long, 20);
    rig.run(&step).unwrap();
    let mut prompt = rig.random_sequence(10);
    let mut step = rig.step();
    rig.add(&mut step, &mut prompt, 10);
    rig.add(&mut step, &mut long, 1);
    step
}

#[test]
fn a_step_takes_what_its_chunks_and_contexts_take() {
    let config = r#"{"base_us": 1000, "prefill_token_us": 20, "decode_us": 300, "prefill_context_ns": 400,
        "decode_context_ns": 5000}"#;
    let graph = graph(&[KvGroupKind::Full]);
    let exec = compile(config, &graph, &options()).unwrap();
    assert!(exec.info().virtual_time);
    let mut rig = Rig::of(&graph, exec, options());
    let step = mixed_step(&mut rig);
    let (_, busy_s) = run(&mut *rig.exec, &step);
    let expected_s = 1e-3 + 10.0 * 20e-6 + 55.0 * 400e-9 + 300e-6 + 21.0 * 5e-6;
    assert!((busy_s - expected_s).abs() < 1e-12, "{busy_s} instead of {expected_s}");
}

#[test]
fn jitter_is_of_the_seed_and_the_step() {
    let graph = graph(&[KvGroupKind::Full]);
    let times = |config: &str| -> Vec<f64> {
        let mut rig = Rig::of(&graph, compile(config, &graph, &options()).unwrap(), options());
        let mut sequence = rig.random_sequence(20);
        let mut step_s = || {
            let mut step = rig.step();
            rig.add(&mut step, &mut sequence, 1);
            run(&mut *rig.exec, &step).1
        };
        (0..20).map(|_| step_s()).collect()
    };
    let (one, same, other) = (
        times(r#"{"jitter": 0.2, "seed": 1}"#),
        times(r#"{"jitter": 0.2, "seed": 1}"#),
        times(r#"{"jitter": 0.2, "seed": 2}"#),
    );
    assert_eq!(one, same);
    assert_ne!(one, other);
    assert!(times("{}").iter().all(|&busy_s| busy_s > 0.0));
}

#[test]
fn tokens_depend_on_seed_and_position_alone_and_all_are_as_likely() {
    let graph = graph(&[KvGroupKind::Full]);
    let slot = |slot: u32, seed| SlotData { slot, seed, suppressed: (0..50).collect(), ..SlotData::default() };
    let tokens = |slots: &[SlotData]| {
        let mut rig = Rig::of(&graph, compile("{}", &graph, &options()).unwrap(), options());
        let mut step = rig.step();
        step.opened_slots = slots.to_vec();
        for slot in slots {
            let mut sequence = rig.random_sequence(7);
            sequence.slot = slot.slot;
            let row = rig.add(&mut step, &mut sequence, 7);
            let mut want = Want::new(row, 6, Want::SAMPLE | Want::LOGPROB | Want::LOGITS);
            want.top = 3;
            step.wants.push(want);
        }
        let (outputs, _) = run(&mut *rig.exec, &step);
        for want in 0..slots.len() {
            let likely = -f64::from(VOCAB).ln() as f32;
            assert_eq!(outputs.logprobs[want], likely);
            assert_eq!(outputs.top(want).collect::<Vec<_>>(), [(0, likely), (1, likely), (2, likely)]);
            assert_eq!(outputs.logits_row(want), [0.0; VOCAB as usize]);
        }
        assert!(outputs.tokens.iter().all(|token| (50..VOCAB).contains(token)), "{:?}", outputs.tokens);
        outputs.tokens
    };
    let together = tokens(&[slot(3, 8), slot(0, 9), slot(5, 10)]);
    assert_eq!(tokens(&[slot(1, 9)]), together[1..2]);
    assert!(together.iter().any(|&token| token != together[0]));
}

#[test]
fn nothing_is_sampled_where_nothing_is_allowed() {
    let graph = graph(&[KvGroupKind::Full]);
    let mut rig = Rig::of(&graph, compile("{}", &graph, &options()).unwrap(), options());
    let mut step = rig.step();
    step.opened_slots.push(SlotData { suppressed: (0..VOCAB).collect(), ..SlotData::default() });
    let mut sequence = rig.random_sequence(3);
    sequence.slot = 0;
    let row = rig.add(&mut step, &mut sequence, 3);
    step.wants.push(Want::new(row, 2, Want::SAMPLE));
    assert_eq!(run(&mut *rig.exec, &step).0.tokens, [NO_TOKEN]);
}

#[test]
fn pages_are_as_many_as_asked_for() {
    let full = graph(&[KvGroupKind::Full]);
    let windowed = graph(&[KvGroupKind::Full, KvGroupKind::SlidingWindow { tokens: 20 }]);
    // 8 rows of 128 tokens, pages of 16; a page takes 16 × 8 × 4 bytes. A window's session holds 20 + 64 tokens.
    type Case<'a> = (&'a str, &'a Graph, u64, &'a [u32], std::result::Result<Vec<u32>, &'a str>);
    let cases: [Case<'_>; 8] = [
        ("{}", &full, 0, &[], Ok(vec![72])),
        ("{}", &windowed, 0, &[], Ok(vec![72, 56])),
        ("{}", &full, 5120, &[], Ok(vec![10])),
        (r#"{"kv_pages": 500}"#, &windowed, 0, &[], Ok(vec![500, 500])),
        (r#"{"kv_pages": 500}"#, &windowed, 0, &[7, 8], Ok(vec![7, 8])),
        (r#"{"kv_pages": 500}"#, &full, 5120, &[], Err("KV pages need 1 MiB, [kv] memory allows 0 MiB: raise it")),
        ("{}", &full, 500, &[], Err("needs 1 MiB, there are 0 MiB for them: raise [kv] memory")),
        ("{}", &full, 0, &[7, 8], Err("kv_pages has 2 entries, the model 1 KV groups")),
    ];
    for (config, graph, kv_bytes, kv_pages, expected) in cases {
        let mut options = options();
        options.kv_bytes = kv_bytes;
        options.kv_pages = kv_pages.to_vec();
        match (compile(config, graph, &options).map(|exec| exec.info().kv_pages), expected) {
            (Ok(pages), Ok(expected)) => assert_eq!(pages, expected, "{config} {kv_bytes} {kv_pages:?}"),
            (Err(error), Err(expected)) => assert!(error.message().contains(expected), "{error} is not {expected}"),
            (found, expected) => panic!("{config} {kv_bytes} {kv_pages:?}: {found:?} is not {expected:?}"),
        }
    }
}

#[test]
fn impossible_settings_are_refused() {
    let cases = [
        (r#"{"base_us": 0}"#, "base_us"),
        (r#"{"decode_us": -1}"#, "decode_us"),
        (r#"{"jitter": 5}"#, "jitter"),
        (r#"{"max_in_flight": 0}"#, "max_in_flight"),
    ];
    for (config, name) in cases {
        let error: Error = SimConfig::from_json(config).unwrap_err();
        assert!(error.kind() == ErrorKind::Config && error.message().contains(name), "{error}");
    }
    let mut options = options();
    options.max_model_len = 129;
    assert!(compile("{}", &graph(&[KvGroupKind::Full]), &options).is_err());
}
