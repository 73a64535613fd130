//! The `setu` program, built by cargo with the tests that run it.

fn main() -> std::process::ExitCode {
    setu_host::cli::main()
}
