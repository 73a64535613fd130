//! Server-sent events, as OpenAI's streams have them.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde::Serialize;

use super::error::ApiError;

/// Silence after which a comment keeps the connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// An event that holds `value` as JSON.
pub fn data(value: &impl Serialize) -> Event {
    Event::default().json_data(value).unwrap_or_else(|error| {
        tracing::error!(%error, "an event can't be written");
        Event::default().comment("an event was lost")
    })
}

/// The event that ends a stream that went wrong.
pub fn error(error: &ApiError) -> Event {
    tracing::warn!(message = error.message, "a stream ends with an error");
    data(&error.body())
}

/// The event that ends every stream.
pub fn done() -> Event {
    Event::default().data("[DONE]")
}

/// A response that streams `events`.
pub fn response(events: impl Stream<Item = Event> + Send + 'static) -> Response {
    use futures_util::StreamExt;
    let events = events.map(Ok::<Event, Infallible>);
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}
