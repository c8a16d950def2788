//! Servers that send back what they get, and clients for their datagrams.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::thread;

use super::place::PATIENCE;

/// Sends back what comes on any connection. Where it listens.
pub fn tcp_echo(listener: TcpListener) -> SocketAddr {
    let address = listener.local_addr().expect("bound");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..read]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

/// The same on a free port of loopback.
pub fn echo_server() -> SocketAddr {
    tcp_echo(TcpListener::bind("127.0.0.1:0").expect("loopback"))
}

/// Sends back each datagram. Where they are sent to.
pub fn udp_echo(socket: UdpSocket) -> SocketAddr {
    let address = socket.local_addr().expect("bound");
    thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        loop {
            // What a client has not waited for comes back as an error.
            if let Ok((size, client)) = socket.recv_from(&mut bytes) {
                let _sent = socket.send_to(&bytes[..size], client);
            }
        }
    });
    address
}

/// A client's socket that can reach this server.
pub fn udp_client(server: SocketAddr) -> UdpSocket {
    let any: IpAddr = if server.is_ipv4() {
        [0; 4].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = UdpSocket::bind((any, 0)).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket
}

/// One that is connected to it.
pub fn connected(server: SocketAddr) -> UdpSocket {
    let socket = udp_client(server);
    socket.connect(server).expect("a route");
    socket
}
