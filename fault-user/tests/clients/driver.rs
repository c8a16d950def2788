//! Drives a daemon with the published toxiproxy_rust: driver API UPSTREAM

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use toxiproxy_rust::client::Client;
use toxiproxy_rust::proxy::ProxyPack;

fn round_trip(listen: &str) -> Option<Duration> {
    let mut stream = TcpStream::connect(listen).ok()?;
    let start = Instant::now();
    stream.write_all(b"x").ok()?;
    stream.read_exact(&mut [0]).ok()?;
    Some(start.elapsed())
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let client = Client::new(arguments[1].as_str());
    assert!(client.is_running());
    assert!(client.version().expect("a version").contains('2'));
    let pack = ProxyPack::new("rust".into(), "127.0.0.1:0".into(), arguments[2].clone());
    let made = client.populate(vec![pack]).expect("populate");
    assert_eq!(made.len(), 1);
    let proxy = client.find_and_reset_proxy("rust").expect("it is there");
    let listen = proxy.proxy_pack.listen.clone();
    assert!(round_trip(&listen).expect("an echo") < Duration::from_millis(900));
    proxy
        .with_latency("downstream".into(), 1000, 0, 1.0)
        .apply(|| assert!(round_trip(&listen).expect("an echo") >= Duration::from_millis(999)))
        .expect("apply");
    assert!(proxy.toxics().expect("toxics").is_empty());
    proxy.with_down(|| assert_eq!(round_trip(&listen), None)).expect("down");
    assert!(round_trip(&listen).is_some());
    client.reset().expect("reset");
    assert_eq!(client.all().expect("all").len(), 1);
    proxy.delete().expect("delete");
    assert!(client.find_proxy("rust").is_err());
    println!("driven");
}
