//! `stall`: nothing is read.

use super::{Definition, Overlap};
use crate::rule::catalog::{Acts, stream};
use crate::rule::fields::fault;

fault! {
    /// Nothing is read and nothing is lost.
    Stall: stream("stall", "nothing is read, nothing is lost, it resumes").listed(230).acting(Acts::OneWay);
}

impl Definition for Stall {
    fn overlap(&self) -> Overlap {
        Overlap::Decides
    }
}
