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

pub use error::ApiError;
pub use events::Events;
pub use proxies::{Proxies, Proxy};
pub use routes::{VERSION, router};
pub use rules::tell_hits;
pub use security::{Caller, Guard};
pub use server::{serve_tcp, serve_unix};
