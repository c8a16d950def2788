//! `no_accept`: the handshake completes, but the connection is not served.

use super::prelude::*;

fault! {
    /// The handshake completes, nobody serves the connection.
    NoAccept: stream(
        "no_accept",
        "the handshake completes, but the connection is not served",
    ).listed(220).acting(Acts::OnService);
}

impl Definition for NoAccept {
    fn overlap(&self) -> Overlap {
        Overlap::Decides
    }
}
