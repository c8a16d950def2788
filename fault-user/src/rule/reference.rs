//! The reference of the faults as Markdown tables, made from what each fault says of itself.

use super::args::unit_name;
use super::catalog::FAULTS;
use super::spec::{Layer, Param, Spec, ValueKind};

/// The tables of docs/rules.md, by the name that their place in the file has.
#[must_use]
pub fn tables() -> [(&'static str, String); 2] {
    let table = |is_packet: bool| {
        let head = "| fault | arguments | what the application sees |\n|---|---|---|\n";
        let rows = FAULTS.iter().filter(|spec| on_packets(spec) == is_packet);
        rows.fold(head.to_owned(), |table, spec| table + &row(spec))
    };
    [
        ("packet faults", table(true)),
        ("stream faults", table(false)),
    ]
}

/// Whether a fault is listed with those that work on packets.
fn on_packets(spec: &Spec) -> bool {
    spec.layer == Layer::Packet || spec.icmp
}

/// The row of one fault.
pub(super) fn row(spec: &Spec) -> String {
    let arguments = spec.params.iter();
    let arguments: Vec<_> = arguments
        .map(|param| format!("`{}` {}", syntax(spec, param), param.help))
        .collect();
    let arguments = match arguments.as_slice() {
        [] => "-".to_owned(),
        arguments => arguments.join("<br>"),
    };
    let mark = if spec.udp && !on_packets(spec) {
        " (UDP)"
    } else {
        ""
    };
    format!("| `{}`{mark} | {arguments} | {} |\n", spec.name, spec.help)
}

/// How an argument is written; a `|` would end the cell.
fn syntax(spec: &Spec, param: &Param) -> String {
    let unit = match param.kind {
        ValueKind::Flag => return param.text.to_owned(),
        ValueKind::Call { names, required } => {
            let (must, may) = names.split_at(required);
            let open: Vec<_> = may.iter().map(|name| format!("[,{name}")).collect();
            return format!(
                "{}({}{}{})",
                param.text,
                must.join(","),
                open.concat(),
                "]".repeat(may.len())
            );
        }
        ValueKind::Statuses | ValueKind::OptionalText | ValueKind::OptionalSize => {
            return format!("{}[:{}]", param.text, unit_name(param.kind));
        }
        ValueKind::Word(words) => words.join("\\|"),
        kind => unit_name(kind).to_owned(),
    };
    if !param.positional {
        return format!("{}:{unit}", param.text);
    }
    let spread = param.spread.and_then(|name| spec.param(name));
    match spread {
        Some(spread) => format!("{unit}[~{}]", unit_name(spread.kind)),
        None => unit,
    }
}
