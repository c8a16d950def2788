//! The target that is most probably meant by a text that can't be read as one.

use std::net::Ipv4Addr;

use super::super::dictionary::service_port;
use super::{Protocol, is_plain, looks_like_ports};

/// The target that is most probably meant by a text that can't be read as one.
pub(super) fn target(text: &str) -> Option<String> {
    let candidates = [
        url(text),
        reversed(text),
        text.rsplit_once([':', '*'])
            .map(|(before, port)| match before.trim_end_matches([':', '*']) {
                "" => port.to_owned(),
                protocol => format!("{protocol}:{port}"),
            })
            .filter(|_| {
                text.contains("::") || text.starts_with([':', '*']) || text.contains(":*:")
            }),
        Some(text.replacen("..", "-", 1)),
        Some(text.replace(';', ",")),
        (text.strip_suffix(':'))
            .filter(|target| target.rsplit(':').next().is_some_and(looks_like_ports))
            .map(str::to_owned),
        between_colons(text),
        ["service/", "svc/"]
            .iter()
            .find_map(|kind| text.strip_prefix(kind))
            .map(str::to_owned),
        // The path of a URL.
        text.split_once('/')
            .map(|(target, _)| target.to_owned())
            .filter(|target| target.contains(':')),
        Some(text.trim_end_matches('.').to_owned()),
        of_stars(text),
        (text == "*:*").then(|| "*".to_owned()),
        // A port behind the wrong sign: no prefix is that long.
        text.split_once('/')
            .filter(|(host, _)| host.parse::<Ipv4Addr>().is_ok())
            .filter(|(_, port)| port.parse::<u16>().is_ok_and(|port| port >= 80))
            .map(|(host, port)| format!("{host}:{port}")),
        Some(text.replace(['"', '\''], "")),
        Some(text.to_ascii_lowercase()),
    ];
    let mut candidates = candidates.into_iter().flatten();
    candidates.find(|meant| is_plain(meant))
}

/// `10.0.0.0/24` for `10.0.0.*`.
fn of_stars(text: &str) -> Option<String> {
    let fixed = text.trim_end_matches(".*");
    let stars = (text.len() - fixed.len()) / 2;
    let prefix = 32 - 8 * stars.min(4);
    (stars > 0).then(|| format!("{fixed}{}/{prefix}", ".0".repeat(stars)))
}

/// `tcp:80-90` for `tcp:80:90`, as iptables writes ranges.
fn between_colons(text: &str) -> Option<String> {
    let (before, last) = text.rsplit_once(':')?;
    let first = before.rsplit(':').next()?;
    let are_ports = [first, last].iter().all(|port| port.parse::<u16>().is_ok());
    are_ports.then(|| format!("{before}-{last}"))
}

/// `tcp:host:443` for `https://host/path`.
fn url(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit('@').next()?;
    let protocol = Protocol::from_word(scheme).unwrap_or(Protocol::Tcp);
    let has_port = host.rsplit(']').next()?.contains(':');
    match service_port(scheme).filter(|_| !has_port) {
        Some(port) => Some(format!("{protocol}:{host}:{port}")),
        None => Some(format!("{protocol}:{host}")),
    }
}

/// `tcp:5432` for `5432/tcp`, `tcp/5432` and `tcp=5432`; `5432` for `port=5432`.
fn reversed(text: &str) -> Option<String> {
    let (a, b) = text.split_once(['/', '='])?;
    let (word, ports) = if looks_like_ports(a) { (b, a) } else { (a, b) };
    let word = word.to_ascii_lowercase();
    if word == "port" {
        return Some(ports.to_owned());
    }
    (Protocol::from_word(&word).is_some() && looks_like_ports(ports))
        .then(|| format!("{word}:{ports}"))
}
