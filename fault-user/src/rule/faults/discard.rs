//! `discard`: everything is read and nothing arrives.

use super::prelude::*;

fault! {
    /// Read and thrown away.
    Discard: datagram("discard", "read and discarded").listed(240);
}

impl Definition for Discard {
    fn overlap(&self) -> Overlap {
        Overlap::Decides
    }
}
