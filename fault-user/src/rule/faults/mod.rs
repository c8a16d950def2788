//! The faults, one file each: the typed arguments, what the language says about them, and what the
//! kernel's programs are told. Nothing but the file has to be added for a new one: `build.rs` lists the
//! folder, and the name of a file is the name of its fault.

use super::args::Args;
use super::complaint::Complaint;
use super::error::RuleError;
use super::fields::Given;
use super::spec::{Acts, Layer, Spec, ranked};

pub use mix::{Mix, MixArm};
pub use packet::{PacketAction, PacketShaper};

mod mix;
mod packet;

include!(concat!(env!("OUT_DIR"), "/faults.rs"));

/// What the file of a fault needs.
mod prelude {
    pub(super) use fault_common::abi::fault;
    pub(super) use fault_common::random::threshold_from_ppm;

    pub(super) use super::{Arguments, Definition, Fault, Overlap, PacketAction, PacketShaper};
    pub(super) use crate::rule::args::{Args, Value};
    pub(super) use crate::rule::complaint::{
        Complaint, MAX_TIME_NS, SECOND, bad_rate, bad_regex, complain, jittered, longer, no_queue,
    };
    pub(super) use crate::rule::error::RuleError;
    pub(super) use crate::rule::fields::{Field as _, Given, fault, give};
    pub(super) use crate::rule::spec::{
        Acts, LIMIT, Layer, Param, SHARED, Spec, ValueKind, datagram, either, first, named, packet,
        query, short, spread, stream,
    };
    pub(super) use crate::rule::units::PPM;
    pub(super) use crate::rule::words::words;
}

/// The arguments of a fault: read from what was given, and given back.
pub(in crate::rule) trait Arguments: Sized {
    /// Its name, its arguments and where it works.
    const SPEC: Spec;

    /// Reads the arguments.
    fn read(args: &Args<'_>) -> Result<Self, RuleError>;

    /// The arguments that differ from their defaults.
    fn given(&self) -> Given;
}

/// What a fault with its arguments is, beside its [`Spec`]. The defaults are right for most faults.
pub(in crate::rule) trait Definition {
    /// What is wrong with the values.
    fn complaint(&self) -> Option<Complaint> {
        None
    }

    /// Why it can't be carried out although the language has it.
    fn unsupported(&self) -> Option<&'static str> {
        None
    }

    /// What the kernel's programs are told; nothing for a fault that works on streams only.
    fn packet(&self) -> Option<PacketAction> {
        None
    }

    /// The stream fault that comes nearest, for hosts on which nothing can hold packets.
    fn on_streams(&self) -> Option<Fault> {
        None
    }

    /// For how long it holds a packet, a byte or the end of a stream at most, in nanoseconds.
    fn held_ns(&self) -> u64 {
        0
    }

    /// What becomes of a second rule for the same traffic.
    fn overlap(&self) -> Overlap {
        Overlap::Adds
    }

    /// What did not happen if a rule for matching traffic never fired, and what to do about it.
    fn waits_for(&self) -> Option<String> {
        None
    }
}

/// What becomes of a second rule for the same traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// Both act.
    Adds,
    /// Two of this fault say two values for what can have but one.
    OneValue,
    /// The same, and the first rule that matches is the only one that does anything.
    FirstCounts,
    /// This fault alone decides what becomes of a connection.
    Decides,
    /// The same, and no later rule sees a packet.
    Swallows,
}

macro_rules! declare {
    ($($(#[$cfg:meta])* $module:ident $fault:ident $name:literal,)*) => {
        $($(#[$cfg])* mod $module;)*
        $($(#[$cfg])* pub use $module::*;)*

        /// A fault with its arguments: probabilities in parts per million, durations in nanoseconds, sizes
        /// in bytes, rates in bits per second.
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub enum Fault {
            $($(#[$cfg])* #[doc = concat!("`", $name, "`.")] $fault($fault),)*
            /// One draw per connection.
            Mix(Mix),
        }

        /// Every fault but `mix`, whose arms are faults and not arguments; in the order of lists.
        pub const FAULTS: &[Spec] = &ranked([$($(#[$cfg])* $fault::SPEC),*]);

        impl Fault {
            /// The fault that the arguments make.
            fn read(args: &Args<'_>) -> Result<Self, RuleError> {
                match args.spec.name {
                    $($(#[$cfg])* $name => $fault::read(args).map(Self::$fault),)*
                    _ => Mix::read(args).map(Self::Mix),
                }
            }

            /// Its name, its arguments and where it works.
            #[must_use]
            pub fn spec(&self) -> &'static Spec {
                match self {
                    $($(#[$cfg])* Self::$fault(_) => &$fault::SPEC,)*
                    Self::Mix(_) => &Mix::SPEC,
                }
            }

            /// The arguments that differ from their defaults.
            pub(super) fn given(&self) -> Given {
                match self {
                    $($(#[$cfg])* Self::$fault(fault) => fault.given(),)*
                    Self::Mix(mix) => mix.given(),
                }
            }

            fn definition(&self) -> &dyn Definition {
                match self {
                    $($(#[$cfg])* Self::$fault(fault) => fault,)*
                    Self::Mix(mix) => mix,
                }
            }
        }
    };
}
each_fault!(declare);

impl Fault {
    /// The name that users type.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.spec().name
    }

    /// The faults of a mix, or this one.
    pub fn parts(&self) -> impl Iterator<Item = &Self> {
        let (arms, alone) = match self {
            Self::Mix(mix) => (mix.arms.as_slice(), None),
            _ => (&[][..], Some(self)),
        };
        arms.iter().map(|arm| &arm.fault).chain(alone)
    }

    /// Which part of `fault` carries it.
    #[must_use]
    pub fn layer(&self) -> Layer {
        self.parts()
            .map(|part| part.spec().layer)
            .reduce(|a, b| match (a, b) {
                (a, b) if a == b => a,
                (Layer::Either, other) | (other, Layer::Either) => other,
                _ => Layer::Mixed,
            })
            .unwrap_or(Layer::Either)
    }

    /// The first part that acts on traffic in this way.
    #[must_use]
    pub fn part_that(&self, acts: Acts) -> Option<&Self> {
        self.parts().find(|part| part.spec().acts == acts)
    }

    /// The fault that the arguments make, if its values are right.
    pub(super) fn build(args: &Args<'_>) -> Result<Self, RuleError> {
        let fault = Self::read(args)?;
        match fault.complaint() {
            Some(complaint) => Err(complaint.at(args.piece(complaint.param).unwrap_or(args.name))),
            None => Ok(fault),
        }
    }

    /// What is wrong with the values.
    pub(super) fn complaint(&self) -> Option<Complaint> {
        self.definition().complaint()
    }

    /// Why it can't be carried out although the language has it.
    #[must_use]
    pub fn unsupported(&self) -> Option<&'static str> {
        self.definition().unsupported()
    }

    /// What the kernel's programs are told; nothing for a mix, and for a fault that works on streams only.
    #[must_use]
    pub fn packet(&self) -> Option<PacketAction> {
        self.definition().packet()
    }

    /// The stream fault that comes nearest, for hosts on which nothing can hold packets.
    #[must_use]
    pub fn on_streams(&self) -> Option<Self> {
        self.definition().on_streams()
    }

    /// For how long it holds a packet, a byte or the end of a stream at most, in nanoseconds.
    #[must_use]
    pub fn held_ns(&self) -> u64 {
        let parts = self.parts().map(|part| part.definition().held_ns());
        parts.max().unwrap_or(0)
    }

    /// What becomes of a second rule for the same traffic.
    #[must_use]
    pub fn overlap(&self) -> Overlap {
        self.definition().overlap()
    }

    /// What did not happen if a rule for matching traffic never fired, and what to do about it.
    #[must_use]
    pub fn waits_for(&self) -> Option<String> {
        self.definition().waits_for()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::rule::{Rule, reference, scenario};

    #[test]
    fn a_file_has_the_name_of_its_fault() {
        macro_rules! names {
            ($($(#[$cfg:meta])* $module:ident $fault:ident $name:literal,)*) => {
                [$(($name, $fault::SPEC.name)),*]
            };
        }
        for (file, name) in each_fault!(names) {
            assert_eq!(file, name);
        }
    }

    #[test]
    fn a_packet_fault_becomes_one_of_its_name_in_the_programs() {
        let known = |spec: &Spec| {
            let text = match spec.name {
                "slot" | "delay" => format!("{}=1ms", spec.name),
                "rate" => "rate=1mbit".to_owned(),
                "mtu" => "mtu=68".to_owned(),
                "answer" => "answer=[::1]".to_owned(),
                name if spec.params.is_empty() || name == "reject" => name.to_owned(),
                name => format!("{name}=1"),
            };
            let fault: Fault = text.parse().ok()?;
            let number = fault.packet()?.fault;
            fault_common::abi::fault::of(number).map(|known| known.name)
        };
        let is_one = |spec: &&Spec| spec.layer != Layer::Stream && spec.name != "profile";
        for spec in FAULTS.iter().filter(is_one) {
            let expected = match spec.name {
                "blackhole" => "drop",
                "nxdomain" | "nodata" | "servfail" | "refused" | "truncated" => "answer",
                "example" => "mtu",
                name => name,
            };
            assert_eq!(known(spec), Some(expected), "{}", spec.name);
        }
    }

    /// The example of CONTRIBUTING.md is a file of this folder, and nothing else had to be told of it.
    #[test]
    fn a_new_fault_is_one_file() {
        let contributing = include_str!("../../../../CONTRIBUTING.md");
        assert!(
            contributing.contains(include_str!("example.rs")),
            "CONTRIBUTING.md does not show what example.rs is"
        );
        let rule: Rule = "tcp:80 example=9000 p=5%".parse().unwrap();
        assert_eq!(rule.to_string(), "tcp:80 example=9000 p=5%");
        assert_eq!(
            rule.fault.to_object(),
            json!({ "example": { "bytes": "9000" } })
        );
        let object: Fault =
            serde_json::from_value(json!({ "example": { "bytes": 9000 } })).unwrap();
        assert_eq!(object, rule.fault);
        assert_eq!("example".parse::<Fault>().unwrap().to_string(), "example");
        let error = "tcp:80 example=0".parse::<Rule>().unwrap_err().to_string();
        assert!(error.contains("no packet has 0 bytes"), "{error}");
        let error = "tcp:80 exmaple".parse::<Rule>().unwrap_err().to_string();
        assert!(error.contains("did you mean `example`?"), "{error}");

        let forms = scenario::schema()["$defs"]["fault"]["anyOf"].clone();
        let has_it = |form: &Value| form["properties"]["example"].is_object();
        assert!(forms.as_array().unwrap().iter().any(has_it));
        let [(_, table), _] = reference::tables();
        assert!(table.ends_with("| `example` | `SIZE` the largest packet that passes; 1500 when absent | packets above a size are dropped |\n"));
    }
}
