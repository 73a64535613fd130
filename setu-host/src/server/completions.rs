//! `/v1/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde::Serialize;
use setu_core::sampling::SamplingParams;
use setu_engine::text::EncodeOptions;
use setu_engine::{Event, TokenLogprob};
use utoipa::ToSchema;

use super::app::{App, now_s};
use super::body::Body;
use super::content::Prompts;
use super::error::{ApiError, ErrorBody};
use super::generation::{Answer, Generation, Prompt, check, finish_name};
use super::keys::Caller;
use super::shared::{Refused, StreamOptions, UsageBody, check as check_params, text_request};
use super::{sse, structured, text};
use crate::request::RequestOptions;
use crate::serving::Serving;

/// Longest answer where nobody says, as OpenAI has it.
const DEFAULT_MAX_TOKENS: u32 = 16;

text_request! {
    /// Texts that are to be continued.
    pub struct CompletionRequest {
        /// What is to be continued: text or token ids, one prompt or several.
        pub prompt: Prompts,
        /// Longest answer, in tokens; 16 where neither it nor `[sampling]` says. 0 with `echo` reads the prompt only.
        #[serde(default)]
        pub max_tokens: Option<u32>,
        /// The answer begins with the prompt, which its log-probabilities then cover.
        #[serde(default)]
        pub echo: Option<bool>,
        /// Tells the log-probability of each token, with this many of the likeliest.
        #[serde(default)]
        #[schema(maximum = 100)]
        pub logprobs: Option<u32>,
        /// Only as many as `n` are provided: all that are generated are returned.
        #[serde(default)]
        pub best_of: Option<u32>,
        /// Whether the tokens that begin and end a prompt are added to texts; true where it isn't given.
        #[serde(default)]
        pub add_special_tokens: Option<bool>,
        #[serde(default)]
        pub suffix: Refused,
    }
}

/// Continuations.
#[derive(Serialize, ToSchema)]
pub struct CompletionBody {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageBody>,
}

/// A continuation or a piece of it. Those of prompt i are from i times `n` on.
#[derive(Serialize, ToSchema)]
struct CompletionChoice {
    index: usize,
    text: String,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    /// The seed that repeats it.
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<i64>,
}

/// Log-probabilities of tokens, each list with an entry a token.
#[derive(Default, Serialize, ToSchema)]
struct Logprobs {
    tokens: Vec<String>,
    /// Null for the first token of a prompt.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Characters before the token.
    text_offset: Vec<usize>,
    /// Characters before the first.
    #[serde(skip)]
    start: usize,
}

sse::stream_event! {
    /// An event of a stream: a piece of the answer, or the error that ends it.
    CompletionEvent of CompletionBody | ErrorBody, ends "[DONE]"
}

/// Continues texts.
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest, responses(
    (status = 200, content((CompletionBody = "application/json"), (CompletionEvent = "text/event-stream"))),
    (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)
))]
pub async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body { request, unknown }: Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let served = app.model(caller, request.model.as_deref()).await?;
    let serving = &served.serving;
    request.suffix.check("suffix", "text is continued at its end")?;
    let (params, prompt_only) = request.params(serving)?;
    let prompts = request.prompts(&app, serving).await?;
    let echo = request.echo == Some(true);
    let echoed =
        if echo { prompts.iter().map(|prompt| prompt.text(serving)).collect::<Result<_, _>>()? } else { vec![] };
    // What has log-probabilities begins with a token that has none.
    let firsts = prompts.iter().filter(|_| params.prompt_logprobs.is_some());
    let firsts = firsts.map(|prompt| prompt.tokens.first().copied()).collect();
    let prompts = prompts.into_iter().map(|prompt| Prompt { tokens: prompt.tokens, only: prompt_only }).collect();
    let form = request.structured()?.map(|grammar| ("structured_outputs", grammar));
    let grammar = structured::compile(&served.serving, form).await?;
    let options = RequestOptions { grammar, ..request.options() };
    let generation = Generation::start(&served, prompts, &params, &options).await?;
    let echo = Echo { texts: echoed, firsts, choices: params.n as usize };
    let answer = Envelope { id: app.answer_id("cmpl"), created: now_s(), model: served.name, echo };
    let response = if request.is_streamed() {
        sse::response(stream(served.serving, generation, answer, request.stream_options()))
    } else {
        let answers = generation.collect().await?;
        Json(answer.whole(serving, answers)).into_response()
    };
    Ok(app.warned(&unknown, response))
}

/// A prompt's tokens and, where it was given as text, the text.
struct Given {
    text: Option<String>,
    tokens: Vec<u32>,
}

impl Given {
    fn text(&self, serving: &Serving) -> Result<String, ApiError> {
        match &self.text {
            Some(text) => Ok(text.clone()),
            None => text::decode(serving, &self.tokens),
        }
    }
}

impl CompletionRequest {
    /// How to sample, and whether prompts are only read.
    fn params(&self, serving: &Serving) -> Result<(SamplingParams, bool), ApiError> {
        let mut params = self.sampling(serving.sampling())?;
        let echo = self.echo == Some(true);
        params.max_tokens = self.max_tokens.or(params.max_tokens).or(Some(DEFAULT_MAX_TOKENS));
        params.logprobs = self.logprobs;
        params.prompt_logprobs = self.logprobs.filter(|_| echo);
        let prompt_only = params.max_tokens == Some(0);
        if prompt_only {
            if !echo {
                let message = "`max_tokens` must be at least 1; 0 needs `echo`, and reads the prompt only";
                return Err(ApiError::invalid("max_tokens", message));
            }
            params.max_tokens = None;
        }
        if self.best_of.is_some_and(|best_of| best_of != params.n) {
            let message = "all answers that are generated are returned: leave `best_of` out, or ask for as many by `n`";
            return Err(ApiError::invalid("best_of", message));
        }
        check_params(&params, serving.engine().limits().vocab_size)?;
        Ok((params, prompt_only))
    }

    async fn prompts(&self, app: &App, serving: &Arc<Serving>) -> Result<Vec<Given>, ApiError> {
        let most = app.config.max_prompts as usize;
        let count = match &self.prompt {
            Prompts::Texts(texts) => texts.len(),
            Prompts::Tokens(prompts) => prompts.len(),
        };
        if count > most {
            return Err(ApiError::invalid(
                "prompt",
                format!("there are {count} prompts; at most {most} are taken at once"),
            ));
        }
        let options = EncodeOptions { add_special: self.add_special_tokens.unwrap_or(true), parse_special: true };
        match &self.prompt {
            Prompts::Tokens(_) if self.add_special_tokens.is_some() => {
                let message = "token ids are taken as they are: leave `add_special_tokens` out";
                Err(ApiError::invalid("add_special_tokens", message))
            }
            Prompts::Tokens(prompts) => {
                Ok(prompts.iter().map(|tokens| Given { text: None, tokens: tokens.clone() }).collect())
            }
            Prompts::Texts(texts) => {
                let mut given = Vec::with_capacity(count);
                for text in texts {
                    let tokens = text::encode(serving, text.clone(), options).await?;
                    given.push(Given { text: Some(text.clone()), tokens });
                }
                Ok(given)
            }
        }
    }
}

/// The prompts, where answers begin with them.
struct Echo {
    /// Empty where they don't.
    texts: Vec<String>,
    /// The first token of each prompt; empty where prompts have no log-probabilities.
    firsts: Vec<Option<u32>>,
    /// Answers to each prompt.
    choices: usize,
}

impl Echo {
    /// What stands before the answer of choice `index`.
    fn text(&self, index: usize) -> &str {
        self.texts.get(index / self.choices).map_or("", String::as_str)
    }

    /// The first token of its prompt, where the prompt has log-probabilities.
    fn first_token(&self, index: usize) -> Option<u32> {
        self.firsts.get(index / self.choices).copied().flatten()
    }
}

/// What all pieces of an answer say.
struct Envelope {
    id: String,
    created: u64,
    model: String,
    echo: Echo,
}

impl Envelope {
    fn whole(self, serving: &Serving, answers: Vec<Answer>) -> CompletionBody {
        let mut usage = UsageBody::default();
        let choice = |(index, answer): (usize, Answer)| {
            usage.add(&answer.usage, index % self.echo.choices == 0);
            let mut logprobs = Logprobs::default();
            if let Some(first) = self.echo.first_token(index) {
                logprobs.push_first(serving, first);
            }
            answer.prompt_logprobs.iter().chain(&answer.logprobs).for_each(|logprob| logprobs.push(serving, logprob));
            let text = self.echo.text(index).to_owned() + &answer.text;
            let finish_reason = Some(finish_name(answer.reason.as_ref()));
            CompletionChoice { index, text, logprobs: logprobs.if_any(), finish_reason, seed: Some(answer.seed as i64) }
        };
        let choices = answers.into_iter().enumerate().map(choice).collect();
        self.body(choices, Some(usage))
    }

    fn body(&self, choices: Vec<CompletionChoice>, usage: Option<UsageBody>) -> CompletionBody {
        let (id, model) = (self.id.clone(), self.model.clone());
        CompletionBody { id, object: "text_completion", created: self.created, model, choices, usage }
    }

    fn chunk(
        &self,
        index: usize,
        text: String,
        logprobs: Option<Logprobs>,
        usage: Option<UsageBody>,
    ) -> CompletionBody {
        self.body(vec![CompletionChoice { index, text, logprobs, finish_reason: None, seed: None }], usage)
    }
}

fn stream(
    serving: Arc<Serving>,
    generation: Generation,
    answer: Envelope,
    options: StreamOptions,
) -> impl Stream<Item = axum::response::sse::Event> + Send {
    async_stream::stream! {
        let mut generation = generation;
        let mut usage = UsageBody::default();
        let mut waiting: Vec<Logprobs> = std::iter::repeat_with(Logprobs::default).take(generation.choices()).collect();
        for (index, waiting) in waiting.iter_mut().enumerate() {
            match answer.echo.first_token(index) {
                // Its text comes with its log-probabilities.
                Some(first) => waiting.push_first(&serving, first),
                None if answer.echo.text(index).is_empty() => {}
                None => {
                    let usage = options.usage_so_far(&generation);
                    yield sse::data(&answer.chunk(index, answer.echo.text(index).to_owned(), None, usage));
                }
            }
        }
        while let Some((index, event)) = generation.next().await {
            let waiting = &mut waiting[index];
            let (text, reason) = match event {
                Event::Prompt(logprobs) => {
                    logprobs.iter().for_each(|logprob| waiting.push(&serving, logprob));
                    (answer.echo.text(index).to_owned(), None)
                }
                Event::Token(token) => {
                    if let Some(logprob) = &token.logprob {
                        waiting.push(&serving, logprob);
                    }
                    (token.text, None)
                }
                Event::Finished(finished) => {
                    if let Err(error) = check(&finished.reason) {
                        yield sse::error(&error);
                        return;
                    }
                    usage.add(&finished.usage, index % answer.echo.choices == 0);
                    (finished.text, Some(finished.reason))
                }
            };
            if text.is_empty() && reason.is_none() {
                continue;
            }
            let mut chunk = answer.chunk(index, text, waiting.take().if_any(), options.usage_so_far(&generation));
            chunk.choices[0].finish_reason = reason.as_ref().map(|reason| finish_name(Some(reason)));
            yield sse::data(&chunk);
        }
        if options.ends_with_usage() {
            yield sse::data(&answer.body(Vec::new(), Some(usage)));
        }
        yield sse::done();
    }
}

impl Logprobs {
    /// The first token of a prompt, which nothing predicted.
    fn push_first(&mut self, serving: &Serving, token: u32) {
        self.push_token(serving.piece(token), None, None);
    }

    fn push(&mut self, serving: &Serving, logprob: &TokenLogprob) {
        // JSON has no infinities.
        let finite = |logprob: f32| logprob.max(f32::MIN);
        let mut top = BTreeMap::new();
        for &(token, logprob) in &logprob.top {
            // Two tokens can have the same text; the likelier comes first.
            top.entry(serving.piece(token)).or_insert(finite(logprob));
        }
        self.push_token(serving.piece(logprob.token), Some(finite(logprob.logprob)), Some(top));
    }

    fn push_token(&mut self, text: String, logprob: Option<f32>, top: Option<BTreeMap<String, f32>>) {
        self.text_offset.push(self.end());
        self.tokens.push(text);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }

    /// What there is, leaving a list that goes on behind it.
    fn take(&mut self) -> Logprobs {
        let start = self.end();
        std::mem::replace(self, Logprobs { start, ..Logprobs::default() })
    }

    /// Characters up to the end of the last token.
    fn end(&self) -> usize {
        match (self.text_offset.last(), self.tokens.last()) {
            (Some(offset), Some(token)) => offset + token.chars().count(),
            _ => self.start,
        }
    }

    fn if_any(self) -> Option<Logprobs> {
        (!self.tokens.is_empty()).then_some(self)
    }
}
