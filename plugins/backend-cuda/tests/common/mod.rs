//! The emulated driver: built once with g++, and loaded in place of the system's.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use setu_backend_cuda::{CudaBackend, CudaConfig};
use setu_core::Backend;
use setu_core::component::Component;

/// Has the CUDA driver of this process be the emulated one.
///
/// # Panics
/// It doesn't build or load.
pub fn emulate() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let library = build();
        let name = CString::new(library.as_os_str().as_bytes()).expect("a path without NUL");
        // The library calls itself `libcuda.so`: whoever asks for that from now on gets this one, even where
        // there is another in the library path.
        // SAFETY: the emulator's initialisers do nothing but fill its table of kernels.
        let loaded = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        assert!(!loaded.is_null(), "{} doesn't load", library.display());
    });
}

/// A backend on the emulated driver.
///
/// # Panics
/// The driver isn't there.
pub fn backend() -> Box<dyn Backend> {
    emulate();
    Box::new(CudaBackend::build(CudaConfig::default()).expect("the emulated driver has a device"))
}

/// Builds the emulated driver, as `libcuda.so` in a folder of its own: its path.
///
/// # Panics
/// There is no g++, or it refuses the sources.
pub fn build() -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulator");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuemu");
    std::fs::create_dir_all(&folder).expect("the target folder can be written");
    let library = folder.join("libcuda.so");
    let partial = folder.join(format!("libcuda.so.{}", std::process::id()));
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let mut command = Command::new(&compiler);
    command.args(["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared"]);
    command.args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wl,-soname,libcuda.so", "-o"]);
    command.arg(&partial).args(["kernels.cpp", "scheduler.cpp", "driver.cpp"]).current_dir(&sources);
    let output = command.output().unwrap_or_else(|error| {
        panic!("the emulated driver needs a C++ compiler ({}: {error}): install g++", compiler.display())
    });
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&partial, &library).expect("the target folder can be written");
    library
}
