//! The JSON schema of a scenario file, made from the tables of faults and modifiers.

use serde_json::{Map, Value as Json, json};

use super::super::catalog::{FAULTS, MIX};
use super::super::modifier::{MODIFIERS, ModifierSpec};
use super::super::spec::{Param, Spec, ValueKind};
use super::super::target::Protocol;
use super::During;

/// The schema's own address.
const ID: &str =
    "https://raw.githubusercontent.com/fault-injector/fault/main/docs/scenario.schema.json";

/// The JSON schema (draft 2020-12) of a scenario file; docs/scenario.schema.json is this text.
#[must_use]
pub fn schema() -> Json {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ID,
        "title": "fault scenario",
        "description": "Network faults with their timeline, and what must hold while they act.",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "$schema": { "type": "string", "description": "For editors; no effect." },
            "seed": { "type": "integer", "minimum": 0, "description": "The seed of all decisions; drawn when absent." },
            "for": reference("duration", "How long the scenario lasts; to the end of the command when absent."),
            "targets": {
                "type": "object",
                "description": "Named targets.",
                "propertyNames": { "pattern": "^[A-Za-z_][A-Za-z0-9_.-]*$", "not": { "enum": Protocol::WORDS } },
                "additionalProperties": { "$ref": "#/$defs/target" }
            },
            "profiles": {
                "type": "object",
                "description": "Kinds of links by their names: the faults that `profile=NAME` stands for.",
                "propertyNames": { "pattern": "^[A-Za-z0-9_.-]+$" },
                "additionalProperties": {
                    "type": "array",
                    "minItems": 1,
                    "items": { "type": "string", "minLength": 1, "description": "FAULT[=ARGS] [dir=WAY], such as `rate=2mbit dir=to-client`." }
                }
            },
            "rules": { "type": "array", "items": { "$ref": "#/$defs/rule" }, "description": "The rules, in their order." },
            "expect": expect(),
            "random": random()
        },
        "$defs": {
            "duration": text_pattern(r"^(0|[0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|min|h))$", "A duration such as 200ms, 5s or 2m."),
            "durations": text_pattern(r"^[0-9.]+[a-zµ]*(\.\.[0-9.]+[a-zµ]*)?$", "A duration or a range of durations such as 2s..10s."),
            "probability": {
                "description": "A probability such as 30% or 0.3.",
                "anyOf": [
                    { "type": "number", "minimum": 0, "maximum": 1 },
                    { "type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?%?$" }
                ]
            },
            "size": number_or_pattern(r"^[0-9]+(\.[0-9]+)?(B|kB|KiB|MB|MiB|GB|GiB)?$", "A size such as 1500 or 64KiB."),
            "rate": text_pattern(r"^[0-9]+(\.[0-9]+)?([kKmMgGtT]?bit(/s)?|(k|Ki|M|Mi|G|Gi)?B/s)$", "A rate such as 10mbit or 64KiB/s."),
            "target": target(),
            "rule": rule(),
            "fault": fault(),
            "probe": probe()
        }
    })
}

/// A reference to a definition, with a description of its own.
fn reference(name: &str, help: &str) -> Json {
    json!({ "$ref": format!("#/$defs/{name}"), "description": help })
}

/// A text with a pattern.
fn text_pattern(pattern: &str, help: &str) -> Json {
    json!({ "description": help, "type": "string", "pattern": pattern })
}

/// A whole number or a text with a pattern.
fn number_or_pattern(pattern: &str, help: &str) -> Json {
    json!({
        "description": help,
        "anyOf": [{ "type": "integer", "minimum": 0 }, { "type": "string", "pattern": pattern }]
    })
}

/// An object of which every field is a target's name.
fn per_target(value: &Json, help: &str) -> Json {
    json!({ "type": "object", "description": help, "additionalProperties": value })
}

/// A target.
fn target() -> Json {
    let port = json!({ "anyOf": [
        { "type": "integer", "minimum": 1, "maximum": 65_535 },
        { "type": "string", "pattern": "^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$" }
    ] });
    json!({
        "description": "[tcp:|udp:|icmp:|any:][host-or-CIDR:]port[,port|-port], icmp, *, each with exclusions (tcp:!22), or an object.",
        "anyOf": [
            { "type": "string", "minLength": 1 },
            { "type": "integer", "minimum": 1, "maximum": 65_535 },
            {
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "protocol": { "enum": Protocol::WORDS },
                    "host": { "type": "string", "description": "An address, a network or a host name." },
                    "port": { "$ref": "#/$defs/target/$defs/port" },
                    "ports": { "anyOf": [
                        { "$ref": "#/$defs/target/$defs/port" },
                        { "type": "array", "items": { "$ref": "#/$defs/target/$defs/port" } }
                    ] },
                    "except": {
                        "type": "array",
                        "items": { "type": "string", "minLength": 1 },
                        "description": "Ports or hosts that are not meant."
                    }
                }
            }
        ],
        "$defs": { "port": port }
    })
}

/// A rule.
fn rule() -> Json {
    let mut properties = Map::new();
    properties.insert("target".to_owned(), json!({ "$ref": "#/$defs/target" }));
    properties.insert("fault".to_owned(), json!({ "$ref": "#/$defs/fault" }));
    for spec in MODIFIERS {
        let schema = modifier(spec);
        if spec.key != spec.name {
            properties.insert(spec.key.to_owned(), schema.clone());
        }
        properties.insert(spec.name.to_owned(), schema);
    }
    json!({
        "description": "TARGET FAULT[=ARGS] [MODIFIER…], or the same as an object.",
        "anyOf": [
            { "type": "string", "minLength": 3 },
            { "type": "object", "additionalProperties": false, "required": ["target", "fault"], "properties": properties }
        ]
    })
}

/// A modifier's value.
fn modifier(spec: &ModifierSpec) -> Json {
    let words = |words: &[&str]| json!({ "enum": words, "description": spec.help });
    match spec.key {
        "p" | "duty" => reference("probability", spec.help),
        "at" | "for" | "period" => reference("duration", spec.help),
        "first" | "nth" | "every" => {
            json!({ "type": "integer", "minimum": 1, "description": spec.help })
        }
        "after" => json!({ "type": "integer", "minimum": 0, "description": spec.help }),
        "count" => words(super::super::CountScope::WORDS),
        "dir" => words(super::super::Direction::WORDS),
        "reconnect" => json!({ "type": "boolean", "description": spec.help }),
        "match" => {
            let kinds = ["syn", "data", "ack", "fin", "rst"];
            json!({ "description": spec.help, "anyOf": [
                { "type": "string", "pattern": "^(syn|data|ack|fin|rst)(/(syn|data|ack|fin|rst))*$" },
                { "type": "array", "minItems": 1, "items": { "enum": kinds } }
            ] })
        }
        _ => json!({ "description": spec.help, "anyOf": [
            { "type": "integer", "minimum": 0 },
            { "type": "string" },
            { "type": "array", "minItems": 2, "maxItems": 2, "items": { "type": ["integer", "string"] } }
        ] }),
    }
}

/// A fault.
fn fault() -> Json {
    let mut forms =
        vec![json!({ "type": "string", "description": "FAULT[=ARGS] as in the one-line form." })];
    forms.extend(FAULTS.iter().map(one_fault));
    forms.push(json!({
        "type": "object",
        "description": MIX.help,
        "additionalProperties": false,
        "required": [MIX.name],
        "properties": { MIX.name: { "type": "array", "minItems": 1, "items": { "anyOf": [
            { "type": "string", "description": "P%:FAULT[=ARGS]" },
            {
                "type": "object",
                "additionalProperties": false,
                "required": ["probability", "fault"],
                "properties": {
                    "probability": { "$ref": "#/$defs/probability" },
                    "fault": { "$ref": "#/$defs/fault" }
                }
            }
        ] } } }
    }));
    json!({ "anyOf": forms })
}

/// One fault's object.
fn one_fault(spec: &Spec) -> Json {
    let mut properties = Map::new();
    for param in spec.params {
        properties.insert(param.name.to_owned(), argument(param));
        if param.text != param.name {
            properties.insert(param.text.to_owned(), argument(param));
        }
    }
    json!({
        "type": "object",
        "description": spec.help,
        "additionalProperties": false,
        "required": [spec.name],
        "properties": { spec.name: {
            "anyOf": [
                { "type": "object", "additionalProperties": false, "properties": properties },
                { "type": ["string", "number", "null"], "description": "The arguments as in the one-line form." }
            ]
        } }
    })
}

/// An argument's value.
fn argument(param: &Param) -> Json {
    let help = param.help;
    match param.kind {
        ValueKind::Probability => reference("probability", help),
        ValueKind::Duration => reference("duration", help),
        ValueKind::Size => reference("size", help),
        ValueKind::Rate => reference("rate", help),
        ValueKind::Count => json!({ "type": "integer", "minimum": 0, "description": help }),
        ValueKind::Signed => json!({ "type": "integer", "description": help }),
        ValueKind::Word(words) => json!({ "enum": words, "description": help }),
        ValueKind::Flag => json!({ "type": "boolean", "description": help }),
        ValueKind::Text => json!({ "type": "string", "description": help }),
        ValueKind::OptionalText => json!({ "type": ["string", "boolean"], "description": help }),
        ValueKind::OptionalSize => {
            json!({ "description": help, "anyOf": [{ "type": "boolean" }, { "$ref": "#/$defs/size" }] })
        }
        ValueKind::Statuses => {
            let status = json!({ "type": "integer", "minimum": 200, "maximum": 599 });
            json!({ "description": help, "anyOf": [
                { "type": "boolean" }, status, { "type": "array", "minItems": 1, "items": status },
                { "type": "string", "pattern": "^[2-5][0-9][0-9](/[2-5][0-9][0-9])*$" }
            ] })
        }
        ValueKind::Call { names, required } => {
            let properties: Map<_, _> = names
                .iter()
                .map(|name| ((*name).to_owned(), json!({ "$ref": "#/$defs/probability" })))
                .collect();
            json!({ "description": help, "anyOf": [
                { "type": "object", "additionalProperties": false, "required": &names[..required], "properties": properties },
                { "type": "array", "minItems": required, "maxItems": names.len(), "items": { "$ref": "#/$defs/probability" } },
                { "type": "string" }
            ] })
        }
    }
}

/// The expectations.
fn expect() -> Json {
    let count = json!({ "type": "integer", "minimum": 0 });
    let duration = json!({ "$ref": "#/$defs/duration" });
    let rate = json!({ "type": "string", "pattern": r"^[0-9]+/[0-9.]*[a-zµ]+$" });
    let no_traffic = json!({ "anyOf": [
        { "$ref": "#/$defs/duration" },
        {
            "type": "object",
            "additionalProperties": false,
            "properties": {
                "faulted": { "type": "string", "description": "The target whose fault counts; the target itself when absent." },
                "after": reference("duration", "How long after the fault's start traffic must have ended.")
            }
        }
    ] });
    json!({
        "type": "object",
        "description": "What must hold.",
        "additionalProperties": false,
        "properties": {
            "exit": { "type": "integer", "minimum": 0, "maximum": 255, "description": "The command's exit code." },
            "fired": { "type": "array", "items": { "type": "string" }, "description": "Targets of which a rule must have fired." },
            "max_connects": per_target(&count, "The most connects to a target (bounded retries)."),
            "connect_rate": per_target(&rate, "The most connects to a target in a time, such as 10/s (back-off)."),
            "recovers_within": per_target(&duration, "How long after a fault's end the first successful exchange may take."),
            "max_open": per_target(&count, "The most connections to a target that are open at once (bulkhead)."),
            "no_traffic_while": per_target(&no_traffic, "Targets that get no traffic while a fault acts (circuit breaker)."),
            "p99_connect": per_target(&duration, "The longest time in which 99 of 100 connects are answered."),
            "probe": { "anyOf": [
                { "$ref": "#/$defs/probe" },
                { "type": "array", "items": { "$ref": "#/$defs/probe" } }
            ] }
        }
    })
}

/// A probe.
fn probe() -> Json {
    json!({
        "type": "object",
        "description": "A check that must hold before the first fault and after the last one.",
        "additionalProperties": false,
        "properties": {
            "name": { "type": "string" },
            "http": { "type": "string", "pattern": "^http://", "description": "A URL that must answer." },
            "status": { "type": "integer", "minimum": 100, "maximum": 599, "description": "The right status; 200 to 399 when absent." },
            "tcp": { "type": "string", "description": "A host and port that must accept." },
            "command": { "type": "array", "minItems": 1, "items": { "type": "string" }, "description": "A command that must exit with 0." },
            "timeout": reference("duration", "How long an answer may take; 5s when absent."),
            "interval": reference("duration", "How often it is tried; 1s when absent."),
            "during": { "enum": During::WORDS, "description": "What it must do while a fault acts." }
        },
        "oneOf": [{ "required": ["http"] }, { "required": ["tcp"] }, { "required": ["command"] }]
    })
}

/// The drawn faults.
fn random() -> Json {
    json!({
        "type": "object",
        "description": "Faults drawn from a weighted list within limits.",
        "additionalProperties": false,
        "required": ["choices", "length", "total"],
        "properties": {
            "choices": { "type": "array", "minItems": 1, "items": { "anyOf": [
                { "type": "string", "minLength": 3 },
                {
                    "type": "object",
                    "additionalProperties": false,
                    "required": ["rule"],
                    "properties": {
                        "weight": { "type": "integer", "minimum": 0 },
                        "rule": { "$ref": "#/$defs/rule" }
                    }
                }
            ] } },
            "length": reference("durations", "How long a drawn fault acts."),
            "quiet": reference("durations", "How long it is quiet before and between faults."),
            "at_a_time": { "type": "integer", "minimum": 1, "description": "How many act at once at most; 1 when absent." },
            "total": reference("duration", "After how long nothing is drawn any more."),
            "connections": reference("probability", "The largest share of a target's connections that a drawn fault touches.")
        }
    })
}
