//! A model loaded into a running engine: the second half of start-up, and what commands do with it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use setu_core::component::{ComponentKind, Kind};
use setu_core::model::CheckpointInfo;
use setu_core::sampling::SamplingParams;
use setu_core::{DType, Error, Graph, Registries, Registry, Result};
use setu_engine::checkpoint::Checkpoint;
use setu_engine::config::{EngineConfig, KvConfig, ParallelConfig};
use setu_engine::core::{Parts, Settings as CoreSettings};
use setu_engine::grammar::{CompiledGrammar, Grammar, Grammars};
use setu_engine::text::{
    ChatInput, ChatTemplate, ChatValue, DetokenizeOptions, Detokenizer, EncodeOptions, StopMatcher, TextStream,
    Tokenizer,
};
use setu_engine::{Engine, EventSink, Guarded, Handle, Health, ModelText, Request, Session, TextSink, load};

use crate::cli::Failure;
use crate::components::{self, ComponentInUse};
use crate::config::Settings;
use crate::linked;
use crate::models::{Console, ModelName, ResolvedModel, Silent, Store, StoreOptions};
use crate::request::RequestOptions;
use crate::settings::{LoadFormat, ModelConfig, SamplingConfig};
use crate::setup::Setup;
use crate::tenants::{Tenants, TenantsConfig};

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn new(role: &str, content: &str) -> Message {
        Message { role: role.to_owned(), content: content.to_owned() }
    }
}

/// A checkpoint that was found and opened.
pub struct OpenModel {
    pub name: String,
    pub checkpoint: Checkpoint,
    pub info: CheckpointInfo,
    config: ModelConfig,
}

impl OpenModel {
    /// Finds the model that `settings` name, or `name`, fetching it if need be, and opens it.
    ///
    /// # Errors
    /// It can't be found, fetched or read.
    pub fn open(settings: &Settings, name: Option<&str>) -> Result<OpenModel> {
        let config: ModelConfig = own(settings, "model")?;
        let store = Store::open(StoreOptions::from_env()?)?;
        let name = store.parse(name.unwrap_or(&config.name))?;
        OpenModel::from_files(store.resolve(&name, &mut Console::stderr())?, config)
    }

    /// The model that the `config.json` at `path` or in that folder describes, with random weights in `dtype`.
    ///
    /// # Errors
    /// There is no such file, or it isn't one.
    pub fn dummy(settings: &Settings, path: &Path, dtype: DType) -> Result<OpenModel> {
        let config: ModelConfig = own(settings, "model")?;
        let checkpoint = Checkpoint::dummy(path, dtype)?;
        let info = checkpoint.info();
        Ok(OpenModel { name: path.display().to_string(), checkpoint, info, config })
    }

    /// Opens the model that `settings` name, unless it would have to be fetched first.
    ///
    /// # Errors
    /// There can be no such model, or it can't be read.
    fn open_if_here(settings: &Settings) -> Result<Option<OpenModel>> {
        let config: ModelConfig = own(settings, "model")?;
        let store = Store::open(StoreOptions { offline: true, ..StoreOptions::from_env()? })?;
        let name = store.parse(&config.name)?;
        match store.resolve(&name, &mut Silent) {
            Ok(model) => OpenModel::from_files(model, config).map(Some),
            Err(error) if matches!(name, ModelName::Path(_)) => Err(error),
            Err(_) => Ok(None),
        }
    }

    fn from_files(model: ResolvedModel, config: ModelConfig) -> Result<OpenModel> {
        let within = |error: Error| error.within(format!("the model {}", model.name));
        let checkpoint = match config.load_format {
            LoadFormat::Auto => Checkpoint::open(&model.path),
            LoadFormat::Dummy => Checkpoint::dummy(&model.path, config.dummy_dtype.dtype()),
        };
        let checkpoint = checkpoint.map_err(within)?;
        let info = checkpoint.info();
        Ok(OpenModel { name: model.name, checkpoint, info, config })
    }

    /// The graph that the model component builds, without loading any weight.
    ///
    /// # Errors
    /// No component takes the checkpoint, or the one that does refuses it.
    pub fn graph(&self, setup: &Setup, settings: &Settings) -> Result<Graph, Failure> {
        let settings = self.choose_component(setup, settings.clone())?;
        let model = build(&settings, &setup.registries.models)?;
        Ok(load::graph(model.1.as_ref(), &self.info, self.config.max_model_len)?)
    }

    /// Has the component that takes the checkpoint chosen where nobody named one.
    fn choose_component(&self, setup: &Setup, settings: Settings) -> Result<Settings, Failure> {
        if settings.section("model").is_some_and(|section| section.chosen.is_some()) {
            return Ok(settings);
        }
        let key = load::choose_model(&self.info, &setup.registries.models)?;
        setup.choose_model(settings.model.as_deref(), &key).map_err(Failure::Usage)
    }

    /// The model's text side, with the chat template that the settings name in place of its own.
    ///
    /// # Errors
    /// The checkpoint has no tokenizer that can be used, or the template's file can't be read.
    pub fn text(&self) -> Result<ModelText> {
        let text = ModelText::from_checkpoint(&self.checkpoint);
        let mut text = text.map_err(|error| error.within(format!("the model {}", self.name)))?;
        if let Some(path) = &self.config.chat_template {
            let unreadable =
                |error| Error::config(format!("the chat template {} can't be read: {error}", path.display()));
            let template = ChatTemplate::parse(&std::fs::read_to_string(path).map_err(unreadable)?);
            let template = template.map_err(|error| error.within(path.display()))?;
            // The special tokens are the model's, whoever wrote the template.
            text.template = Ok(template.with_special_tokens(special_tokens(&text.tokenizer)));
        }
        Ok(text)
    }
}

fn special_tokens(tokenizer: &Tokenizer) -> Vec<(String, String)> {
    let tokens = [("bos_token", tokenizer.bos()), ("eos_token", tokenizer.eos())];
    tokens.into_iter().filter_map(|(name, id)| Some((name.to_owned(), piece(tokenizer, id?)))).collect()
}

/// A running engine with its model's text side.
pub struct Serving {
    engine: Engine,
    model: OpenModel,
    tokenizer: Arc<Tokenizer>,
    template: Result<ChatTemplate>,
    /// Prepared when the first answer must have a form.
    grammars: OnceLock<Result<Grammars>>,
    tenants: Tenants,
    sampling: SamplingParams,
    components: Vec<ComponentInUse>,
    weight_bytes: u64,
    timings: Vec<(&'static str, f64)>,
    load_s: f64,
}

impl Serving {
    /// Loads the model that `settings` name and starts an engine of the components that they choose.
    ///
    /// # Errors
    /// The configuration is refused by a component, or the model can't be loaded.
    pub fn start(setup: &Setup, settings: Settings) -> Result<Serving, Failure> {
        Serving::start_model(setup, settings, None)
    }

    /// As [`start`](Serving::start), with the model `name` where one is given.
    ///
    /// # Errors
    /// As [`start`](Serving::start).
    pub fn start_model(setup: &Setup, settings: Settings, name: Option<&str>) -> Result<Serving, Failure> {
        let started = Instant::now();
        let model = OpenModel::open(&settings, name)?;
        let opened_s = started.elapsed().as_secs_f64();
        let settings = model.choose_component(setup, settings)?;
        let Configs { engine: engine_config, kv: kv_config, tenants, sampling } = Configs::of(&settings)?;
        let components = components::in_use(&settings, &setup.layout);

        let registries = &setup.registries;
        let scheduler = build(&settings, &registries.schedulers)?;
        let batcher = build(&settings, &registries.batchers)?;
        let (_, component) = build(&settings, &registries.models)?;
        let (_, mut backend) = build(&settings, &registries.backends)?;

        // Taken from what is linked in, whatever a plugin of the same key says.
        let fallbacks = Registries::linked_in();

        // The tokenizer is as much work as a part of the weights, and nobody needs it before the first prompt.
        let (loaded, text) = std::thread::scope(|scope| {
            let text = scope.spawn(|| model.text());
            let configs = (&engine_config, &kv_config);
            let loaded = load::load(
                &model.checkpoint,
                &model.info,
                component.as_ref(),
                model.config.max_model_len,
                backend.as_mut(),
                configs,
            );
            (loaded, text.join().unwrap_or_else(|_| Err(Error::internal("the tokenizer panicked"))))
        });
        let (loaded, ModelText { tokenizer, template }) = (loaded?, text?);
        if tokenizer.vocab_size() > loaded.graph.vocab_size as usize {
            return Err(Failure::Failed(format!(
                "the model {}: the tokenizer has {} tokens, the embedding only {} rows",
                model.name,
                tokenizer.vocab_size(),
                loaded.graph.vocab_size
            )));
        }
        let weight_bytes = loaded.info.weight_bytes;
        let mut timings = vec![("open the checkpoint", opened_s)];
        timings.extend(loaded.timings);
        let parts = Parts {
            graph: loaded.graph,
            executable: loaded.executable,
            scheduler: guarded(scheduler, linked::FALLBACK_SCHEDULER, &fallbacks.schedulers)?,
            batcher: guarded(batcher, linked::FALLBACK_BATCHER, &fallbacks.batchers)?,
            eos: tokenizer.eos_ids().to_vec(),
            keep_alive: vec![Box::new(model.checkpoint.clone()), Box::new(backend)],
        };
        let core_settings = CoreSettings { engine: engine_config, kv: kv_config, max_model_len: loaded.max_model_len };
        let engine = Engine::start(parts, core_settings)?;
        let load_s = started.elapsed().as_secs_f64();
        Ok(Serving {
            engine,
            model,
            tokenizer,
            template,
            grammars: OnceLock::new(),
            tenants,
            sampling,
            components,
            weight_bytes,
            timings,
            load_s,
        })
    }

    /// Checks whatever can be told of `settings` before their model is loaded.
    ///
    /// # Errors
    /// [`start`](Serving::start) would refuse them.
    pub fn check(setup: &Setup, settings: &Settings) -> Result<(), Failure> {
        let mut settings = settings.clone();
        if let Some(model) = OpenModel::open_if_here(&settings)? {
            settings = model.choose_component(setup, settings)?;
        }
        Configs::of(&settings)?;
        let unusable = unusable_components(&settings, &setup.registries).into_iter().next();
        unusable.map_or(Ok(()), |(_, _, reason)| Err(Failure::Usage(reason)))
    }

    /// What `setu run FLAGS` would start; for tests and benches.
    ///
    /// # Errors
    /// As the command's.
    pub fn from_flags(flags: &[&str]) -> Result<Serving, String> {
        let args = ["setu", "run"].iter().chain(flags).map(std::ffi::OsString::from).collect::<Vec<_>>();
        let mut setup = Setup::new(args.iter().skip(1).cloned())?;
        let matches = crate::cli::command(&setup).try_get_matches_from(args).map_err(|error| error.to_string())?;
        let Some((_, matches)) = matches.subcommand() else { return Err("no command".to_owned()) };
        let settings = setup.resolve(matches)?;
        Serving::start(&setup, settings).map_err(Failure::into_message)
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The model's chat template.
    ///
    /// # Errors
    /// There is none, or it can't be read.
    pub fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().map_err(Clone::clone)
    }

    pub fn model_config(&self) -> &ModelConfig {
        &self.model.config
    }

    pub fn tenants(&self) -> &Tenants {
        &self.tenants
    }

    /// How tokens are sampled where a request doesn't say.
    pub fn sampling(&self) -> &SamplingParams {
        &self.sampling
    }

    /// What the engine is made of.
    pub fn components(&self) -> &[ComponentInUse] {
        &self.components
    }

    pub fn model_name(&self) -> &str {
        &self.model.name
    }

    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Seconds from finding the model to a running engine.
    pub fn load_s(&self) -> f64 {
        self.load_s
    }

    pub fn is_alive(&self) -> bool {
        self.engine.health(std::time::Duration::MAX) != Health::Stopped
    }

    /// Tokens of a text in which special tokens count as what they are.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, EncodeOptions { add_special, parse_special: true })
    }

    /// Tokens of a conversation, rendered by the model's chat template and open for an answer.
    ///
    /// # Errors
    /// There is no template, or it fails.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.tokenizer.encode(&self.render_chat(messages)?, EncodeOptions::RENDERED)
    }

    /// The text of a conversation, open for an answer.
    ///
    /// # Errors
    /// There is no template, or it fails.
    pub fn render_chat(&self, messages: &[Message]) -> Result<String> {
        let template = self.template()?;
        let messages = messages.iter().map(|message| ChatValue::message(&message.role, &message.content)).collect();
        template.render(&ChatInput::new(messages))
    }

    /// The text of tokens, special ones included.
    ///
    /// # Errors
    /// There is no such token.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, false)
    }

    /// Adds a request whose answers come with text.
    ///
    /// # Errors
    /// The request is invalid.
    pub fn add(&self, prompt: Vec<u32>, params: SamplingParams, options: &RequestOptions) -> Result<Vec<Session>> {
        self.engine.add_session(self.request(prompt, params, options)?)
    }

    /// As [`add`](Serving::add), with events handed to what `sink` returns for each choice. Where `prompt_only` is set
    /// the prompt is read and nothing generated.
    ///
    /// # Errors
    /// The request is invalid.
    pub fn add_with(
        &self,
        prompt: Vec<u32>,
        prompt_only: bool,
        params: SamplingParams,
        options: &RequestOptions,
        sink: impl FnMut(u32) -> Box<dyn EventSink>,
    ) -> Result<Vec<Handle>> {
        let request = Request { prompt_only, ..self.request(prompt, params, options)? };
        self.engine.add_session_with(request, sink)
    }

    fn request(&self, prompt: Vec<u32>, params: SamplingParams, options: &RequestOptions) -> Result<Request> {
        let stops = StopMatcher::new(&params.stop, false)?;
        let text = (0..params.n).map(|_| {
            let detokenizer = Detokenizer::new(self.tokenizer.clone(), DetokenizeOptions::default());
            let detokenizer = detokenizer.showing(options.shown.clone());
            let text: Box<dyn TextSink> = Box::new(TextStream::new(detokenizer, stops.clone()));
            text
        });
        let text = text.collect();
        let mut request = Request::new(prompt, params);
        request.text = text;
        let (tenant, weight) = self.tenants.get(options.tenant.as_deref());
        (request.tenant, request.tenant_weight) = (tenant, options.weight.unwrap_or(weight));
        request.priority = options.priority;
        request.class = options.class;
        request.deadlines = options.deadlines;
        if let Some(grammar) = &options.grammar {
            request.constraints = (0..request.params.n).map(|_| grammar.start()).collect();
        }
        Ok(request)
    }

    /// Compiles a grammar; one that was compiled lately is found.
    ///
    /// # Errors
    /// It is refused, or the model's vocabulary can't be used for grammars.
    pub fn grammar(&self, grammar: &Grammar) -> Result<Arc<CompiledGrammar>> {
        let vocab_size = self.engine.limits().vocab_size;
        let grammars = self.grammars.get_or_init(|| Grammars::new(&self.tokenizer, vocab_size));
        grammars.as_ref().map_err(Clone::clone)?.compile(grammar)
    }

    /// The text of one token, as well as it can be shown alone.
    pub fn piece(&self, id: u32) -> String {
        piece(&self.tokenizer, id)
    }

    /// The token that begins a text.
    ///
    /// # Errors
    /// The model has none.
    pub fn bos(&self) -> Result<u32> {
        let none = || Error::config(format!("{} has no beginning-of-sequence token: leave --bos out", self.model.name));
        self.tokenizer.bos().ok_or_else(none)
    }

    /// Records every step and decision into `path`, as lines of JSON: see [`setu_engine::trace`].
    ///
    /// # Errors
    /// The file can't be written.
    pub fn trace_to(&mut self, path: &Path) -> Result<()> {
        let unwritable = |error| Error::config(format!("the trace {} can't be written: {error}", path.display()));
        let file = std::fs::File::create(path).map_err(unwritable)?;
        let path: PathBuf = path.to_owned();
        let failed = move |error: std::io::Error| {
            tracing::warn!(%error, path = %path.display(), "the trace can't be written; the rest of it is lost");
        };
        self.engine.set_tracer(Some(setu_engine::trace::writer(file, failed)))
    }

    /// Where the time from process start to the first token went, a line each.
    pub fn timings(&self, first_token_s: Option<f64>) -> String {
        let mut text = String::new();
        let mut line = |name: &str, seconds: f64| text.push_str(&format!("{:>8.1} ms  {name}\n", seconds * 1e3));
        self.timings.iter().for_each(|(name, seconds)| line(name, *seconds));
        line("load in all", self.load_s);
        if let Some(first_token_s) = first_token_s {
            line("prompt to first token", first_token_s);
        }
        if let Some(seconds) = process_age_s() {
            line("process start until now", seconds);
        }
        text
    }
}

/// The text of one token, as well as it can be shown alone.
pub fn piece(tokenizer: &Tokenizer, id: u32) -> String {
    tokenizer.token_bytes(id).map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(bytes).into_owned())
}

/// The settings that are not a component's.
struct Configs {
    engine: EngineConfig,
    kv: KvConfig,
    tenants: Tenants,
    sampling: SamplingParams,
}

impl Configs {
    fn of(settings: &Settings) -> Result<Configs> {
        own::<ParallelConfig>(settings, "parallel")?;
        Ok(Configs {
            engine: own(settings, "engine")?,
            kv: own(settings, "kv")?,
            tenants: Tenants::new(own::<TenantsConfig>(settings, "tenants")?),
            sampling: own::<SamplingConfig>(settings, "sampling")?.params(),
        })
    }
}

/// A section's own settings.
fn own<T: setu_core::config::Config>(settings: &Settings, section: &str) -> Result<T> {
    let found = settings.section(section).ok_or_else(|| Error::internal(format!("there is no section [{section}]")))?;
    found.read_own()
}

/// The component that a section chose, built from its settings.
fn build<C: ComponentKind + ?Sized>(settings: &Settings, registry: &Registry<C>) -> Result<(String, Box<C>), Failure> {
    let section = C::KIND.name();
    let chosen = settings.section(section).and_then(|section| Some((section, section.chosen.as_ref()?)));
    let Some((table, chosen)) = chosen else {
        return Err(Failure::Failed(format!("no component was chosen for [{section}]")));
    };
    let entry = registry.get(&chosen.key)?;
    let built = load::caught(|| (entry.build)(&table.options_json()));
    let component = built.map_err(|error| {
        let error = match &entry.source {
            setu_core::registry::Source::File { path, .. } => error.within(path.display()),
            _ => error,
        };
        Failure::Usage(settings.refusal(section, &error).to_string())
    })?;
    Ok((chosen.key.clone(), component))
}

/// The chosen components that can't be built from their settings: kind, key and the reason.
pub fn unusable_components(settings: &Settings, registries: &Registries) -> Vec<(Kind, String, String)> {
    fn check<C: ComponentKind + ?Sized>(
        settings: &Settings,
        registry: &Registry<C>,
        found: &mut Vec<(Kind, String, String)>,
    ) {
        let chosen = settings.section(C::KIND.name()).and_then(|section| section.chosen.as_ref());
        if let (Some(chosen), Err(Failure::Usage(reason) | Failure::Failed(reason))) =
            (chosen, build(settings, registry))
        {
            found.push((C::KIND, chosen.key.clone(), reason));
        }
    }
    let mut found = Vec::new();
    check(settings, &registries.schedulers, &mut found);
    check(settings, &registries.batchers, &mut found);
    check(settings, &registries.models, &mut found);
    check(settings, &registries.backends, &mut found);
    found
}

/// Puts the fallback that is linked in beside a chosen component.
fn guarded<C: ComponentKind + ?Sized>(
    (name, component): (String, Box<C>),
    fallback: &str,
    registry: &Registry<C>,
) -> Result<Guarded<C>> {
    let fallback_component = (registry.get(fallback)?.build)("{}")?;
    Ok(Guarded::new(&name, component, fallback, fallback_component))
}

/// Seconds since the process began, from the kernel's books.
fn process_age_s() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let started: f64 = stat.rsplit(')').next()?.split_whitespace().nth(19)?.parse().ok()?;
    let uptime: f64 = std::fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
    Some(uptime - started / 100.0)
}
