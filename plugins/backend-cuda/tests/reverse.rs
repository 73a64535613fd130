//! With lanes and blocks in reverse: what only comes out right because lanes run in order comes out wrong here.

mod common;

use setu_testkit::backend::{Options, conformance};

#[test]
fn conforms_with_lanes_and_blocks_in_reverse() {
    // SAFETY: the only test of this process has started no thread that reads the environment.
    unsafe { std::env::set_var("CUEMU_REVERSE", "1") };
    let checks = [
        "sampling/",
        "models/experts/",
        "models/windows/",
        "ops/attention/F16 in pages of 8",
        "ops/route",
        "ops/linear/Q4_K",
    ];
    for only in checks {
        let options = Options { only: Some(only.into()), ..Options::default() };
        let report = conformance(&mut common::backend, &options);
        assert!(report.passed() && !report.checks.is_empty(), "{only}\n{report}");
    }
}
