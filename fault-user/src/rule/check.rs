//! What the parts of a rule must fulfil together, whichever way they were written.

use super::args::one_of;
use super::catalog::FAULTS;
use super::complaint::{Complaint, complain};
use super::faults::{Fault, RejectWith};
use super::modifier::{Direction, Modifiers, PacketKinds};
use super::spec::{Acts, Layer, Spec};
use super::target::{Protocol, Target};

/// What is wrong with a fault on a protocol; `param` of the complaint is `fault`.
fn on_protocol(fault: &Fault, protocol: Protocol) -> Option<Complaint> {
    let (name, works): (_, fn(&Spec) -> bool) = match protocol {
        Protocol::Any | Protocol::Tcp => return None,
        Protocol::Udp => ("UDP", |spec| spec.udp && spec.acts != Acts::OnQueries),
        Protocol::Icmp => ("ICMP", |spec| spec.icmp),
        Protocol::Dns => ("DNS", |spec| {
            spec.udp && matches!(spec.layer, Layer::Packet | Layer::Either)
        }),
    };
    fault.parts().find_map(|part| {
        if matches!(part, Fault::Reject(reject) if reject.with == Some(RejectWith::Rst)) {
            return complain(
                "fault",
                format!("{name} has no RST"),
                "`reject=icmp-port`, `reject=icmp-host` or `reject=icmp-admin`",
            );
        }
        if works(part.spec()) {
            return None;
        }
        let others = FAULTS.iter().filter(|spec| works(spec));
        let others: Vec<_> = others.map(|spec| spec.name).collect();
        complain(
            "fault",
            format!("`{}` does not work on {name}", part.name()),
            &one_of(&others),
        )
    })
}

/// What is wrong about queries of DNS.
fn on_queries(target: Option<&Target>, fault: &Fault, modifiers: &Modifiers) -> Option<Complaint> {
    const EXPECTED: &str = "a target such as `dns:api.example.com`, or `dns` for all queries";
    let is_dns = target?.protocol == Protocol::Dns;
    if let Some(part) = fault.part_that(Acts::OnQueries).filter(|_| !is_dns) {
        let message = format!("`{}` answers DNS queries", part.name());
        return complain("target", message, EXPECTED);
    }
    if modifiers.query_type.is_some() && !is_dns {
        return complain("type", "only DNS queries have a type", EXPECTED);
    }
    if is_dns && modifiers.direction == Direction::ToClient {
        return complain(
            "dir",
            "a target of `dns` is the queries, which go to the server",
            "no `dir`, or `udp:53` for all packets from servers",
        );
    }
    None
}

/// What is wrong between the parts of a rule; `param` is `target`, `fault` or a modifier's key.
pub(super) fn rule(
    target: Option<&Target>,
    fault: &Fault,
    modifiers: &Modifiers,
) -> Option<Complaint> {
    let layer = fault.layer();
    let protocol = target.map_or(Protocol::Any, |target| target.protocol);
    let complaint = on_queries(target, fault, modifiers).or_else(|| on_protocol(fault, protocol));
    if complaint.is_some() {
        return complaint;
    }
    let flags = modifiers.packets.without(PacketKinds::DATA);
    if !flags.is_empty() && matches!(protocol, Protocol::Udp | Protocol::Icmp | Protocol::Dns) {
        return complain(
            "match",
            "only TCP packets have flags",
            "`match=data` or a tcp target",
        );
    }
    if layer == Layer::Stream {
        let packets = [
            (!modifiers.packets.is_empty(), "match"),
            (
                modifiers.size.is_some() && protocol != Protocol::Udp,
                "size",
            ),
        ];
        if let Some((_, key)) = packets.iter().find(|(wrong, _)| *wrong) {
            let message = format!(
                "`{key}` picks packets, and `{}` works on a stream",
                fault.name()
            );
            return complain(key, message, "a fault of the packet layer");
        }
    }
    if let Some(key) = modifiers.asked.key() {
        if layer != Layer::Stream {
            let message = format!(
                "`{key}` is read from a stream, and `{}` works on packets",
                fault.name()
            );
            return complain(
                key,
                message,
                "a stream fault such as latency, reset_peer, timeout or error",
            );
        }
        if protocol == Protocol::Udp {
            let message = format!("`{key}` is read from TCP, and this target is UDP");
            return complain(key, message, "a tcp target");
        }
    }
    if let Fault::Profile(_) = fault {
        let plain = Modifiers::default();
        let picking = [
            (modifiers.probability != plain.probability, "p"),
            (!modifiers.triggers.is_empty(), "count"),
            (!modifiers.packets.is_empty(), "match"),
            (modifiers.size.is_some(), "size"),
        ];
        if let Some((_, key)) = picking.iter().find(|(wrong, _)| *wrong) {
            return complain(
                key,
                "a profile is a whole link, and this would pick some of its packets",
                "`conn`, `dir` or times, or the faults of the profile one by one",
            );
        }
    }
    if modifiers.reconnect && matches!(layer, Layer::Packet | Layer::Either) {
        let message = format!("`{}` already acts on open connections", fault.name());
        return complain("reconnect", message, "`reconnect` with a stream fault");
    }
    if modifiers.reconnect && protocol == Protocol::Udp {
        return complain(
            "reconnect",
            "UDP has no connections to reset",
            "a tcp target",
        );
    }
    modifiers.complaint()
}
