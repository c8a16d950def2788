//! The rule language: whatever the text, it is refused or it prints as a rule that reads the same.
#![no_main]

use fault_user::rule::Rule;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match text.parse::<Rule>() {
        Ok(rule) => {
            let printed = rule.to_string();
            assert_eq!(
                printed.parse::<Rule>().as_ref(),
                Ok(&rule),
                "{text:?} prints as {printed:?}"
            );
        }
        // The message points into the text by columns, which must not panic either.
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
