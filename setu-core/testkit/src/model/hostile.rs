//! Checkpoints with one thing wrong about them: every key and every tensor in turn. What can't be right must be refused
//! by name, and nothing may panic or be large because a number in a file is.

use serde_json::{Value, json};
use setu_core::model::{CheckpointInfo, GraphOptions};
use setu_core::{Error, ErrorKind, Model};

use super::{Make, short};
use crate::report::{Checked, caught, ensure, fail};

pub fn keys(make: Make<'_>, checkpoint: &CheckpointInfo) -> Checked {
    let model = make();
    let Some(keys) = checkpoint.metadata.as_object() else { return Ok(()) };
    for (key, value) in keys.iter().filter(|(_, value)| !value.is_null()) {
        let changed = |value: Option<Value>| {
            let mut changed = checkpoint.clone();
            if let Some(keys) = changed.metadata.as_object_mut() {
                match value {
                    Some(value) => keys.insert(key.clone(), value),
                    None => keys.remove(key),
                };
            }
            changed
        };
        let named = |error: &Error| error.message().contains(short(checkpoint.format, key));
        let without = answer(&*model, &changed(None), &format!("no `{key}`"))?;
        if let Err(error) = &without {
            // A default may fit the tensors or not.
            let clear = named(error) || names_tensor(error, checkpoint);
            ensure!(clear, "the refusal of a checkpoint without `{key}` doesn't name it: {error}");
        }
        for wrong in wrong_types(value) {
            let what = format!("`{key}` = {wrong}");
            match answer(&*model, &changed(Some(wrong)), &what)? {
                Ok(()) => ensure!(without.is_ok(), "a checkpoint with {what} is taken; without the key it is refused"),
                Err(error) => ensure!(
                    named(&error) || names_tensor(&error, checkpoint),
                    "the refusal of {what} doesn't name the key: {error}"
                ),
            }
        }
        for extreme in extremes(value) {
            let what = format!("`{key}` = {extreme}");
            if let Err(error) = answer(&*model, &changed(Some(extreme)), &what)? {
                let clear = error.message().len() < 1000;
                ensure!(clear, "the refusal of {what} is {} bytes long", error.message().len());
            }
        }
    }
    Ok(())
}

/// What the key can't be.
fn wrong_types(value: &Value) -> Vec<Value> {
    let wrong = [json!("many"), json!(-1), json!(true), json!([]), json!({}), json!([[1]])];
    wrong.into_iter().filter(|wrong| std::mem::discriminant(wrong) != std::mem::discriminant(value)).collect()
}

/// What it can be and hardly is.
fn extremes(value: &Value) -> Vec<Value> {
    match value {
        Value::Number(_) => [0.0, -0.5, 1.0, 3.0, 1e-300, 1e300, 4_294_967_295.0, 9.3e18]
            .into_iter()
            .map(
                |number: f64| {
                    if number.fract() == 0.0 && number.abs() < 1e19 { json!(number as u64) } else { json!(number) }
                },
            )
            .chain([json!(-1), json!(i64::MIN), json!(u64::MAX)])
            .collect(),
        Value::String(_) => vec![json!(""), json!("x".repeat(10_000)), json!("सेतु\u{0}")],
        Value::Array(_) => vec![json!([]), json!([0]), json!(vec![1e300; 4096])],
        Value::Object(object) => {
            // One level down, which tables of the rotary embedding are.
            let hostile =
                [json!(null), json!("many"), json!(-1), json!(0), json!(1e300), json!([0.0]), json!(vec![1; 4096])];
            let changed = |key: &String, value: &Value| {
                let mut object = object.clone();
                object.insert(key.clone(), value.clone());
                Value::Object(object)
            };
            object.keys().flat_map(|key| hostile.iter().map(move |value| changed(key, value))).collect()
        }
        _ => Vec::new(),
    }
}

pub fn tensors(make: Make<'_>, checkpoint: &CheckpointInfo) -> Checked {
    let model = make();
    let graph = model.graph(checkpoint, &GraphOptions::default())?;
    let used: Vec<&String> = graph.weights.iter().flat_map(|weight| &weight.sources).collect();
    for (index, tensor) in checkpoint.tensors.iter().enumerate() {
        let mut without = checkpoint.clone();
        without.tensors.remove(index);
        if let Err(error) = answer(&*model, &without, &format!("no tensor `{}`", tensor.name))? {
            let clear = error.message().contains(&tensor.name) || names_something(&error);
            ensure!(clear, "the refusal of a checkpoint without `{}` doesn't name it: {error}", tensor.name);
        }
        let shape = &tensor.shape;
        let shapes = [
            vec![],
            vec![0],
            vec![usize::MAX; 3],
            shape.iter().map(|dim| dim + 1).collect(),
            [&shape[..], &[1]].concat(),
        ];
        for shape in shapes {
            let what = format!("tensor `{}` of the shape {shape:?}", tensor.name);
            let mut changed = checkpoint.clone();
            changed.tensors[index].shape = shape;
            match answer(&*model, &changed, &what)? {
                Ok(()) => ensure!(!used.contains(&&tensor.name), "a checkpoint with {what} is taken"),
                Err(error) => ensure!(
                    error.message().contains(&tensor.name) || names_something(&error),
                    "the refusal of {what} doesn't name it: {error}"
                ),
            }
        }
    }
    Ok(())
}

/// What a model says to a checkpoint: a graph that keeps the rules, or a refusal of a kind that says who is to blame.
fn answer(model: &dyn Model, checkpoint: &CheckpointInfo, what: &str) -> Checked<Result<(), Error>> {
    let built = caught(|| {
        // Asked first, as whoever chooses a component does.
        model.supports(checkpoint).then(|| model.graph(checkpoint, &GraphOptions::default()))
    });
    match built {
        Err(panic) => fail(format!("with {what} it {panic}")),
        Ok(None) => Ok(Err(Error::unsupported(format!("not taken: {what}")))),
        Ok(Some(Ok(graph))) => match graph.verify() {
            Ok(()) => Ok(Ok(())),
            Err(error) => fail(format!("with {what} it makes a graph that breaks the rules: {error}")),
        },
        Ok(Some(Err(error))) => match error.kind() {
            ErrorKind::InvalidInput | ErrorKind::Unsupported | ErrorKind::Config => Ok(Err(error)),
            kind => fail(format!("with {what} it fails as {kind:?}: {error}")),
        },
    }
}

/// Whether an error names a tensor that the checkpoint has, or a layer's that it would have to have.
fn names_tensor(error: &Error, checkpoint: &CheckpointInfo) -> bool {
    checkpoint.tensors.iter().any(|tensor| error.message().contains(&tensor.name)) || names_something(error)
}

/// Whether an error names a key or tensor at all.
fn names_something(error: &Error) -> bool {
    error.message().contains('`')
}
