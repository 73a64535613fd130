//! The `setu` program as a user runs it.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The program, built in the profile of the running test.
///
/// # Panics
/// It doesn't build.
pub fn setu() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            let test = std::env::current_exe().expect("a test knows its own path");
            let profile = test.parent().and_then(|deps| deps.parent()).expect("tests lie in <profile>/deps");
            let target = profile.parent().expect("a profile's folder has a parent");
            let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            command.args(["build", "--quiet", "-p", "setu-host", "--bin", "setu"]);
            command.arg("--target-dir").arg(target).current_dir(env!("CARGO_MANIFEST_DIR"));
            if profile.ends_with("release") {
                command.arg("--release");
            }
            assert!(command.status().expect("cargo runs").success(), "setu doesn't build");
            profile.join("setu")
        })
        .clone()
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
