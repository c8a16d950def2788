//! `corrupt_data`: bytes of the stream are changed.

use serde::{Deserialize, Serialize};

use super::prelude::*;

words! {
    /// What `corrupt_data` makes of a byte.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    CorruptDataMode {
        /// One of its bits is inverted.
        #[default]
        Flip = "flip",
        /// It becomes zero.
        Zero = "zero",
        /// It becomes a drawn byte that differs.
        Random = "random",
    }
}

/// Bytes of the stream are changed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CorruptData {
    /// Into what.
    pub mode: CorruptDataMode,
    /// Which.
    pub at: CorruptAt,
}

/// Where `corrupt_data` hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CorruptAt {
    /// Each byte with this probability, in parts per million.
    Probability(u32),
    /// The one byte at this offset of the stream (of each datagram with UDP), counted from 0.
    Offset(u64),
}

const MODE: Param = first(
    "mode",
    ValueKind::Word(CorruptDataMode::WORDS),
    "what becomes of a byte; `flip` when absent",
);
const PROBABILITY: Param = first(
    "probability",
    ValueKind::Probability,
    "chance of each byte; 100% when absent",
);
const OFFSET: Param = named(
    "offset",
    ValueKind::Count,
    "the one byte at this offset of the stream or datagram, from 0",
);

impl Arguments for CorruptData {
    const SPEC: Spec = Spec {
        params: &[MODE, PROBABILITY, OFFSET],
        ..datagram("corrupt_data", "the application reads wrong bytes").listed(270)
    };

    fn read(args: &Args<'_>) -> Result<Self, RuleError> {
        args.at_most_one(&["probability", "offset"])?;
        let at = match args.field(&OFFSET, [None])? {
            Some(offset) => CorruptAt::Offset(offset),
            None => CorruptAt::Probability(args.field(&PROBABILITY, [PPM])?),
        };
        Ok(Self {
            mode: args.field(&MODE, [CorruptDataMode::default()])?,
            at,
        })
    }

    fn given(&self) -> Given {
        let mut given = Given::new();
        give(&mut given, &MODE, &self.mode, &[CorruptDataMode::default()]);
        match self.at {
            CorruptAt::Probability(ppm) => give(&mut given, &PROBABILITY, &ppm, &[PPM]),
            CorruptAt::Offset(offset) => give(&mut given, &OFFSET, &offset, &[]),
        }
        given
    }
}

impl Definition for CorruptData {
    fn complaint(&self) -> Option<Complaint> {
        if self.at != CorruptAt::Probability(0) {
            return None;
        }
        complain(
            "probability",
            "a probability of 0 does nothing",
            "more than 0%",
        )
    }
}
