//! `close`: open connections are closed, once.

use serde::{Deserialize, Serialize};

use super::prelude::*;

words! {
    /// How a connection is ended.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    CloseHow {
        /// In order, with FIN.
        #[default]
        Fin = "fin",
        /// At once, with RST.
        Rst = "rst",
    }
}

impl CloseHow {
    /// The argument of the faults that end connections.
    pub(super) const PARAM: Param = first(
        "how",
        ValueKind::Word(Self::WORDS),
        "how; `fin` when absent",
    );
}

fault! {
    /// Open connections are closed, once.
    Close: stream("close", "open connections are closed, once, the oldest first").listed(260).acting(Acts::OnService);

    /// How many of them, the oldest first; all where it was not given.
    count: Option<u64> = None => first("count", ValueKind::Count, "how many; all when absent");
    /// How.
    how: CloseHow = CloseHow::default() => CloseHow::PARAM;
}

impl Definition for Close {
    fn complaint(&self) -> Option<Complaint> {
        if self.count != Some(0) {
            return None;
        }
        complain("count", "closing 0 connections does nothing", "1 or more")
    }

    fn waits_for(&self) -> Option<String> {
        let needs = "no redirected connection was open when it acted: give it `at=TIME`, and its target another stream rule \
             such as `latency=1ms`, which redirects connections until then";
        Some(needs.to_owned())
    }
}
