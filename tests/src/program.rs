//! The `setu` program as a user runs it.

use std::path::PathBuf;
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
