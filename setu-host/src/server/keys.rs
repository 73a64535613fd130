//! Keys: who may use the server, as which tenant, how urgently and how much.
//!
//! A key is 32 random bytes, so SHA-256 is the right hash for it: nobody finds it by trying, which is what slow hashes
//! are for, and a slow one would let anybody make the server work by sending wrong keys. Whoever reads the file learns
//! no key. Comparison takes the same time whatever was sent, and goes over all keys.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header, request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use subtle::{ConditionallySelectable, ConstantTimeEq};
use toml::Spanned;

use super::app::App;
use super::error::ApiError;
use super::limits::{Exceeded, Limits, Meter, Running};
use super::metrics;
use crate::config::{Diagnostic, Place, Report, Source};
use crate::models::Digest;
use crate::request::RequestOptions;

/// What every key opens with, so that scanners of leaked secrets find it.
const PREFIX: &str = "sk-setu-";

/// The keys of a file.
#[derive(Debug)]
pub struct Keys {
    path: PathBuf,
    keys: RwLock<Arc<[Arc<Key>]>>,
}

/// A key, of which only the hash is known.
#[derive(Debug)]
pub struct Key {
    /// Whose it is, for people.
    pub name: String,
    pub digest: Digest,
    pub tenant: String,
    /// The tenant's share under contention; `None` takes what `[tenants]` says.
    pub weight: Option<f64>,
    /// The highest priority that requests may ask for.
    pub max_priority: Option<i32>,
    pub meter: Arc<Meter>,
}

/// What a new key is to be allowed.
#[derive(Clone, Debug, Default)]
pub struct NewKey {
    pub name: String,
    pub tenant: String,
    pub weight: Option<f64>,
    pub max_priority: Option<i32>,
    pub limits: Limits,
}

/// Who sends a request: the owner of a key, or anybody where there are none.
#[derive(Clone, Debug)]
pub struct Caller {
    key: Option<Arc<Key>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: Spanned<String>,
    sha256: Spanned<String>,
    tenant: Spanned<String>,
    weight: Option<Spanned<f64>>,
    max_priority: Option<i32>,
    requests_per_minute: Option<Spanned<u32>>,
    tokens_per_minute: Option<Spanned<u32>>,
    max_concurrent: Option<Spanned<u32>>,
}

impl Keys {
    /// Reads a file of keys.
    ///
    /// # Errors
    /// It can't be read, or what is wrong in it, with its place.
    pub fn load(path: &Path) -> Result<Keys, Report> {
        let keys = parse(Source::read(path)?)?;
        Ok(Keys { path: path.to_owned(), keys: RwLock::new(keys.into()) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file again. What a key has used stays used, unless its limits are others. Returns how many there are.
    ///
    /// # Errors
    /// As [`load`](Keys::load); the keys then stay as they are.
    pub fn reload(&self) -> Result<usize, Report> {
        let mut keys = parse(Source::read(&self.path)?)?;
        let old = self.all();
        for key in &mut keys {
            let before = old.iter().find(|old| old.digest == key.digest && old.meter.limits == key.meter.limits);
            if let (Some(before), Some(key)) = (before, Arc::get_mut(key)) {
                key.meter = before.meter.clone();
            }
        }
        let count = keys.len();
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys.into();
        Ok(count)
    }

    /// All keys, in the file's order.
    pub fn all(&self) -> Arc<[Arc<Key>]> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The key that is `secret`.
    fn find(&self, secret: &[u8]) -> Option<Arc<Key>> {
        let digest = Digest::of(secret);
        let keys = self.all();
        // One past the last stands for none.
        let mut found = keys.len() as u64;
        for (index, key) in (0..).zip(keys.iter()) {
            found.conditional_assign(&index, key.digest.bytes().ct_eq(digest.bytes()));
        }
        keys.get(usize::try_from(found).ok()?).cloned()
    }

    /// Who sends a request with these headers.
    ///
    /// # Errors
    /// There is no key in them, or a wrong one.
    pub fn caller(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let unauthorized =
            |message: &str| ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key");
        let Some(secret) = secret(headers) else {
            let message = "a key is needed: send it as `Authorization: Bearer <key>`, or as `x-api-key: <key>`";
            return Err(unauthorized(message));
        };
        let key = self.find(secret).ok_or_else(|| unauthorized("the key isn't known here"))?;
        Ok(Caller { key: Some(key) })
    }
}

/// The key that headers bring, as OpenAI's clients send it or as Anthropic's do.
fn secret(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, secret) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(secret.trim_ascii())
    });
    let secret = bearer.or_else(|| Some(headers.get("x-api-key")?.as_bytes().trim_ascii()));
    secret.filter(|secret| !secret.is_empty())
}

fn parse(source: Source) -> Result<Vec<Arc<Key>>, Report> {
    let file: File = match toml::from_str(&source.text) {
        Ok(file) => file,
        Err(error) => {
            let problem = Diagnostic::error(error.message()).at(Place::File(error.span().unwrap_or(0..0)));
            return Err(Report::new(Some(Arc::new(source)), vec![problem]));
        }
    };
    let mut problems = Vec::new();
    let mut keys: Vec<Arc<Key>> = Vec::new();
    for entry in file.key {
        let mut wrong = |span: std::ops::Range<usize>, message: String| {
            problems.push(Diagnostic::error(message).at(Place::File(span)));
        };
        for (field, text) in [("name", &entry.name), ("tenant", &entry.tenant)] {
            if text.get_ref().trim().is_empty() {
                wrong(text.span(), format!("{field} is empty"));
            }
        }
        if let Some(weight) = entry.weight.as_ref().filter(|weight| !is_weight(*weight.get_ref())) {
            wrong(weight.span(), format!("weight must be above 0 and at most 1000000, found {}", weight.get_ref()));
        }
        let limits = [
            ("requests_per_minute", &entry.requests_per_minute),
            ("tokens_per_minute", &entry.tokens_per_minute),
            ("max_concurrent", &entry.max_concurrent),
        ];
        for (field, limit) in limits {
            if let Some(limit) = limit.as_ref().filter(|limit| *limit.get_ref() == 0) {
                wrong(limit.span(), format!("{field} must be at least 1; take the key out to shut it off"));
            }
        }
        if keys.iter().any(|key| key.name == *entry.name.get_ref()) {
            wrong(entry.name.span(), format!("two keys are called {:?}", entry.name.get_ref()));
        }
        let digest: Digest = match entry.sha256.get_ref().parse() {
            Ok(digest) => digest,
            Err(_) => {
                wrong(
                    entry.sha256.span(),
                    "sha256 must be 64 hexadecimal digits, as `setu keys add` writes them".into(),
                );
                continue;
            }
        };
        if let Some(key) = keys.iter().find(|key| key.digest == digest) {
            wrong(entry.sha256.span(), format!("this is the key of {:?} as well", key.name));
        }
        let number = |limit: Option<Spanned<u32>>| limit.map(Spanned::into_inner);
        keys.push(Arc::new(Key {
            name: entry.name.into_inner(),
            digest,
            tenant: entry.tenant.into_inner(),
            weight: entry.weight.map(Spanned::into_inner),
            max_priority: entry.max_priority,
            meter: Arc::new(Meter::new(Limits {
                requests_per_minute: number(entry.requests_per_minute),
                tokens_per_minute: number(entry.tokens_per_minute),
                max_concurrent: number(entry.max_concurrent),
            })),
        }));
    }
    if problems.is_empty() { Ok(keys) } else { Err(Report::new(Some(Arc::new(source)), problems)) }
}

fn is_weight(weight: f64) -> bool {
    weight > 0.0 && weight <= 1e6
}

impl NewKey {
    /// Makes a key, appends its hash to the file at `path`, and returns the key, which is kept nowhere.
    ///
    /// # Errors
    /// The file can't be read or written, or wouldn't be right with the key in it.
    pub fn add_to(&self, path: &Path) -> Result<String, String> {
        let mut text = if path.exists() {
            let source = Source::read(path).map_err(|report| report.to_string())?;
            let text = source.text.clone();
            parse(source).map_err(|report| report.to_string())?;
            text
        } else {
            String::new()
        };
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|error| format!("no random bytes can be had: {error}"))?;
        let mut secret = PREFIX.to_owned();
        for byte in bytes {
            let _ = write!(secret, "{byte:02x}");
        }
        let separator = if text.is_empty() {
            ""
        } else if text.ends_with('\n') {
            "\n"
        } else {
            "\n\n"
        };
        let entry = format!("{separator}{}", self.entry(&Digest::of(secret.as_bytes())));
        text.push_str(&entry);
        parse(Source::new(path.display().to_string(), text)).map_err(|report| report.to_string())?;
        let mut options = std::fs::OpenOptions::new();
        options.append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let written = options.open(path).and_then(|mut file| file.write_all(entry.as_bytes()));
        written.map_err(|error| format!("{} can't be written: {error}", path.display()))?;
        Ok(secret)
    }

    fn entry(&self, digest: &Digest) -> String {
        let mut table = toml::Table::new();
        table.insert("name".to_owned(), self.name.as_str().into());
        table.insert("sha256".to_owned(), digest.to_string().into());
        table.insert("tenant".to_owned(), self.tenant.as_str().into());
        table.extend(self.weight.map(|weight| ("weight".to_owned(), weight.into())));
        table.extend(self.max_priority.map(|most| ("max_priority".to_owned(), most.into())));
        let limits = [
            ("requests_per_minute", self.limits.requests_per_minute),
            ("tokens_per_minute", self.limits.tokens_per_minute),
            ("max_concurrent", self.limits.max_concurrent),
        ];
        table.extend(limits.into_iter().filter_map(|(name, limit)| Some((name.to_owned(), limit?.into()))));
        format!("[[key]]\n{table}")
    }
}

impl Caller {
    /// Where there are no keys.
    pub const ANYBODY: Caller = Caller { key: None };

    /// The tenant that the key is of.
    pub fn tenant(&self) -> Option<&str> {
        self.key.as_ref().map(|key| key.tenant.as_str())
    }

    /// Puts what the key says in place of what the request says.
    ///
    /// # Errors
    /// The request asks for what the key doesn't allow.
    pub fn apply(&self, options: &mut RequestOptions) -> Result<(), ApiError> {
        let Some(key) = &self.key else { return Ok(()) };
        let forbidden = |param: &str, message: String| ApiError {
            status: StatusCode::FORBIDDEN,
            code: Some("not_allowed"),
            ..ApiError::invalid(param, message)
        };
        if let Some(user) = options.tenant.as_ref().filter(|user| **user != key.tenant) {
            let tenant = &key.tenant;
            return Err(forbidden(
                "user",
                format!("the key is of the tenant {tenant:?}, not {user:?}: leave `user` out"),
            ));
        }
        if let (Some(most), Some(asked)) = (key.max_priority, options.priority)
            && asked > most
        {
            return Err(forbidden("priority", format!("the key allows priorities up to {most}, not {asked}")));
        }
        options.tenant = Some(key.tenant.clone());
        options.weight = key.weight.or(options.weight);
        Ok(())
    }

    /// Lets a request with so many prompt tokens in, as far as the key's limits go.
    ///
    /// # Errors
    /// One of them is reached.
    pub fn admit(&self, prompt_tokens: u32) -> Result<Option<Running>, ApiError> {
        let Some(key) = &self.key else { return Ok(None) };
        key.meter.admit(Instant::now(), prompt_tokens).map(Some).map_err(|exceeded| key.refusal(exceeded))
    }

    /// Counts a request.
    fn count(&self) -> Result<(), ApiError> {
        let Some(key) = &self.key else { return Ok(()) };
        key.meter.request(Instant::now()).map_err(|exceeded| key.refusal(exceeded))
    }
}

impl Key {
    fn refusal(&self, exceeded: Exceeded) -> ApiError {
        metrics::count_rate_limited(&self.tenant, exceeded.name());
        let Limits { requests_per_minute, tokens_per_minute, max_concurrent } = self.meter.limits;
        let (limit, retry_after_s) = match exceeded {
            Exceeded::Requests { retry_after_s } => {
                (format!("{} requests a minute", most(requests_per_minute)), retry_after_s)
            }
            Exceeded::Tokens { retry_after_s } => {
                (format!("{} tokens a minute", most(tokens_per_minute)), retry_after_s)
            }
            // When one of those that run will end, nobody knows.
            Exceeded::Concurrent => (format!("{} requests at once", most(max_concurrent)), 1.0),
        };
        ApiError::busy(format!("the key allows {limit}"), Some(retry_after_s))
    }
}

fn most(limit: Option<u32>) -> u32 {
    limit.unwrap_or(u32::MAX)
}

/// Lets only those through who have a key, where keys are configured, and tells them where their limits stand.
pub async fn authenticate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let caller = match &app.keys {
        Some(keys) => match keys.caller(request.headers()) {
            Ok(caller) => caller,
            Err(error) => {
                metrics::count_unauthorized();
                let mut response = error.into_response();
                response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                return response;
            }
        },
        None => Caller::ANYBODY,
    };
    // What is only looked at costs nothing.
    let counted = if request.method() == Method::POST { caller.count() } else { Ok(()) };
    let mut response = match counted {
        Ok(()) => {
            request.extensions_mut().insert(caller.clone());
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    if let Some(key) = &caller.key {
        key.meter.tell(Instant::now(), response.headers_mut());
    }
    response
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut request::Parts, _state: &S) -> Result<Caller, ApiError> {
        // Only a route that forgot to ask for keys has none, and it must not answer.
        let missing = || ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the route doesn't ask for a key");
        parts.extensions.get::<Caller>().cloned().ok_or_else(missing)
    }
}
