//! `nodata`: the name has no record of the type that is asked for.

use fault_common::dns::code;

use super::prelude::*;

fault! {
    /// The name has no record of the type that is asked for.
    Nodata: query("nodata", "DNS queries are answered: the name has no such record").listed(201);
}

impl Definition for Nodata {
    fn packet(&self) -> Option<PacketAction> {
        Some(PacketAction::answer(code::NO_ERROR, None))
    }

    fn overlap(&self) -> Overlap {
        Overlap::Swallows
    }
}
