//! `setu kernels`: GPU kernels compiled ahead, for machines that have the driver and nothing else of CUDA.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command, value_parser};
use indicatif::{ProgressBar, ProgressStyle};

use super::print_line;
use crate::cli::Failure;
use crate::linked;

pub fn command() -> Command {
    let path = |name: &'static str| Arg::new(name).long(name).value_parser(value_parser!(PathBuf));
    Command::new("kernels")
        .about("Compile the GPU kernels ahead, which needs NVRTC but no GPU")
        .long_about(
            "Compile the GPU kernels ahead, which needs NVRTC but no GPU.\n\n\
             A machine that has the NVIDIA driver and nothing else of CUDA runs with them: put the folder beside the \
             program there, or name it in [backend] kernel_cache. They are for this version of Setu alone. Code for sm_80 \
             also runs on sm_86 and sm_89, and so in each generation; that for an architecture with a letter, on no other.",
        )
        .arg(
            Arg::new("for")
                .long("for")
                .value_name("ARCH,…")
                .value_delimiter(',')
                .value_parser(architecture)
                .default_values(linked::KERNEL_ARCHITECTURES)
                .help("Architectures of GPUs"),
        )
        .arg(path("out").value_name("DIR").help("Put them here [default: where the GPU backend keeps them]"))
        .arg(path("nvrtc").value_name("FILE").help("The NVRTC library [default: looked for in the usual places]"))
}

/// An architecture as NVIDIA's compilers name it.
fn architecture(text: &str) -> Result<String, String> {
    let number = text.strip_prefix("sm_").map(|number| number.strip_suffix('a').unwrap_or(number));
    match number.and_then(|number| number.parse::<u32>().ok()) {
        Some(number) if number >= 80 => Ok(text.to_owned()),
        Some(_) => Err("8.0 (Ampere), sm_80, is the least that the kernels are for".to_owned()),
        None => Err("it is none such as sm_80 or sm_90a".to_owned()),
    }
}

pub fn main(matches: &ArgMatches) -> Result<(), Failure> {
    let (out, nvrtc) = (matches.get_one::<PathBuf>("out"), matches.get_one::<PathBuf>("nvrtc"));
    for architecture in matches.get_many::<String>("for").into_iter().flatten() {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(0).with_style(style).with_prefix(architecture.clone());
        let told = |done: usize, all: usize| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        };
        let compiled = linked::compile_kernels(architecture, nvrtc.map(PathBuf::as_path), out.cloned(), &told);
        bar.finish_and_clear();
        let (count, folder) = compiled.map_err(|error| Failure::from(error).within(architecture))?;
        print_line(format_args!("{architecture}: {count} files of kernels in {}", folder.display()));
    }
    Ok(())
}
