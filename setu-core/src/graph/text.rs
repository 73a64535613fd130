//! The text form: one line a part, for snapshots, diffs and people.

use std::fmt::{Display, Formatter, Result};

use super::verify::shown;
use super::*;

impl Display for Graph {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(f, "graph {} vocab={} max_len={}", self.name, self.vocab_size, self.max_model_len)?;
        for (index, group) in self.kv_groups.iter().enumerate() {
            match group.kind {
                KvGroupKind::Full => writeln!(f, "kv_group {index} {} full", group.name)?,
                KvGroupKind::SlidingWindow { tokens } => {
                    writeln!(f, "kv_group {index} {} window={tokens}", group.name)?
                }
            }
        }
        for (index, layer) in self.kv_layers.iter().enumerate() {
            let KvLayer { group, heads, k_dim, v_dim } = layer;
            writeln!(f, "kv_layer {index} group={group} heads={heads} k={k_dim} v={v_dim}")?;
        }
        for (index, table) in self.rope_tables.iter().enumerate() {
            let (first, last) = (table.inv_freq.first(), table.inv_freq.last());
            let (first, last) = (first.copied().unwrap_or(0.0), last.copied().unwrap_or(0.0));
            writeln!(
                f,
                "rope_table {index} n={} first={first:.6e} last={last:.6e} magnitude={:.6}",
                table.inv_freq.len(),
                table.magnitude
            )?;
        }
        for weight in &self.weights {
            let shard = format!("{:?}", weight.shard).to_lowercase();
            writeln!(f, "weight {} {:?} {shard} <- {}", weight.name, weight.shape, weight.sources.join(" + "))?;
        }
        for Ignored { name, why } in &self.ignored {
            writeln!(f, "ignored {name}: {why}")?;
        }
        for node in &self.nodes {
            let outputs: Vec<_> = node.outputs.iter().map(|id| format!("%{}", id.0)).collect();
            let inputs: Vec<_> = node.inputs.iter().map(|id| format!("%{}", id.0)).collect();
            let shapes: Vec<_> = node.outputs.iter().map(|&id| shown(self.value(id))).collect();
            write!(f, "{} = {}({}", outputs.join(", "), node.op.name(), inputs.join(", "))?;
            for (name, value) in self.attributes(&node.op) {
                write!(f, " {name}={value}")?;
            }
            writeln!(f, ") -> {}  # {}", shapes.join(", "), node.name)?;
        }
        for output in &self.outputs {
            writeln!(f, "output {} = %{}", output.name, output.value.0)?;
        }
        Ok(())
    }
}

impl Graph {
    /// An op's attributes as written: weights by name, enums by theirs.
    fn attributes(&self, op: &Op) -> Vec<(String, String)> {
        let weight_fields = ["weight", "bias", "sinks", "gate", "up", "down"];
        let Ok(serde_json::Value::Object(tagged)) = serde_json::to_value(op) else { return Vec::new() };
        let Some(serde_json::Value::Object(fields)) = tagged.into_iter().next().map(|(_, fields)| fields) else {
            return Vec::new();
        };
        let mut attributes = Vec::new();
        for (name, value) in fields {
            let weight = value.as_u64().filter(|_| weight_fields.contains(&name.as_str()));
            let text = match (weight.and_then(|id| self.weights.get(id as usize)), value) {
                (Some(weight), _) => weight.name.clone(),
                (None, serde_json::Value::Null) => continue,
                (None, serde_json::Value::String(text)) => text,
                // Constants are f32; as f64 they would print with digits that they don't have.
                (None, serde_json::Value::Number(number)) if number.is_f64() => {
                    (number.as_f64().unwrap_or(f64::NAN) as f32).to_string()
                }
                (None, other) => other.to_string(),
            };
            attributes.push((name, text));
        }
        attributes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_names_weights_and_shapes() {
        let mut g = GraphBuilder::new("tiny", 8, 16);
        let table = g.weight("embed", "tok.weight", &[8, 4], Shard::Replicated);
        let norm = g.weight("norm", "norm.weight", &[4], Shard::Replicated);
        let x = g.embed("embed", table).unwrap();
        let x = g.rms_norm("norm", x, norm, 1e-5).unwrap();
        let x = g.select("select", x).unwrap();
        let logits = g.linear("head", x, table, None).unwrap();
        g.output("logits", logits);
        g.ignore("rope.inv_freq", "computed from the base");
        let text = g.finish().unwrap().to_string();
        let expected = "\
graph tiny vocab=8 max_len=16
weight embed [8, 4] replicated <- tok.weight
weight norm [4] replicated <- norm.weight
ignored rope.inv_freq: computed from the base
%0 = embed( weight=embed scale=1) -> [tokens, 4]  # embed
%1 = rms_norm(%0 weight=norm eps=0.00001 group=0 offset=0) -> [tokens, 4]  # norm
%2 = select(%1) -> [wanted, 4]  # select
%3 = linear(%2 weight=embed) -> [wanted, 8]  # head
output logits = %3
";
        assert_eq!(text, expected);
    }
}
