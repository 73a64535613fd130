//! `setu plugins list|inspect|check`.

use std::path::PathBuf;

use clap::ArgMatches;
use serde_json::{Value, json};
use setu_core::component::ComponentKind;
use setu_core::registry::Source;
use setu_core::{Registries, Registry};

use super::{check, print_line};
use crate::cli::Failure;
use crate::setup::Setup;

pub fn main(matches: &ArgMatches, setup: &mut Setup) -> Result<(), Failure> {
    match matches.subcommand() {
        Some(("inspect", matches)) => inspect(matches),
        Some(("check", matches)) => check::main(matches, setup),
        Some((_, matches)) => list(matches, setup),
        None => Ok(()),
    }
}

/// A component as a listing shows it.
struct Row {
    kind: &'static str,
    key: String,
    version: String,
    source: Source,
    description: String,
}

fn rows(registries: &Registries) -> Vec<Row> {
    fn of<C: ComponentKind + ?Sized>(registry: &Registry<C>) -> impl Iterator<Item = Row> + '_ {
        registry.list().iter().map(|entry| Row {
            kind: C::KIND.name(),
            key: entry.key.clone(),
            version: entry.version.clone(),
            source: entry.source.clone(),
            description: entry.description.clone(),
        })
    }
    of(&registries.schedulers)
        .chain(of(&registries.batchers))
        .chain(of(&registries.models))
        .chain(of(&registries.backends))
        .collect()
}

fn list(matches: &ArgMatches, setup: &mut Setup) -> Result<(), Failure> {
    let settings = setup.resolve(matches).map_err(Failure::Usage)?;
    let unusable = crate::serving::unusable_components(&settings, &setup.registries);
    let rows = rows(&setup.registries);
    if matches.get_flag("json") {
        let components: Vec<Value> = rows
            .iter()
            .map(|row| {
                let (source, digest) = match &row.source {
                    Source::BuiltIn { package } => (format!("built in ({package})"), None),
                    Source::File { path, sha256 } => (path.display().to_string(), Some(sha256)),
                };
                json!({
                    "kind": row.kind, "key": row.key, "version": row.version, "source": source,
                    "sha256": digest, "description": row.description,
                })
            })
            .collect();
        let rejected: Vec<Value> = setup
            .plugins
            .rejected
            .iter()
            .map(|file| json!({ "file": file.path.display().to_string(), "kind": file.kind.name(), "reason": file.reason }))
            .collect();
        let unusable: Vec<Value> = unusable
            .iter()
            .map(|(kind, key, reason)| json!({ "kind": kind.name(), "key": key, "reason": reason }))
            .collect();
        print_line(format_args!(
            "{:#}",
            json!({ "components": components, "rejected": rejected, "unusable": unusable })
        ));
        return Ok(());
    }
    let width = |column: fn(&Row) -> usize| rows.iter().map(column).max().unwrap_or(0);
    let (keys, versions) = (width(|row| row.key.len()), width(|row| row.version.len()));
    for row in &rows {
        let (kind, key, version) = (row.kind, &row.key, &row.version);
        print_line(format_args!("{kind:<9}  {key:<keys$}  {version:<versions$}  {}", row.description));
        match &row.source {
            Source::BuiltIn { package } => print_line(format_args!("           built in ({package})")),
            Source::File { path, sha256 } => {
                print_line(format_args!("           {} (sha256 {}…)", path.display(), &sha256[..16.min(sha256.len())]));
            }
        }
    }
    for file in &setup.plugins.rejected {
        print_line(format_args!("refused    {}\n           {}", file.path.display(), file.reason));
    }
    for (kind, key, reason) in &unusable {
        print_line(format_args!("refused    {kind} {key}, as configured\n           {reason}"));
    }
    Ok(())
}

fn inspect(matches: &ArgMatches) -> Result<(), Failure> {
    let Some(path) = matches.get_one::<PathBuf>("file") else { return Ok(()) };
    let file = setu_engine::plugins::inspect(path).map_err(|rejection| Failure::Failed(rejection.to_string()))?;
    if matches.get_flag("json") {
        let plugins: Vec<Value> = file
            .plugins
            .iter()
            .map(|plugin| {
                let components = plugin.components.iter().map(|component| {
                    json!({ "kind": component.kind.name(), "key": component.key, "description": component.description })
                });
                json!({
                    "package": plugin.package, "version": plugin.version, "abi": plugin.abi.to_string(),
                    "setu_core": plugin.core_version, "components": components.collect::<Vec<_>>(),
                })
            })
            .collect();
        let shown = json!({ "file": path.display().to_string(), "sha256": file.sha256, "plugins": plugins });
        print_line(format_args!("{shown:#}"));
        return Ok(());
    }
    print_line(format_args!("file       {}", path.display()));
    print_line(format_args!("sha256     {}", file.sha256));
    for plugin in &file.plugins {
        print_line(format_args!("package    {} {}", plugin.package, plugin.version));
        print_line(format_args!("ABI        {}, setu-core {}", plugin.abi, plugin.core_version));
        for component in &plugin.components {
            print_line(format_args!("{:<10} {}: {}", component.kind.name(), component.key, component.description));
        }
    }
    Ok(())
}
