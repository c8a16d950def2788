//! `answer`: the name has another address.

use std::net::IpAddr;

use fault_common::dns::code;

use super::prelude::*;

fault! {
    /// The name has this address and nothing else.
    Answer: query("answer", "DNS queries are answered with this address; those for other types than its own with no record").listed(205);

    /// The address; of IPv6 in brackets.
    address: String => first("address", ValueKind::Text, "an IPv4 address, or an IPv6 address in brackets");
}

impl Answer {
    /// The address.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        let text = self
            .address
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'));
        text.unwrap_or(&self.address).parse().ok()
    }
}

impl Definition for Answer {
    fn complaint(&self) -> Option<Complaint> {
        if self.address().is_some() {
            return None;
        }
        complain(
            "address",
            format!("`{}` is not an address", self.address),
            "an address such as 10.0.0.9 or [::1]",
        )
    }

    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::answer(code::NO_ERROR, self.address()))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
