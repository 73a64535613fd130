//! Server-sent events, as OpenAI's streams have them.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde::Serialize;
use utoipa::openapi::schema::{AnyOfBuilder, ObjectBuilder, Ref, Type};
use utoipa::openapi::{RefOr, Schema};

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

/// Documents the events of a stream whose data is JSON of any of the types behind `of`, the last but for what `ends`.
macro_rules! stream_event {
    ($(#[$meta:meta])* $name:ident of $($body:ident)|+ $(, ends $end:literal)?) => {
        $(#[$meta])*
        pub struct $name;

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                crate::server::sse::event_schema(&[$(stringify!($body)),+], &[$($end)?])
            }
        }

        impl utoipa::ToSchema for $name {
            fn name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn schemas(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>) {
                $(
                    schemas.push((stringify!($body).to_owned(), <$body as utoipa::PartialSchema>::schema()));
                    <$body as utoipa::ToSchema>::schemas(schemas);
                )+
            }
        }
    };
}
pub(super) use stream_event;

/// An event as OpenAPI describes it: an object of its fields, of which `data` is text.
pub fn event_schema(bodies: &[&str], ends: &[&str]) -> RefOr<Schema> {
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let body = bodies.iter().fold(AnyOfBuilder::new(), |any, body| any.item(Ref::from_schema_name(*body)));
    let json = text().content_media_type("application/json").content_schema(Some(body));
    let data: RefOr<Schema> = match ends {
        [] => json.into(),
        ends => AnyOfBuilder::new().item(text().enum_values(Some(ends.to_vec()))).item(json).into(),
    };
    ObjectBuilder::new().property("data", data).required("data").into()
}
