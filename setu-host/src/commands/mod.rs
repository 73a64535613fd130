//! One command a file.

pub mod bench;
pub mod chat;
pub mod check;
pub mod completions;
pub mod config;
pub mod doctor;
pub mod kernels;
pub mod keys;
pub mod make_dummy;
pub mod model;
pub mod plugins;
pub mod run;
pub mod score;
pub mod serve;
pub mod tokenize;
pub mod why;

use std::io::{Read, Write};

use crate::cli::Failure;

/// The text of an argument, or of standard input where it is `-`.
fn text_or_stdin(text: &str) -> Result<String, Failure> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut all = String::new();
    let read = std::io::stdin().take(64 << 20).read_to_string(&mut all);
    read.map_err(|error| Failure::Failed(format!("standard input can't be read: {error}")))?;
    Ok(all)
}

/// Prints a line to standard output. A reader that has gone away ends the program quietly.
fn print_line(line: impl std::fmt::Display) {
    if writeln!(std::io::stdout(), "{line}").is_err() {
        std::process::exit(0);
    }
}

/// Bytes as people write them.
fn human_bytes(bytes: u64) -> String {
    indicatif::DecimalBytes(bytes).to_string()
}
