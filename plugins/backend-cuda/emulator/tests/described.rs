//! Pieces that kernels are made of mean on the emulator what is written about them: programs that compare the two.

use std::path::Path;
use std::process::Command;

/// Compiles `tests/NAME.cpp` and runs it, in both orders of lanes and blocks.
fn is_as_described(name: &str) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuemu-{name}-{}", std::process::id()));
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let mut command = Command::new(compiler);
    command.args(["-std=c++17", "-O1", "-o"]).arg(&program).args([&format!("tests/{name}.cpp"), "scheduler.cpp"]);
    let built = command.current_dir(sources).output().expect("a C++ compiler: install g++");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    for reverse in [false, true] {
        let mut command = Command::new(&program);
        if reverse {
            command.env("CUEMU_REVERSE", "1");
        }
        let output = command.output().expect("the program runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("as described"), "{said}");
    }
    let _ = std::fs::remove_file(&program);
}

#[test]
fn tensor_cores_are_as_described() {
    is_as_described("tensor");
}

#[test]
fn eight_bit_keys_and_values_are_as_described() {
    is_as_described("e4m3");
}
