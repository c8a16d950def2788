//! `close_on_data`: the first data closes the connection.

use super::CloseHow;
use super::prelude::*;

fault! {
    /// The first data closes the connection.
    CloseOnData: datagram("close_on_data", "the first data closes the connection").listed(250);

    /// How.
    how: CloseHow = CloseHow::default() => CloseHow::PARAM;
}

impl Definition for CloseOnData {}
