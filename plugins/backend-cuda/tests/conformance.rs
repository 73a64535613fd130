//! The testkit's suite on the emulated driver.

mod common;

use setu_testkit::backend::assert_conforms;

#[test]
fn conforms() {
    assert_conforms(common::backend);
}
