//! The rule book: which shapes each op takes and gives. The builder asks it node by node; a graph that
//! crossed the ABI or came from a file is checked as a whole before anything trusts it.

use std::collections::HashSet;

use super::{Graph, Node, Op, RowSpace, Value, ValueId, WeightId};
use crate::error::{Error, Result};

/// Limits that no model reaches and that keep arithmetic on sizes safe.
const MAX_COLS: u32 = 1 << 26;
const MAX_ITEMS: usize = 1 << 20;

impl Graph {
    /// Checks every index, name and shape.
    ///
    /// # Errors
    /// A `Contract` error that names the node or weight and says what was expected.
    pub fn verify(&self) -> Result<()> {
        self.verify_parts()?;
        let mut defined = vec![false; self.values.len()];
        let mut names = HashSet::new();
        for node in &self.nodes {
            if !names.insert(node.name.as_str()) {
                return Err(Error::contract("a node of this name exists already").within(place(node)));
            }
            self.verify_node(node, &mut defined).map_err(|error| error.within(place(node)))?;
        }
        self.verify_kv()?;
        for output in &self.outputs {
            if !defined.get(output.value.0 as usize).copied().unwrap_or(false) {
                return Err(Error::contract(format!("the output `{}` is never computed", output.name)));
            }
        }
        match self.output("logits").map(|value| self.value(value)) {
            None => Err(Error::contract("the graph has no output called `logits`")),
            Some(logits) if logits == (Value { rows: RowSpace::Wanted, cols: self.vocab_size }) => Ok(()),
            Some(logits) => {
                let expected = Value { rows: RowSpace::Wanted, cols: self.vocab_size };
                Err(Error::contract(format!("`logits` must be {}, not {}", shown(expected), shown(logits))))
            }
        }
    }

    /// Checks a node and marks its outputs in `defined`.
    fn verify_node(&self, node: &Node, defined: &mut [bool]) -> Result<()> {
        for input in &node.inputs {
            if !defined.get(input.0 as usize).copied().unwrap_or(false) {
                return Err(Error::contract(format!("input %{} is not computed before it is used", input.0)));
            }
        }
        let expected = self.infer(&node.op, &node.inputs)?;
        if expected.len() != node.outputs.len() {
            let (wanted, found) = (expected.len(), node.outputs.len());
            return Err(Error::contract(format!("the op has {wanted} outputs, the node {found}")));
        }
        for (output, expected) in node.outputs.iter().zip(expected) {
            let declared = self.values.get(output.0 as usize).copied();
            if declared != Some(expected) {
                let declared = declared.map_or("missing".to_owned(), shown);
                return Err(Error::contract(format!(
                    "output %{} must be {}, not {declared}",
                    output.0,
                    shown(expected)
                )));
            }
            if std::mem::replace(&mut defined[output.0 as usize], true) {
                return Err(Error::contract(format!("output %{} is computed twice", output.0)));
            }
        }
        Ok(())
    }

    fn verify_parts(&self) -> Result<()> {
        let sizes = [self.weights.len(), self.values.len(), self.nodes.len(), self.kv_layers.len(), self.ignored.len()];
        if sizes.iter().any(|&size| size > MAX_ITEMS) || self.kv_groups.len() > 64 {
            return Err(Error::contract("the graph has an absurd number of parts"));
        }
        if self.vocab_size == 0 || self.vocab_size > MAX_COLS || self.max_model_len == 0 {
            return Err(Error::contract("vocab_size and max_model_len must be over 0 and vocab_size at most 2^26"));
        }
        let mut names = HashSet::new();
        for weight in &self.weights {
            let fail = |what: &str| Err(Error::contract(format!("weight `{}`: {what}", weight.name)));
            if !names.insert(weight.name.as_str()) {
                return fail("declared twice");
            }
            if weight.sources.is_empty() {
                return fail("names no tensor of the checkpoint");
            }
            if weight.shape.is_empty() || weight.shape.len() > 3 {
                return fail("has no shape of one to three dimensions");
            }
            if weight.shape.iter().any(|&dim| dim == 0 || dim > MAX_COLS as usize) {
                return fail("has a dimension that is 0 or over 2^26");
            }
        }
        let sources: HashSet<&str> =
            self.weights.iter().flat_map(|weight| &weight.sources).map(String::as_str).collect();
        if let Some(ignored) = self.ignored.iter().find(|ignored| sources.contains(ignored.name.as_str())) {
            return Err(Error::contract(format!("the tensor `{}` is both used and ignored", ignored.name)));
        }
        for (index, table) in self.rope_tables.iter().enumerate() {
            let finite = table.inv_freq.iter().all(|freq| freq.is_finite()) && table.magnitude.is_finite();
            if !finite || table.inv_freq.is_empty() {
                return Err(Error::contract(format!(
                    "rope table {index} is empty or holds a number that is not finite"
                )));
            }
        }
        Ok(())
    }

    fn verify_kv(&self) -> Result<()> {
        let mut used = vec![0usize; self.kv_layers.len()];
        for node in &self.nodes {
            if let Op::Attention { layer, .. } = node.op {
                used[layer as usize] += 1;
            }
        }
        if let Some(layer) = used.iter().position(|&count| count != 1) {
            let count = used[layer];
            return Err(Error::contract(format!("KV layer {layer} belongs to {count} attention nodes, not to one")));
        }
        if let Some(group) = self.kv_groups.iter().find(|group| group.kind.window() == Some(0)) {
            return Err(Error::contract(format!("the window of KV group `{}` is of 0 tokens", group.name)));
        }
        for (index, layer) in self.kv_layers.iter().enumerate() {
            if layer.group as usize >= self.kv_groups.len() {
                return Err(Error::contract(format!(
                    "KV layer {index} is of the group {}, which doesn't exist",
                    layer.group
                )));
            }
        }
        Ok(())
    }

    /// The values that `op` gives for `inputs`.
    pub(super) fn infer(&self, op: &Op, inputs: &[ValueId]) -> Result<Vec<Value>> {
        let arity = match op {
            Op::Embed { .. } => Some(0),
            Op::Gated { .. } | Op::Add | Op::Mul | Op::Experts { .. } => Some(2),
            Op::Attention { .. } => Some(3),
            Op::Custom { .. } => None,
            _ => Some(1),
        };
        if arity.is_some_and(|arity| arity != inputs.len()) || (arity.is_none() && inputs.is_empty()) {
            return Err(Error::contract(format!(
                "{} takes {} inputs, not {}",
                op.name(),
                arity.unwrap_or(1),
                inputs.len()
            )));
        }
        let values = inputs.iter().map(|&id| {
            self.values
                .get(id.0 as usize)
                .copied()
                .ok_or_else(|| Error::contract(format!("value %{} doesn't exist", id.0)))
        });
        let values = values.collect::<Result<Vec<Value>>>()?;
        let first = values.first().copied();
        let x = first.unwrap_or(Value { rows: RowSpace::Tokens, cols: 0 });
        let same = |what: &str| -> Result<Vec<Value>> {
            let y = values[1];
            if x != y {
                return Err(Error::contract(format!("{what} must be alike, not {} and {}", shown(x), shown(y))));
            }
            Ok(vec![x])
        };
        match op {
            Op::Embed { weight, scale } => {
                let shape = self.matrix(*weight, "embedding")?;
                finite(*scale, "scale")?;
                if shape[0] < self.vocab_size as usize {
                    return Err(Error::contract(format!(
                        "{} rows are fewer than the vocabulary's {}",
                        shape[0], self.vocab_size
                    )));
                }
                Ok(vec![Value { rows: RowSpace::Tokens, cols: shape[1] as u32 }])
            }
            Op::Linear { weight, bias } => {
                let shape = self.matrix(*weight, "linear")?;
                if shape[1] != x.cols as usize {
                    return Err(Error::contract(format!(
                        "weight `{}` takes {} columns, the input has {}",
                        self.weights[weight.0 as usize].name, shape[1], x.cols
                    )));
                }
                if let Some(bias) = bias {
                    self.vector(*bias, shape[0], "bias")?;
                }
                Ok(vec![Value { cols: shape[0] as u32, ..x }])
            }
            Op::RmsNorm { weight, eps, group, offset } => {
                let group = if *group == 0 { x.cols } else { *group };
                if x.cols % group != 0 {
                    return Err(Error::contract(format!("groups of {group} columns don't divide {}", x.cols)));
                }
                self.vector(*weight, group as usize, "weight")?;
                positive(*eps, "eps")?;
                finite(*offset, "offset")?;
                Ok(vec![x])
            }
            Op::LayerNorm { weight, bias, eps } => {
                self.vector(*weight, x.cols as usize, "weight")?;
                if let Some(bias) = bias {
                    self.vector(*bias, x.cols as usize, "bias")?;
                }
                positive(*eps, "eps")?;
                Ok(vec![x])
            }
            Op::Rope { table, head_dim, .. } => {
                tokens(x)?;
                let Some(table) = self.rope_tables.get(*table as usize) else {
                    return Err(Error::contract(format!("rope table {table} doesn't exist")));
                };
                if *head_dim == 0 || x.cols % head_dim != 0 || 2 * table.inv_freq.len() > *head_dim as usize {
                    return Err(Error::contract(format!(
                        "{} frequencies and {} columns don't fit heads of {head_dim}",
                        table.inv_freq.len(),
                        x.cols
                    )));
                }
                Ok(vec![x])
            }
            Op::Attention { layer, heads, scale, softcap, mask: _, sinks } => {
                let Some(kv) = self.kv_layers.get(*layer as usize) else {
                    return Err(Error::contract(format!("KV layer {layer} doesn't exist")));
                };
                values.iter().try_for_each(|&value| tokens(value))?;
                finite(*scale, "scale")?;
                finite(*softcap, "softcap")?;
                if kv.heads == 0 || *heads == 0 || heads % kv.heads != 0 || kv.k_dim == 0 || kv.v_dim == 0 {
                    return Err(Error::contract(format!("{heads} heads can't share {} KV heads", kv.heads)));
                }
                let wanted = [(*heads, kv.k_dim, "q"), (kv.heads, kv.k_dim, "k"), (kv.heads, kv.v_dim, "v")];
                for ((heads, dim, name), value) in wanted.into_iter().zip(&values) {
                    if heads.checked_mul(dim) != Some(value.cols) {
                        return Err(Error::contract(format!(
                            "{name} must have {heads} × {dim} columns, not {}",
                            value.cols
                        )));
                    }
                }
                if let Some(sinks) = sinks {
                    self.vector(*sinks, *heads as usize, "sinks")?;
                }
                let cols = heads.checked_mul(kv.v_dim).ok_or_else(|| Error::contract("too many columns"))?;
                Ok(vec![Value { cols, ..x }])
            }
            Op::Activation { .. } => Ok(vec![x]),
            Op::Scale { by } => finite(*by, "by").map(|()| vec![x]),
            Op::Softcap { cap } => positive(*cap, "cap").map(|()| vec![x]),
            Op::Gated { .. } => same("gate and up"),
            Op::Add | Op::Mul => same("both inputs"),
            Op::Slice { start, cols } => {
                if *cols == 0 || start.checked_add(*cols).is_none_or(|end| end > x.cols) {
                    return Err(Error::contract(format!("columns {start} + {cols} are not within {}", x.cols)));
                }
                Ok(vec![Value { cols: *cols, ..x }])
            }
            Op::Route { top_k, scale, .. } => {
                finite(*scale, "scale")?;
                if *top_k == 0 || *top_k > x.cols {
                    return Err(Error::contract(format!("top_k {top_k} is not between 1 and the {} experts", x.cols)));
                }
                Ok(vec![x])
            }
            Op::Experts { gate, up, down, .. } => {
                let routing = values[1];
                let experts = routing.cols as usize;
                if routing.rows != x.rows {
                    return Err(Error::contract("x and routing must have the same rows"));
                }
                let shape = &self.shape(*gate)?;
                let ffn = if shape.len() == 3 { shape[1] } else { 0 };
                let wanted = [
                    (*gate, [experts, ffn, x.cols as usize]),
                    (*up, [experts, ffn, x.cols as usize]),
                    (*down, [experts, x.cols as usize, ffn]),
                ];
                for (weight, wanted) in wanted {
                    if self.shape(weight)? != wanted {
                        let weight = &self.weights[weight.0 as usize];
                        let (name, shape) = (&weight.name, &weight.shape);
                        return Err(Error::contract(format!("weight `{name}` must be {wanted:?}, not {shape:?}")));
                    }
                }
                Ok(vec![x])
            }
            Op::Select => {
                tokens(x)?;
                Ok(vec![Value { rows: RowSpace::Wanted, ..x }])
            }
            Op::Custom { id, cols, .. } => {
                if id.is_empty() || cols.is_empty() || cols.iter().any(|&cols| cols == 0 || cols > MAX_COLS) {
                    return Err(Error::contract("a custom op needs an id and outputs"));
                }
                Ok(cols.iter().map(|&cols| Value { rows: x.rows, cols }).collect())
            }
        }
    }

    fn shape(&self, weight: WeightId) -> Result<&[usize]> {
        let weight = self.weights.get(weight.0 as usize);
        weight
            .map(|weight| weight.shape.as_slice())
            .ok_or_else(|| Error::contract("a weight of the node doesn't exist"))
    }

    fn matrix(&self, weight: WeightId, role: &str) -> Result<[usize; 2]> {
        let shape = self.shape(weight)?;
        shape.try_into().map_err(|_| {
            let name = &self.weights[weight.0 as usize].name;
            Error::contract(format!("{role} weight `{name}` must have two dimensions, not {shape:?}"))
        })
    }

    fn vector(&self, weight: WeightId, len: usize, role: &str) -> Result<()> {
        let shape = self.shape(weight)?;
        if shape != [len] {
            let name = &self.weights[weight.0 as usize].name;
            return Err(Error::contract(format!("{role} `{name}` must have the shape [{len}], not {shape:?}")));
        }
        Ok(())
    }
}

pub(super) fn shown(value: Value) -> String {
    let rows = match value.rows {
        RowSpace::Tokens => "tokens",
        RowSpace::Wanted => "wanted",
    };
    format!("[{rows}, {}]", value.cols)
}

pub(super) fn place(node: &Node) -> String {
    format!("{} ({})", node.name, node.op.name())
}

fn tokens(value: Value) -> Result<()> {
    if value.rows == RowSpace::Tokens {
        Ok(())
    } else {
        Err(Error::contract("the input must have a row for each token"))
    }
}

fn finite(number: f32, name: &str) -> Result<()> {
    if number.is_finite() { Ok(()) } else { Err(Error::contract(format!("{name} must be finite, not {number}"))) }
}

fn positive(number: f32, name: &str) -> Result<()> {
    if number > 0.0 && number.is_finite() {
        Ok(())
    } else {
        Err(Error::contract(format!("{name} must be over 0, not {number}")))
    }
}
