//! What the formats of K and V cost the default model, in the reference's arithmetic: nothing else is rounded.

use serde_json::Value;
use setu_core::backend::WeightData;
use setu_core::{KvDType, Registries, Result};
use setu_engine::checkpoint::Checkpoint;
use setu_engine::load;
use setu_testkit::reference::{Matrix, ReferenceModel};
use setu_tests::models::default_model_or_skip;

fn logits(path: &str, kv_dtype: KvDType, tokens: &[u32]) -> Result<Matrix> {
    let checkpoint = Checkpoint::open(path.as_ref())?;
    let (info, registries) = (checkpoint.info(), Registries::linked_in());
    let model = (registries.models.get(&load::choose_model(&info, &registries.models)?)?.build)("{}")?;
    let graph = load::graph(model.as_ref(), &info, None)?;
    let weights = graph.weights.iter().map(|weight| {
        let tensors = weight.sources.iter().map(|source| checkpoint.require(source)).collect::<Result<Vec<_>>>()?;
        Ok(WeightData { dtype: tensors[0].dtype, parts: tensors.iter().map(|tensor| tensor.data).collect() })
    });
    ReferenceModel::new(&graph, &weights.collect::<Result<Vec<_>>>()?, kv_dtype)?.logits(tokens)
}

/// Mean over the rows of the Kullback-Leibler divergence of `found` from `expected`, in nats.
fn divergence(expected: &Matrix, found: &Matrix) -> f64 {
    let log_probs = |row: &[f64]| -> Vec<f64> {
        let highest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = row.iter().map(|x| (x - highest).exp()).sum::<f64>().ln() + highest;
        row.iter().map(|x| x - total).collect()
    };
    let of_row = |(expected, found): (&[f64], &[f64])| -> f64 {
        let (expected, found) = (log_probs(expected), log_probs(found));
        expected.iter().zip(&found).map(|(p, q)| p.exp() * (p - q)).sum()
    };
    expected.rows().zip(found.rows()).map(of_row).sum::<f64>() / expected.rows().len() as f64
}

#[test]
fn eight_bits_for_k_and_v_cost_the_default_model_little() {
    let Some(path) = default_model_or_skip("eight_bits_for_k_and_v_cost_the_default_model_little") else { return };
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/smollm2-135m-q4_1.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(text).unwrap()).unwrap();
    // A conversation with its answer.
    let case = golden["chat"].as_array().unwrap().last().unwrap();
    let ids = ["ids", "greedy"].into_iter().flat_map(|part| case[part].as_array().unwrap());
    let tokens: Vec<u32> = ids.map(|id| id.as_u64().unwrap() as u32).collect();
    let of = |kv_dtype| logits(&path, kv_dtype, &tokens).unwrap();
    let exact = of(KvDType::F32);
    for (kv_dtype, most) in [(KvDType::BF16, 1e-3), (KvDType::F8E4M3, 2e-2)] {
        let found = divergence(&exact, &of(kv_dtype));
        println!("{kv_dtype}: {found:.2e} nats over {} tokens", tokens.len());
        assert!(found < most, "{kv_dtype}: {found} nats, over {most}");
    }
}
