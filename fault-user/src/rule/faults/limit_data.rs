//! `limit_data`: so many bytes and no more.

use super::prelude::*;

fault! {
    /// The connection ends after so many bytes.
    LimitData: datagram("limit_data", "the connection ends after exactly this many bytes; with `shared` all connections do").listed(200);

    /// How many.
    bytes: u64 => first("bytes", ValueKind::Size, "how many");
    /// One count for the whole relay, not one for each connection.
    shared: bool = false => SHARED;
}

impl Definition for LimitData {}
