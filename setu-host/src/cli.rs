//! The command line: which commands there are, and what each of them needs to start.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::commands::{
    bench, chat, check, completions, config, doctor, kernels, keys, make_dummy, model, plugins, run, score, serve,
    tokenize, why,
};
use crate::config::{Settings, read};
use crate::logging;
use crate::request::RequestOptions;
use crate::settings::LogConfig;
use crate::setup::Setup;

/// Runs the program and says how it went: 0 well, 1 not, 2 the command line or the configuration is at fault.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let setup = match Setup::new(args.iter().skip(1).cloned()) {
        Ok(setup) => setup,
        Err(message) => return fail(&message, 2),
    };
    let matches = command(&setup).try_get_matches_from(args);
    let matches = match matches {
        Ok(matches) => matches,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let Some((name, matches)) = matches.subcommand() else { return fail("no command was given", 2) };
    match dispatch(name, matches, setup) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => fail(&message, 2),
        Err(Failure::Failed(message)) => fail(&message, 1),
    }
}

/// Why a command came to nothing.
pub enum Failure {
    /// The command line or the configuration is at fault.
    Usage(String),
    Failed(String),
}

impl Failure {
    /// The same, with what it is about in front, where it has no place of its own.
    pub fn within(self, what: &str) -> Failure {
        match self {
            Failure::Usage(message) => Failure::Usage(message),
            Failure::Failed(message) => Failure::Failed(format!("{what}: {message}")),
        }
    }

    pub fn into_message(self) -> String {
        match self {
            Failure::Usage(message) | Failure::Failed(message) => message,
        }
    }
}

impl From<setu_core::Error> for Failure {
    fn from(error: setu_core::Error) -> Failure {
        match error.kind() {
            setu_core::ErrorKind::Config => Failure::Usage(error.to_string()),
            _ => Failure::Failed(error.to_string()),
        }
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    eprintln!("setu: {message}");
    ExitCode::from(code)
}

fn dispatch(name: &str, matches: &ArgMatches, mut setup: Setup) -> Result<(), Failure> {
    let with_settings = ["bench", "run", "score", "serve", "tokenize"].contains(&name);
    if !with_settings {
        return match name {
            "plugins" => plugins::main(matches, &mut setup),
            "config" => config::main(matches, &mut setup),
            "doctor" => doctor::main(matches, &mut setup),
            "kernels" => kernels::main(matches),
            "keys" => keys::main(matches, &mut setup),
            "model" => model::main(matches, &mut setup),
            "why" => why::main(matches),
            _ => completions::main(matches, command(&setup)),
        };
    }
    let settings = setup.resolve(matches).map_err(Failure::Usage)?;
    logging::adjust(
        &read::<LogConfig>(&settings.section("log").map_or_else(Vec::new, |log| log.own.clone()))?,
        matches.get_count("verbose"),
    )
    .map_err(Failure::Usage)?;
    if !settings.warnings.is_empty() {
        eprintln!("{}", settings.warnings);
    }
    let settings = if name == "tokenize" { settings } else { choose_backend(&mut setup, settings) };
    match name {
        "bench" => bench::main(matches, &setup, settings),
        "score" => score::main(matches, &setup, settings),
        "serve" => serve::main(matches, setup, settings),
        "tokenize" => tokenize::main(matches, settings),
        _ if matches.contains_id("prompt") && matches.get_one::<String>("prompt").is_some() => {
            run::main(matches, &setup, settings)
        }
        _ => chat::main(matches, &setup, settings),
    }
}

/// Has a GPU used if there is one and nobody said otherwise; else says in a line what was looked for.
fn choose_backend(setup: &mut Setup, settings: Settings) -> Settings {
    let (settings, why_not) = setup.choose_backend(settings);
    if let Some(why) = why_not {
        // What to do about it is for `setu doctor`.
        let found = why.split(": install").next().unwrap_or_default();
        eprintln!("setu: running on the CPU: {found}; `setu doctor` tells more");
    }
    settings
}

/// The whole command line, with a flag for every setting that `setup` knows.
pub fn command(setup: &Setup) -> Command {
    let json = || Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print JSON for programs");
    let verbose = || {
        let help = "Log more: info, debug, trace for -v, -vv, -vvv";
        Arg::new("verbose").short('v').long("verbose").action(ArgAction::Count).help(help)
    };
    let flag = |name: &'static str, help: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue).help(help);
    let file = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name("FILE").value_parser(value_parser!(std::path::PathBuf)).help(help)
    };
    let number = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name("N").value_parser(value_parser!(u32)).help(help)
    };
    let model_name = |help: &'static str| Arg::new("name").value_name("MODEL").help(help);

    let run = Command::new("run")
        .about("Answer a prompt, or chat if none is given")
        .arg(Arg::new("prompt").value_name("PROMPT").help("The prompt; `-` reads standard input. Without one: a chat"))
        .arg(flag("raw", "Continue the prompt as it is, without the chat template"))
        .arg(Arg::new("system").long("system").value_name("TEXT").help("The system message of the chat"))
        .arg(number("n", "Answers to generate"))
        .arg(number("logprobs", "Report log-probabilities, with the N likeliest tokens (needs --json)"))
        .arg(number("prompt-logprobs", "The same for the tokens of the prompt (needs --json)"))
        .arg(
            Arg::new("logit-bias")
                .long("logit-bias")
                .value_name("TOKEN=BIAS")
                .action(ArgAction::Append)
                .help("Add BIAS to the logit of token id TOKEN; may be repeated"),
        )
        .arg(file("trace", "Record every step and decision into FILE, as lines of JSON"))
        .arg(flag("timings", "Show where the time from start to the first token went"))
        .arg(json())
        .arg(verbose());
    let run = RequestOptions::add_flags(run);
    let score = Command::new("score")
        .about("Log-probabilities and perplexity of a text")
        .arg(Arg::new("file").value_name("FILE").required(true).help("The text; `-` reads standard input"))
        .arg(number("window", "Tokens the model sees at once").default_value("512"))
        .arg(number("scored-from", "First token of a window that is scored, from 0 [default: half the window + 1]"))
        .arg(flag("keep-last", "Score a short last window too, instead of dropping it"))
        .arg(flag("bos", "Begin every window with the beginning-of-sequence token"))
        .arg(flag("tokens", "Print every scored token"))
        .arg(json())
        .arg(verbose());
    let serve = Command::new("serve")
        .about("Serve models to clients of OpenAI's API")
        .arg(model_name("Path, Hub id or short name [default: what [model] and [models] name]"))
        .arg(file("trace", "Record every step and decision into FILE, as lines of JSON"))
        .arg(verbose());
    let tokenize = Command::new("tokenize")
        .about("Token ids of a text")
        .arg(Arg::new("text").value_name("TEXT").required(true).help("The text; `-` reads standard input"))
        .arg(flag("no-special", "Take special tokens in the text for plain text"))
        .arg(flag("add-special", "Add the special tokens that begin and end a prompt"))
        .arg(flag("ids", "Print ids only"))
        .arg(json())
        .arg(verbose());
    let plugins = Command::new("plugins")
        .about("What is linked in, loaded and refused")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(setup.add_flags(Command::new("list").about("List components and refused files").arg(json())))
        .subcommand(setup.add_flags(check::command().arg(json())))
        .subcommand(
            Command::new("inspect")
                .about("Show what a plugin file says of itself, without running any of its code")
                .arg(Arg::new("file").value_name("FILE").required(true).value_parser(value_parser!(std::path::PathBuf)))
                .arg(json()),
        );
    let config = Command::new("config")
        .about("Show, describe and check the configuration")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            setup.add_flags(Command::new("show").about("Each setting's value and where it came from").arg(json())),
        )
        .subcommand(setup.add_flags(Command::new("schema").about("A JSON Schema of setu.toml, for editors")))
        .subcommand(setup.add_flags(Command::new("example").about("A setu.toml with every setting, commented")))
        .subcommand(
            setup.add_flags(
                Command::new("reference").about("Reference pages of all settings").arg(
                    Arg::new("out")
                        .long("out")
                        .value_name("DIR")
                        .value_parser(value_parser!(std::path::PathBuf))
                        .help("Write the pages into DIR instead of printing them"),
                ),
            ),
        );
    let keys = Command::new("keys")
        .about("Make and list the keys that `setu serve` asks for")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands(keys::commands().map(|command| setup.add_flags(command)));
    let model = Command::new("model")
        .about("Fetch and look at models")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            Command::new("pull").about("Fetch a model").arg(model_name("Path, Hub id or short name")).arg(json()),
        )
        .subcommand(Command::new("list").about("List the catalogue and what was fetched").arg(json()))
        .subcommand(
            setup.add_flags(
                Command::new("inspect")
                    .about("Show a checkpoint's files, hyper-parameters and tensors")
                    .arg(model_name("Path, Hub id or short name"))
                    .arg(flag("tensors", "List every tensor"))
                    .arg(flag("graph", "Print the graph that the model component builds"))
                    .arg(json()),
            ),
        )
        .subcommand(make_dummy::command());
    let why = Command::new("why")
        .about("Tell why a session ran, waited or ended as it did")
        .arg(
            Arg::new("session")
                .value_name("SESSION")
                .help("A session's name, its number, or the beginning of its name. Without one: a summary of all"),
        )
        .arg(file("trace", "The record that `setu run --trace` wrote").required(true))
        .arg(json());
    Command::new("setu")
        .about("An LLM inference engine whose every part is a plugin")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(setup.add_flags(run))
        .subcommand(setup.add_flags(bench::command().arg(json()).arg(verbose())))
        .subcommand(setup.add_flags(score))
        .subcommand(setup.add_flags(serve))
        .subcommand(setup.add_flags(tokenize))
        .subcommand(plugins)
        .subcommand(config)
        .subcommand(keys)
        .subcommand(model)
        .subcommand(setup.add_flags(
            Command::new("doctor").about("What this machine has to run models on, and what is missing").arg(json()),
        ))
        .subcommand(kernels::command())
        .subcommand(why)
        .subcommand(Command::new("completions").about("Shell completions").arg(
            Arg::new("shell").value_name("SHELL").required(true).value_parser(value_parser!(clap_complete::Shell)),
        ))
}
