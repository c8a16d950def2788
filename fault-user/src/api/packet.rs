//! Packet faults as toxics: on a transparent proxy each of them is a packet rule on the proxy's upstream.

use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::body::read_rule;
use super::error::ApiError;
use crate::relay::StreamDirection;
use crate::rule::{Layer, MODIFIERS, catalog};
use crate::session::standing::NewRule;

/// A toxic that is a packet rule.
#[derive(Clone, Debug)]
pub(crate) struct PacketToxic {
    /// Unique in its proxy, over all toxics.
    pub(crate) name: String,
    /// The fault's name.
    pub(crate) kind: &'static str,
    /// The direction under which it is listed.
    pub(crate) direction: StreamDirection,
    /// The direction as given by the client; without it the rule acts in both.
    pub(crate) stream: Option<String>,
    /// The fraction of connections that it applies to.
    pub(crate) toxicity: f64,
    /// The fault's arguments and the rule's modifiers, as in a rule object.
    pub(crate) attributes: Map<String, Value>,
    /// The number of its rule.
    pub(crate) rule: u64,
    /// The rule.
    pub(crate) text: String,
}

/// The name of a packet fault; `None` for any other.
pub(crate) fn kind(name: &str) -> Option<&'static str> {
    let spec = catalog::spec(name).filter(|spec| spec.name == name)?;
    matches!(spec.layer, Layer::Packet | Layer::Either).then_some(spec.name)
}

/// The error for a packet fault on an ordinary proxy.
pub(crate) fn refused(kind: &str) -> ApiError {
    let why = format!(
        "{kind} is a packet fault: use a transparent proxy (its listen address equals its upstream) or a rule of \
         /v1/rules"
    );
    ApiError::new(StatusCode::BAD_REQUEST, why)
}

impl PacketToxic {
    /// Applies a client's changes.
    ///
    /// # Errors
    /// 400 if the attributes are not an object.
    pub(crate) fn change(
        &mut self,
        attributes: Option<&Value>,
        toxicity: Option<f64>,
    ) -> Result<(), ApiError> {
        match attributes {
            None => {}
            Some(Value::Object(given)) => self.attributes.extend(given.clone()),
            Some(other) => {
                let why = format!("attributes must be an object, not {other}");
                return Err(ApiError::bad_body(why));
            }
        }
        self.toxicity = toxicity.unwrap_or(self.toxicity);
        Ok(())
    }

    /// The rule for this upstream.
    ///
    /// # Errors
    /// 400 for attributes that the rule does not support.
    pub(crate) fn new_rule(&self, upstream: &str) -> Result<NewRule, ApiError> {
        let is_modifier = |name: &str| {
            let mut modifiers = MODIFIERS.iter();
            catalog::spec(self.kind).is_none_or(|spec| spec.param(name).is_none())
                && modifiers.any(|spec| spec.key == name || spec.name == name)
        };
        let (mut rule, arguments): (Map<_, _>, Map<_, _>) = self
            .attributes
            .clone()
            .into_iter()
            .partition(|(name, _)| is_modifier(name));
        let mut fault = if arguments.is_empty() {
            json!(self.kind)
        } else {
            json!({ self.kind: arguments })
        };
        if self.toxicity < 1.0 {
            // A mix draws once per connection.
            fault = json!({"mix": [{"probability": self.toxicity, "fault": fault}]});
        }
        rule.insert("fault".to_owned(), fault);
        rule.insert("target".to_owned(), json!(format!("tcp:{upstream}")));
        if self.stream.is_some() && !rule.contains_key("dir") && !rule.contains_key("direction") {
            let direction = match self.direction {
                StreamDirection::Upstream => "to-server",
                StreamDirection::Downstream => "to-client",
            };
            rule.insert("direction".to_owned(), json!(direction));
        }
        Ok(NewRule::new(read_rule(Value::Object(rule))?)?)
    }

    /// Its JSON in the API: like any toxic, with its rule.
    pub(crate) fn json(&self) -> Value {
        json!({
            "attributes": self.attributes,
            "name": self.name,
            "type": self.kind,
            "stream": self.stream.as_deref().unwrap_or(self.direction.name()),
            "toxicity": super::body::number(self.toxicity),
            "rule": self.text,
        })
    }
}
