//! Options that `fault run`, `inject` and `replay` share.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::parse_time;
use crate::inject::injector::Attachment;
use crate::inject::reach::IngressMechanism;
use crate::plan::mechanism::Mechanism;
use crate::session::options::SessionOptions;
use crate::session::outcome::Failure;
use crate::sys::net::interfaces::Selection;

/// Options that select the traffic that rules apply to.
#[derive(Debug, Args)]
pub struct TrafficOptions {
    /// Only traffic of this process and its descendants, in the network namespace of this process.
    #[arg(long, value_name = "PID", conflicts_with = "cgroup")]
    pid: Option<i32>,
    /// Only traffic of the processes in this cgroup (a directory of cgroup2).
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Only traffic of this container (Docker, Podman or containerd; by name or id).
    #[arg(long, value_name = "NAME", conflicts_with_all = ["pid", "cgroup", "netns"])]
    container: Option<String>,
    /// Apply the rules again whenever the container is restarted.
    #[arg(long, requires = "container")]
    follow: bool,
    /// Only traffic in this network namespace (a path such as /proc/PID/ns/net, or a name of `ip netns`).
    #[arg(long, value_name = "NS", conflicts_with_all = ["pid", "cgroup"])]
    netns: Option<PathBuf>,
    /// Only this interface. Repeatable; default: lo and all interfaces that are up, including later ones.
    #[arg(long = "interface", short = 'i', value_name = "NAME")]
    interfaces: Vec<String>,
    /// How the programs are attached; default: tcx where the kernel has it.
    #[arg(long, value_name = "HOW")]
    attach: Option<Attach>,
    /// The mechanism: `tc` or `xdp` processes incoming packets; `delay-line`, `fq` or `netem` holds delayed ones.
    /// Repeatable. Default: tc (xdp on an interface that was named and supports it natively, if the rules only drop
    /// packets), and the delay line where a tap device is available.
    #[arg(long, value_name = "WHAT")]
    mechanism: Vec<MechanismChoice>,
    /// When the rules end, wait at most this long for data still in the relay to be delivered, e.g. 30s. The rest is
    /// counted, and its connections are reset. Default: the rules' own delays plus 10 s.
    #[arg(long, value_name = "TIME")]
    drain: Option<String>,
    /// Allow rules that match port 22 or fault's control API on the whole host.
    #[arg(long)]
    force: bool,
}

/// The values of `--attach`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attach {
    /// TCX links (Linux 6.6): the kernel removes them when the process ends.
    Tcx,
    /// A clsact qdisc and filters: after a kill they stop acting within 3 s, and `fault clean` removes them.
    Clsact,
}

/// The values of `--mechanism`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MechanismChoice {
    /// Only the tc programs.
    Tc,
    /// The XDP program in front of them, native where the driver supports it, otherwise generic. It drops packets;
    /// rules that do more stay with tc.
    Xdp,
    /// A thread of fault behind a tap device; works on every kernel and with any qdisc.
    DelayLine,
    /// fq qdiscs hold delayed and reordered packets; the delay line those with a rate or slots.
    Fq,
    /// netem qdiscs hold packets with a constant delay; the delay line the others.
    Netem,
}

impl TrafficOptions {
    /// Converts the options to those of a session. `verbose` is the number of `-v`.
    ///
    /// # Errors
    /// An invalid time.
    pub fn read(self, verbose: u8) -> Result<SessionOptions, Failure> {
        Ok(SessionOptions {
            selection: self.selection(),
            attachment: self.attachment(),
            front: self.front(),
            mechanism: self.mechanism(),
            drain: self.drain()?,
            pid: self.pid,
            cgroup: self.cgroup,
            container: self.container,
            follow: self.follow,
            netns: self.netns,
            force: self.force,
            trace: verbose >= 2,
        })
    }

    /// The requested mechanism to hold packets; the last one counts.
    fn mechanism(&self) -> Option<Mechanism> {
        let mut injection_options = self.mechanism.iter().rev();
        injection_options.find_map(|requested| match requested {
            MechanismChoice::DelayLine => Some(Mechanism::DelayLine),
            MechanismChoice::Fq => Some(Mechanism::Fq),
            MechanismChoice::Netem => Some(Mechanism::Netem),
            MechanismChoice::Tc | MechanismChoice::Xdp => None,
        })
    }

    /// The requested attachment.
    fn attachment(&self) -> Option<Attachment> {
        self.attach.map(|attach| match attach {
            Attach::Tcx => Attachment::Tcx,
            Attach::Clsact => Attachment::Clsact,
        })
    }

    /// The mechanism for incoming packets. Native XDP makes some drivers set up their queues again, and makes a veth's
    /// peer send without segmentation offload, so it is only the default on an interface that was named.
    fn front(&self) -> IngressMechanism {
        let mut injection_options = self.mechanism.iter().rev();
        let requested = injection_options.find_map(|requested| match requested {
            MechanismChoice::Tc => Some(IngressMechanism::Tc),
            MechanismChoice::Xdp => Some(IngressMechanism::Xdp),
            _ => None,
        });
        requested.unwrap_or(if self.interfaces.is_empty() {
            IngressMechanism::Tc
        } else {
            IngressMechanism::NativeXdp
        })
    }

    fn drain(&self) -> Result<Option<Duration>, Failure> {
        let drain = self.drain.as_deref();
        drain.map(|text| parse_time("--drain", text)).transpose()
    }

    /// The interfaces that rules are applied to, including those that appear later.
    fn selection(&self) -> Selection {
        if self.interfaces.is_empty() {
            Selection::Default
        } else {
            Selection::Names(self.interfaces.clone())
        }
    }
}
