//! The HTTP control API of `fault daemon`: Toxiproxy's API with extensions.

mod body;
mod error;
mod events;
mod gate;
mod metrics;
mod packet;
mod proxies;
mod routes;
mod rules;
mod security;
mod server;

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::response::Response;

pub use error::ApiError;
pub use events::EventChannel;
pub use proxies::{Proxies, Proxy};
pub use routes::{VERSION, router};
pub use rules::tell_hits;
pub use security::{Caller, Guard};
pub use server::{serve_tcp, serve_unix};

/// What a handler acts on.
type Api = State<Arc<Proxies>>;
/// Who calls a handler.
type By = Extension<Caller>;
/// What a handler answers.
type ApiResult = Result<Response, ApiError>;
