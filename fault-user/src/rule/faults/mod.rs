//! The faults, one file each: the typed arguments, what the language says about them, and what the
//! kernel's programs are told. Nothing but the file has to be added for a new one: `build.rs` lists the
//! folder, and the name of a file is the name of its fault.

use super::args::Args;
use super::catalog::{Acts, Layer, Spec, ranked};
use super::check::Complaint;
use super::error::RuleError;
use super::fields::Given;
use super::mix::Mix;
use super::packet::PacketAction;

include!(concat!(env!("OUT_DIR"), "/faults.rs"));

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
    ($($module:ident $fault:ident $name:literal,)*) => {
        $(mod $module;)*
        $(pub use $module::*;)*

        /// A fault with its arguments: probabilities in parts per million, durations in nanoseconds, sizes
        /// in bytes, rates in bits per second.
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub enum Fault {
            $(#[doc = concat!("`", $name, "`.")] $fault($fault),)*
            /// One draw per connection.
            Mix(Mix),
        }

        /// Every fault but `mix`, whose arms are faults and not arguments; in the order of lists.
        pub const FAULTS: &[Spec] = &ranked([$($fault::SPEC),*]);

        impl Fault {
            /// The fault that the arguments make.
            pub(super) fn read(args: &Args<'_>) -> Result<Self, RuleError> {
                match args.spec.name {
                    $($name => $fault::read(args).map(Self::$fault),)*
                    _ => Mix::read(args).map(Self::Mix),
                }
            }

            /// Its name, its arguments and where it works.
            #[must_use]
            pub fn spec(&self) -> &'static Spec {
                match self {
                    $(Self::$fault(_) => &$fault::SPEC,)*
                    Self::Mix(_) => &Mix::SPEC,
                }
            }

            /// The arguments that differ from their defaults.
            pub(super) fn given(&self) -> Given {
                match self {
                    $(Self::$fault(fault) => fault.given(),)*
                    Self::Mix(mix) => mix.given(),
                }
            }

            fn definition(&self) -> &dyn Definition {
                match self {
                    $(Self::$fault(fault) => fault,)*
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
    use super::*;

    #[test]
    fn a_file_has_the_name_of_its_fault() {
        macro_rules! names {
            ($($module:ident $fault:ident $name:literal,)*) => { [$(($name, $fault::SPEC.name)),*] };
        }
        for (file, name) in each_fault!(names) {
            assert_eq!(file, name);
        }
    }
}
