//! The emulator finds what would go unnoticed on a device, or hang it.

use std::path::Path;
use std::process::Command;

#[test]
fn faults_of_kernels_are_found() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuemu-faults-{}", std::process::id()));
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let mut command = Command::new(compiler);
    command.args(["-std=c++17", "-O1", "-o"]).arg(&program).args(["tests/faults.cpp", "scheduler.cpp"]);
    let built = command.current_dir(sources).output().expect("a C++ compiler: install g++");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let cases = [
        (false, "a barrier is not reached by threads that exited"),
        (false, "threads wait for each other"),
        (false, "a lane that the mask names has exited"),
        (false, "a shuffle reads a lane outside its mask"),
        (true, "unwritten shared memory is NaN"),
        // Three blocks of the sum of 0 to 63.
        (true, "total 6048"),
    ];
    for (number, (ends_well, expected)) in cases.iter().enumerate() {
        for reverse in [false, true] {
            let mut command = Command::new(&program);
            command.arg(number.to_string());
            if reverse {
                command.env("CUEMU_REVERSE", "1");
            }
            let output = command.output().expect("the program runs");
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.success(), *ends_well, "case {number}: {said}");
            assert!(said.contains(expected), "case {number}: {said}");
        }
    }
    let _ = std::fs::remove_file(&program);
}
