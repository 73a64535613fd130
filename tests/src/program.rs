//! The `setu` program as a user runs it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The program: cargo builds it before it runs the tests and benches of this package.
///
/// # Panics
/// The caller is no test or bench.
pub fn setu() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("tests lie in <profile>/deps");
    profile.join("setu-under-test")
}

/// Runs `setu` with `args` and no variables of Setu's own but the test's.
///
/// # Panics
/// It can't be started.
pub fn run(args: &[&str]) -> Output {
    Command::new(setu()).args(args).output().expect("setu starts")
}

/// As [`run`], with an emulated GPU, whose driver is built below `folder`.
///
/// # Panics
/// It can't be started, or the driver can't be built.
pub fn run_with_gpu(args: &[&str], folder: &Path) -> Output {
    let inherited = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let folders = std::iter::once(setu_cuemu::build(folder)).chain(std::env::split_paths(&inherited));
    let path = std::env::join_paths(folders).expect("folders without a colon");
    Command::new(setu()).args(args).env("LD_LIBRARY_PATH", path).output().expect("setu starts")
}

/// Peak resident memory, in KiB, of the largest child that has ended.
pub fn children_peak_kib() -> u64 {
    // SAFETY: an all-zero rusage is valid, and getrusage writes to it alone.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    usage.ru_maxrss as u64
}
