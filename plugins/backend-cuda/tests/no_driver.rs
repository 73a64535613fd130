//! On a machine without the NVIDIA driver.

use std::io::Write;

use setu_backend_cuda::{CudaBackend, CudaConfig};
use setu_core::ErrorKind;
use setu_core::component::Component;

#[test]
fn without_a_driver_it_says_what_it_looked_for() {
    match CudaBackend::build(CudaConfig::default()) {
        Ok(_) => {
            // Past the harness, which keeps what passing tests print.
            let _ = writeln!(std::io::stdout(), "skipped: a machine without the NVIDIA driver: this one has it");
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            for part in ["NVIDIA", "libcuda.so.1", "[backend] type = \"cpu\""] {
                assert!(error.message().contains(part), "{part:?} is missing in {error}");
            }
        }
    }
}
