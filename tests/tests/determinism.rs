//! On one machine the same prompt and seed give the same tokens, whatever else is different.

use setu_core::sampling::SamplingParams;
use setu_engine::{Event, Request, Session};
use setu_host::serving::Serving;
use setu_tests::extensions::{cdylib, plugin_folder};
use setu_tests::models::default_model_or_skip;

const PROMPT: &str = "The lighthouse keeper opened the door one stormy night and found, lying on the step, a small wooden box. \
                      Inside the box there was a letter, a key made of brass, and a map of an island that";

fn params(seed: u64) -> SamplingParams {
    let mut params = SamplingParams::default();
    params.temperature = 0.9;
    params.top_p = 0.95;
    params.repetition_penalty = 1.1;
    params.frequency_penalty = 0.2;
    params.seed = Some(seed);
    params.max_tokens = Some(24);
    params.ignore_eos = true;
    params
}

fn tokens(session: &Session) -> Vec<u32> {
    let tokens = session.events().filter_map(|event| match event {
        Event::Token(token) => Some(token.token),
        Event::Finished(finished) => {
            assert!(matches!(finished.reason, setu_engine::FinishReason::Length), "{:?}", finished.reason);
            None
        }
        Event::Prompt(_) => None,
    });
    tokens.collect()
}

fn start(model: &str, flags: &[&str]) -> Serving {
    // However busy the machine is.
    let own = ["--model.name", model, "--scheduler.queue_timeout_s", "0"];
    let flags: Vec<&str> = own.iter().chain(flags).copied().collect();
    Serving::from_flags(&flags).expect("a running engine")
}

fn answer(serving: &Serving, seed: u64) -> Vec<u32> {
    let prompt = serving.encode(PROMPT, false).expect("tokens");
    tokens(&serving.engine().add_session(Request::new(prompt, params(seed))).expect("valid")[0])
}

#[test]
fn the_same_seed_gives_the_same_tokens() {
    let Some(model) = default_model_or_skip("determinism") else { return };
    let alone = start(&model, &[]);
    let expected = answer(&alone, 7);
    assert_eq!(expected.len(), 24);
    assert_ne!(expected, answer(&alone, 8), "the seed matters");
    assert_eq!(expected, answer(&alone, 7), "with its prefix in the cache");

    // Among 32 strangers of many lengths, which come and go meanwhile.
    let prompt = alone.encode(PROMPT, false).expect("tokens");
    let strangers: Vec<Session> = (0..32u64)
        .map(|stranger| {
            let ids: Vec<u32> =
                (0..5 + stranger * 7).map(|i| 1000 + (stranger * 131 + i * 17) as u32 % 20000).collect();
            let mut params = params(stranger);
            params.max_tokens = Some(4 + stranger as u32);
            alone.engine().add_session(Request::new(ids, params)).expect("valid").remove(0)
        })
        .collect();
    let session = &alone.engine().add_session(Request::new(prompt.clone(), params(7))).expect("valid")[0];
    assert_eq!(expected, tokens(session), "in a batch of strangers");
    drop(strangers);

    // Preempted again and again.
    let session = &alone.engine().add_session(Request::new(prompt.clone(), params(7))).expect("valid")[0];
    let mut seen = Vec::new();
    for event in session.events() {
        match event {
            Event::Token(token) => {
                seen.push(token.token);
                if seen.len() % 5 == 0 {
                    alone.engine().preempt_all().expect("alive");
                    alone.engine().clear_prefix_cache().expect("alive");
                }
            }
            Event::Finished(finished) => assert!(finished.usage.preemptions > 0, "it was preempted"),
            Event::Prompt(_) => {}
        }
    }
    assert_eq!(expected, seen, "after forced preemptions");

    // As one of several answers: answer 2 of seed 5 is drawn with seed 7.
    let mut several = params(5);
    several.n = 3;
    let sessions = alone.engine().add_session(Request::new(prompt, several)).expect("valid");
    assert_eq!(expected, tokens(&sessions[2]), "as the third answer to one prompt");
    drop(alone);

    for flags in [
        &["--kv.prefix_cache=false"][..],
        &["--batcher.chunk_tokens", "1"],
        &["--batcher.chunk_tokens", "16"],
        &["--batcher.chunk_tokens", "512"],
        &["--backend.threads", "1"],
        &["--backend.threads", "3"],
        &["--kv.page_tokens", "64"],
    ] {
        let serving = start(&model, flags);
        assert_eq!(expected, answer(&serving, 7), "{flags:?}");
    }

    let packages = ["setu-scheduler-fcfs", "setu-batcher-fixed-chunk", "setu-model-llama", "setu-backend-cpu"];
    let files: Vec<(String, _)> = packages.iter().map(|package| (format!("{package}.so"), cdylib(package))).collect();
    let folder = plugin_folder(files.iter().map(|(name, file)| (name.as_str(), file.clone())));
    let serving = start(&model, &["--plugins", folder.path().to_str().expect("UTF-8")]);
    assert_eq!(expected, answer(&serving, 7), "with every component loaded as .so");
}
