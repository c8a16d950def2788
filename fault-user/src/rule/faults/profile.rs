//! `profile`: a kind of link by its name, which stands for several rules.

use super::prelude::*;

fault! {
    /// A kind of link by its name.
    Profile: packet("profile", "a kind of link by its name, such as `lte`: delay, jitter, loss and rate; `fault profiles` lists them").listed(5);

    /// The profile's name.
    name: String => first("name", ValueKind::Text, "a profile of `fault profiles` or of the scenario's `profiles`");
}

impl Definition for Profile {
    fn unsupported(&self) -> Option<&'static str> {
        Some(
            "`profile` stands for several rules, and only one fits here: give these, as `fault check` prints them",
        )
    }
}
