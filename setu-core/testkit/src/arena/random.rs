//! Looks for the smallest workload in which something goes wrong.

use std::cell::RefCell;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use crate::report::{Checked, Stop, fail};

/// Runs `test` with `cases` random values, always the same ones. Of one that fails it looks for the smallest that still
/// does, and tells what that one came to.
pub(crate) fn smallest<S: Strategy>(
    cases: u32,
    strategy: &S,
    test: impl FnMut(S::Value) -> Result<(), String>,
) -> Checked {
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 2000, max_shrink_time: 5000, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let test = RefCell::new(test);
    let found =
        runner.run(strategy, |value| (test.borrow_mut())(value).map_err(proptest::test_runner::TestCaseError::fail));
    match found {
        Ok(()) => Ok(()),
        Err(TestError::Fail(story, _)) => fail(story.message()),
        Err(TestError::Abort(why)) => Err(Stop::NotTested(why.message().to_owned())),
    }
}
