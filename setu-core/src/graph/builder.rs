//! Builds graphs, checking each node as it is added.

use super::verify::{place, shown};
use super::*;
use crate::error::Result;

/// Writes down a model node by node.
///
/// Names are paths: what is added inside a [`scope`](GraphBuilder::scope) gets its name in front, so an
/// error says `layers.3.attn.q (linear): …`.
///
/// ```
/// use setu_core::graph::{GraphBuilder, Shard};
///
/// let mut g = GraphBuilder::new("tiny", 32, 128);
/// let table = g.weight("embed", "tok.weight", &[32, 8], Shard::Replicated);
/// let x = g.embed("embed", table)?;
/// let x = g.select("last", x)?;
/// let logits = g.linear("head", x, table, None)?;
/// g.output("logits", logits);
/// let graph = g.finish()?;
/// assert_eq!(graph.value(graph.output("logits").unwrap()).cols, 32);
/// # Ok::<(), setu_core::Error>(())
/// ```
#[derive(Debug)]
pub struct GraphBuilder {
    graph: Graph,
    scope: Vec<String>,
}

/// A value of the graph under construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub id: ValueId,
    pub cols: u32,
}

impl GraphBuilder {
    pub fn new(name: impl Into<String>, vocab_size: u32, max_model_len: u32) -> GraphBuilder {
        let graph = Graph {
            name: name.into(),
            vocab_size,
            max_model_len,
            weights: Vec::new(),
            kv_groups: Vec::new(),
            kv_layers: Vec::new(),
            rope_tables: Vec::new(),
            values: Vec::new(),
            nodes: Vec::new(),
            outputs: Vec::new(),
            ignored: Vec::new(),
        };
        GraphBuilder { graph, scope: Vec::new() }
    }

    /// Runs `build` with `name` in front of every name.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn scope<T>(
        &mut self,
        name: impl Into<String>,
        build: impl FnOnce(&mut GraphBuilder) -> Result<T>,
    ) -> Result<T> {
        self.scope.push(name.into());
        let built = build(self);
        self.scope.pop();
        built
    }

    /// Declares a weight that is one tensor of the checkpoint.
    pub fn weight(&mut self, name: &str, source: impl Into<String>, shape: &[usize], shard: Shard) -> WeightId {
        self.stacked_weight(name, vec![source.into()], shape, shard)
    }

    /// Declares a weight that is several tensors, stacked along the outermost dimension.
    pub fn stacked_weight(&mut self, name: &str, sources: Vec<String>, shape: &[usize], shard: Shard) -> WeightId {
        let weight = Weight { name: self.path(name), sources, shape: shape.to_vec(), shard };
        self.graph.weights.push(weight);
        WeightId(self.graph.weights.len() as u32 - 1)
    }

    /// Leaves a tensor of the checkpoint out, for a reason that a person can check.
    pub fn ignore(&mut self, name: impl Into<String>, why: impl Into<String>) {
        self.graph.ignored.push(Ignored { name: name.into(), why: why.into() });
    }

    /// Adds a group of KV layers; one of the same name and kind is kept once.
    pub fn kv_group(&mut self, name: &str, kind: KvGroupKind) -> u32 {
        let known = self.graph.kv_groups.iter().position(|group| group.name == name && group.kind == kind);
        known.unwrap_or_else(|| {
            self.graph.kv_groups.push(KvGroup { name: name.to_owned(), kind });
            self.graph.kv_groups.len() - 1
        }) as u32
    }

    /// Adds rotary frequencies; equal ones are kept once.
    pub fn rope_table(&mut self, table: RopeTable) -> u32 {
        let known = self.graph.rope_tables.iter().position(|other| *other == table);
        known.unwrap_or_else(|| {
            self.graph.rope_tables.push(table);
            self.graph.rope_tables.len() - 1
        }) as u32
    }

    /// Adds the K/V store of an attention node.
    pub fn kv_layer(&mut self, layer: KvLayer) -> u32 {
        self.graph.kv_layers.push(layer);
        self.graph.kv_layers.len() as u32 - 1
    }

    /// Adds any op.
    ///
    /// # Errors
    /// The shapes don't fit; the error names the node.
    pub fn node(&mut self, name: &str, op: Op, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let inputs: Vec<ValueId> = inputs.iter().map(|tensor| tensor.id).collect();
        let mut node = Node { name: self.path(name), op, inputs, outputs: Vec::new() };
        let outputs = self.graph.infer(&node.op, &node.inputs).map_err(|error| error.within(place(&node)))?;
        let mut tensors = Vec::with_capacity(outputs.len());
        for value in outputs {
            let id = ValueId(self.graph.values.len() as u32);
            self.graph.values.push(value);
            node.outputs.push(id);
            tensors.push(Tensor { id, cols: value.cols });
        }
        self.graph.nodes.push(node);
        Ok(tensors)
    }

    fn one(&mut self, name: &str, op: Op, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(self.node(name, op, inputs)?[0])
    }

    /// See [`Op::Embed`].
    ///
    /// # Errors
    /// The weight is no matrix of the vocabulary's height.
    pub fn embed(&mut self, name: &str, weight: WeightId) -> Result<Tensor> {
        self.one(name, Op::Embed { weight, scale: 1.0 }, &[])
    }

    /// See [`Op::Linear`].
    ///
    /// # Errors
    /// The weight doesn't take as many columns as `x` has.
    pub fn linear(&mut self, name: &str, x: Tensor, weight: WeightId, bias: Option<WeightId>) -> Result<Tensor> {
        self.one(name, Op::Linear { weight, bias }, &[x])
    }

    /// See [`Op::RmsNorm`]; over the whole row.
    ///
    /// # Errors
    /// The weight is not as long as a row.
    pub fn rms_norm(&mut self, name: &str, x: Tensor, weight: WeightId, eps: f32) -> Result<Tensor> {
        self.one(name, Op::RmsNorm { weight, eps, group: 0, offset: 0.0 }, &[x])
    }

    /// See [`Op::RmsNorm`]; over each `group` columns, such as those of a head.
    ///
    /// # Errors
    /// The weight is not as long as a group, or groups don't divide a row.
    pub fn grouped_rms_norm(
        &mut self,
        name: &str,
        x: Tensor,
        weight: WeightId,
        eps: f32,
        group: u32,
    ) -> Result<Tensor> {
        self.one(name, Op::RmsNorm { weight, eps, group, offset: 0.0 }, &[x])
    }

    /// See [`Op::Rope`].
    ///
    /// # Errors
    /// The heads or the table don't fit the columns.
    pub fn rope(&mut self, name: &str, x: Tensor, table: u32, head_dim: u32, style: RopeStyle) -> Result<Tensor> {
        self.one(name, Op::Rope { table, head_dim, style }, &[x])
    }

    /// See [`Op::Attention`]; causal, without soft-cap and sinks.
    ///
    /// # Errors
    /// q, k or v don't fit the heads.
    pub fn attention(&mut self, name: &str, qkv: [Tensor; 3], layer: u32, heads: u32, scale: f32) -> Result<Tensor> {
        let op = Op::Attention { layer, heads, scale, softcap: 0.0, mask: MaskKind::Causal, sinks: None };
        self.one(name, op, &qkv)
    }

    /// See [`Op::Gated`].
    ///
    /// # Errors
    /// The shapes differ.
    pub fn gated(&mut self, name: &str, kind: ActivationKind, gate: Tensor, up: Tensor) -> Result<Tensor> {
        self.one(name, Op::Gated { kind }, &[gate, up])
    }

    /// See [`Op::Add`].
    ///
    /// # Errors
    /// The shapes differ.
    pub fn add(&mut self, name: &str, a: Tensor, b: Tensor) -> Result<Tensor> {
        self.one(name, Op::Add, &[a, b])
    }

    /// See [`Op::Slice`].
    ///
    /// # Errors
    /// The columns are not within those of `x`.
    pub fn slice(&mut self, name: &str, x: Tensor, start: u32, cols: u32) -> Result<Tensor> {
        self.one(name, Op::Slice { start, cols }, &[x])
    }

    /// See [`Op::Route`]; softmax over all experts, and the weights of the chosen ones sum to 1.
    ///
    /// # Errors
    /// There are fewer experts than `top_k`.
    pub fn route(&mut self, name: &str, logits: Tensor, top_k: u32) -> Result<Tensor> {
        let op = Op::Route { top_k, scoring: Scoring::Softmax, renormalize: true, scale: 1.0 };
        self.one(name, op, &[logits])
    }

    /// See [`Op::Experts`]; the weights are gate, up and down.
    ///
    /// # Errors
    /// The weights don't fit each other, the columns of `x` or those of the routing.
    pub fn experts(
        &mut self,
        name: &str,
        kind: ActivationKind,
        [gate, up, down]: [WeightId; 3],
        x: Tensor,
        routing: Tensor,
    ) -> Result<Tensor> {
        self.one(name, Op::Experts { gate, up, down, kind }, &[x, routing])
    }

    /// See [`Op::Select`].
    ///
    /// # Errors
    /// `x` has no row for each token.
    pub fn select(&mut self, name: &str, x: Tensor) -> Result<Tensor> {
        self.one(name, Op::Select, &[x])
    }

    /// Lets steps ask for `tensor` by name.
    pub fn output(&mut self, name: &str, tensor: Tensor) {
        self.graph.outputs.push(Output { name: name.to_owned(), value: tensor.id });
    }

    /// The finished graph.
    ///
    /// # Errors
    /// What only the whole graph shows: a name given twice, a KV layer unused, no `logits`.
    pub fn finish(self) -> Result<Graph> {
        self.graph.verify().map_err(|error| error.within(&self.graph.name))?;
        Ok(self.graph)
    }

    /// Longest session of the graph.
    pub fn max_model_len(&self) -> u32 {
        self.graph.max_model_len
    }

    /// A sentence about a tensor for errors of model plugins: `[tokens, 576]`.
    pub fn describe(&self, tensor: Tensor) -> String {
        shown(self.graph.value(tensor.id))
    }

    fn path(&self, name: &str) -> String {
        if self.scope.is_empty() { name.to_owned() } else { format!("{}.{name}", self.scope.join(".")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(build: impl FnOnce(&mut GraphBuilder) -> Result<Tensor>) -> String {
        let mut g = GraphBuilder::new("tiny", 8, 16);
        g.scope("layers.3", |g| g.scope("attn", build)).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_the_layer() {
        let text = error_of(|g| {
            let table = g.weight("embed", "t", &[8, 4], Shard::Replicated);
            let x = g.embed("embed", table)?;
            let q = g.weight("q", "q", &[6, 5], Shard::Column);
            g.linear("q", x, q, None)
        });
        assert_eq!(text, "layers.3.attn.q (linear): weight `layers.3.attn.q` takes 5 columns, the input has 4");
        let text = error_of(|g| {
            let table = g.weight("embed", "t", &[7, 4], Shard::Replicated);
            g.embed("embed", table)
        });
        assert_eq!(text, "layers.3.attn.embed (embed): 7 rows are fewer than the vocabulary's 8");
    }

    #[test]
    fn a_graph_without_logits_is_refused() {
        let g = GraphBuilder::new("tiny", 8, 16);
        assert_eq!(g.finish().unwrap_err().message(), "tiny: the graph has no output called `logits`");
    }

    #[test]
    fn a_window_of_nothing_is_refused() {
        let mut g = GraphBuilder::new("tiny", 8, 16);
        let table = g.weight("embed", "t", &[8, 4], Shard::Replicated);
        let x = g.embed("embed", table).unwrap();
        let group = g.kv_group("narrow", KvGroupKind::SlidingWindow { tokens: 0 });
        let layer = g.kv_layer(KvLayer { group, heads: 1, k_dim: 4, v_dim: 4 });
        let x = g.attention("attend", [x, x, x], layer, 1, 1.0).unwrap();
        let x = g.select("select", x).unwrap();
        let logits = g.linear("head", x, table, None).unwrap();
        g.output("logits", logits);
        assert_eq!(g.finish().unwrap_err().message(), "tiny: the window of KV group `narrow` is of 0 tokens");
    }

    #[test]
    fn a_name_given_twice_is_refused() {
        let mut g = GraphBuilder::new("tiny", 8, 16);
        let table = g.weight("embed", "t", &[8, 4], Shard::Replicated);
        let x = g.embed("x", table).unwrap();
        g.select("x", x).unwrap();
        assert_eq!(g.finish().unwrap_err().message(), "tiny: x (select): a node of this name exists already");
    }
}
