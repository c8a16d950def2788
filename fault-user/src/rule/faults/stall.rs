//! `stall`: nothing is read.

use super::prelude::*;

fault! {
    /// Nothing is read and nothing is lost.
    Stall: stream("stall", "nothing is read, nothing is lost, it resumes").listed(230).acting(Acts::OneWay);
}

impl Definition for Stall {
    fn overlap(&self) -> Overlap {
        Overlap::Decides
    }
}
