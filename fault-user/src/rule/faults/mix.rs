//! `mix`: one draw per connection decides which of several faults it gets, if any.

use super::prelude::*;

/// One draw per connection; those that no arm takes are untouched.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mix {
    /// The alternatives.
    pub arms: Vec<MixArm>,
}

/// One arm of a mix.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MixArm {
    /// The share of the connections, in parts per million.
    pub probability: u32,
    /// What happens to them; never a mix.
    pub fault: Fault,
}

impl Mix {
    /// The share of the connections that no arm takes, in parts per million.
    #[must_use]
    pub fn untouched(&self) -> u32 {
        self.arms
            .iter()
            .fold(PPM, |rest, arm| rest.saturating_sub(arm.probability))
    }
}

impl Arguments for Mix {
    const SPEC: Spec = either("mix", "one draw per connection, the rest untouched");

    /// Its arms are words of their own, which are read elsewhere.
    fn read(args: &Args<'_>) -> Result<Self, RuleError> {
        Err(args
            .name
            .error(format!("`{}` needs its arms", args.spec.name))
            .expected("P%:FAULT P%:FAULT … such as `mix 10%:timeout 20%:latency=1s`"))
    }

    fn given(&self) -> Given {
        Given::new()
    }
}

impl Definition for Mix {
    fn complaint(&self) -> Option<Complaint> {
        let sum: u64 = self.arms.iter().map(|a| u64::from(a.probability)).sum();
        if self.arms.is_empty() {
            return complain("arms", "`mix` needs its arms", "P%:FAULT P%:FAULT …");
        }
        if self.arms.iter().any(|a| matches!(a.fault, Fault::Mix(_))) {
            return complain("arms", "a mix has no mix inside", "another fault");
        }
        if self
            .arms
            .iter()
            .any(|a| matches!(a.fault, Fault::Profile(_)))
        {
            return complain(
                "arms",
                "a mix has no profile inside",
                "its faults one by one",
            );
        }
        if sum > u64::from(PPM) {
            return complain(
                "arms",
                "the arms add up to more than 100%",
                "at most 100% in all",
            );
        }
        self.arms.iter().find_map(|arm| arm.fault.complaint())
    }
}
