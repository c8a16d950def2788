//! Enumerations whose values are words of the language.

/// A value that a word of the language stands for.
pub(super) trait Keyword: Copy {
    /// The value of a word.
    fn of(word: &str) -> Option<Self>;
    /// The word of the value.
    fn text(self) -> &'static str;
}

/// Declares an enumeration together with the word of each value.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$doc])* $variant,)+
        }

        impl $name {
            /// Every word of the language that stands for a value of this type.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word that stands for this value.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// The value that a word stands for.
            #[must_use]
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }

        impl $crate::rule::words::Keyword for $name {
            fn of(word: &str) -> Option<Self> {
                Self::from_word(word)
            }

            fn text(self) -> &'static str {
                self.word()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.word())
            }
        }
    };
}
pub(super) use words;
