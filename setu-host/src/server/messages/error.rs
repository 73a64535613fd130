//! What goes wrong, in the shape that Anthropic's clients expect.

use axum::Json;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::server::error::ApiError;
use crate::server::sse;

/// The body of every answer that isn't a success.
#[derive(Serialize, ToSchema)]
pub struct MessageErrorBody {
    r#type: &'static str,
    error: MessageError,
}

/// What is wrong.
#[derive(Serialize, ToSchema)]
struct MessageError {
    r#type: &'static str,
    /// Names the field at fault, where there is one.
    message: String,
}

impl MessageErrorBody {
    fn new(error: &ApiError) -> MessageErrorBody {
        let r#type = match error.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_server_error() => "api_error",
            _ => "invalid_request_error",
        };
        let message = match &error.param {
            Some(param) if !error.message.contains(param) => format!("{param}: {}", error.message),
            _ => error.message.clone(),
        };
        MessageErrorBody { r#type: "error", error: MessageError { r#type, message } }
    }
}

/// The event that ends a stream that went wrong.
pub fn error_event(error: &ApiError) -> Event {
    tracing::warn!(message = error.message, "a stream ends with an error");
    sse::data(&MessageErrorBody::new(error)).event("error")
}

/// Gives errors of Anthropic's routes, whoever found them, the shape that their clients expect.
pub async fn in_shape(request: Request, next: Next) -> Response {
    let concerned = request.uri().path().starts_with("/v1/messages");
    let mut response = next.run(request).await;
    let Some(error) = response.extensions_mut().remove::<ApiError>().filter(|_| concerned) else { return response };
    let mut shaped = (error.status, Json(MessageErrorBody::new(&error))).into_response();
    for (name, value) in response.headers() {
        if !shaped.headers().contains_key(name) {
            shaped.headers_mut().insert(name, value.clone());
        }
    }
    shaped
}
