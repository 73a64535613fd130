//! Every model against what HF transformers computes, on the checkpoints in `tests/fixtures/models`.

use std::path::Path;

use setu_tests::fixtures::Fixture;
use setu_tests::parity::{Line, RUNS, TOLERANCE, measure};

#[test]
fn every_model_agrees_with_its_reference() {
    let mut problems = Vec::new();
    for fixture in Fixture::all() {
        match measure(&fixture) {
            Ok(lines) => problems.extend(lines.iter().flat_map(too_far)),
            Err(error) => problems.push(error),
        }
    }
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

fn too_far(line: &Line) -> Vec<String> {
    let runs = RUNS.iter().zip(&line.errors).filter_map(|(run, error)| Some((run, (*error)?)));
    let far = runs.filter(|(_, error)| *error > TOLERANCE);
    far.map(|(run, error)| format!("{}, {}, {run}: off by {error:.1e}", line.model, line.case)).collect()
}

#[test]
fn the_page_lists_every_case() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/parity.md");
    let page = std::fs::read_to_string(&path).expect("docs/parity.md");
    let cells = |line: &str| -> Vec<String> { line.split('|').map(|cell| cell.trim().to_owned()).collect() };
    let listed: Vec<Vec<String>> = page.lines().filter(|line| line.starts_with('|')).map(cells).collect();
    let head = ["", "model", "case"].iter().chain(&RUNS).chain(&[""]);
    assert_eq!(listed[0], head.map(ToString::to_string).collect::<Vec<_>>());
    let listed: Vec<&[String]> = listed[2..].iter().map(|cells| &cells[1..3]).collect();
    let cases = Fixture::all();
    let cases = cases.iter().flat_map(|fixture| fixture.cases.iter().map(|case| [fixture.name.clone(), case.name()]));
    let cases: Vec<[String; 2]> = cases.collect();
    assert_eq!(listed, cases, "docs/parity.md is stale: cargo run --release -p setu-tests --bin parity -- --write");
}
