//! `setu completions SHELL`.

use clap::{ArgMatches, Command};

use crate::cli::Failure;

pub fn main(matches: &ArgMatches, mut command: Command) -> Result<(), Failure> {
    if let Some(&shell) = matches.get_one::<clap_complete::Shell>("shell") {
        clap_complete::generate(shell, &mut command, "setu", &mut std::io::stdout());
    }
    Ok(())
}
