//! `setu model make-dummy SHAPE --out FILE`.

use std::path::{Path, PathBuf};

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use setu_core::DType;
use setu_engine::checkpoint::write::{DummyGguf, DummyOptions};

use super::print_line;
use crate::cli::Failure;
use crate::config::config_flag;
use crate::models::{Console, Progress};
use crate::serving::OpenModel;
use crate::setup::Setup;

pub fn command() -> Command {
    let path = |name: &'static str| Arg::new(name).value_parser(value_parser!(PathBuf)).required(true);
    Command::new("make-dummy")
        .about("Write a GGUF file of random weights, to measure a model without its checkpoint")
        .long_about(
            "Write a GGUF file of random weights, to measure a model without its checkpoint, here or with llama.cpp.\n\n\
             All matrices have the one format, embedding and head too: it is none of the mixtures that k-quant files of \
             trained models usually are. Matrices whose rows aren't whole blocks of the format are BF16; vectors and \
             routers are F32. The tokenizer knows single bytes and an end.",
        )
        .arg(path("shape").value_name("SHAPE").help("A config.json of Hugging Face's, or the folder that holds it"))
        .arg(path("out").long("out").value_name("FILE").help("The file to write"))
        .arg(
            Arg::new("format")
                .long("format")
                .value_name("FORMAT")
                .value_parser(PossibleValuesParser::new(DType::ALL.map(DType::name)))
                .ignore_case(true)
                .default_value(DType::Q4_0.name())
                .help("Format of all matrices"),
        )
        .arg(
            Arg::new("seed")
                .long("seed")
                .value_name("N")
                .value_parser(value_parser!(u64))
                .default_value("0")
                .help("What the weights are drawn from: the same number gives the same file"),
        )
        .arg(Arg::new("force").long("force").action(ArgAction::SetTrue).help("Replace FILE if it exists"))
        // Not a flag for every setting: those of sampling have a seed too.
        .arg(config_flag())
}

pub fn main(matches: &ArgMatches, setup: &mut Setup) -> Result<(), Failure> {
    let settings = setup.resolve(matches).map_err(Failure::Usage)?;
    let missing = |name: &str| Failure::Usage(format!("{name} is missing"));
    let path = |name: &str| matches.get_one::<PathBuf>(name).ok_or_else(|| missing(name));
    let (shape, out) = (path("shape")?, path("out")?);
    let format = matches.get_one::<String>("format").ok_or_else(|| missing("--format"))?;
    let dtype = DType::ALL.into_iter().find(|dtype| dtype.name().eq_ignore_ascii_case(format));
    let dtype = dtype.ok_or_else(|| Failure::Usage(format!("there is no format {format:?}")))?;
    let seed = matches.get_one("seed").copied().unwrap_or(0);
    refuse_to_replace(out, matches.get_flag("force"))?;

    let model = OpenModel::dummy(&settings, shape, dtype)?;
    let graph = model.graph(setup, &settings).map_err(|failure| failure.within(&model.name))?;
    let name = name_of(shape);
    let options = DummyOptions { name: &name, dtype, seed };
    let dummy = DummyGguf::new(model.checkpoint.metadata(), &graph, options);
    let dummy = dummy.map_err(|error| error.within(&model.name))?;
    let writer = dummy.writer()?;
    let mut console = Console::stderr();
    console.begin(&format!("writing {}", out.display()), Some(writer.bytes()?));
    writer.write_telling(out, &mut |written| console.at(written))?;
    console.end();
    print_line(out.display());
    Ok(())
}

fn refuse_to_replace(out: &Path, force: bool) -> Result<(), Failure> {
    let shown = out.display();
    match out.symlink_metadata() {
        Ok(found) if found.is_dir() => {
            Err(Failure::Failed(format!("{shown} is a folder; --out names the file to write")))
        }
        Ok(_) if !force => Err(Failure::Failed(format!("{shown} exists; --force replaces it"))),
        _ => Ok(()),
    }
}

/// The folder's name, which says what shape it is.
fn name_of(shape: &Path) -> String {
    let folder = if shape.is_file() { shape.parent().unwrap_or(shape) } else { shape };
    let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
    name.map_or_else(|| "dummy".to_owned(), |name| format!("{name} (dummy)"))
}
