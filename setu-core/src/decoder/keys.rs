//! Reading single hyper-parameters; errors name the key.

use serde_json::Value;

use super::Family;
use crate::error::{Error, Result};
use crate::model::CheckpointInfo;

pub(super) fn lacks(key: &str) -> Error {
    Error::invalid(format!("the checkpoint lacks the hyper-parameter `{key}`"))
}

/// A number over 0 that an f32 can hold, or `None` where the key is missing.
pub(super) fn positive(checkpoint: &CheckpointInfo, key: &str) -> Result<Option<f64>> {
    let number = checkpoint.number(key)?;
    match number.filter(|&number| !is_positive(number)) {
        Some(number) => Err(Error::invalid(format!("the hyper-parameter `{key}` must be over 0, not {number}"))),
        None => Ok(number),
    }
}

pub(super) fn is_positive(number: f64) -> bool {
    (number as f32) > 0.0 && (number as f32).is_finite()
}

/// A factor by which something is stretched.
pub(super) fn need_factor(checkpoint: &CheckpointInfo, key: &str) -> Result<f64> {
    match checkpoint.number(key)?.ok_or_else(|| lacks(key))? {
        factor if (1.0..=1e6).contains(&factor) => Ok(factor),
        factor => Err(Error::invalid(format!("the hyper-parameter `{key}` must be at least 1, not {factor}"))),
    }
}

/// A count that may be 0, or `None` where the key is missing.
pub(super) fn count_or_zero(checkpoint: &CheckpointInfo, key: &str) -> Result<Option<u32>> {
    match checkpoint.get(key).and_then(Value::as_u64) {
        Some(0) => Ok(Some(0)),
        _ => checkpoint.count(key),
    }
}

/// A count that a GGUF file may also give layer by layer; only where all layers agree.
pub(super) fn uniform(family: &Family, checkpoint: &CheckpointInfo, key: &str) -> Result<Option<u32>> {
    let Some(Value::Array(layers)) = checkpoint.get(key) else { return checkpoint.count(key) };
    let Some(first) = layers.first() else { return Ok(None) };
    if layers.iter().any(|layer| layer != first) {
        let name = family.name;
        return Err(Error::unsupported(format!("`{key}` differs between layers, which model {name} doesn't build")));
    }
    CheckpointInfo::new(checkpoint.format, "", serde_json::json!({ key: first }), Vec::new()).count(key)
}

/// `total / parts`, where a checkpoint leaves the quotient out.
pub(super) fn divided(total: u32, parts: u32, total_key: &str, parts_key: &str) -> Result<u32> {
    if total.is_multiple_of(parts) {
        return Ok(total / parts);
    }
    Err(Error::invalid(format!(
        "`{total_key}` {total} is no multiple of `{parts_key}` {parts}, and no head width is given"
    )))
}

/// Keys of GGUF files that change what a model computes and that none of the families here has, with the values that
/// change nothing. A writer that states another value means another model.
const UNKNOWN_TO_ALL: [(&str, &[f64]); 16] = [
    ("attention.causal", &[1.0]),
    ("attention.clamp_kqv", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("attention.scale", &[0.0]),
    ("attention.temperature_scale", &[0.0]),
    ("attn_logit_softcapping", &[0.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("expert_gating_func", &[0.0, 1.0]),
    ("expert_shared_count", &[0.0]),
    ("expert_shared_feed_forward_length", &[0.0]),
    ("expert_weights_scale", &[0.0, 1.0]),
    ("final_logit_softcapping", &[0.0]),
    ("leading_dense_block_count", &[0.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("rope.scaling.yarn_log_multiplier", &[0.0]),
];

/// Refuses a GGUF file whose keys ask for what no piece here computes.
pub(super) fn refuse_unknown(family: &Family, checkpoint: &CheckpointInfo) -> Result<()> {
    for (name, inert) in UNKNOWN_TO_ALL {
        let key = family.key(name);
        let Some(value) = checkpoint.get(&key) else { continue };
        let number = value.as_bool().map(|flag| f64::from(u8::from(flag))).or(value.as_f64());
        if !number.is_some_and(|number| inert.contains(&number)) {
            let name = family.name;
            return Err(Error::unsupported(format!("`{key}` is {value}, which model {name} doesn't build")));
        }
    }
    Ok(())
}
