//! `setu config show|schema|example|reference`.

use std::path::PathBuf;

use clap::ArgMatches;

use super::print_line;
use crate::cli::Failure;
use crate::config::{example, json_schema, reference};
use crate::setup::Setup;

pub fn main(matches: &ArgMatches, setup: &mut Setup) -> Result<(), Failure> {
    let Some((name, matches)) = matches.subcommand() else { return Ok(()) };
    match name {
        "schema" => print_line(format_args!("{:#}", json_schema(&setup.layout))),
        "example" => print_line(example(&setup.layout).trim_end()),
        "reference" => {
            let pages = reference(&setup.layout);
            match matches.get_one::<PathBuf>("out") {
                Some(folder) => write_pages(folder, &pages)?,
                None => pages.values().for_each(print_line),
            }
        }
        _ => {
            let settings = setup.resolve(matches).map_err(Failure::Usage)?;
            if matches.get_flag("json") {
                print_line(format_args!("{:#}", settings.to_json()));
            } else {
                print_line(settings.to_text().trim_end());
            }
            if !settings.warnings.is_empty() {
                eprintln!("{}", settings.warnings);
            }
        }
    }
    Ok(())
}

fn write_pages(folder: &std::path::Path, pages: &std::collections::BTreeMap<PathBuf, String>) -> Result<(), Failure> {
    for (path, page) in pages {
        let path = folder.join(path);
        let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&path, page));
        written.map_err(|error| Failure::Failed(format!("{} can't be written: {error}", path.display())))?;
    }
    Ok(())
}
