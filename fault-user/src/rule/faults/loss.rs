//! `loss`: silent loss, as on a wire.

use super::prelude::*;
use crate::rule::units::show_probability;

/// Which packets are lost. All probabilities are parts per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Loss {
    /// Each packet on its own.
    Random(u32),
    /// The Gilbert-Elliott model: a good and a bad state (Elliott 1963; the parameters are tc-netem's).
    GilbertElliott {
        /// From good to bad.
        p: u32,
        /// From bad to good; 1 - p where it was not given.
        r: u32,
        /// Loss in the bad state; 100% where it was not given.
        one_minus_h: u32,
        /// Loss in the good state; 0 where it was not given.
        one_minus_k: u32,
    },
    /// The four-state Markov model of Salsano, Ludovici and Ordine (2009), as in tc-netem: 1 received in
    /// a gap, 2 received in a burst, 3 lost in a burst, 4 lost alone in a gap.
    State {
        /// From 1 to 3.
        p13: u32,
        /// From 3 to 1; 1 - p13 where it was not given.
        p31: u32,
        /// From 3 to 2; 0 where it was not given.
        p32: u32,
        /// From 2 to 3; 100% where it was not given.
        p23: u32,
        /// From 1 to 4; 0 where it was not given.
        p14: u32,
    },
}

const PROBABILITY: Param = first(
    "probability",
    ValueKind::Probability,
    "share of the packets, each on its own",
);
const GILBERT_ELLIOTT: Param = named(
    "ge",
    ValueKind::Call {
        names: &["p", "r", "one_minus_h", "one_minus_k"],
        required: 2,
    },
    "Gilbert-Elliott: good to bad, bad to good, loss when bad (100%), loss when good (0%)",
);
const STATE: Param = named(
    "state",
    ValueKind::Call {
        names: &["p13", "p31", "p32", "p23", "p14"],
        required: 1,
    },
    "four-state Markov model; absent: p31 = 1 - p13, p32 = 0%, p23 = 100%, p14 = 0%",
);

impl Loss {
    /// The argument of the model, its probabilities, and what those are that were not given.
    fn parts(&self) -> (&'static Param, Vec<u32>, [Option<u32>; 5]) {
        match *self {
            Self::Random(p) => (&PROBABILITY, vec![p], [None; 5]),
            Self::GilbertElliott {
                p,
                r,
                one_minus_h,
                one_minus_k,
            } => (
                &GILBERT_ELLIOTT,
                vec![p, r, one_minus_h, one_minus_k],
                [None, None, Some(PPM), Some(0), None],
            ),
            Self::State {
                p13,
                p31,
                p32,
                p23,
                p14,
            } => (
                &STATE,
                vec![p13, p31, p32, p23, p14],
                [None, PPM.checked_sub(p13), Some(0), Some(PPM), Some(0)],
            ),
        }
    }
}

impl Arguments for Loss {
    const SPEC: Spec = Spec {
        params: &[PROBABILITY, GILBERT_ELLIOTT, STATE],
        ..either("loss", "packets are lost silently, as on a wire").listed(10)
    };

    fn read(args: &Args<'_>) -> Result<Self, RuleError> {
        args.at_most_one(&["probability", "ge", "state"])?;
        let get = |list: &[u32], i: usize, default| list.get(i).copied().unwrap_or(default);
        match (args.value("ge"), args.value("state")) {
            (Some(Value::Call(list)), _) => Ok(Self::GilbertElliott {
                p: get(list, 0, 0),
                r: get(list, 1, 0),
                one_minus_h: get(list, 2, PPM),
                one_minus_k: get(list, 3, 0),
            }),
            (_, Some(Value::Call(list))) => {
                let p13 = get(list, 0, 0);
                Ok(Self::State {
                    p13,
                    p31: get(list, 1, PPM - p13),
                    p32: get(list, 2, 0),
                    p23: get(list, 3, PPM),
                    p14: get(list, 4, 0),
                })
            }
            _ => args.field(&PROBABILITY, []).map(Self::Random),
        }
    }

    fn given(&self) -> Given {
        let (param, mut values, defaults) = self.parts();
        if let Self::Random(p) = self {
            return vec![(param.name, Value::Probability(*p))];
        }
        while defaults[values.len() - 1] == values.last().copied() {
            values.pop();
        }
        vec![(param.name, Value::Call(values))]
    }
}

impl Definition for Loss {
    fn complaint(&self) -> Option<Complaint> {
        let (_, values, _) = self.parts();
        if values.iter().any(|p| *p > PPM) {
            return complain(
                "probability",
                "this probability is more than 100%",
                "0% to 100%",
            );
        }
        match *self {
            Self::State { p13, p14, .. } if p13 + p14 > PPM => complain(
                "state",
                format!("p13 + p14 is {}", show_probability(p13 + p14)),
                "at most 100% for what leaves state 1",
            ),
            Self::State { p31, p32, .. } if p31 + p32 > PPM => complain(
                "state",
                format!("p31 + p32 is {}", show_probability(p31 + p32)),
                "at most 100% for what leaves state 3",
            ),
            _ => None,
        }
    }

    fn packet(&self) -> Option<PacketAction> {
        let number = match self {
            Self::Random(_) => fault::LOSS,
            Self::GilbertElliott { .. } => fault::LOSS_GILBERT_ELLIOTT,
            Self::State { .. } => fault::LOSS_STATE,
        };
        let mut action = PacketAction::new(number, []);
        for (argument, ppm) in action.arguments.iter_mut().zip(self.parts().1) {
            *argument = threshold_from_ppm(ppm);
        }
        Some(action.per_wire_packet(*self != Self::Random(PPM)))
    }
}
