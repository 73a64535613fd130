//! The testkit's suite, on every instruction set that the machine has and on fewer and more threads than cores.

use setu_backend_cpu::{CpuBackend, CpuConfig};
use setu_core::component::Component;
use setu_core::config::Config;
use setu_testkit::backend::{Options, assert_conforms, conformance};

fn backend(config: &str) -> CpuBackend {
    CpuBackend::build(CpuConfig::from_json(config).unwrap()).unwrap()
}

#[test]
fn conforms() {
    assert_conforms(|| Box::new(backend(r#"{"threads": 2}"#)));
}

#[test]
fn conforms_on_one_thread_and_on_more_than_there_are_cores() {
    for config in [r#"{"threads": 1}"#, r#"{"threads": 5, "activations": "f32"}"#] {
        let options = Options { only: Some("models/".into()), ..Options::default() };
        let report = conformance(&mut || Box::new(backend(config)), &options);
        assert!(report.passed(), "{config}\n{report}");
    }
}

#[test]
fn conforms_on_lesser_instruction_sets() {
    for isa in ["avx2", "portable"] {
        let config = format!(r#"{{"threads": 2, "isa": "{isa}"}}"#);
        if CpuBackend::build(CpuConfig::from_json(&config).unwrap()).is_err() {
            continue;
        }
        for only in ["ops/attention", "ops/linear/Q4_1", "ops/linear/F", "models/windows", "models/experts"] {
            let options = Options { only: Some(only.into()), ..Options::default() };
            let report = conformance(&mut || Box::new(backend(&config)), &options);
            assert!(report.passed(), "{isa}\n{report}");
        }
    }
}
