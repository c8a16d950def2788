//! What speaks at a port: told by the first bytes of a connection, because ports lie.

use std::fmt;

/// A protocol of applications.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ApplicationProtocol {
    /// None that is known here.
    #[default]
    Unknown,
    /// HTTP/1, with the host that was asked for.
    Http(Option<String>),
    /// HTTP/2 without TLS, which is mostly gRPC.
    Grpc,
    /// TLS, with the server's name (SNI).
    Tls(Option<String>),
    /// `PostgreSQL`.
    Postgres,
    /// `MySQL` and `MariaDB`.
    Mysql,
    /// Redis.
    Redis,
    /// NATS.
    Nats,
    /// AMQP.
    Amqp,
    /// `MongoDB`.
    Mongo,
    /// Kafka.
    Kafka,
    /// memcached.
    Memcached,
    /// SMTP.
    Smtp,
    /// DNS.
    Dns,
}

impl fmt::Display for ApplicationProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown",
            Self::Http(_) => "http",
            Self::Grpc => "grpc",
            Self::Tls(_) => "tls",
            Self::Postgres => "postgres",
            Self::Mysql => "mysql",
            Self::Redis => "redis",
            Self::Nats => "nats",
            Self::Amqp => "amqp",
            Self::Mongo => "mongodb",
            Self::Kafka => "kafka",
            Self::Memcached => "memcached",
            Self::Smtp => "smtp",
            Self::Dns => "dns",
        })
    }
}

/// The protocol of a TCP connection, by the first bytes of each direction.
#[must_use]
pub fn of_stream(to_server: &[u8], to_client: &[u8]) -> ApplicationProtocol {
    by_client(to_server)
        .or_else(|| by_server(to_client, to_server))
        .unwrap_or_default()
}

/// The protocol of datagrams, by the server's port and the first datagram.
#[must_use]
pub fn of_datagram(port: u16, to_server: &[u8]) -> ApplicationProtocol {
    // A header of twelve bytes that asks one question.
    if port == 53 && to_server.len() > 12 && to_server[4..6] == [0, 1] {
        ApplicationProtocol::Dns
    } else {
        ApplicationProtocol::Unknown
    }
}

fn by_client(data: &[u8]) -> Option<ApplicationProtocol> {
    if let Some(http) = http(data) {
        return Some(http);
    }
    if data.starts_with(b"PRI * HTTP/2") {
        return Some(ApplicationProtocol::Grpc);
    }
    if data.starts_with(&[0x16, 3]) {
        return Some(ApplicationProtocol::Tls(server_name(data)));
    }
    if data.starts_with(b"AMQP\0") {
        return Some(ApplicationProtocol::Amqp);
    }
    let is_redis = matches!(data, [b'*', b'0'..=b'9', ..]) || data.starts_with(b"PING\r\n");
    if is_redis {
        return Some(ApplicationProtocol::Redis);
    }
    if is_postgres(data) {
        return Some(ApplicationProtocol::Postgres);
    }
    if is_mongo(data) {
        return Some(ApplicationProtocol::Mongo);
    }
    if is_kafka(data) {
        return Some(ApplicationProtocol::Kafka);
    }
    is_memcached(data).then_some(ApplicationProtocol::Memcached)
}

/// Protocols in which the server speaks first.
fn by_server(data: &[u8], to_server: &[u8]) -> Option<ApplicationProtocol> {
    if data.starts_with(b"INFO {") {
        return Some(ApplicationProtocol::Nats);
    }
    let greets = [&b"EHLO"[..], b"HELO", b"ehlo", b"helo"];
    let is_smtp = data.starts_with(b"220") && greets.iter().any(|word| to_server.starts_with(word));
    if is_smtp {
        return Some(ApplicationProtocol::Smtp);
    }
    // A packet of number 0 that begins with the version of the protocol and the server's in digits.
    match data {
        [_, _, 0, 0, 10, b'0'..=b'9', ..] => Some(ApplicationProtocol::Mysql),
        _ => None,
    }
}

/// HTTP/1, where it is that.
fn http(data: &[u8]) -> Option<ApplicationProtocol> {
    const METHODS: [&str; 8] = [
        "GET ", "POST ", "PUT ", "HEAD ", "DELETE ", "PATCH ", "OPTIONS ", "CONNECT ",
    ];
    let text = String::from_utf8_lossy(data);
    if !METHODS.iter().any(|method| text.starts_with(method)) {
        return None;
    }
    let mut lines = text.split("\r\n");
    if !lines.next()?.contains(" HTTP/1.") {
        return None;
    }
    let host = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("host").then(|| value.trim())
    });
    Some(ApplicationProtocol::Http(host.map(without_port)))
}

fn without_port(host: &str) -> String {
    let digits = |c: char| c.is_ascii_digit();
    let bare = host.trim_end_matches(digits).strip_suffix(':');
    bare.unwrap_or(host).to_owned()
}

fn word32(data: &[u8], at: usize) -> Option<[u8; 4]> {
    data.get(at..at + 4)?.try_into().ok()
}

fn is_postgres(data: &[u8]) -> bool {
    let codes = [196_608, 80_877_103, 80_877_104, 196_610];
    let code = word32(data, 4).map(u32::from_be_bytes);
    let length = word32(data, 0).map(u32::from_be_bytes);
    code.is_some_and(|code| codes.contains(&code)) && length.is_some_and(|length| length < 10_000)
}

fn is_mongo(data: &[u8]) -> bool {
    let code = word32(data, 12).map(u32::from_le_bytes);
    matches!(code, Some(2004 | 2010..=2013))
}

fn is_kafka(data: &[u8]) -> bool {
    let [Some(length), Some([0, key, 0, version])] = [word32(data, 0), word32(data, 4)] else {
        return false;
    };
    let length = u32::from_be_bytes(length) as usize;
    // What clients ask first: metadata or the versions of the interface.
    (key == 3 || key == 18) && version < 20 && length + 4 == data.len()
}

fn is_memcached(data: &[u8]) -> bool {
    const COMMANDS: [&str; 8] = [
        "get ", "gets ", "set ", "add ", "delete ", "version", "stats", "mg ",
    ];
    let text = String::from_utf8_lossy(data);
    let is_command = COMMANDS.iter().any(|word| text.starts_with(word)) && text.contains("\r\n");
    is_command || (data.len() >= 24 && data[0] == 0x80)
}

/// The server's name in a TLS `ClientHello` (RFC 6066, section 3).
fn server_name(data: &[u8]) -> Option<String> {
    // Behind the record's and the handshake's headers, the version and the random.
    let session = 5 + 4 + 2 + 32;
    let suites = session + 1 + usize::from(*data.get(session)?);
    let compression = suites + 2 + half(data, suites)?;
    let mut at = compression + 1 + usize::from(*data.get(compression)?) + 2;
    loop {
        let (kind, length) = (half(data, at)?, half(data, at + 2)?);
        at += 4;
        if kind == 0 {
            let name = half(data, at + 3)?;
            let name = data.get(at + 5..at + 5 + name)?;
            return String::from_utf8(name.to_vec()).ok();
        }
        at += length;
    }
}

fn half(data: &[u8], at: usize) -> Option<usize> {
    let bytes = data.get(at..at + 2)?.try_into().ok()?;
    Some(usize::from(u16::from_be_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(data: &[u8]) -> ApplicationProtocol {
        of_stream(data, b"")
    }

    #[test]
    fn protocols_are_told_by_what_clients_say_first() {
        let host = ApplicationProtocol::Http(Some("shop.internal".to_owned()));
        assert_eq!(
            client(b"GET / HTTP/1.1\r\nHost: shop.internal:8080\r\n\r\n"),
            host
        );
        assert_eq!(
            client(b"GET / HTTP/1.0\r\n\r\n"),
            ApplicationProtocol::Http(None)
        );
        assert_eq!(client(b"*1\r\n$4\r\nPING\r\n"), ApplicationProtocol::Redis);
        assert_eq!(
            client(&[0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f]),
            ApplicationProtocol::Postgres,
            "a request for TLS"
        );
        assert_eq!(
            client(b"\0\0\0\x21\0\x03\0\0user\0me\0\0"),
            ApplicationProtocol::Postgres
        );
        assert_eq!(client(b"AMQP\0\0\x09\x01"), ApplicationProtocol::Amqp);
        assert_eq!(client(b"get key\r\n"), ApplicationProtocol::Memcached);
        assert_eq!(
            client(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            ApplicationProtocol::Grpc
        );
        assert_eq!(client(b"get out"), ApplicationProtocol::Unknown);
        assert_eq!(client(b""), ApplicationProtocol::Unknown);
    }

    #[test]
    fn protocols_are_told_by_what_servers_say_first() {
        assert_eq!(
            of_stream(b"", b"INFO {\"server_id\":1}"),
            ApplicationProtocol::Nats
        );
        assert_eq!(
            of_stream(b"EHLO me\r\n", b"220 mail\r\n"),
            ApplicationProtocol::Smtp
        );
        assert_eq!(
            of_stream(b"", b"\x4a\0\0\0\x0a8.0.36\0"),
            ApplicationProtocol::Mysql
        );
        assert_eq!(of_stream(b"", b"220 ftp"), ApplicationProtocol::Unknown);
    }

    #[test]
    fn tls_names_its_server() {
        let mut hello = vec![0x16, 3, 1, 0, 0, 1, 0, 0, 0, 3, 3];
        hello.extend([0; 32]);
        hello.extend([0, 0, 2, 0x13, 1, 1, 0]);
        hello.extend([0, 0, 0, 10, 0, 0, 0, 6, 0, 4]);
        hello.truncate(hello.len() - 2);
        hello.extend([0, 3]);
        hello.extend(b"db.");
        // Extensions: server_name of nine bytes.
        assert_eq!(client(&hello[..20]), ApplicationProtocol::Tls(None));
        let ApplicationProtocol::Tls(_) = client(&hello) else {
            panic!("it is TLS");
        };
    }

    #[test]
    fn no_bytes_are_too_odd() {
        for length in 0..60 {
            for first in [0x16, 0, 0x80, b'*'] {
                let mut data = vec![0xff; length];
                data.extend([0]);
                data[0] = first;
                let _kind = of_stream(&data, &data);
            }
        }
    }
}
