//! What requests for text have in common: how to sample, whose the request is and when it is due.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use serde::de::{Deserializer, IgnoredAny};
use serde::{Deserialize, Serialize};
use setu_core::sampling::SamplingParams;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::error::ApiError;
use super::generation::Generation;

/// A field that is known and not provided: any value but null is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    is_given: bool,
}

impl<'de> Deserialize<'de> for Refused {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Refused, D::Error> {
        Ok(Refused { is_given: Option::<IgnoredAny>::deserialize(deserializer)?.is_some() })
    }
}

impl PartialSchema for Refused {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().schema_type(Type::Null).description(Some("Known and not provided.")).into()
    }
}

impl ToSchema for Refused {}

/// A field of which only values are taken that ask for what happens anyway.
#[derive(Clone, Copy, Debug)]
pub struct Accepted<T>(PhantomData<T>);

impl<T> Default for Accepted<T> {
    fn default() -> Accepted<T> {
        Accepted(PhantomData)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Accepted<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Accepted<T>, D::Error> {
        Option::<T>::deserialize(deserializer).map(|_| Accepted::default())
    }
}

impl Refused {
    /// # Errors
    /// The field `name` was given.
    pub fn check(self, name: &str, why: &str) -> Result<(), ApiError> {
        if !self.is_given {
            return Ok(());
        }
        Err(ApiError::invalid(name, format!("`{name}` is not supported: {why}")).with_code("unsupported_field"))
    }
}

/// How an answer is streamed.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// A last chunk tells the tokens used.
    #[serde(default)]
    pub include_usage: Option<bool>,
    /// Each chunk tells the tokens used so far, by all choices together.
    #[serde(default)]
    pub continuous_usage_stats: Option<bool>,
    /// Accepted: chunks are never padded.
    #[serde(default)]
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    #[schema(value_type = Option<bool>)]
    pub include_obfuscation: Accepted<bool>,
}

impl StreamOptions {
    /// Whether the last chunk tells the tokens used.
    pub fn ends_with_usage(&self) -> bool {
        self.include_usage == Some(true)
    }

    /// What a chunk tells of the tokens used so far.
    pub fn usage_so_far(&self, generation: &Generation) -> Option<UsageBody> {
        (self.continuous_usage_stats == Some(true)).then(|| generation.usage())
    }
}

/// Tokens that a request took.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct UsageBody {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    pub total_tokens: u32,
    /// Known when an answer ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptDetails>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_tokens_details: Option<CompletionDetails>,
}

/// Where a prompt's tokens came from.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct PromptDetails {
    /// Those that were found in the prefix cache.
    pub cached_tokens: u32,
}

/// What an answer's tokens are.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct CompletionDetails {
    /// Those of reasoning, with the marks around it.
    pub reasoning_tokens: u32,
}

impl UsageBody {
    /// Adds what a session took; the choices of one prompt share it.
    pub fn add(&mut self, usage: &setu_engine::Usage, is_first_choice: bool) {
        if is_first_choice {
            self.prompt_tokens += usage.prompt_tokens;
            self.prompt_tokens_details.get_or_insert_default().cached_tokens += usage.cached_tokens;
        }
        self.completion_tokens += usage.generated_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// A request for text: the struct's own fields and those that all such requests have.
macro_rules! text_request {
    ($(#[$meta:meta])* pub struct $name:ident { $($own:tt)* }) => {
        $(#[$meta])*
        #[derive(Debug, serde::Deserialize, utoipa::ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($own)*
            /// The model's name; without it the first that is served.
            #[serde(default)]
            pub model: Option<String>,
            /// 0 takes the likeliest token; higher is more varied. Without it what `[sampling]` says, as for all that follow.
            #[serde(default)]
            #[schema(minimum = 0, maximum = 100)]
            pub temperature: Option<f32>,
            /// Keeps the likeliest tokens that together reach this probability; over 0.
            #[serde(default)]
            #[schema(exclusive_minimum = 0, maximum = 1)]
            pub top_p: Option<f32>,
            /// Keeps the k likeliest tokens; 0 keeps all.
            #[serde(default)]
            pub top_k: Option<u32>,
            /// Keeps tokens at least this fraction as likely as the likeliest.
            #[serde(default)]
            #[schema(minimum = 0, maximum = 1)]
            pub min_p: Option<f32>,
            /// Keeps the tokens nearest to the expected surprise that together reach this probability.
            #[serde(default)]
            #[schema(exclusive_minimum = 0, maximum = 1)]
            pub typical_p: Option<f32>,
            /// Makes tokens that were seen less likely by this factor.
            #[serde(default)]
            #[schema(exclusive_minimum = 0, maximum = 100)]
            pub repetition_penalty: Option<f32>,
            /// Subtracted from the logits of tokens in the answer so far.
            #[serde(default)]
            #[schema(minimum = -100, maximum = 100)]
            pub presence_penalty: Option<f32>,
            /// Subtracted from the logits of tokens in the answer so far, once for each time that a token is in it.
            #[serde(default)]
            #[schema(minimum = -100, maximum = 100)]
            pub frequency_penalty: Option<f32>,
            /// Added to logits, by token id; from -100 to 100.
            #[serde(default)]
            pub logit_bias: Option<std::collections::BTreeMap<String, f32>>,
            /// Seed of the draws: the same request with the same seed has the same answer, whatever runs beside it.
            #[serde(default)]
            pub seed: Option<i64>,
            /// Answers to generate.
            #[serde(default)]
            #[schema(minimum = 1, maximum = 128)]
            pub n: Option<u32>,
            /// Texts that end the answer; not part of it.
            #[serde(default)]
            pub stop: Option<crate::server::content::Texts>,
            /// Tokens that end the answer.
            #[serde(default)]
            pub stop_token_ids: Option<Vec<u32>>,
            /// Tokens before which the answer can't end, unless its form has it complete.
            #[serde(default)]
            pub min_tokens: Option<u32>,
            /// Goes on past the end of sequence.
            #[serde(default)]
            pub ignore_eos: Option<bool>,
            /// The form that the answer must have.
            #[serde(default)]
            #[schema(value_type = Option<crate::server::structured::StructuredOutputs>)]
            pub structured_outputs:
                Option<crate::server::content::Object<crate::server::structured::StructuredOutputs>>,
            #[serde(default)]
            pub guided_json: crate::server::shared::Refused,
            #[serde(default)]
            pub guided_regex: crate::server::shared::Refused,
            #[serde(default)]
            pub guided_choice: crate::server::shared::Refused,
            #[serde(default)]
            pub guided_grammar: crate::server::shared::Refused,
            /// The answer comes as server-sent events, as it is generated.
            #[serde(default)]
            pub stream: Option<bool>,
            /// How it is streamed; needs `stream`.
            #[serde(default)]
            #[schema(value_type = Option<StreamOptions>)]
            pub stream_options: Option<crate::server::content::Object<StreamOptions>>,
            /// Whose request it is: the tenant that it is accounted to.
            #[serde(default)]
            pub user: Option<String>,
            /// How urgent it is; higher is more urgent, and the scheduler defines the range.
            #[serde(default)]
            pub priority: Option<i32>,
            /// The class of application, by which answers' lengths are estimated.
            #[serde(default)]
            pub class: Option<u32>,
            /// Time until the first token is due, in ms.
            #[serde(default)]
            #[schema(exclusive_minimum = 0)]
            pub ttft_ms: Option<f64>,
            /// Longest time between two tokens, in ms.
            #[serde(default)]
            #[schema(exclusive_minimum = 0)]
            pub itl_ms: Option<f64>,
            /// Time until the last token is due, in ms.
            #[serde(default)]
            #[schema(exclusive_minimum = 0)]
            pub deadline_ms: Option<f64>,
        }

        impl $name {
            /// How to sample, where `defaults` is what the configuration says.
            fn sampling(
                &self,
                defaults: &setu_core::sampling::SamplingParams,
            ) -> Result<setu_core::sampling::SamplingParams, crate::server::error::ApiError> {
                let mut params = defaults.clone();
                macro_rules! take {
                    ($field:ident) => { if let Some(value) = self.$field.clone() { params.$field = value; } };
                }
                take!(temperature);
                take!(top_p);
                take!(top_k);
                take!(min_p);
                take!(typical_p);
                take!(repetition_penalty);
                take!(presence_penalty);
                take!(frequency_penalty);
                take!(stop_token_ids);
                take!(min_tokens);
                take!(ignore_eos);
                take!(n);
                params.seed = self.seed.map(|seed| seed as u64).or(params.seed);
                if let Some(stop) = self.stop.clone() {
                    params.stop = stop.0;
                }
                if let Some(bias) = &self.logit_bias {
                    params.logit_bias = crate::server::shared::logit_bias(bias)?;
                }
                if self.stream_options.is_some() && !self.is_streamed() {
                    return Err(crate::server::error::ApiError::invalid(
                        "stream_options",
                        "`stream_options` needs `stream` to be true",
                    ));
                }
                Ok(params)
            }

            /// The form that `structured_outputs` asks for.
            fn structured(&self) -> Result<Option<setu_engine::grammar::Grammar>, crate::server::error::ApiError> {
                let newer = "ask by `structured_outputs`, which has `json`, `regex`, `choice` and `grammar`";
                self.guided_json.check("guided_json", newer)?;
                self.guided_regex.check("guided_regex", newer)?;
                self.guided_choice.check("guided_choice", newer)?;
                self.guided_grammar.check("guided_grammar", newer)?;
                self.structured_outputs.as_ref().map(|asked| asked.0.grammar()).transpose()
            }

            fn is_streamed(&self) -> bool {
                self.stream == Some(true)
            }

            /// How it is streamed.
            fn stream_options(&self) -> crate::server::shared::StreamOptions {
                self.stream_options.as_ref().map(|options| options.0).unwrap_or_default()
            }

            /// Whose the request is and when it is due.
            fn options(&self) -> crate::request::RequestOptions {
                let seconds = |ms: Option<f64>| ms.map_or(f64::INFINITY, |ms| ms * 1e-3);
                crate::request::RequestOptions {
                    tenant: self.user.clone(),
                    weight: None,
                    priority: self.priority,
                    class: self.class.unwrap_or(0),
                    deadlines: setu_engine::Deadlines {
                        ttft_s: seconds(self.ttft_ms),
                        itl_s: seconds(self.itl_ms),
                        total_s: seconds(self.deadline_ms),
                    },
                    grammar: None,
                    shown: std::sync::Arc::default(),
                }
            }
        }
    };
}
pub(super) use text_request;

pub fn logit_bias(bias: &BTreeMap<String, f32>) -> Result<Vec<(u32, f32)>, ApiError> {
    let entry = |(token, &bias): (&String, &f32)| {
        let id = token.parse().map_err(|_| {
            ApiError::invalid("logit_bias", format!("`logit_bias` is by token id, and {token:?} is none"))
        });
        Ok((id?, bias))
    };
    bias.iter().map(entry).collect()
}

/// Checks what the engine would, to name the field.
pub fn check(params: &SamplingParams, vocab_size: u32) -> Result<(), ApiError> {
    params.validate(vocab_size).map_err(|error| {
        let message = error.message().to_owned();
        let name = message.split_whitespace().next().unwrap_or_default().to_owned();
        ApiError::invalid(name, message)
    })
}
