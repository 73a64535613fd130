//! `setu model pull|list|inspect|make-dummy`.

use clap::ArgMatches;
use serde_json::{Value, json};

use super::{human_bytes, make_dummy, print_line};
use crate::cli::Failure;
use crate::models::{Console, Store, StoreOptions};
use crate::serving::OpenModel;
use crate::setup::Setup;

pub fn main(matches: &ArgMatches, setup: &mut Setup) -> Result<(), Failure> {
    match matches.subcommand() {
        Some(("pull", matches)) => pull(matches),
        Some(("inspect", matches)) => inspect(matches, setup),
        Some(("make-dummy", matches)) => make_dummy::main(matches, setup),
        Some((_, matches)) => list(matches),
        None => Ok(()),
    }
}

fn store() -> Result<Store, Failure> {
    Ok(Store::open(StoreOptions::from_env()?)?)
}

fn pull(matches: &ArgMatches) -> Result<(), Failure> {
    let store = store()?;
    let default = store.catalogue().default_model().name.clone();
    let name = store.parse(matches.get_one::<String>("name").unwrap_or(&default))?;
    let model = store.pull(&name, &mut Console::stderr())?;
    if matches.get_flag("json") {
        print_line(json!(model));
        return Ok(());
    }
    print_line(format_args!("{}\n  {}", model.name, model.path.display()));
    if let Some(license) = &model.license {
        print_line(format_args!("  licence {license}, from {}", model.source));
    }
    Ok(())
}

fn list(matches: &ArgMatches) -> Result<(), Failure> {
    let entries = store()?.list();
    if matches.get_flag("json") {
        print_line(format_args!("{:#}", json!(entries)));
        return Ok(());
    }
    let width = entries.iter().map(|entry| entry.name.len()).max().unwrap_or(0);
    for entry in &entries {
        let state = match (&entry.path, entry.default) {
            (Some(_), true) => "here, default",
            (Some(_), false) => "here",
            (None, true) => "to be fetched, default",
            (None, false) => "to be fetched",
        };
        let (name, size) = (&entry.name, human_bytes(entry.size));
        let about = entry.description.as_deref().unwrap_or("");
        print_line(format_args!("{name:<width$}  {size:>10}  {state}  {about}"));
    }
    Ok(())
}

fn inspect(matches: &ArgMatches, setup: &mut Setup) -> Result<(), Failure> {
    let settings = setup.resolve(matches).map_err(Failure::Usage)?;
    let name = matches.get_one::<String>("name").cloned();
    let model = OpenModel::open(&settings, name.as_deref())?;
    if matches.get_flag("graph") {
        print_line(model.graph(setup, &settings)?.to_string().trim_end());
        return Ok(());
    }
    let info = &model.info;
    let files: Vec<Value> = model
        .checkpoint
        .files()
        .iter()
        .map(|file| json!({ "path": file.path.display().to_string(), "bytes": file.bytes }))
        .collect();
    let (formats, parameters) = (model.checkpoint.formats(), model.checkpoint.parameters());
    if matches.get_flag("json") {
        let formats: Vec<Value> = formats
            .iter()
            .map(|(format, totals)| json!({ "format": format, "tensors": totals.tensors, "elements": totals.parameters }))
            .collect();
        let mut shown = json!({
            "name": model.name, "format": info.format, "architecture": info.architecture, "parameters": parameters,
            "files": files, "formats": formats, "metadata": info.metadata,
        });
        if matches.get_flag("tensors") {
            shown["tensors"] = json!(info.tensors);
        }
        print_line(format_args!("{shown:#}"));
        return Ok(());
    }
    print_line(format_args!("model         {}", model.name));
    print_line(format_args!("architecture  {} ({:?})", info.architecture, info.format));
    print_line(format_args!("parameters    {:.1} M", parameters as f64 / 1e6));
    for file in model.checkpoint.files() {
        print_line(format_args!("file          {} ({})", file.path.display(), human_bytes(file.bytes)));
    }
    for (format, totals) in &formats {
        let (tensors, elements) = (totals.tensors, totals.parameters as f64 / 1e6);
        print_line(format_args!("tensors       {tensors} in {format}, {elements:.1} M elements"));
    }
    if let Value::Object(metadata) = &info.metadata {
        for (key, value) in metadata {
            let text: String = value.to_string().chars().take(100).collect();
            print_line(format_args!("  {key} = {text}"));
        }
    }
    if matches.get_flag("tensors") {
        for tensor in &info.tensors {
            print_line(format_args!("  {:<5} {:?} {}", tensor.dtype.to_string(), tensor.shape, tensor.name));
        }
    }
    Ok(())
}
