//! `close_on_data`: the first data closes the connection.

use super::{CloseHow, Definition};
use crate::rule::catalog::stream;
use crate::rule::fields::fault;

fault! {
    /// The first data closes the connection.
    CloseOnData: stream("close_on_data", "the first data closes the connection").listed(250);

    /// How.
    how: CloseHow = CloseHow::default() => CloseHow::PARAM;
}

impl Definition for CloseOnData {}
