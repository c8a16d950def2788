//! `reject`: refused at once.

use fault_common::abi::reject;

use super::prelude::*;

words! {
    /// How `reject` refuses a packet.
    RejectWith {
        /// A TCP segment with RST.
        Rst = "rst",
        /// ICMP "port unreachable".
        IcmpPort = "icmp-port",
        /// ICMP "host unreachable" (`ICMPv6`: "address unreachable").
        IcmpHost = "icmp-host",
        /// ICMP "administratively prohibited".
        IcmpAdmin = "icmp-admin",
    }
}

fault! {
    /// Refused at once.
    Reject: packet("reject", "refused at once").listed(40);

    /// How; where it was not given RST for TCP, port unreachable for UDP, host unreachable for ICMP.
    with: Option<RejectWith> = None => first(
        "with",
        ValueKind::Word(RejectWith::WORDS),
        "how; RST for TCP, port unreachable for UDP, host unreachable for ICMP when absent",
    );
}

impl Definition for Reject {
    fn packet(&self) -> Option<PacketAction> {
        let with = match self.with {
            None => reject::BY_PROTOCOL,
            Some(RejectWith::Rst) => reject::RST,
            Some(RejectWith::IcmpPort) => reject::ICMP_PORT,
            Some(RejectWith::IcmpHost) => reject::ICMP_HOST,
            Some(RejectWith::IcmpAdmin) => reject::ICMP_ADMIN,
        };
        Some(PacketAction::new(fault::REJECT, [with]).per_wire_packet(false))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
