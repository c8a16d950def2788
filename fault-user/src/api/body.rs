//! Parses request bodies as Toxiproxy's Go decoder does: only the first JSON value counts, names are case-insensitive,
//! nulls and unknown fields are ignored.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use serde_json::json;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::rule::{Rule, scenario};

/// Maximum size of a body in bytes.
pub(crate) const LIMIT: usize = 2 << 20;
/// A client must send its body within this time.
const WAIT: Duration = Duration::from_secs(10);

/// Collects a body.
///
/// # Errors
///
/// 413 if it is too large, 408 if it takes too long, 400 if it is incomplete.
pub(crate) async fn collect(body: Body) -> Result<Bytes, ApiError> {
    match tokio::time::timeout(WAIT, axum::body::to_bytes(body, LIMIT)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => {
            let too_large = std::error::Error::source(&error)
                .is_some_and(|source| source.to_string().contains("length limit"));
            if too_large {
                let message = format!("request body too large, the limit is {LIMIT} bytes");
                return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message));
            }
            Err(ApiError::bad_body(error))
        }
        Err(_elapsed) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "the request body took too long",
        )),
    }
}

/// The first JSON value of a body.
///
/// # Errors
///
/// `bad request body`, with `EOF` for an empty one.
pub(crate) fn value(body: &[u8]) -> Result<Value, ApiError> {
    match serde_json::Deserializer::from_slice(body)
        .into_iter::<Value>()
        .next()
    {
        Some(value) => value.map_err(ApiError::bad_body),
        None => Err(ApiError::bad_body("EOF")),
    }
}

/// A JSON object whose fields are looked up as in Go.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Converts an object; null is an empty one.
    ///
    /// # Errors
    ///
    /// `bad request body` for anything else.
    pub(crate) fn new(value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(fields) => Ok(Self(fields)),
            Value::Null => Ok(Self(Map::new())),
            other => Err(ApiError::bad_body(format!(
                "cannot unmarshal {} into an object",
                type_name(&other)
            ))),
        }
    }

    /// Parses a body that contains an object.
    ///
    /// # Errors
    ///
    /// `bad request body`.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        Self::new(value(body)?)
    }

    /// A field that exists and is not null. If several differ only in case, the last one counts.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        let fields = self
            .0
            .iter()
            .filter(|(key, _)| key.eq_ignore_ascii_case(name));
        fields
            .map(|(_, value)| value)
            .rfind(|value| !value.is_null())
    }

    /// Whether it has fields, and each is an object.
    pub(crate) fn holds_objects(&self) -> bool {
        !self.0.is_empty() && self.0.values().all(Value::is_object)
    }

    fn typed<'a, T>(
        &'a self,
        name: &str,
        kind: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let wrong = || {
            ApiError::bad_body(format!(
                "cannot unmarshal {} into field {name} of type {kind}",
                type_name(value)
            ))
        };
        convert(value).map(Some).ok_or_else(wrong)
    }

    /// A text.
    ///
    /// # Errors
    ///
    /// `bad request body` for another type.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, ApiError> {
        self.typed(name, "string", Value::as_str)
    }

    /// A truth value.
    ///
    /// # Errors
    ///
    /// `bad request body` for another type.
    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "bool", Value::as_bool)
    }

    /// A number.
    ///
    /// # Errors
    ///
    /// `bad request body` for another type.
    pub(crate) fn number(&self, name: &str) -> Result<Option<f64>, ApiError> {
        self.typed(name, "float32", Value::as_f64)
    }

    /// A count.
    ///
    /// # Errors
    ///
    /// `bad request body` for another type, a fraction or a negative number.
    pub(crate) fn count(&self, name: &str) -> Result<Option<u64>, ApiError> {
        self.typed(name, "count", Value::as_u64)
    }
}

const fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Formats a whole number without a decimal point, as Go does.
pub(super) fn number(value: f64) -> Value {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "only whole numbers in a small range are cast"
    )]
    if value.fract() == 0.0 && value.abs() < 1e9 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

/// Parses a rule: a text, an object, or an object in the format of the list of rules.
///
/// # Errors
/// 400.
pub(super) fn read_rule(value: Value) -> Result<Rule, ApiError> {
    let listed = value.get("rule").filter(|rule| rule.is_string()).cloned();
    let read = scenario::read_rule(&listed.unwrap_or(value));
    read.map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, error.to_string()))
}
