//! Small checkpoints for tests of models: named tensors in both formats, and what a graph makes of them.

use setu_core::backend::WeightData;
use setu_core::graph::{Graph, Weight};
use setu_core::model::TensorInfo;
use setu_core::{DType, KvDType};

use crate::blocks;
use crate::reference::ReferenceModel;
use crate::rng::Rng;

/// How GGUF files call what Hugging Face's checkpoints of Llama's relatives hold, for [`Tensors::renamed`].
pub const TO_GGUF: [(&str, &str); 10] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"),
    ("mlp.", "ffn_"),
    ("_proj", ""),
];

/// The tensors of a checkpoint in F32.
#[derive(Clone, Debug, Default)]
pub struct Tensors(Vec<Tensor>);

#[derive(Clone, Debug)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Tensors {
    /// Random tensors of these names, without `.weight`, and shapes: first those that a model has once, then those of
    /// each of `layers` layers, named within `model.layers.N`. A name that ends in `.bias` is left as it is.
    pub fn random(outer: &[(&str, &[usize])], layer: &[(&str, &[usize])], layers: usize) -> Tensors {
        let mut tensors = Tensors::default();
        outer.iter().for_each(|&(name, shape)| tensors.add(name.to_owned(), shape));
        for index in 0..layers {
            layer.iter().for_each(|&(name, shape)| tensors.add(format!("model.layers.{index}.{name}"), shape));
        }
        tensors
    }

    fn add(&mut self, name: String, shape: &[usize]) {
        let mut rng = Rng::new(self.0.len() as u64 + 1);
        let size = if shape.len() == 1 { 1.0 } else { (shape[shape.len() - 1] as f64).sqrt().recip() };
        let values = (0..shape.iter().product()).map(|_| f64::from((rng.centered() * size) as f32));
        let name = if name.ends_with(".bias") { name } else { format!("{name}.weight") };
        self.0.push(Tensor { name, shape: shape.to_vec(), values: values.collect() });
    }

    /// With the first text of each pair replaced by the second wherever a name has it, pair by pair.
    #[must_use]
    pub fn renamed(mut self, names: &[(&str, &str)]) -> Tensors {
        for tensor in &mut self.0 {
            tensor.name = names.iter().fold(tensor.name.clone(), |name, (from, to)| name.replace(from, to));
        }
        self
    }

    /// With the rows of each head in the order that puts the two columns of a rotated pair side by side, in the tensors
    /// whose name contains one of `names`.
    #[must_use]
    pub fn paired(mut self, names: &[&str], head_dim: usize) -> Tensors {
        for tensor in self.0.iter_mut().filter(|tensor| names.iter().any(|name| tensor.name.contains(name))) {
            let cols = tensor.values.len() / tensor.shape[0];
            let old = std::mem::take(&mut tensor.values);
            for row in 0..tensor.shape[0] {
                let (head, row) = (row / head_dim, row % head_dim);
                let from = head * head_dim + row % 2 * (head_dim / 2) + row / 2;
                tensor.values.extend(&old[from * cols..][..cols]);
            }
        }
        self
    }

    /// With one tensor of one more dimension in place of `parts`.
    ///
    /// # Panics
    /// One isn't there.
    #[must_use]
    pub fn stacked(mut self, name: &str, parts: &[String]) -> Tensors {
        let mut shape = vec![parts.len()];
        shape.extend(&self.tensor(&parts[0]).shape);
        let values = parts.iter().flat_map(|part| self.tensor(part).values.clone()).collect();
        self.0.retain(|tensor| !parts.contains(&tensor.name));
        self.0.push(Tensor { name: name.to_owned(), shape, values });
        self
    }

    /// With a tensor, without `.weight`, added or replaced by a random one of this shape.
    #[must_use]
    pub fn with(mut self, name: &str, shape: &[usize]) -> Tensors {
        self = self.without(name);
        self.add(name.to_owned(), shape);
        self
    }

    /// Without a tensor, named without `.weight`.
    #[must_use]
    pub fn without(mut self, name: &str) -> Tensors {
        self.0.retain(|tensor| tensor.name.trim_end_matches(".weight") != name);
        self
    }

    /// What a checkpoint says of them.
    pub fn infos(&self) -> Vec<TensorInfo> {
        let info =
            |tensor: &Tensor| TensorInfo { name: tensor.name.clone(), dtype: DType::F32, shape: tensor.shape.clone() };
        self.0.iter().map(info).collect()
    }

    /// The logits of `graph` with these tensors at each of `tokens`, row by row.
    ///
    /// # Panics
    /// A tensor isn't there, or the reference can't run the graph.
    pub fn logits(&self, graph: &Graph, tokens: &[u32]) -> Vec<f64> {
        let parts = |weight: &Weight| -> Vec<Vec<u8>> {
            let sources = weight.sources.iter();
            sources.map(|source| blocks::encode(DType::F32, &self.tensor(source).values)).collect()
        };
        let parts: Vec<Vec<Vec<u8>>> = graph.weights.iter().map(parts).collect();
        let data = parts
            .iter()
            .map(|parts| WeightData { dtype: DType::F32, parts: parts.iter().map(Vec::as_slice).collect() });
        let model = ReferenceModel::new(graph, &data.collect::<Vec<_>>(), KvDType::F32).expect("the reference runs it");
        model.logits(tokens).expect("the graph has logits").data
    }

    fn tensor(&self, name: &str) -> &Tensor {
        let found = self.0.iter().find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("no tensor is called {name}"))
    }
}
