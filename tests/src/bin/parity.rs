//! Prints how far each model is from its reference; with `--write`, into `docs/parity.md`.

use std::path::Path;
use std::process::ExitCode;

use setu_tests::fixtures::Fixture;
use setu_tests::parity::{TOLERANCE, measure, page};

fn main() -> ExitCode {
    let mut lines = Vec::new();
    let mut failed = false;
    for fixture in Fixture::all() {
        match measure(&fixture) {
            Ok(found) => lines.extend(found),
            Err(error) => {
                eprintln!("{error}");
                failed = true;
            }
        }
    }
    let far = lines.iter().filter(|line| line.errors.iter().flatten().any(|&error| error > TOLERANCE));
    for line in far {
        eprintln!("{}, {}: more than {TOLERANCE:.0e} off", line.model, line.case);
        failed = true;
    }
    let page = page(&lines);
    print!("{page}");
    if failed {
        return ExitCode::FAILURE;
    }
    if std::env::args().any(|argument| argument == "--write") {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/parity.md");
        if let Err(error) = std::fs::write(&path, page) {
            eprintln!("{} can't be written: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
