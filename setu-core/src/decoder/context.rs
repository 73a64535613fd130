//! How far a session reaches: the rotary embedding as a checkpoint describes it, and the lengths that it is good for.

use serde_json::Value;

use super::keys::{is_positive, lacks, need_factor, positive};
use super::rope::{Llama3, LongRope, Rope, Scaling, Yarn, longrope_attention_factor, yarn_attention_factor};
use super::{Family, Hyper};
use crate::error::{Error, Result};
use crate::graph::{GraphBuilder, RopeStyle};
use crate::model::{CheckpointFormat, CheckpointInfo, shortened};

/// The tensors of a GGUF file that divide the rotary frequencies: one for all, or two to choose from.
const ROPE_FREQS: &str = "rope_freqs.weight";
const ROPE_SHORT: &str = "rope_factors_short.weight";
const ROPE_LONG: &str = "rope_factors_long.weight";

/// The rotary embedding and the lengths that it is good for.
#[derive(Clone, Debug, PartialEq)]
pub struct Context {
    pub rope: Rope,
    pub style: RopeStyle,
    /// Longest session where the operator doesn't say.
    pub default_len: u32,
    /// Longest session that the rotary embedding is good for.
    pub longest_len: u32,
    /// How `longest_len` comes about, for errors.
    pub longest_len_is: String,
    /// Tensors of the checkpoint whose values are in `rope`.
    pub tensors: Vec<&'static str>,
}

/// Rotary frequencies of a graph, and the columns that they turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotary {
    pub table: u32,
    pub style: RopeStyle,
}

impl Context {
    /// Reads and checks it.
    ///
    /// # Errors
    /// Names the key or tensor that is missing, makes no sense, or asks for a scaling that the family doesn't have.
    pub fn read(family: &Family, checkpoint: &CheckpointInfo, hyper: &Hyper) -> Result<Context> {
        let context = match checkpoint.format {
            CheckpointFormat::Hf => from_hf(family, checkpoint, hyper),
            CheckpointFormat::Gguf => from_gguf(family, checkpoint, hyper),
        }?;
        check(&context.rope, hyper)?;
        Ok(context)
    }

    /// The longest session, as the operator wants it or by default.
    ///
    /// # Errors
    /// It is longer than the rotary embedding is good for.
    pub fn model_len(&self, wanted: Option<u32>) -> Result<u32> {
        match wanted {
            None => Ok(self.default_len),
            Some(0) => Err(Error::config("max_model_len must be at least 1")),
            Some(wanted) if wanted > self.longest_len => Err(Error::config(format!(
                "max_model_len {wanted} is more than the {} tokens that the checkpoint is good for ({})",
                self.longest_len, self.longest_len_is
            ))),
            Some(wanted) => Ok(wanted),
        }
    }

    /// Adds the frequencies for the longest session of the graph. The graph ignores tensors whose values are in them.
    pub fn rope(&self, g: &mut GraphBuilder) -> Rotary {
        self.tensors.iter().for_each(|&name| g.ignore(name, "its values are in the rotary frequencies"));
        let table = self.rope.table(g.max_model_len());
        Rotary { table: g.rope_table(table), style: self.style }
    }
}

fn check(rope: &Rope, hyper: &Hyper) -> Result<()> {
    if rope.dim == 0 || !rope.dim.is_multiple_of(2) || rope.dim > hyper.k_dim {
        return Err(Error::invalid(format!("{} rotated columns don't fit heads of {}", rope.dim, hyper.k_dim)));
    }
    if rope.theta <= 1.0 {
        return Err(Error::invalid(format!("the rotary base must be over 1, not {}", rope.theta)));
    }
    if let Some(divisors) = &rope.divisors {
        check_divisors(&format!("tensor `{ROPE_FREQS}`"), divisors, rope.dim)?;
    }
    Ok(())
}

fn check_divisors<T: Copy + Into<f64>>(what: &str, divisors: &[T], dim: u32) -> Result<()> {
    if divisors.len() != dim as usize / 2 {
        return Err(Error::invalid(format!("{what} has {} elements, not {}", divisors.len(), dim / 2)));
    }
    match divisors.iter().map(|&divisor| divisor.into()).find(|&divisor| !is_positive(divisor)) {
        Some(divisor) => Err(Error::invalid(format!("{what} holds {divisor}, which no frequency has"))),
        None => Ok(()),
    }
}

fn from_hf(family: &Family, checkpoint: &CheckpointInfo, hyper: &Hyper) -> Result<Context> {
    let trained = checkpoint.count("max_position_embeddings")?.unwrap_or(family.max_position_embeddings);
    // Newer checkpoints keep all of the rotary embedding in one table, which older ones have beside the base.
    let table = ["rope_parameters", "rope_scaling"].into_iter().find(|key| checkpoint.get(key).is_some());
    let nested = match table.and_then(|key| Some((key, checkpoint.get(key)?))) {
        Some((_, value)) if value.is_object() => CheckpointInfo::new(checkpoint.format, "", value.clone(), Vec::new()),
        Some((key, _)) => return Err(Error::invalid(format!("the hyper-parameter `{key}` must be an object"))),
        None => CheckpointInfo::new(checkpoint.format, "", Value::Null, Vec::new()),
    };
    let within = |error: Error| error.within(table.unwrap_or_default());
    // A table for each kind of layer would leave nothing where all layers look.
    if let Some(key) = ["full_attention", "sliding_attention"].into_iter().find(|key| nested.get(key).is_some()) {
        let name = family.name;
        let refusal = Error::unsupported(format!("`{key}`: model {name} has one rotary embedding for all layers"));
        return Err(within(refusal));
    }
    let number = |key: &str| Ok::<_, Error>(nested.number(key).map_err(within)?.or(checkpoint.number(key)?));
    let theta = number("rope_theta")?.unwrap_or(family.rope_theta);
    let dim = match number("partial_rotary_factor")? {
        None | Some(1.0) => hyper.k_dim,
        Some(share) if family.partial_rotary && share > 0.0 && share < 1.0 => (f64::from(hyper.k_dim) * share) as u32,
        Some(share) if family.partial_rotary => {
            return Err(Error::invalid(format!(
                "the hyper-parameter `partial_rotary_factor` must be over 0 and at most 1, not {share}"
            )));
        }
        Some(share) => {
            let name = family.name;
            return Err(Error::unsupported(format!(
                "`partial_rotary_factor` is {share}; model {name} rotates all columns of a head"
            )));
        }
    };
    let scaling = match hf_kind(family, &nested).map_err(within)? {
        "longrope" => Scaling::LongRope(hf_longrope(checkpoint, &nested, trained, dim).map_err(within)?),
        kind => hf_scaling(kind, &nested, trained).map_err(within)?,
    };
    let (default_len, longest_len, longest_len_is) = match &scaling {
        Scaling::None | Scaling::Llama3(_) | Scaling::LongRope(_) => {
            (trained, trained, "`max_position_embeddings`".to_owned())
        }
        Scaling::Yarn(yarn) => {
            let longest = stretched(yarn.original_len, yarn.factor).max(trained);
            (longest, longest, "the context before yarn × its factor".to_owned())
        }
        Scaling::Linear { factor } | Scaling::Dynamic { factor, .. } => {
            let longest = stretched(f64::from(trained), *factor);
            let default = if matches!(scaling, Scaling::Linear { .. }) { longest } else { trained };
            (default, longest, format!("`max_position_embeddings` {trained} × the factor {factor}"))
        }
    };
    let rope = Rope { theta, dim, scaling, divisors: None, magnitude: 1.0 };
    Ok(Context { rope, style: RopeStyle::Half, default_len, longest_len, longest_len_is, tensors: Vec::new() })
}

/// The scaling's name in the table of the rotary embedding, of those that the family has.
fn hf_kind<'a>(family: &Family, table: &'a CheckpointInfo) -> Result<&'a str> {
    let stated = table.text("rope_type")?.or(table.text("type")?).unwrap_or("default");
    let has = |kind: &str| family.rope_types.contains(&kind);
    let kind = match stated {
        "none" => "default",
        // Names that LongRoPE's first checkpoints have for it.
        "su" | "yarn" if has("longrope") && !has(stated) => "longrope",
        other => other,
    };
    if has(kind) {
        return Ok(kind);
    }
    let (last, others) = family.rope_types.split_last().unwrap_or((&"none", &[]));
    let known = if others.is_empty() { (*last).to_owned() } else { format!("{} and {last}", others.join(", ")) };
    Err(Error::unsupported(format!(
        "model {} has no rope scaling called {:?}; it has {known}",
        family.name,
        shortened(stated)
    )))
}

fn hf_scaling(kind: &str, table: &CheckpointInfo, trained: u32) -> Result<Scaling> {
    let original = table.count("original_max_position_embeddings")?;
    let factor = || need_factor(table, "factor");
    Ok(match kind {
        "linear" => Scaling::Linear { factor: factor()? },
        "dynamic" => Scaling::Dynamic { factor: factor()?, trained_len: trained },
        "yarn" => {
            let factor = match (table.get("factor"), original) {
                (None, Some(original)) => f64::from(trained) / f64::from(original),
                _ => factor()?,
            };
            let weights = (table.number("mscale")?, table.number("mscale_all_dim")?);
            let implied = match weights {
                (Some(weight), Some(all)) if weight != 0.0 && all != 0.0 => {
                    yarn_attention_factor(factor, weight) / yarn_attention_factor(factor, all)
                }
                _ => yarn_attention_factor(factor, 1.0),
            };
            let yarn = Yarn {
                factor,
                original_len: f64::from(original.unwrap_or(trained)),
                beta_fast: positive(table, "beta_fast")?.unwrap_or(32.0),
                beta_slow: positive(table, "beta_slow")?.unwrap_or(1.0),
                extrapolation: 1.0,
                truncate: table.flag("truncate")?.unwrap_or(true),
                attention_factor: positive(table, "attention_factor")?.unwrap_or(implied),
            };
            Scaling::Yarn(ordered(yarn)?)
        }
        "llama3" => {
            let need = |key: &str| positive(table, key)?.ok_or_else(|| lacks(key));
            let (low_freq_factor, high_freq_factor) = (need("low_freq_factor")?, need("high_freq_factor")?);
            if low_freq_factor >= high_freq_factor {
                return Err(Error::invalid(format!(
                    "`low_freq_factor` {low_freq_factor} must be less than `high_freq_factor` {high_freq_factor}"
                )));
            }
            let original_len = f64::from(original.unwrap_or(trained));
            Scaling::Llama3(Llama3 { factor: factor()?, low_freq_factor, high_freq_factor, original_len })
        }
        _ => Scaling::None,
    })
}

fn hf_longrope(checkpoint: &CheckpointInfo, table: &CheckpointInfo, trained: u32, dim: u32) -> Result<LongRope> {
    if let Some(key) = ["short_mscale", "long_mscale"].into_iter().find(|key| table.get(key).is_some()) {
        return Err(Error::unsupported(format!("`{key}`: the factor on sine and cosine is `attention_factor` here")));
    }
    let divisors = |key: &str| {
        let values = table.get(key).ok_or_else(|| lacks(key))?;
        let numbers = values.as_array().and_then(|values| values.iter().map(Value::as_f64).collect());
        let numbers: Vec<f64> =
            numbers.ok_or_else(|| Error::invalid(format!("the hyper-parameter `{key}` must be a list of numbers")))?;
        check_divisors(&format!("`{key}`"), &numbers, dim)?;
        Ok::<_, Error>(numbers)
    };
    // Beside the table it has precedence, as in the reference implementation.
    let key = "original_max_position_embeddings";
    let original_len = checkpoint.count(key)?.or(table.count(key)?).ok_or_else(|| lacks(key))?;
    let factor = match table.get("factor") {
        Some(_) => need_factor(table, "factor")?,
        None => f64::from(trained) / f64::from(original_len),
    };
    let implied = longrope_attention_factor(factor, f64::from(original_len));
    if !implied.is_finite() {
        return Err(Error::invalid(format!("`{key}` {original_len} is too short for LongRoPE")));
    }
    let attention_factor = positive(table, "attention_factor")?.unwrap_or(implied);
    Ok(LongRope { short: divisors("short_factor")?, long: divisors("long_factor")?, original_len, attention_factor })
}

fn from_gguf(family: &Family, checkpoint: &CheckpointInfo, hyper: &Hyper) -> Result<Context> {
    let trained_key = family.key("context_length");
    let trained = checkpoint.need_count(&trained_key)?;
    let dim = checkpoint.count(&family.key("rope.dimension_count"))?.unwrap_or(hyper.k_dim);
    let (scaling, magnitude) = gguf_scaling(family, checkpoint, trained, dim)?;
    let original = checkpoint.count(&family.key("rope.scaling.original_context_length"))?.unwrap_or(trained);
    let (longest_len, longest_len_is) = match scaling.factor() {
        1.0 => (trained, format!("`{trained_key}`")),
        factor => (
            stretched(f64::from(original), factor).max(trained),
            format!("the larger of `{trained_key}` {trained} and {original} × the scaling factor {factor}"),
        ),
    };
    let theta = positive(checkpoint, &family.key("rope.freq_base"))?.unwrap_or(10_000.0);
    let divisors = constant(checkpoint, ROPE_FREQS)?;
    let mut tensors: Vec<&str> = divisors.iter().map(|_| ROPE_FREQS).collect();
    if matches!(scaling, Scaling::LongRope(_)) {
        tensors.extend([ROPE_SHORT, ROPE_LONG]);
    }
    let rope = Rope { theta, dim, scaling, divisors, magnitude };
    let style = family.gguf_rope_style;
    Ok(Context { rope, style, default_len: longest_len, longest_len, longest_len_is, tensors })
}

/// The values of a tensor that shapes the frequencies.
fn constant(checkpoint: &CheckpointInfo, name: &str) -> Result<Option<Vec<f32>>> {
    match (checkpoint.tensor(name), checkpoint.constants.get(name)) {
        (Some(_), None) => Err(Error::unsupported(format!("tensor `{name}` is no row of F32 numbers"))),
        (_, values) => Ok(values.cloned()),
    }
}

/// The scaling, and the factor on sine and cosine that isn't yarn's own.
fn gguf_scaling(family: &Family, checkpoint: &CheckpointInfo, trained: u32, dim: u32) -> Result<(Scaling, f64)> {
    let key = |name: &str| family.key(&format!("rope.scaling.{name}"));
    let magnitude = positive(checkpoint, &key("attn_factor"))?.unwrap_or(1.0);
    // Files from before `scaling.type` state only a linear factor.
    let old_key = family.key("rope.scale_linear");
    let kind = checkpoint.text(&key("type"))?;
    if family.rope_types.contains(&"longrope") && matches!(kind, None | Some("none" | "longrope")) {
        let sets = (constant(checkpoint, ROPE_SHORT)?, constant(checkpoint, ROPE_LONG)?);
        if sets != (None, None) || kind == Some("longrope") {
            let divisors = |name: &str, set: Option<Vec<f32>>| {
                let set = set.ok_or_else(|| Error::invalid(format!("the checkpoint lacks the tensor `{name}`")))?;
                check_divisors(&format!("tensor `{name}`"), &set, dim)?;
                Ok::<_, Error>(set.into_iter().map(f64::from).collect())
            };
            // Writers put the whole factor on sine and cosine into `attn_factor`.
            let longrope = LongRope {
                short: divisors(ROPE_SHORT, sets.0)?,
                long: divisors(ROPE_LONG, sets.1)?,
                original_len: checkpoint.need_count(&key("original_context_length"))?,
                attention_factor: 1.0,
            };
            return Ok((Scaling::LongRope(longrope), magnitude));
        }
    }
    let scaling = match kind {
        None if checkpoint.get(&old_key).is_some() => Scaling::Linear { factor: need_factor(checkpoint, &old_key)? },
        None | Some("none") => Scaling::None,
        Some("linear") => Scaling::Linear { factor: need_factor(checkpoint, &key("factor"))? },
        Some("yarn") => {
            let factor = need_factor(checkpoint, &key("factor"))?;
            let original = checkpoint.count(&key("original_context_length"))?.unwrap_or(trained);
            let extrapolation = checkpoint.number(&key("yarn_ext_factor"))?.unwrap_or(1.0);
            if !(0.0..=1.0).contains(&extrapolation) {
                let key = key("yarn_ext_factor");
                return Err(Error::invalid(format!("`{key}` must be between 0 and 1, not {extrapolation}")));
            }
            let own = if extrapolation == 0.0 { 1.0 } else { yarn_attention_factor(factor, 1.0) };
            let yarn = Yarn {
                factor,
                original_len: f64::from(original),
                beta_fast: positive(checkpoint, &key("yarn_beta_fast"))?.unwrap_or(32.0),
                beta_slow: positive(checkpoint, &key("yarn_beta_slow"))?.unwrap_or(1.0),
                extrapolation,
                truncate: true,
                attention_factor: own * positive(checkpoint, &key("yarn_attn_factor"))?.unwrap_or(1.0),
            };
            Scaling::Yarn(ordered(yarn)?)
        }
        Some(other) => {
            let (key, name, other) = (key("type"), family.name, shortened(other));
            return Err(Error::unsupported(format!("`{key}`: model {name} has none, linear and yarn, not {other:?}")));
        }
    };
    // A factor of 1 stretches nothing, and some writers leave it in every file.
    let inert = matches!(scaling, Scaling::Linear { factor: 1.0 });
    Ok((if inert { Scaling::None } else { scaling }, magnitude))
}

fn ordered(yarn: Yarn) -> Result<Yarn> {
    if yarn.beta_slow >= yarn.beta_fast {
        let (slow, fast) = (yarn.beta_slow, yarn.beta_fast);
        return Err(Error::invalid(format!("yarn's beta_slow {slow} must be less than its beta_fast {fast}")));
    }
    Ok(yarn)
}

fn stretched(len: f64, factor: f64) -> u32 {
    // Saturates, and factors such as 2.6667 are meant to reach whole numbers.
    (len * factor + 0.01) as u32
}
