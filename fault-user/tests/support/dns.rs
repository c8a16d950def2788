//! DNS messages, built with a library, and a server that sends them.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use simple_dns::rdata::{A, AAAA, CNAME, OPT, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, ResourceRecord};
pub use simple_dns::{RCODE, TYPE};

/// A query for the IPv4 addresses of a name.
pub fn query(name: &str) -> Vec<u8> {
    asked(name).build_bytes_vec().unwrap()
}

/// A query for records of a type, with extensions.
pub fn query_for(name: &str, kind: TYPE) -> Vec<u8> {
    let mut packet = asked(name);
    packet.questions[0].qtype = QTYPE::TYPE(kind);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    *packet.opt_mut() = Some(OPT {
        opt_codes: Vec::new(),
        udp_packet_size: 1232,
        version: 0,
    });
    packet.build_bytes_vec().unwrap()
}

/// What a response tells: its code, whether it is truncated, and its addresses.
pub fn read_response(response: &[u8]) -> (RCODE, bool, Vec<String>) {
    let packet = Packet::parse(response).unwrap();
    assert!(packet.has_flags(PacketFlag::RESPONSE) && packet.opt().is_some());
    assert_eq!((packet.id(), packet.questions.len()), (7, 1));
    (
        packet.rcode(),
        packet.has_flags(PacketFlag::TRUNCATION),
        addresses(&packet),
    )
}

fn addresses(packet: &Packet<'_>) -> Vec<String> {
    let addresses = packet.answers.iter().map(|answer| match &answer.rdata {
        RData::A(a) => Ipv4Addr::from(a.address).to_string(),
        RData::AAAA(aaaa) => Ipv6Addr::from(aaaa.address).to_string(),
        other => panic!("{other:?}"),
    });
    addresses.collect()
}

/// A response with these addresses, each of a name.
pub fn answer(name: &str, addresses: &[(&str, &str)]) -> Vec<u8> {
    response(
        name,
        addresses
            .iter()
            .map(|(owner, address)| (*owner, data(address))),
    )
}

/// A response with an alias, and the addresses of that.
pub fn alias(name: &str, canonical: &str, addresses: &[&str]) -> Vec<u8> {
    let alias = (name, RData::CNAME(CNAME(Name::new_unchecked(canonical))));
    let addresses = addresses.iter().map(|address| (canonical, data(address)));
    response(name, std::iter::once(alias).chain(addresses))
}

fn data(address: &str) -> RData<'static> {
    match address.parse().unwrap() {
        IpAddr::V4(address) => RData::A(A::from(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA::from(address)),
    }
}

fn asked(name: &str) -> Packet<'_> {
    let mut packet = Packet::new_query(7);
    let (kind, class) = (QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN));
    let name = Name::new_unchecked(name);
    packet
        .questions
        .push(Question::new(name, kind, class, false));
    packet
}

fn response<'a>(name: &'a str, answers: impl Iterator<Item = (&'a str, RData<'a>)>) -> Vec<u8> {
    let mut packet = asked(name);
    packet.set_flags(PacketFlag::RESPONSE);
    packet.answers = answers
        .map(|(owner, data)| ResourceRecord::new(Name::new_unchecked(owner), CLASS::IN, 60, data))
        .collect();
    packet.build_bytes_vec_compressed().unwrap()
}

/// A server that gives each name the IPv4 address that its first label is, with `-` for dots: `127-0-0-2.example`.
pub fn serve(at: SocketAddr) {
    let socket = UdpSocket::bind(at).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            socket.send_to(&served(&buffer[..length]), client).unwrap();
        }
    });
}

/// The same over TCP.
pub fn serve_streams(at: SocketAddr) {
    let listener = TcpListener::bind(at).unwrap();
    std::thread::spawn(move || {
        for mut client in listener.incoming().map(Result::unwrap) {
            std::thread::spawn(move || {
                while let Ok(query) = receive(&mut client) {
                    let response = framed(&served(&query));
                    if client.write_all(&response).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// The response of a server that gives a name the address that its first label is.
fn served(query: &[u8]) -> Vec<u8> {
    let asked = Packet::parse(query).unwrap();
    let question = &asked.questions[0];
    let name = question.qname.to_string();
    let address = name.split('.').next().unwrap().replace('-', ".");
    let mut response = Packet::new_reply(asked.id());
    response.questions.push(question.clone());
    if question.qtype == QTYPE::TYPE(TYPE::A) {
        let name = Name::new_unchecked(&name);
        let answer = ResourceRecord::new(name, CLASS::IN, 60, data(&address));
        response.answers.push(answer);
    }
    response.build_bytes_vec_compressed().unwrap()
}

/// A message as TCP carries it, behind its length.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap();
    [&length.to_be_bytes(), message].concat()
}

/// Reads a message that TCP carries.
pub fn receive(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// Asks for the IPv4 addresses of names over one TCP connection, all before the first answer and each byte in a segment of
/// its own. Gives the code and the addresses of each answer, by the names.
pub fn ask_over_tcp(server: SocketAddr, names: &[&str]) -> BTreeMap<String, (RCODE, Vec<String>)> {
    let mut stream = TcpStream::connect(server).unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in names.iter().flat_map(|name| framed(&query(name))) {
        stream.write_all(&[byte]).unwrap();
    }
    let answers = names.iter().map(|_| {
        let response = receive(&mut stream).unwrap();
        let packet = Packet::parse(&response).unwrap();
        let name = packet.questions[0].qname.to_string();
        (name, (packet.rcode(), addresses(&packet)))
    });
    answers.collect()
}

/// Looks a name up at the server; the answer is what the server is asked to give.
pub fn look_up(client: &UdpSocket, name: &str) {
    client.send(&query(name)).unwrap();
    let mut buffer = [0; 512];
    let length = client.recv(&mut buffer).unwrap();
    assert_eq!(Packet::parse(&buffer[..length]).unwrap().answers.len(), 1);
}
