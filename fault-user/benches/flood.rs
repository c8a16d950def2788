//! What losing packets costs beside nftables doing the same, and XDP beside tc: frames made by the kernel itself
//! (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18) arrive at a veth device as fast as they are dealt with.
//!
//! Prints one JSON object a line, as `cargo xtask bench` reads them. Runs as root, in network namespaces of its own.

mod support;

use std::io::Write as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use fault_user::inject::injection::{InjectionOptions, PreparedInjection};
use fault_user::inject::preparation::prepare;
use fault_user::inject::reach::IngressMechanism;
use fault_user::sys::net::interfaces::{Selection, list, select};
use fault_user::sys::process::netns::NetworkNamespace;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use support::plan;

/// Frames for one figure.
const FRAMES: u32 = 1_000_000;
/// How often a figure is taken, in turns with the others; the smallest counts.
const ROUNDS: usize = 5;
/// The port that the frames go to: that of the last of many rules.
const LAST_PORT: u16 = 10_999;

/// Prints one figure with what it is compared with; `ok` judges their ratio.
fn compare(name: &str, value: f64, reference: f64, goal: &str, ok: impl Fn(f64) -> bool) {
    let ratio = value / reference;
    support::measure(name, value, "ns", Some(reference), goal, ok(ratio));
}

fn run(words: &str) {
    let mut words = words.split(' ');
    let program = words.next().unwrap_or_default();
    let done = Command::new(program).args(words).status();
    assert!(
        done.unwrap_or_else(|error| panic!("{program}: {error} (cargo xtask setup --for bench)"))
            .success(),
        "{program} failed"
    );
}

/// A datagram to `port`, addressed at another link address, so that what passes goes no farther than IP's door.
fn frame(port: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([
        0x45, 0, 0, 46, 0, 1, 0, 0, 64, 17, 0, 0, 10, 79, 0, 1, 10, 79, 0, 2,
    ]);
    frame.extend([0x9c, 0x40]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 26, 0, 0]);
    frame.extend([0x55; 18]);
    frame
}

/// A system call of bpf(2).
fn bpf<T>(command: libc::c_long, attributes: &mut T) -> Result<i32, Errno> {
    // SAFETY: the structure lives through the call, and its size is told.
    let status =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    Ok(i32::try_from(Errno::result(status)?).unwrap_or(i32::MAX))
}

/// A program that sends every frame out through one device.
struct Source(OwnedFd);

impl Source {
    fn through(device: u32) -> Self {
        /// The start of `union bpf_attr` for `BPF_PROG_LOAD`.
        #[repr(C)]
        struct Load {
            kind: u32,
            instructions: u32,
            code: u64,
            license: u64,
        }
        const BPF_PROG_LOAD: libc::c_long = 5;
        const BPF_PROG_TYPE_XDP: u32 = 6;
        // r1 = device; r2 = 0; call bpf_redirect; exit
        let code: [u64; 4] = [
            0xb7 | 1 << 8 | u64::from(device) << 32,
            0xb7 | 2 << 8,
            0x85 | 23 << 32,
            0x95,
        ];
        let mut attributes = Load {
            kind: BPF_PROG_TYPE_XDP,
            instructions: 4,
            code: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
        };
        let program = bpf(BPF_PROG_LOAD, &mut attributes).expect("a program (run as root)");
        // SAFETY: the call has just made it, and nobody else knows it.
        Self(unsafe { OwnedFd::from_raw_fd(program) })
    }

    /// Nanoseconds for each frame that arrived; none where a tenth was lost on the way, as on a machine that does other
    /// work.
    fn flood(&self, frame: &[u8], peer: &NetworkNamespace) -> Option<f64> {
        /// `union bpf_attr` for `BPF_PROG_TEST_RUN`.
        #[repr(C)]
        #[derive(Default)]
        struct TestRun {
            program: u32,
            returned: u32,
            data_bytes: u32,
            data_out_bytes: u32,
            data: u64,
            data_out: u64,
            repeat: u32,
            duration: u32,
            context_bytes: u32,
            context_out_bytes: u32,
            context: u64,
            context_out: u64,
            flags: u32,
            cpu: u32,
            batch: u32,
            padding: u32,
        }
        const BPF_PROG_TEST_RUN: libc::c_long = 10;
        const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
        let mut attributes = TestRun {
            program: self.0.as_raw_fd().cast_unsigned(),
            data_bytes: u32::try_from(frame.len()).expect("a short frame"),
            data: frame.as_ptr() as u64,
            repeat: FRAMES,
            flags: BPF_F_TEST_XDP_LIVE_FRAMES,
            batch: 64,
            ..TestRun::default()
        };
        let before = arrived(peer);
        let start = Instant::now();
        bpf(BPF_PROG_TEST_RUN, &mut attributes).expect("live frames (Linux 5.18)");
        let took = start.elapsed().as_secs_f64();
        let count = arrived(peer) - before;
        if count < f64::from(FRAMES) * 0.9 {
            eprintln!("{count} of {FRAMES} frames arrived: this round is left out");
            return None;
        }
        Some(took * 1e9 / count)
    }
}

/// Packets that have come to `vb`.
fn arrived(peer: &NetworkNamespace) -> f64 {
    let text = peer
        .enter(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))
        .expect("statistics");
    let line = text
        .lines()
        .find(|line| line.trim_start().starts_with("vb:"))
        .expect("vb");
    line.split_whitespace()
        .nth(2)
        .and_then(|count| count.parse().ok())
        .expect("a count")
}

/// Something that stands in the frames' way while it lives.
trait Obstacle {
    fn put(&self, peer: &NetworkNamespace) -> Box<dyn FnOnce()>;
}

struct Nothing;

impl Obstacle for Nothing {
    fn put(&self, _peer: &NetworkNamespace) -> Box<dyn FnOnce()> {
        Box::new(|| {})
    }
}

struct Fault(Vec<String>, IngressMechanism);

impl Obstacle for Fault {
    fn put(&self, peer: &NetworkNamespace) -> Box<dyn FnOnce()> {
        let injection_options = InjectionOptions {
            front: self.1,
            ..InjectionOptions::default()
        };
        let injection = peer
            .enter(|| {
                let devices = select(&list()?, &Selection::Names(vec!["vb".to_owned()]))?;
                prepare(&plan(&self.0), &devices, &injection_options)
                    .and_then(PreparedInjection::start)
            })
            .expect("rules");
        let rules = plan(&self.0);
        Box::new(move || {
            let hits = injection.hits(&rules).expect("figures");
            assert!(
                hits.iter().any(|hits| hits.stats.hit_packets > 0),
                "the rule at the port fires"
            );
            injection.remove().expect("restored");
        })
    }
}

/// Rules of nftables at the device's ingress, its earliest hook.
struct Nftables(String, String);

impl Obstacle for Nftables {
    fn put(&self, _peer: &NetworkNamespace) -> Box<dyn FnOnce()> {
        let name = self.0.clone();
        feed(
            &name,
            &format!(
                "add table netdev bench\nadd chain netdev bench in {{ type filter hook ingress device vb priority 0; }}\n{}",
                self.1
            ),
        );
        Box::new(move || feed(&name, "delete table netdev bench\n"))
    }
}

fn feed(namespace: &str, rules: &str) {
    let mut nft = Command::new("ip")
        .args(["netns", "exec", namespace, "nft", "-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("nft (cargo xtask setup --for bench)");
    nft.stdin
        .take()
        .expect("a pipe")
        .write_all(rules.as_bytes())
        .expect("nft reads");
    assert!(
        nft.wait().expect("nft ends").success(),
        "nft refuses {rules:.200}"
    );
}

fn ports() -> impl Iterator<Item = u16> {
    10_000..=LAST_PORT
}

fn main() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (run as root)");
    let name = format!("fault-flood-{}", std::process::id());
    run(&format!("ip netns add {name}"));
    run(&format!(
        "ip link add va type veth peer name vb netns {name}"
    ));
    run("ip link set va up");
    run(&format!("ip -n {name} link set vb up"));
    // With GRO a veth device has the queues that take frames.
    run("ethtool -K va gro on");
    run(&format!("ip netns exec {name} ethtool -K vb gro on"));
    let peer = NetworkNamespace::open(Path::new(&name)).expect("the peer");
    let source = Source::through(nix::net::if_::if_nametoindex("va").expect("va"));
    measure(&name, &peer, &source);
    run(&format!("ip netns del {name}"));
}

fn measure(name: &str, peer: &NetworkNamespace, source: &Source) {
    let lose = |port: u16| format!("udp:{port} loss=50%");
    let nft = |rules: String| Nftables(name.to_owned(), rules);
    let rule = |matching: &str| {
        format!("add rule netdev bench in udp dport {matching} numgen random mod 100 < 50 drop\n")
    };
    let set = ports()
        .map(|port| port.to_string())
        .collect::<Vec<_>>()
        .join(", ");
    let map = ports()
        .map(|port| format!("{port} : jump lose"))
        .collect::<Vec<_>>()
        .join(", ");
    let mut obstacles: Vec<(&str, Box<dyn Obstacle>)> = vec![
        ("nothing", Box::new(Nothing)),
        (
            "one",
            Box::new(Fault(vec![lose(LAST_PORT)], IngressMechanism::Tc)),
        ),
        ("nft one", Box::new(nft(rule(&LAST_PORT.to_string())))),
        (
            "many",
            Box::new(Fault(ports().map(lose).collect(), IngressMechanism::Tc)),
        ),
        (
            "nft chain",
            Box::new(nft(ports().map(|port| rule(&port.to_string())).collect())),
        ),
        ("nft set", Box::new(nft(rule(&format!("{{ {set} }}"))))),
        (
            "nft map",
            Box::new(nft(format!(
                "add chain netdev bench lose\nadd rule netdev bench lose numgen random mod 100 < 50 drop\n\
             add rule netdev bench in udp dport vmap {{ {map} }}\n"
            ))),
        ),
        (
            "tc drop",
            Box::new(Fault(
                vec![format!("udp:{LAST_PORT} blackhole")],
                IngressMechanism::Tc,
            )),
        ),
        (
            "xdp drop",
            Box::new(Fault(
                vec![format!("udp:{LAST_PORT} blackhole")],
                IngressMechanism::Xdp,
            )),
        ),
    ];
    if let Err(error) = Command::new("nft").arg("--version").output() {
        eprintln!("nftables is left out: nft: {error}");
        obstacles.retain(|(name, _)| !name.starts_with("nft"));
    }
    let mut best = vec![f64::INFINITY; obstacles.len()];
    let frame = frame(LAST_PORT);
    for _ in 0..ROUNDS {
        for (best, (_, obstacle)) in best.iter_mut().zip(&obstacles) {
            let remove = obstacle.put(peer);
            if let Some(nanoseconds) = source.flood(&frame, peer) {
                *best = best.min(nanoseconds);
            }
            remove();
        }
    }
    let of = |name: &str| {
        obstacles
            .iter()
            .zip(&best)
            .find(|((other, _), _)| *other == name)
            .map(|(_, best)| *best)
            .filter(|best| best.is_finite())
    };
    report(of);
}

/// Prints what was measured of both.
fn report(of: impl Fn(&str) -> Option<f64>) {
    let compare = |name: &str, value, reference, goal: &str, ok: fn(f64) -> bool| {
        if let (Some(value), Some(reference)) = (value, reference) {
            compare(name, value, reference, goal, ok);
        }
    };
    compare(
        "a frame that arrives, 1 rule of loss (beside no rule)",
        of("one"),
        of("nothing"),
        "shown only",
        |_| true,
    );
    compare(
        "1 rule of loss, beside nftables",
        of("one"),
        of("nft one"),
        "ratio at most 1.0",
        |ratio| ratio <= 1.0,
    );
    compare(
        "1,000 rules, beside a chain of nftables",
        of("many"),
        of("nft chain"),
        "ratio at most 0.2",
        |ratio| ratio <= 0.2,
    );
    compare(
        "1,000 rules, beside a set of nftables",
        of("many"),
        of("nft set"),
        "ratio at most 0.9",
        |ratio| ratio <= 0.9,
    );
    compare(
        "1,000 rules, beside a map of nftables",
        of("many"),
        of("nft map"),
        "ratio at most 1.0",
        |ratio| ratio <= 1.0,
    );
    compare(
        "a drop by XDP, beside tc",
        of("xdp drop"),
        of("tc drop"),
        "ratio at most 0.35",
        |ratio| ratio <= 0.35,
    );
}
