//! `abort`: the request reaches the server, its answer does not reach the client.

use super::prelude::*;

fault! {
    /// The connection is reset after the request has reached the server.
    Abort: stream(
        "abort",
        "the connection is reset after the request has reached the server",
    ).listed(330).acting(Acts::OnRequests);
}

impl Definition for Abort {
    fn overlap(&self) -> Overlap {
        Overlap::Decides
    }
}
