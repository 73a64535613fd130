//! The testkit's suite on the emulated driver.

mod common;

use setu_testkit::backend::{Options, assert_conforms, conformance};

#[test]
fn conforms() {
    assert_conforms(common::backend);
}

#[test]
fn conforms_with_batch_invariance() {
    // Whole models use all ops.
    for only in ["models/", "sampling/"] {
        let report = conformance(&mut common::invariant, &Options { only: Some(only.into()), ..Options::default() });
        assert!(report.passed(), "{report}");
        let shown = report.to_string();
        assert!(!shown.contains("claim batch invariance"), "{shown}");
    }
}
