//! `setu keys add|list`: the file of keys that `setu serve` asks for.

use std::path::Path;

use clap::{Arg, ArgMatches, Command, value_parser};
use serde_json::{Value, json};
use setu_core::Error;

use super::print_line;
use crate::cli::Failure;
use crate::server::{Keys, Limits, NewKey, ServerConfig};
use crate::setup::Setup;

/// The command line of `setu keys`, without the flags of settings.
pub fn commands() -> [Command; 2] {
    let number = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name("N").value_parser(value_parser!(u32).range(1..)).help(help)
    };
    let priority = Arg::new("max-priority")
        .long("max-priority")
        .value_name("N")
        .value_parser(value_parser!(i32))
        .allow_negative_numbers(true)
        .help("Highest priority that requests may ask for");
    let weight = Arg::new("weight").long("weight").value_name("W").value_parser(value_parser!(f64));
    let add = Command::new("add")
        .about("Make a key, print it once, and append its hash to the file")
        .arg(Arg::new("name").value_name("NAME").required(true).help("Whose key it is"))
        .arg(Arg::new("tenant").long("tenant").value_name("T").help("Whom requests are accounted to [default: NAME]"))
        .arg(weight.help("The tenant's share under contention [default: what [tenants] says]"))
        .arg(priority)
        .arg(number("requests-per-minute", "Most requests a minute"))
        .arg(number("tokens-per-minute", "Most tokens a minute, of prompts and answers"))
        .arg(number("max-concurrent", "Most requests at once"));
    let json = Arg::new("json").long("json").action(clap::ArgAction::SetTrue).help("Print JSON for programs");
    [add, Command::new("list").about("List the keys of the file; what they are isn't known").arg(json)]
}

pub fn main(matches: &ArgMatches, setup: &mut Setup) -> Result<(), Failure> {
    let Some((name, matches)) = matches.subcommand() else { return Ok(()) };
    let settings = setup.resolve(matches).map_err(Failure::Usage)?;
    let section = settings.section("server").ok_or_else(|| Error::internal("there is no section [server]"))?;
    let config: ServerConfig = section.read_own()?;
    let unnamed = || Failure::Usage("name the file of keys: [server] keys, or --server.keys FILE".to_owned());
    let path = config.keys.ok_or_else(unnamed)?;
    if name == "add" { add(matches, &path) } else { list(matches, &path) }
}

fn add(matches: &ArgMatches, path: &Path) -> Result<(), Failure> {
    let text = |name: &str| matches.get_one::<String>(name).cloned();
    let number = |name: &str| matches.get_one::<u32>(name).copied();
    let name = text("name").unwrap_or_default();
    let key = NewKey {
        tenant: text("tenant").unwrap_or_else(|| name.clone()),
        name,
        weight: matches.get_one("weight").copied(),
        max_priority: matches.get_one("max-priority").copied(),
        limits: Limits {
            requests_per_minute: number("requests-per-minute"),
            tokens_per_minute: number("tokens-per-minute"),
            max_concurrent: number("max-concurrent"),
        },
    };
    let secret = key.add_to(path).map_err(Failure::Failed)?;
    print_line(&secret);
    eprintln!("This is the key of {}, shown once: {} has its hash only.", key.name, path.display());
    eprintln!("A server that runs takes it in on SIGHUP.");
    Ok(())
}

fn list(matches: &ArgMatches, path: &Path) -> Result<(), Failure> {
    let keys = Keys::load(path).map_err(|report| Failure::Usage(report.to_string()))?.all();
    let row = |key: &crate::server::Key| {
        let limits = key.meter.limits;
        json!({
            "name": key.name, "tenant": key.tenant, "sha256": key.digest.to_string(), "weight": key.weight,
            "max_priority": key.max_priority, "requests_per_minute": limits.requests_per_minute,
            "tokens_per_minute": limits.tokens_per_minute, "max_concurrent": limits.max_concurrent,
        })
    };
    let rows: Vec<Value> = keys.iter().map(|key| row(key)).collect();
    if matches.get_flag("json") {
        print_line(format_args!("{:#}", json!({ "keys": rows })));
        return Ok(());
    }
    let width = keys.iter().map(|key| key.name.chars().count()).max().unwrap_or(0);
    for (key, row) in keys.iter().zip(&rows) {
        let shown = ["weight", "max_priority", "requests_per_minute", "tokens_per_minute", "max_concurrent"];
        let set = shown.iter().filter(|name| !row[**name].is_null());
        let set: Vec<String> = set.map(|name| format!("{name} {}", row[*name])).collect();
        let (name, digest) = (&key.name, key.digest.to_string());
        let line = format!("{name:width$}  {}…  tenant {}  {}", &digest[..12], key.tenant, set.join(", "));
        print_line(line.trim_end());
    }
    Ok(())
}
