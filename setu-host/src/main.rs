//! The `setu` program.

fn main() -> std::process::ExitCode {
    setu_host::cli::main()
}
