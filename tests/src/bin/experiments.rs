//! Runs experiments with policies: `experiments [NAME…] [--out FOLDER]`, all of them if none is named. Prints their
//! figures, and writes these and the plots into `docs/experiments`, or the folder named.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use setu_tests::experiments::{ALL, page};

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), String> {
    let mut out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/experiments");
    let mut chosen = Vec::new();
    while let Some(argument) = arguments.next() {
        if argument == "--out" {
            out = PathBuf::from(arguments.next().ok_or("--out needs a folder")?);
        } else {
            let known = || ALL.map(|(name, _)| name).join(", ");
            let experiment = ALL.iter().find(|(name, _)| *name == argument);
            chosen
                .push(*experiment.ok_or_else(|| format!("there is no experiment {argument}; there are {}", known()))?);
        }
    }
    if chosen.is_empty() {
        chosen.extend(ALL);
    }
    std::fs::create_dir_all(&out).map_err(|error| format!("{} can't be made: {error}", out.display()))?;
    let mut sections = Vec::new();
    for (name, experiment) in chosen {
        let started = std::time::Instant::now();
        match experiment(&out).map_err(|error| format!("{name}: {error}"))? {
            Some(section) => {
                println!("## {}\n\n{}\n({:.1} s)\n", section.title, section.text, started.elapsed().as_secs_f64());
                sections.push(section);
            }
            None => println!("{name} was skipped\n"),
        }
    }
    let path = out.join("README.md");
    let before = std::fs::read_to_string(&path).unwrap_or_default();
    std::fs::write(&path, page::merge(&before, &sections))
        .map_err(|error| format!("{} can't be written: {error}", path.display()))
}
