//! What is wrong with a rule, shown where it is wrong.

use std::fmt;
use std::ops::Range;

/// A mistake in a rule, or in a part of one.
///
/// `Display` draws the picture that the command line shows: the message, the rule, a caret under the word, and a line of help
/// with what was expected and the nearest valid name. [`RuleError::one_line`] says the same in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleError {
    /// The whole text that was read.
    pub input: String,
    /// The bytes of `input` that are wrong; both ends lie on character boundaries.
    pub span: Range<usize>,
    /// What is wrong, as a clause without a full stop.
    pub message: String,
    /// What would have been right.
    pub expected: Option<String>,
    /// A text to put in the place of the wrong one.
    pub suggestion: Option<String>,
}

impl RuleError {
    /// An error about what a rule does: the caret stands under its second word. What was expected follows `: expected ` in
    /// the message.
    #[must_use]
    pub fn of_fault(input: String, message: &str) -> Self {
        let rest = input
            .trim_start()
            .trim_start_matches(|c: char| !c.is_whitespace());
        let start = input.len() - rest.trim_start().len();
        let length = input[start..].find(char::is_whitespace);
        let end = length.map_or(input.len(), |length| start + length);
        Self {
            span: start..end,
            ..Self::of_line(input, message)
        }
    }

    /// An error that came as one line, at the start of a text, or without one if that is empty.
    #[must_use]
    pub fn of_line(input: String, line: &str) -> Self {
        let (rest, suggestion) = [";", ":", ","]
            .iter()
            .find_map(|mark| line.split_once(&format!("{mark} did you mean `")))
            .map_or((line, None), |(rest, name)| {
                (rest, Some(name.trim_end_matches("`?").to_owned()))
            });
        let (message, expected) = rest
            .split_once(": expected ")
            .or_else(|| rest.split_once(", expected "))
            .map_or((rest, None), |(message, expected)| {
                (message, Some(expected.to_owned()))
            });
        Self {
            input,
            span: 0..0,
            message: message.to_owned(),
            expected,
            suggestion,
        }
    }

    /// The error in one line, for logs, file errors and the API.
    #[must_use]
    pub fn one_line(&self) -> String {
        let mut line = self.message.clone();
        if !self.input.is_empty() && self.span != (0..self.input.len()) {
            let column = self.input[..self.span.start].chars().count() + 1;
            let rule = printable(&self.input);
            line = format!("{line} (at {column} of `{rule}`)");
        }
        if let Some(advice) = self.advice() {
            line += ": ";
            line += &advice;
        }
        line
    }

    /// The error in one line without the text that was read, for values that have a place of their own.
    pub(super) fn clause(&self) -> String {
        match self.advice() {
            Some(advice) => format!("{}: {advice}", self.message),
            None => self.message.clone(),
        }
    }

    /// The text from expectation and suggestion, where there is one.
    fn advice(&self) -> Option<String> {
        match (&self.expected, &self.suggestion) {
            (Some(expected), Some(nearest)) => Some(format!(
                "expected {expected}; did you mean `{}`?",
                printable(nearest)
            )),
            (Some(expected), None) => Some(format!("expected {expected}")),
            (None, Some(nearest)) => Some(format!("did you mean `{}`?", printable(nearest))),
            (None, None) => None,
        }
    }
}

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.input.is_empty() {
            let before = self.input[..self.span.start].chars().count();
            let width = self.input[self.span.clone()].chars().count().max(1);
            let (space, caret) = (" ".repeat(before), "^".repeat(width));
            write!(f, "\n  {}\n  {space}{caret}", printable(&self.input))?;
        }
        if let Some(advice) = self.advice() {
            write!(f, "\nhelp: {advice}")?;
        }
        Ok(())
    }
}

impl std::error::Error for RuleError {}

/// The text with each control character as one space, so that the caret below stays in its column
/// and no escape sequence reaches the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// A part of a text that is being read; it knows where it lies, so that errors can point at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece<'a> {
    input: &'a str,
    start: usize,
    end: usize,
}

impl<'a> Piece<'a> {
    /// The whole of a text.
    pub fn whole(input: &'a str) -> Self {
        Self {
            input,
            start: 0,
            end: input.len(),
        }
    }

    /// The characters of this part.
    pub fn text(&self) -> &'a str {
        &self.input[self.start..self.end]
    }

    /// A part of this part, by byte offsets within it that lie on character boundaries.
    pub fn slice(&self, range: Range<usize>) -> Self {
        Self {
            input: self.input,
            start: self.start + range.start,
            end: self.start + range.end,
        }
    }

    /// What lies before and after the first of the separators.
    pub fn split_once(&self, separators: &[char]) -> Option<(Self, Self)> {
        let (at, found) = self
            .text()
            .char_indices()
            .find(|(_, c)| separators.contains(c))?;
        let rest = at + found.len_utf8();
        Some((self.slice(0..at), self.slice(rest..self.text().len())))
    }

    /// This part without white space at its ends.
    pub fn trim(&self) -> Self {
        let text = self.text();
        let start = text.len() - text.trim_start().len();
        self.slice(start..start + text.trim().len())
    }

    /// From the start of this part to the end of the other, which lies behind it in the same text.
    pub fn to(&self, last: Self) -> Self {
        Self {
            end: last.end,
            ..*self
        }
    }

    /// An error that points at this part.
    pub fn error(&self, message: impl Into<String>) -> RuleError {
        RuleError {
            input: self.input.to_owned(),
            span: self.start..self.end,
            message: message.into(),
            expected: None,
            suggestion: None,
        }
    }
}

impl RuleError {
    /// Adds what would have been right.
    pub(super) fn expected(mut self, expected: impl Into<String>) -> Self {
        self.expected = Some(expected.into());
        self
    }

    /// Adds a text to put in the place of the wrong one.
    pub(super) fn suggest(mut self, suggestion: impl Into<String>) -> Self {
        self.suggestion = Some(suggestion.into());
        self
    }

    /// Adds a text to put in the place of the wrong one, if there is one.
    pub(super) fn suggest_some(mut self, suggestion: Option<impl Into<String>>) -> Self {
        self.suggestion = suggestion.map(Into::into).or(self.suggestion);
        self
    }

    /// Adds the nearest of the valid names, if one is near.
    pub(super) fn nearest<'n>(
        mut self,
        wrong: &str,
        names: impl IntoIterator<Item = &'n str>,
    ) -> Self {
        self.suggestion = nearest(wrong, names).map(str::to_owned);
        self
    }
}

/// The valid name that a wrong one most probably stands for.
///
/// Near means a Damerau-Levenshtein distance of at most a third of the length (and at least one), or
/// a beginning of the name.
pub(crate) fn nearest<'n>(
    wrong: &str,
    names: impl IntoIterator<Item = &'n str>,
) -> Option<&'n str> {
    let wrong = wrong.to_lowercase().replace('-', "_");
    let length = wrong.chars().count();
    let limit = (length / 3).max(1);
    names
        .into_iter()
        .filter_map(|name| {
            let plain = name.to_lowercase().replace('-', "_");
            let distance = strsim::damerau_levenshtein(&wrong, &plain);
            if distance <= limit && distance < length {
                Some((distance, name))
            } else if length >= 2 && plain.starts_with(&wrong) {
                Some((limit + 1, name))
            } else {
                None
            }
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}
