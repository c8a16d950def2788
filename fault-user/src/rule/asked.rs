//! What a client asks for in its first bytes: `sni`, `host` and `alpn` select connections by it.

use std::fmt;

use super::error::{Piece, RuleError};

/// A host name, or `*.` in front of one for all names below it, or `*` for any name. It is in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamePattern(String);

/// The most bytes of a host name.
const LONGEST_NAME: usize = 253;
/// The most bytes of a label of one.
const LONGEST_LABEL: usize = 63;

impl NamePattern {
    /// Reads a pattern; a dot at its end does not count.
    pub(super) fn read(piece: Piece<'_>) -> Result<Self, RuleError> {
        let text = piece.text().to_ascii_lowercase();
        let text = text.strip_suffix('.').unwrap_or(&text);
        let name = match text {
            "*" => return Ok(Self(text.to_owned())),
            _ => text.strip_prefix("*.").unwrap_or(text),
        };
        let is_label = |label: &str| {
            let is_of = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=LONGEST_LABEL).contains(&label.len()) && label.bytes().all(is_of)
        };
        if name.len() <= LONGEST_NAME && name.split('.').all(is_label) {
            return Ok(Self(text.to_owned()));
        }
        let error = piece.error(format!("`{}` is no host name", piece.text()));
        if !text.is_ascii() {
            return Err(
                error.expected("the name as clients send it, such as `xn--bcher-kva.example`")
            );
        }
        Err(match name.rsplit_once(':') {
            Some((host, _)) if !host.is_empty() && host.split('.').all(is_label) => error
                .expected("the name alone: the port belongs to the target")
                .suggest(host),
            _ => error
                .expected("a name such as `api.example.com`, or `*.example.com` for all below it"),
        })
    }

    /// The pattern of one name, if it is one.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::read(Piece::whole(name)).ok()
    }

    /// Whether a name in lower case, without a dot at its end, matches.
    #[must_use]
    pub fn fits(&self, name: &str) -> bool {
        match self.0.strip_prefix('*') {
            Some("") => true,
            Some(end) => name.len() > end.len() && name.ends_with(end),
            None => name == self.0,
        }
    }

    /// Whether a name matches, or may be the same host by a name that is shorter or longer: resolvers complete names by a
    /// search list.
    #[must_use]
    pub(crate) fn is_same_host(&self, name: &str) -> bool {
        let begins = |long: &str, short: &str| {
            let rest = long.strip_prefix(short);
            rest.is_some_and(|rest| rest.starts_with('.'))
        };
        self.fits(name) || begins(&self.0, name) || begins(name, &self.0)
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which connections, by what their clients ask for in their first bytes. All that is given must match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Asked {
    /// The server's name in the TLS `ClientHello`.
    pub sni: Option<NamePattern>,
    /// The `Host` of the first HTTP/1 request, without its port.
    pub host: Option<NamePattern>,
    /// A protocol that the `ClientHello` offers, such as `h2`.
    pub alpn: Option<String>,
}

impl Asked {
    /// Whether nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The first that is given, by its key.
    #[must_use]
    pub fn key(&self) -> Option<&'static str> {
        self.given().first().map(|(key, _)| *key)
    }

    /// Key and value of each that is given.
    #[must_use]
    pub fn given(&self) -> Vec<(&'static str, String)> {
        let name = |pattern: &Option<NamePattern>| pattern.as_ref().map(ToString::to_string);
        let all = [
            ("sni", name(&self.sni)),
            ("host", name(&self.host)),
            ("alpn", self.alpn.clone()),
        ];
        let given = all.into_iter();
        given
            .filter_map(|(key, value)| Some((key, value?)))
            .collect()
    }
}

/// Whether a text can be a protocol of ALPN.
#[must_use]
pub fn is_alpn(text: &str) -> bool {
    let is_of = |byte: u8| byte.is_ascii_alphanumeric() || b"/.-_".contains(&byte);
    (1..=255).contains(&text.len()) && text.bytes().all(is_of)
}

/// Reads a protocol of ALPN.
pub(super) fn alpn(piece: Piece<'_>) -> Result<String, RuleError> {
    let text = piece.text();
    if is_alpn(text) {
        return Ok(text.to_owned());
    }
    Err(piece
        .error(format!("`{text}` is no protocol of ALPN"))
        .expected("such as `h2` or `http/1.1`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_means_a_name_or_all_below_it() {
        let fits = |pattern: &str, name: &str| NamePattern::of_name(pattern).unwrap().fits(name);
        assert!(fits("api.example.com", "api.example.com"));
        assert!(fits("API.example.com.", "api.example.com"));
        assert!(!fits("api.example.com", "www.api.example.com"));
        assert!(fits("*.example.com", "a.example.com"));
        assert!(fits("*.example.com", "a.b.example.com"));
        assert!(!fits("*.example.com", "example.com"));
        assert!(!fits("*.example.com", "badexample.com"));
        assert!(fits("*", "anything"));
        for wrong in ["", "a..b", "*a.b", "a.*.b", "a b", "*..", "a:443", "**"] {
            assert!(NamePattern::of_name(wrong).is_none(), "{wrong}");
        }
    }
}
