//! Options that `fault run`, `inject` and `replay` share.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::parse_time;
use crate::inject::injector::Attachment;
use crate::inject::reach::IngressMechanism;
use crate::plan::mechanism::Mechanism;
use crate::session::options::Options;
use crate::session::outcome::Failure;
use crate::sys::net::interfaces::Selection;

/// Options that say whose traffic is touched.
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
    /// Put the rules in force again whenever the container has been restarted.
    #[arg(long, requires = "container")]
    follow: bool,
    /// Only traffic in this network namespace (a path such as /proc/PID/ns/net, or a name of `ip netns`).
    #[arg(long, value_name = "NS", conflicts_with_all = ["pid", "cgroup"])]
    netns: Option<PathBuf>,
    /// Only this interface. Repeatable; default: lo and all that are up, those that appear later included.
    #[arg(long = "interface", short = 'i', value_name = "NAME")]
    interfaces: Vec<String>,
    /// How the programs are attached; default: tcx where the kernel has it.
    #[arg(long, value_name = "HOW")]
    attach: Option<Attach>,
    /// By what rules are carried out: `tc` or `xdp` for packets that arrive, `delay-line`, `fq` or `netem` for those that
    /// are held. Repeatable. Default: tc (xdp on hardware that was named and has it, if rules only lose packets), and the
    /// delay line, where a tap device can be had.
    #[arg(long, value_name = "WHAT")]
    mechanism: Vec<Choice>,
    /// How long data on its way through a stream rule may take to arrive when the rules end, e.g. 30s; what has not
    /// arrived by then is counted, and its connections are reset. Default: the rules' own delays and 10 s.
    #[arg(long, value_name = "TIME")]
    drain: Option<String>,
    /// Allow rules that reach port 22 or fault's control API on the whole host.
    #[arg(long)]
    force: bool,
}

/// The values of `--attach`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attach {
    /// TCX links (Linux 6.6): gone with the process.
    Tcx,
    /// A clsact qdisc and filters: gone after the lease of 3 s and `fault clean`.
    Clsact,
}

/// The values of `--mechanism`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// The tc programs alone.
    Tc,
    /// The XDP program in front of them, native where the driver can, else generic. It loses packets; rules that do more
    /// stay with tc.
    Xdp,
    /// A thread of fault behind a tap device: on every kernel, beside any qdisc.
    DelayLine,
    /// fq qdiscs hold what is delayed or reordered; the delay line what has a rate or slots.
    Fq,
    /// netem qdiscs hold what has a constant delay; the delay line all else.
    Netem,
}

impl TrafficOptions {
    /// The options, understood.
    ///
    /// # Errors
    /// A time that is none.
    pub fn read(self) -> Result<Options, Failure> {
        Ok(Options {
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
        })
    }

    /// What was asked to hold packets; the last one counts.
    fn mechanism(&self) -> Option<Mechanism> {
        let mut injection_options = self.mechanism.iter().rev();
        injection_options.find_map(|wish| match wish {
            Choice::DelayLine => Some(Mechanism::DelayLine),
            Choice::Fq => Some(Mechanism::Fq),
            Choice::Netem => Some(Mechanism::Netem),
            Choice::Tc | Choice::Xdp => None,
        })
    }

    /// The attachment that was asked for.
    fn attachment(&self) -> Option<Attachment> {
        self.attach.map(|attach| match attach {
            Attach::Tcx => Attachment::Tcx,
            Attach::Clsact => Attachment::Clsact,
        })
    }

    /// What judges packets that arrive. Native XDP makes some drivers set their queues up anew, and a veth's peer
    /// send without segmentation offload, so it is only taken where the interface was named.
    fn front(&self) -> IngressMechanism {
        let mut injection_options = self.mechanism.iter().rev();
        let wish = injection_options.find_map(|wish| match wish {
            Choice::Tc => Some(IngressMechanism::Tc),
            Choice::Xdp => Some(IngressMechanism::Xdp),
            _ => None,
        });
        wish.unwrap_or(if self.interfaces.is_empty() {
            IngressMechanism::Tc
        } else {
            IngressMechanism::NativeXdp
        })
    }

    fn drain(&self) -> Result<Option<Duration>, Failure> {
        let drain = self.drain.as_deref();
        drain.map(|text| parse_time("--drain", text)).transpose()
    }

    /// Which interfaces rules are put on, those that appear later included.
    fn selection(&self) -> Selection {
        if self.interfaces.is_empty() {
            Selection::Default
        } else {
            Selection::Names(self.interfaces.clone())
        }
    }
}
