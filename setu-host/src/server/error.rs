//! What goes wrong, in the shape that OpenAI's clients expect.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use setu_core::{Error, ErrorKind};
use utoipa::ToSchema;

/// An answer that tells what was wrong with a request, or with the server.
#[derive(Clone, Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field at fault, as a path such as `messages[2].content`.
    pub param: Option<String>,
    pub code: Option<&'static str>,
    pub retry_after_s: Option<f64>,
}

/// The body of every answer that isn't a success.
#[derive(Serialize, ToSchema)]
pub struct ErrorBody {
    error: ErrorDetail,
}

/// What is wrong.
#[derive(Serialize, ToSchema)]
struct ErrorDetail {
    message: String,
    r#type: &'static str,
    /// The field at fault.
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), ..ApiError::new(StatusCode::BAD_REQUEST, message) }
    }

    /// Too much is asked at present.
    pub fn busy(message: impl Into<String>, retry_after_s: Option<f64>) -> ApiError {
        ApiError {
            code: Some("rate_limit_exceeded"),
            retry_after_s: Some(retry_after_s.unwrap_or(1.0)),
            ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
        }
    }

    pub fn with_code(mut self, code: &'static str) -> ApiError {
        self.code = Some(code);
        self
    }

    pub fn body(&self) -> ErrorBody {
        let r#type = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ErrorBody {
            error: ErrorDetail { message: self.message.clone(), r#type, param: self.param.clone(), code: self.code },
        }
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        let status = match error.kind() {
            ErrorKind::InvalidInput | ErrorKind::Unsupported | ErrorKind::Config => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ApiError::new(status, error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::error!(status = self.status.as_u16(), message = self.message, "a request failed");
        }
        let mut response = (self.status, Json(self.body())).into_response();
        // Routes of another API tell it in another shape.
        response.extensions_mut().insert(self.clone());
        if let Some(seconds) = self.retry_after_s {
            // Whole seconds are what the header takes.
            let seconds = HeaderValue::from(seconds.clamp(1.0, 86_400.0).ceil() as u64);
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}
