//! `/v1/rules`: the daemon's packet rules.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, Path, Query, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};

use super::body::{self, collect, read_rule};
use super::error::ApiError;
use super::events::EventChannel;
use super::proxies::{PACKET_RULES, Proxies};
use super::{Api, ApiResult, By};
use crate::doctor::DoctorReport;
use crate::rule::Rule;
use crate::session::standing::{NewRule, RuleStatus, RulesChange, StandingRules, off_the_runtime};

/// Interval of events about hits.
const TELL: Duration = Duration::from_millis(200);

/// Sends events about hits, forever.
pub async fn tell_hits(rules: Arc<StandingRules>, events: EventChannel) {
    let mut told: HashMap<u64, u64> = HashMap::new();
    let mut ticks = interval(TELL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let hits = match off_the_runtime(&rules, StandingRules::hits).await {
            Ok(hits) => hits,
            Err(error) => {
                log::debug!("{error}");
                continue;
            }
        };
        told.retain(|id, _| hits.iter().any(|(there, ..)| there == id));
        for (id, rule, hits) in hits {
            let (packets, before) = (hits.stats.hit_packets, told.entry(id).or_default());
            if packets > *before {
                let about =
                    json!({"id": id, "rule": rule, "hits": packets - *before, "total": packets});
                events.tell("rule hit", "", &about);
                *before = packets;
            }
        }
    }
}

pub(crate) fn routes() -> Router<Arc<Proxies>> {
    Router::new()
        .route("/v1/rules", get(index).post(add).delete(clear))
        .route("/v1/rules/{id}", get(show).delete(remove))
        .route("/v1/doctor", get(doctor))
}

async fn index(State(proxies): Api) -> ApiResult {
    let rules = off_the_runtime(proxies.rules(), StandingRules::list).await?;
    Ok(Json(rules).into_response())
}

#[derive(Deserialize)]
struct AddQuery {
    /// Accept rules that match SSH or the API.
    #[serde(default)]
    force: bool,
}

/// Adds one rule, or all of an array: a text or an object each. A profile adds those that it stands for.
async fn add(
    State(proxies): Api,
    Extension(caller): By,
    Query(options): Query<AddQuery>,
    body: Body,
) -> ApiResult {
    caller.require(PACKET_RULES)?;
    let body = collect(body).await?;
    let value = body::value(&body).map_err(|error| unquoted(&body).unwrap_or(error))?;
    let (many, values) = match value {
        Value::Array(values) => (true, values),
        Value::Object(fields) if fields.get("rules").is_some_and(Value::is_array) => {
            let why =
                "the rules are not in an object\nhelp: send the list itself: [\"tcp:80 drop\"]";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, why));
        }
        one => (false, vec![one]),
    };
    let written = values.into_iter().map(read_rule);
    let written: Vec<Rule> = written.collect::<Result<_, _>>()?;
    let added = off_the_runtime(proxies.rules(), move |rules| {
        let mut add = Vec::new();
        for rule in &written {
            add.extend(NewRule::all_of(rule)?);
        }
        let ids = rules.change(&RulesChange {
            add,
            toxic: None,
            remove: Vec::new(),
            force: options.force,
        })?;
        let mut all = rules.list()?;
        all.retain(|rule| ids.contains(&rule.id));
        Ok::<_, ApiError>(all)
    })
    .await?;
    for rule in &added {
        proxies.events().tell("rule added", "", &json!(rule));
    }
    // One rule that is a profile is several.
    let answer = match added.as_slice() {
        [one] if !many => json!(one),
        all => json!(all),
    };
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

/// The error for a rule that is not in JSON.
fn unquoted(body: &[u8]) -> Option<ApiError> {
    let text = std::str::from_utf8(body).ok()?.trim();
    text.parse::<Rule>().ok()?;
    let why = format!(
        "a rule is a text of JSON\nhelp: send it in quotes: {}",
        json!(text)
    );
    Some(ApiError::new(StatusCode::BAD_REQUEST, why))
}

/// The rule with this number.
async fn find(proxies: &Proxies, id: &str) -> Result<(u64, RuleStatus), ApiError> {
    let rules = off_the_runtime(proxies.rules(), StandingRules::list).await?;
    let number = id.parse::<u64>().ok();
    let found = number.and_then(|id| {
        let rule = rules.into_iter().find(|rule| rule.id == id)?;
        Some((id, rule))
    });
    found.ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "rule not found"))
}

async fn show(State(proxies): Api, Path(id): Path<String>) -> ApiResult {
    Ok(Json(find(&proxies, &id).await?.1).into_response())
}

async fn remove(State(proxies): Api, Extension(caller): By, Path(id): Path<String>) -> ApiResult {
    caller.require(PACKET_RULES)?;
    let (id, rule) = find(&proxies, &id).await?;
    if let Some(toxic) = &rule.toxic {
        let why = format!("the rule belongs to the toxic {toxic}: remove the toxic instead");
        return Err(ApiError::new(StatusCode::CONFLICT, why));
    }
    take_away(&proxies, vec![id]).await
}

async fn clear(State(proxies): Api, Extension(caller): By) -> ApiResult {
    caller.require(PACKET_RULES)?;
    let rules = off_the_runtime(proxies.rules(), StandingRules::list).await?;
    let own = rules.iter().filter(|rule| rule.toxic.is_none());
    take_away(&proxies, own.map(|rule| rule.id).collect()).await
}

async fn take_away(proxies: &Proxies, ids: Vec<u64>) -> ApiResult {
    let gone = ids.clone();
    off_the_runtime(proxies.rules(), |rules| rules.remove(ids)).await?;
    for id in gone {
        proxies
            .events()
            .tell("rule removed", "", &json!({"id": id}));
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The output of `fault doctor --json`.
async fn doctor(State(proxies): Api) -> ApiResult {
    let report = off_the_runtime(proxies.rules(), |_rules| DoctorReport::gather()).await?;
    Ok(Json(json!(report)).into_response())
}
