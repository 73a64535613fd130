//! `setu tokenize TEXT`.

use clap::ArgMatches;
use serde_json::json;

use super::{print_line, text_or_stdin};
use crate::cli::Failure;
use crate::config::Settings;
use crate::serving::{OpenModel, piece};
use setu_engine::text::EncodeOptions;

pub fn main(matches: &ArgMatches, settings: Settings) -> Result<(), Failure> {
    let text = text_or_stdin(matches.get_one::<String>("text").map_or("", String::as_str))?;
    let tokenizer = OpenModel::open(&settings, None)?.text()?.tokenizer;
    let options =
        EncodeOptions { add_special: matches.get_flag("add-special"), parse_special: !matches.get_flag("no-special") };
    let ids = tokenizer.encode(&text, options)?;
    if matches.get_flag("json") {
        let tokens: Vec<_> = ids.iter().map(|&id| json!({ "id": id, "text": piece(&tokenizer, id) })).collect();
        print_line(json!({ "tokens": tokens, "count": ids.len() }));
    } else if matches.get_flag("ids") {
        print_line(ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "));
    } else {
        ids.iter().for_each(|&id| print_line(format_args!("{id:>8} {:?}", piece(&tokenizer, id))));
    }
    Ok(())
}
