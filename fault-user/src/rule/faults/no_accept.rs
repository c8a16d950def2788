//! `no_accept`: the handshake completes, nobody serves the connection.

use super::prelude::*;

fault! {
    /// The handshake completes, nobody serves the connection.
    NoAccept: stream(
        "no_accept",
        "the handshake completes, nobody serves the connection",
    ).listed(220).acting(Acts::OnService);
}

impl Definition for NoAccept {
    fn overlap(&self) -> Overlap {
        Overlap::Decides
    }
}
