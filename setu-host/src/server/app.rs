//! What all handlers share, and the routes.

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use http_body_util::LengthLimitError;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, Any, CorsLayer};

use super::config::{ServerConfig, UnknownFields};
use super::error::ApiError;
use super::keys::{self, Caller, Keys};
use super::served::{ModelSource, Models, Served};
use super::{chat, completions, limits, live, messages, metrics, models, openapi, page, status, text};

/// Names the fields of a request that nobody knew, where they are only warned of.
pub const WARNING: HeaderName = HeaderName::from_static("x-setu-warning");

/// The running server.
pub struct App {
    pub models: Models,
    /// `None` lets anybody in.
    pub keys: Option<Arc<Keys>>,
    pub config: ServerConfig,
    pub metrics: metrics::Metrics,
    pub live: live::Live,
    pub created_s: u64,
    draining: AtomicBool,
    requests: AtomicU64,
    /// Tells the names of this start's answers from those of another.
    salt: u64,
}

impl App {
    pub fn new(models: Vec<ModelSource>, keys: Option<Arc<Keys>>, config: ServerConfig) -> App {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        App {
            models: Models::new(models, &config.model_names),
            keys,
            config,
            metrics: metrics::Metrics::new(),
            live: live::Live::default(),
            created_s: started.as_secs(),
            draining: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            salt: started.as_nanos() as u64,
        }
    }

    /// From now on `/ready` says no, so that nobody sends more.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// A name for an answer, such as `chatcmpl-…`.
    pub fn answer_id(&self, prefix: &str) -> String {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}-{:016x}{number:08x}", self.salt)
    }

    /// The model called `asked`, or the first, loaded if need be.
    ///
    /// # Errors
    /// There is none of this name, or it can't be loaded.
    pub async fn model(&self, caller: Caller, asked: Option<&str>) -> Result<Served, ApiError> {
        let (model, serving) = self.models.load(asked).await?;
        let name = asked.unwrap_or(&model).to_owned();
        Ok(Served { name, model, serving, caller, max_backlog: self.config.max_backlog })
    }

    /// The header that warns of unknown fields.
    pub fn warned(&self, unknown: &[String], mut response: Response) -> Response {
        if !unknown.is_empty() && self.config.unknown_fields == UnknownFields::Warn {
            let text: String = unknown.join(", ").chars().filter(|c| c.is_ascii_graphic() || *c == ' ').collect();
            if let Ok(value) = HeaderValue::from_str(&format!("unknown fields: {text}")) {
                response.headers_mut().insert(WARNING, value);
            }
        }
        response
    }
}

/// Every route.
pub fn router(app: Arc<App>) -> Router {
    let route = |methods: MethodRouter<Arc<App>>| methods.fallback(method_not_allowed);
    let cors = cors(&app.config);
    // What needs a key, where there are keys: everything but the routes of `open`.
    let keyed = Router::new()
        .route("/v1/chat/completions", route(post(chat::create)))
        .route("/v1/completions", route(post(completions::create)))
        .route("/v1/messages", route(post(messages::create)))
        .route("/v1/messages/count_tokens", route(post(messages::count_tokens)))
        .route("/v1/models", route(get(models::list)))
        .route("/v1/models/{*model}", route(get(models::retrieve)))
        .route("/tokenize", route(post(text::tokenize)))
        .route("/detokenize", route(post(text::detokenize)))
        .route("/version", route(get(status::version)))
        .route("/metrics", route(get(metrics::render)))
        .route("/openapi.json", route(get(openapi::get)))
        .route("/live", route(get(live::stream)))
        // A key is asked for before the body is read.
        .layer(middleware::from_fn_with_state(app.clone(), whole_body))
        .layer(middleware::from_fn_with_state(app.clone(), keys::authenticate));
    // What balancers of load and supervisors ask without a key: they learn no more than yes or no, and why not. The page
    // itself is the same for everybody; what it shows it asks for with a key.
    let open = Router::new()
        .route("/health", route(get(status::health)))
        .route("/ready", route(get(status::ready)))
        .route("/", route(get(page::index)))
        .route("/page/{file}", route(get(page::file)));
    open.merge(keyed)
        .fallback(not_found)
        .layer(middleware::from_fn(errors_in_shape))
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the server failed at this request").into_response()
        }))
        .layer(middleware::from_fn(messages::in_shape))
        .layer(cors)
        .with_state(app)
}

async fn not_found(request: Request) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no {} {}", request.method(), request.uri().path()))
}

async fn method_not_allowed(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{path} doesn't take {method}"))
}

/// Reads a request's body, which may be neither too large nor too slow.
async fn whole_body(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let limit = usize::try_from(app.config.max_body).unwrap_or(usize::MAX);
    let seconds = app.config.request_timeout_s;
    let (parts, body) = request.into_parts();
    let read = axum::body::to_bytes(body, limit);
    let error = match tokio::time::timeout(Duration::from_secs_f64(seconds), read).await {
        Ok(Ok(bytes)) => return next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Ok(Err(error)) if error.source().is_some_and(|source| source.is::<LengthLimitError>()) => {
            let message = format!("the body is larger than {limit} bytes");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
        }
        Ok(Err(error)) => ApiError::new(StatusCode::BAD_REQUEST, format!("the body can't be read: {error}")),
        Err(_) => {
            let message = format!("the body wasn't there within {seconds} s");
            ApiError::new(StatusCode::REQUEST_TIMEOUT, message)
        }
    };
    error.into_response()
}

/// Gives refusals that aren't a handler's own, such as of a body that is too large, the shape of all others.
async fn errors_in_shape(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let is_text = |response: &Response| {
        let kind = response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        kind.is_none_or(|kind| kind.starts_with("text/plain"))
    };
    if !response.status().is_client_error() || !is_text(&response) {
        return response;
    }
    let status = response.status();
    ApiError::new(status, status.canonical_reason().unwrap_or("the request is refused")).into_response()
}

fn cors(config: &ServerConfig) -> CorsLayer {
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        // `*` would leave out the header that keys come in.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(
            [WARNING, header::RETRY_AFTER].into_iter().chain(limits::HEADERS.into_iter().flatten()).collect::<Vec<_>>(),
        );
    if config.cors_origins.iter().any(|origin| origin == "*") {
        return layer.allow_origin(Any);
    }
    layer
        .allow_origin(config.cors_origins.iter().filter_map(|origin| origin.parse().ok()).collect::<Vec<HeaderValue>>())
}

/// Seconds since 1970.
pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
