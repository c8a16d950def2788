//! Extensions for tests: count, await and close connections, stop and start accepting, events. An answer means that the
//! request has taken effect.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Extension, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Map, Value, json};
use tokio::sync::broadcast::error::RecvError;

use super::body::{Fields, collect};
use super::error::ApiError;
use super::proxies::Proxies;
use super::security::Caller;
use super::{Api, ApiResult};
use crate::relay::CloseMode;

/// Default time limit of a wait in milliseconds.
const DEFAULT_WAIT_MS: u64 = 10_000;
/// Maximum time limit of a wait in milliseconds.
const LONGEST_WAIT_MS: u64 = 3_600_000;
/// Interval of heartbeats in a stream of events.
const HEARTBEAT: Duration = Duration::from_secs(15);

pub(crate) fn routes() -> Router<Arc<Proxies>> {
    Router::new()
        .route("/v1/stats", get(all_stats))
        .route("/v1/events", get(events))
        .route("/v1/proxies/{proxy}/stats", get(stats))
        .route("/v1/proxies/{proxy}/connections", get(connections))
        .route("/v1/proxies/{proxy}/wait", post(wait))
        .route("/v1/proxies/{proxy}/close", post(close))
        .route("/v1/proxies/{proxy}/accept", post(accept))
}

async fn all_stats(State(proxies): Api) -> Response {
    let all: Map<String, Value> = proxies
        .all()
        .iter()
        .map(|proxy| {
            (
                proxy.relay().name().to_owned(),
                json!(proxy.relay().stats()),
            )
        })
        .collect();
    Json(all).into_response()
}

async fn stats(State(proxies): Api, Path(name): Path<String>) -> ApiResult {
    Ok(Json(json!(proxies.get(&name)?.relay().stats())).into_response())
}

async fn connections(State(proxies): Api, Path(name): Path<String>) -> ApiResult {
    let proxy = proxies.get(&name)?;
    let connections = proxy.relay().connections();
    let accepted = proxy.relay().stats().accepted;
    Ok(
        Json(json!({"open": connections.len(), "accepted": accepted, "connections": connections}))
            .into_response(),
    )
}

/// The body's fields; none without a body.
async fn fields(body: Body) -> Result<Fields, ApiError> {
    let body = collect(body).await?;
    if body.is_empty() {
        Fields::new(Value::Null)
    } else {
        Fields::parse(&body)
    }
}

/// Waits for at least `open` connections, for exactly `exactly`, or for `accepted` ones since the start.
async fn wait(State(proxies): Api, Path(name): Path<String>, body: Body) -> ApiResult {
    let proxy = proxies.get(&name)?;
    let fields = fields(body).await?;
    let (open, exactly, accepted) = (
        fields.count("open")?,
        fields.count("exactly")?,
        fields.count("accepted")?,
    );
    let timeout_ms = fields
        .count("timeout")?
        .unwrap_or(DEFAULT_WAIT_MS)
        .min(LONGEST_WAIT_MS);
    if open.is_none() && exactly.is_none() && accepted.is_none() {
        return Err(ApiError::missing("open, exactly or accepted"));
    }
    let holds = |now: usize, ever: u64| {
        open.is_none_or(|open| now as u64 >= open)
            && exactly.is_none_or(|exactly| now as u64 == exactly)
            && accepted.is_none_or(|accepted| ever >= accepted)
    };
    match tokio::time::timeout(
        Duration::from_millis(timeout_ms),
        proxy.relay().wait_for(holds),
    )
    .await
    {
        Ok((open, accepted)) => {
            Ok(Json(json!({"open": open, "accepted": accepted})).into_response())
        }
        Err(_elapsed) => {
            let stats = proxy.relay().stats();
            let message = format!(
                "after {timeout_ms} ms {} connections are open, {} were accepted",
                stats.open, stats.accepted
            );
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// Closes `count` connections (default: all), the oldest first, with `mode` `fin` or `rst`.
async fn close(
    State(proxies): Api,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    body: Body,
) -> ApiResult {
    let proxy = proxies.get_for(&name, caller)?;
    let fields = fields(body).await?;
    let count = fields.count("count")?.map_or(usize::MAX, |count| {
        usize::try_from(count).unwrap_or(usize::MAX)
    });
    let mode = match fields.text("mode")? {
        None | Some("fin") => CloseMode::Fin,
        Some("rst") => CloseMode::Rst,
        Some(other) => {
            return Err(ApiError::bad_body(format!(
                "mode {other:?}, expected \"fin\" or \"rst\""
            )));
        }
    };
    let closed = proxy.relay().close_connections(count, mode).await;
    Ok(Json(json!({"closed": closed})).into_response())
}

/// Stops (`{"accept": false}`) or starts accepting.
async fn accept(
    State(proxies): Api,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    body: Body,
) -> ApiResult {
    let proxy = proxies.get_for(&name, caller)?;
    let accept = fields(body)
        .await?
        .flag("accept")?
        .ok_or_else(|| ApiError::missing("accept"))?;
    proxy.relay().set_accepting(accept).await?;
    Ok(Json(json!({"accept": accept})).into_response())
}

/// Server-sent events, one JSON object each.
async fn events(State(proxies): Api) -> Response {
    let watcher = proxies.events().watch();
    let stream =
        futures_util::stream::unfold((watcher, true), |(mut watcher, is_first)| async move {
            if is_first {
                // The head of the answer is only sent with its first bytes.
                return Some((
                    Ok::<_, Infallible>(Bytes::from_static(b": watching\n\n")),
                    (watcher, false),
                ));
            }
            let line = match tokio::time::timeout(HEARTBEAT, watcher.recv()).await {
                Ok(Ok(event)) => format!("data: {event}\n\n"),
                Ok(Err(RecvError::Lagged(missed))) => {
                    format!("data: {{\"event\":\"missed\",\"count\":{missed}}}\n\n")
                }
                Ok(Err(RecvError::Closed)) => return None,
                Err(_elapsed) => ": alive\n\n".to_owned(),
            };
            Some((Ok(Bytes::from(line)), (watcher, false)))
        });
    (
        [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-store"),
        ],
        Body::from_stream(stream),
    )
        .into_response()
}
