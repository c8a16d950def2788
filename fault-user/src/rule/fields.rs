//! The typed arguments of a fault: how a field of its struct is read from what was given, and given back.

use super::args::{Args, Value};
use super::dictionary;
use super::error::RuleError;
use super::spec::{Param, ValueKind};
use super::words::Keyword;

/// The arguments of a fault that differ from their defaults, by their names in the object form.
pub(super) type Given = Vec<(&'static str, Value)>;

/// A type that the value of an argument is read into.
pub(super) trait Field: Sized {
    /// The value of an argument, if it was given.
    fn read(args: &Args<'_>, name: &str) -> Result<Option<Self>, RuleError>;

    /// The value as an argument of this kind; nothing where it stands for none.
    fn value(&self, kind: ValueKind) -> Option<Value>;
}

impl Field for u64 {
    fn read(args: &Args<'_>, name: &str) -> Result<Option<Self>, RuleError> {
        Ok(match args.value(name) {
            Some(Value::Duration(n) | Value::Size(n) | Value::Rate(n) | Value::Count(n)) => {
                Some(*n)
            }
            _ => None,
        })
    }

    fn value(&self, kind: ValueKind) -> Option<Value> {
        Some(match kind {
            ValueKind::Duration => Value::Duration(*self),
            ValueKind::Size | ValueKind::OptionalSize => Value::Size(*self),
            ValueKind::Rate => Value::Rate(*self),
            _ => Value::Count(*self),
        })
    }
}

impl Field for u32 {
    fn read(args: &Args<'_>, name: &str) -> Result<Option<Self>, RuleError> {
        if let Some(Value::Probability(ppm)) = args.value(name) {
            return Ok(Some(*ppm));
        }
        let narrow =
            |n| Self::try_from(n).map_err(|_| args.error(name, "this number is too large"));
        u64::read(args, name)?.map(narrow).transpose()
    }

    fn value(&self, kind: ValueKind) -> Option<Value> {
        match kind {
            ValueKind::Probability => Some(Value::Probability(*self)),
            kind => u64::from(*self).value(kind),
        }
    }
}

/// The most bytes that a number with a sign may stand for, to either side.
const SIGNED_MAX: i32 = 65_535;

impl Field for i32 {
    fn read(args: &Args<'_>, name: &str) -> Result<Option<Self>, RuleError> {
        let Some(Value::Signed(n)) = args.value(name) else {
            return Ok(None);
        };
        let n = Self::try_from(*n).ok().filter(|n| n.abs() <= SIGNED_MAX);
        n.map(Some).ok_or_else(|| {
            args.error(name, "this number is too large")
                .expected("-65535 to 65535")
        })
    }

    fn value(&self, _kind: ValueKind) -> Option<Value> {
        Some(Value::Signed((*self).into()))
    }
}

impl Field for bool {
    fn read(args: &Args<'_>, name: &str) -> Result<Option<Self>, RuleError> {
        Ok(args.value(name).map(|_| true))
    }

    fn value(&self, _kind: ValueKind) -> Option<Value> {
        self.then_some(Value::Bare)
    }
}

impl Field for String {
    fn read(args: &Args<'_>, name: &str) -> Result<Option<Self>, RuleError> {
        Ok(match args.value(name) {
            Some(Value::Text(text)) => Some(text.clone()),
            _ => None,
        })
    }

    fn value(&self, _kind: ValueKind) -> Option<Value> {
        Some(Value::Text(self.clone()))
    }
}

impl<T: Keyword> Field for T {
    fn read(args: &Args<'_>, name: &str) -> Result<Option<Self>, RuleError> {
        Ok(match args.value(name) {
            Some(Value::Word(word)) => T::of(word),
            _ => None,
        })
    }

    fn value(&self, _kind: ValueKind) -> Option<Value> {
        Some(Value::Word(self.text()))
    }
}

impl<T: Field> Field for Option<T> {
    fn read(args: &Args<'_>, name: &str) -> Result<Option<Self>, RuleError> {
        Ok(T::read(args, name)?.map(Some))
    }

    fn value(&self, kind: ValueKind) -> Option<Value> {
        self.as_ref()?.value(kind)
    }
}

/// Typed access to the arguments that were given.
impl Args<'_> {
    /// The value of an argument, or its default; one without a default must be there.
    pub fn field<T: Field, const N: usize>(
        &self,
        param: &Param,
        default: [T; N],
    ) -> Result<T, RuleError> {
        let value = T::read(self, param.name)?.or_else(|| default.into_iter().next());
        self.need(param.text, value)
    }

    /// What must be there; `text` is what users call it.
    pub fn need<T>(&self, text: &str, value: Option<T>) -> Result<T, RuleError> {
        value.ok_or_else(|| {
            self.name
                .error(format!("`{}` needs its {text}", self.spec.name))
                .expected(format!("{}={}", self.spec.name, self.expected()))
                .suggest_some(dictionary::look_up(dictionary::EXAMPLES, self.spec.name))
        })
    }

    /// Arguments of which at most one may be there.
    pub fn at_most_one(&self, names: &[&str]) -> Result<(), RuleError> {
        let mut given = names.iter().filter(|name| self.piece(name).is_some());
        match (given.next(), given.next()) {
            (Some(first), Some(second)) => Err(self
                .error(
                    second,
                    format!("`{first}` and `{second}` exclude each other"),
                )
                .expected("one of them")),
            _ => Ok(()),
        }
    }
}

/// Adds an argument, unless its value is the default.
pub(super) fn give<T: Field + PartialEq>(
    given: &mut Given,
    param: &Param,
    value: &T,
    default: &[T],
) {
    if !default.contains(value) {
        given.extend(value.value(param.kind).map(|value| (param.name, value)));
    }
}

/// Declares a fault: its struct and its [`Spec`](super::spec::Spec), how it is read and given back.
///
/// A field is `name: type => argument;`, with `= default` behind the type where it may be left out. What
/// can only be told from the arguments as they were given is looked at by a `check: function` first.
macro_rules! fault {
    ($(#[$meta:meta])* $name:ident: $spec:expr;) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name;

        impl $crate::rule::faults::Arguments for $name {
            const SPEC: $crate::rule::spec::Spec = $spec;

            fn read(
                _: &$crate::rule::args::Args<'_>,
            ) -> Result<Self, $crate::rule::error::RuleError> {
                Ok(Self)
            }

            fn given(&self) -> $crate::rule::fields::Given {
                Vec::new()
            }
        }
    };
    (
        $(#[$meta:meta])* $name:ident: $spec:expr $(, check: $check:path)?;
        $($(#[$doc:meta])* $field:ident: $type:ty $(= $default:expr)? => $param:expr;)+
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)+
        }

        impl $crate::rule::faults::Arguments for $name {
            const SPEC: $crate::rule::spec::Spec = $crate::rule::spec::Spec {
                params: &[$($param),+],
                ..$spec
            };

            fn read(
                args: &$crate::rule::args::Args<'_>,
            ) -> Result<Self, $crate::rule::error::RuleError> {
                $($check(args)?;)?
                Ok(Self { $($field: args.field(&$param, [$($default)?])?,)+ })
            }

            fn given(&self) -> $crate::rule::fields::Given {
                let mut given = Vec::new();
                $($crate::rule::fields::give(&mut given, &$param, &self.$field, &[$($default)?]);)+
                given
            }
        }
    };
}
pub(super) use fault;
