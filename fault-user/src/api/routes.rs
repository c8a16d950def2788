//! The routes of Toxiproxy's API.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderName, HeaderValue, Request, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Map, Value, json};

use super::body::collect;
use super::proxies::Proxies;
use super::security::{self, Guard};
use super::{Api, ApiResult, By};
use super::{gate, metrics, rules};
use crate::session::standing::{StandingRules, off_the_runtime};

/// The compatible version of Toxiproxy; clients choose their requests by it.
pub const VERSION: &str = "2.12.0";

/// The API for a listener with this guard. With `has_runtime_metrics`, `/metrics` includes this process.
pub fn router(proxies: Arc<Proxies>, guard: Guard, has_runtime_metrics: bool) -> Router {
    let routed = Router::new()
        .route("/reset", post(reset))
        .route("/proxies", get(index).post(create))
        .route("/populate", post(populate))
        .route(
            "/proxies/{proxy}",
            get(show).post(update).patch(update).delete(delete),
        )
        .route("/proxies/{proxy}/toxics", get(toxics).post(add_toxic))
        .route(
            "/proxies/{proxy}/toxics/{toxic}",
            get(toxic)
                .post(update_toxic)
                .patch(update_toxic)
                .delete(remove_toxic),
        )
        .route("/version", get(version))
        .route(
            "/metrics",
            get(move |proxies| show_metrics(proxies, has_runtime_metrics)),
        )
        .merge(gate::routes())
        .merge(rules::routes());
    routed
        .fallback(|| async { (StatusCode::NOT_FOUND, "404 page not found\n") })
        .layer(middleware::from_fn_with_state(guard, security::check))
        .layer(middleware::from_fn(request_id))
        .with_state(proxies)
}

/// Answers carry an identifier, as Toxiproxy's do.
async fn request_id(request: Request<Body>, next: Next) -> Response {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut response = next.run(request).await;
    let value = format!("{:08x}-{id:08x}", std::process::id());
    if let Ok(value) = HeaderValue::from_str(&value) {
        response
            .headers_mut()
            .insert(HeaderName::from_static("x-toxiproxy-request-id"), value);
    }
    response
}

async fn index(State(proxies): Api) -> Response {
    let all: Map<String, Value> = proxies
        .all()
        .iter()
        .map(|proxy| (proxy.relay().name().to_owned(), proxy.json()))
        .collect();
    Json(all).into_response()
}

async fn create(State(proxies): Api, Extension(caller): By, body: Body) -> ApiResult {
    let proxy = proxies.create(&collect(body).await?, caller).await?;
    Ok((StatusCode::CREATED, Json(proxy.json())).into_response())
}

async fn populate(State(proxies): Api, Extension(caller): By, body: Body) -> ApiResult {
    let (made, error) = proxies.populate(&collect(body).await?, caller).await;
    let made: Vec<Value> = made.iter().map(|proxy| proxy.json()).collect();
    let (status, mut answer) = match error {
        Some(error) => (error.status, error.json()),
        None => (StatusCode::CREATED, json!({})),
    };
    answer["proxies"] = Value::Array(made);
    Ok((status, Json(answer)).into_response())
}

async fn show(State(proxies): Api, Path(name): Path<String>) -> ApiResult {
    Ok(Json(proxies.get(&name)?.json()).into_response())
}

async fn update(
    State(proxies): Api,
    Extension(caller): By,
    Path(name): Path<String>,
    body: Body,
) -> ApiResult {
    // An unknown proxy is reported before an invalid body.
    proxies.get(&name)?;
    let body = collect(body).await?;
    let proxy = proxies.update(&name, &body, caller).await?;
    Ok(Json(proxy.json()).into_response())
}

async fn delete(State(proxies): Api, Extension(caller): By, Path(name): Path<String>) -> ApiResult {
    proxies.delete(&name, caller).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn toxics(State(proxies): Api, Path(name): Path<String>) -> ApiResult {
    Ok(Json(proxies.get(&name)?.toxics()).into_response())
}

async fn add_toxic(
    State(proxies): Api,
    Extension(caller): By,
    Path(name): Path<String>,
    body: Body,
) -> ApiResult {
    proxies.get(&name)?;
    let body = collect(body).await?;
    let toxic = proxies.add_toxic(&name, &body, caller).await?;
    Ok(Json(toxic).into_response())
}

async fn toxic(State(proxies): Api, Path((name, toxic)): Path<(String, String)>) -> ApiResult {
    Ok(Json(proxies.get(&name)?.toxic(&toxic)?).into_response())
}

async fn update_toxic(
    State(proxies): Api,
    Extension(caller): By,
    Path((name, toxic)): Path<(String, String)>,
    body: Body,
) -> ApiResult {
    proxies.get(&name)?.toxic(&toxic)?;
    let body = collect(body).await?;
    let toxic = proxies.update_toxic(&name, &toxic, &body, caller).await?;
    Ok(Json(toxic).into_response())
}

async fn remove_toxic(
    State(proxies): Api,
    Extension(caller): By,
    Path((name, toxic)): Path<(String, String)>,
) -> ApiResult {
    proxies.remove_toxic(&name, &toxic, caller).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn reset(State(proxies): Api, Extension(caller): By) -> ApiResult {
    proxies.reset(caller).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Exactly Toxiproxy's bytes, because some clients compare the text.
async fn version() -> Response {
    let kind = (header::CONTENT_TYPE, "application/json;charset=utf-8");
    ([kind], format!("{{\"version\": \"{VERSION}\"}}\n")).into_response()
}

async fn show_metrics(State(proxies): Api, has_runtime_metrics: bool) -> ApiResult {
    let rules = off_the_runtime(proxies.rules(), StandingRules::list).await?;
    let kind = (
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"),
    );
    let mut text = metrics::render(&proxies, &rules);
    if has_runtime_metrics {
        metrics::process(&mut text)?;
    }
    Ok(([kind], text).into_response())
}
