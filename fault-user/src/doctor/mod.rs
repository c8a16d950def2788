//! Checks what this machine supports (`fault doctor`).
//!
//! Every feature is tried rather than derived from a version: vendors backport features, and containers restrict them.

use crate::sys::bpf::features as bpf;
use crate::sys::process::capabilities::{Capability, Rights};
use crate::sys::process::cgroup::{CommandCgroup, Hierarchy, Leftovers};
use crate::sys::{preflight, probe};
use crate::undo::leftovers;
use crate::undo::{leftover::Leftover, leftovers::LeftoverPlaces};
use anyhow::{Context, Result};
use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_map_supported};
use nix::errno::Errno;
use serde::Serialize;
use std::fmt;

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The name for people.
    pub name: String,
    /// Whether the feature is available.
    pub ok: bool,
    /// Whether the check could be done: without privileges many can't.
    pub tried: bool,
    /// Details: a place, a name, or the kernel's error.
    pub detail: String,
    /// How to make a missing feature available, if that is possible.
    pub advice: Option<String>,
}

impl Check {
    fn new(name: &str, found: Result<String>, advice: &str) -> Self {
        let tried = !found.as_ref().is_err_and(is_forbidden);
        let (ok, detail) = match found {
            Ok(detail) => (true, detail),
            Err(_) if !tried => (false, "can't be checked without more privileges".to_owned()),
            Err(error) => (false, format!("{error:#}")),
        };
        let advice = (!ok && tried && !advice.is_empty()).then(|| advice.to_owned());
        Self {
            name: name.to_owned(),
            ok,
            tried,
            detail,
            advice,
        }
    }
}

/// The symbol for yes, no or unknown.
fn mark(ok: bool, tried: bool) -> &'static str {
    match (ok, tried) {
        (true, _) => "yes",
        (false, true) => "no",
        (false, false) => "?",
    }
}

/// Whether the check failed for lack of privileges.
fn is_forbidden(error: &anyhow::Error) -> bool {
    let is_right = |errno: i32| errno == nix::libc::EPERM || errno == nix::libc::EACCES;
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>();
        let errno = cause.downcast_ref::<Errno>();
        io.and_then(std::io::Error::raw_os_error)
            .is_some_and(is_right)
            || errno.is_some_and(|errno| is_right(*errno as i32))
    })
}

/// The mechanism of a group of faults on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FaultSupport {
    /// The names of the faults.
    pub faults: &'static str,
    /// The mechanism; `None` if they are unsupported.
    pub mechanism: Option<&'static str>,
    /// Whether the features that it depends on could be checked.
    pub tried: bool,
    /// The requirements, if they are unsupported.
    pub advice: Option<&'static str>,
}

/// Whether fault works on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// All of it.
    Works,
    /// A part of it.
    Limited,
    /// It could not be checked without more privileges.
    Unchecked,
    /// No packet fault.
    Fails,
}

/// The result in one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DoctorVerdict {
    /// Whether fault works here.
    pub level: Level,
    /// One line that says so, and what to do.
    pub text: String,
}

impl DoctorVerdict {
    /// Sums up what was found.
    fn of(mechanisms: &[FaultSupport], cgroup: Option<&Check>, leftovers: Option<usize>) -> Self {
        let [packets, holding, ..] = mechanisms else {
            unreachable!("there is a row for packets, and one for those that are held");
        };
        let (mut level, mut parts) = (Level::Works, Vec::new());
        if packets.mechanism.is_none() {
            level = if packets.tried {
                Level::Fails
            } else {
                Level::Unchecked
            };
            parts.push(packets.advice.unwrap_or_default().to_owned());
        } else {
            if let Some(cgroup) = cgroup.filter(|cgroup| !cgroup.ok) {
                level = Level::Limited;
                parts.push(if cgroup.tried {
                    format!(
                        "`fault run` can't limit rules to a command: {}, or use --scope host or `fault inject`",
                        cgroup.detail
                    )
                } else {
                    "whether `fault run` can limit rules to a command could not be checked: run with sudo"
                        .to_owned()
                });
            }
            if holding.mechanism.is_none() {
                level = Level::Limited;
                let what = if holding.tried {
                    "unsupported"
                } else {
                    "could not be checked"
                };
                let advice = holding.advice.unwrap_or_default();
                parts.push(format!("{}: {what}, {advice}", holding.faults));
            }
        }
        if let Some(count @ 1..) = leftovers {
            parts.push(format!(
                "{count} leftovers of killed instances: `sudo fault clean` removes them"
            ));
        }
        let start = match level {
            Level::Works => "fault works here",
            Level::Limited => "fault works here with limits",
            Level::Unchecked => "whether fault works here could not be checked",
            Level::Fails => "packet faults do not work here",
        };
        let more = if parts.is_empty() { "" } else { ": " };
        Self {
            level,
            text: format!("{start}{more}{}", parts.join("; ")),
        }
    }
}

/// The report of `fault doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DoctorReport {
    /// The result in one line.
    pub verdict: DoctorVerdict,
    /// Kernel release and architecture.
    pub kernel: String,
    /// Kernel, BTF, cgroups, restrictions of bpf(2).
    pub system: Vec<Check>,
    /// The capabilities of this process.
    pub capabilities: Vec<Check>,
    /// Hooks and features of programs.
    pub programs: Vec<Check>,
    /// Qdiscs and devices.
    pub traffic: Vec<Check>,
    /// Faults and their mechanisms.
    pub mechanisms: Vec<FaultSupport>,
    /// Leftovers of killed instances; `None` if they can't be listed.
    pub leftovers: Option<Vec<Leftover>>,
}

impl DoctorReport {
    /// Runs all checks. They use their own network namespace and cgroup and change nothing else. If no namespace can be
    /// created, a program that lets everything through is attached to `lo` for an instant.
    ///
    /// # Errors
    /// `/proc` can't be read.
    pub fn gather() -> Result<Self> {
        let rights = Rights::read()?;
        let names = nix::sys::utsname::uname().context("can't ask for the kernel's version")?;
        let kernel = format!(
            "{} {}",
            names.release().display(),
            names.machine().display()
        );
        let leftovers = match leftovers::find(&LeftoverPlaces::of_this_machine()) {
            Err(error) if is_forbidden(&error) => None,
            found => Some(found?),
        };
        let programs = program_checks();
        let traffic = traffic_checks();
        let mechanisms = mechanisms(|name| {
            let mut all = programs.iter().chain(&traffic);
            let check = all.find(|check| check.name == name)?;
            check.tried.then_some(check.ok)
        });
        let system = system_checks(&rights);
        let cgroup = system.iter().find(|check| check.name == name::CGROUP);
        Ok(Self {
            verdict: DoctorVerdict::of(&mechanisms, cgroup, leftovers.as_ref().map(Vec::len)),
            system,
            capabilities: capability_checks(&rights),
            mechanisms,
            kernel,
            programs,
            traffic,
            leftovers,
        })
    }

    /// Whether packet faults work here; if not, or if that could not be checked, `fault doctor` exits with 1.
    #[must_use]
    pub fn works(&self) -> bool {
        matches!(self.verdict.level, Level::Works | Level::Limited)
    }
}

fn system_checks(rights: &Rights) -> Vec<Check> {
    let exists = |path: &str| -> Result<String> {
        std::fs::metadata(path)?;
        Ok(path.to_owned())
    };
    // A mount that is writable may still reject it.
    let cgroup = Hierarchy::find().and_then(|found| {
        CommandCgroup::create(&found, Leftovers::Release)?.finish()?;
        Ok(found.path().display().to_string())
    });
    let blocked = bpf::load(bpf::program_type::SCHED_CLS, 0, -1)
        .map(|_| "programs load".to_owned())
        .map_err(|error| anyhow::anyhow!("{}", preflight::explain_bpf(&error, rights)));
    let namespaces = probe::in_throw_away_netns(|| Ok("network namespaces".to_owned()));
    let lockdown = rights.lockdown.as_deref().unwrap_or("none");
    let lockdown = match lockdown {
        "confidentiality" => Err(anyhow::anyhow!("confidentiality")),
        mode => Ok(mode.to_owned()),
    };
    vec![
        Check::new("bpf(2)", blocked, ""),
        Check::new(
            "BTF",
            exists("/sys/kernel/btf/vmlinux"),
            "not needed for tc programs; for the others CONFIG_DEBUG_INFO_BTF=y",
        ),
        Check::new(
            name::CGROUP,
            cgroup,
            "rules for the whole host (--scope host) do without",
        ),
        Check::new(
            "namespaces",
            namespaces,
            "see /proc/sys/user/max_net_namespaces; most features are checked in a namespace and are shown as missing \
             without it",
        ),
        Check::new("lockdown", lockdown, "boot with lockdown=integrity or less"),
    ]
}

fn capability_checks(rights: &Rights) -> Vec<Check> {
    let check = |capability: Capability| {
        let found = if rights.has(capability) {
            Ok(capability.purpose().to_owned())
        } else {
            Err(anyhow::anyhow!("{}", capability.purpose()))
        };
        let advice = if rights.is_root {
            format!("in a container: --cap-add {}", capability.name())
        } else {
            "run with sudo".to_owned()
        };
        Check::new(&format!("CAP_{}", capability.name()), found, &advice)
    };
    Capability::ALL.into_iter().map(check).collect()
}

/// The names by which [`mechanisms`] finds checks.
mod name {
    pub const CGROUP: &str = "cgroup2";
    pub const TCX: &str = "TCX";
    pub const CLSACT: &str = "clsact";
    pub const SK_LOOKUP: &str = "sk_lookup";
    pub const CONNECT: &str = "cgroup connect";
    pub const FQ: &str = "fq";
    pub const NETEM: &str = "netem";
    pub const PRIO: &str = "prio";
    pub const TAP: &str = "tap";
}

fn program_checks() -> Vec<Check> {
    let yes = |found: Result<()>| found.map(|()| "works".to_owned());
    let apart = |try_it: fn() -> Result<()>| yes(probe::in_throw_away_netns(try_it));
    let (tcx, clsact) = match probe::in_throw_away_netns(probe::tc_hooks) {
        Ok(hooks) => hooks,
        // In a container without CAP_SYS_ADMIN: in the namespace of the rules.
        Err(error) => (probe::tcx_here(), Err(error)),
    };
    let map = |kind| match is_map_supported(kind) {
        Ok(true) => Ok("works".to_owned()),
        Ok(false) => Err(anyhow::anyhow!("not in this kernel")),
        Err(error) => Err(error.into()),
    };
    let helper = |helper| match is_helper_supported(ProgramType::SchedClassifier, helper) {
        Ok(true) => Ok("works".to_owned()),
        Ok(false) => Err(anyhow::anyhow!("not in this kernel")),
        Err(error) => Err(error.into()),
    };
    vec![
        Check::new(
            name::TCX,
            yes(tcx),
            "Linux 6.6 or later; clsact does as well",
        ),
        Check::new(name::CLSACT, yes(clsact), "modprobe sch_ingress cls_bpf"),
        Check::new("XDP", apart(probe::xdp), "Linux 5.9 or later"),
        Check::new(
            name::SK_LOOKUP,
            apart(probe::sk_lookup),
            "Linux 5.9 or later",
        ),
        Check::new(
            name::CONNECT,
            yes(probe::connect_hook()),
            "Linux 5.7 or later, and a writable cgroup2",
        ),
        Check::new("ring buffer", map(MapType::RingBuf), "Linux 5.8 or later"),
        Check::new(
            "bpf_loop",
            helper(BpfHelper::BPF_FUNC_loop),
            "Linux 5.17 or later",
        ),
        Check::new(
            "membarrier",
            yes(probe::membarrier()),
            "CONFIG_MEMBARRIER=y",
        ),
    ]
}

fn traffic_checks() -> Vec<Check> {
    let yes = |found: Result<()>| found.map(|()| "works".to_owned());
    let qdisc = |kind: &'static str| {
        let found = probe::in_throw_away_netns(|| probe::qdisc(kind));
        Check::new(
            kind,
            yes(found),
            &format!("modprobe sch_{kind}; only --mechanism needs it"),
        )
    };
    let apart = |try_it: fn() -> Result<()>| yes(probe::in_throw_away_netns(try_it));
    let tap_advice = "modprobe tun, or in a container --device /dev/net/tun";
    let destroy_advice =
        "CONFIG_INET_DIAG_DESTROY=y; without it existing connections can't be reset";
    vec![
        qdisc(name::FQ),
        qdisc(name::NETEM),
        qdisc(name::PRIO),
        qdisc("htb"),
        qdisc("tbf"),
        Check::new("ifb", apart(probe::ifb), "modprobe ifb"),
        Check::new(
            name::TAP,
            apart(probe::tap).or_else(|_| yes(probe::tap_device())),
            tap_advice,
        ),
        Check::new("SOCK_DESTROY", apart(probe::sock_destroy), destroy_advice),
    ]
}

/// The mechanism of each group of faults. `look` returns whether a feature is available, if known.
fn mechanisms(look: impl Fn(&str) -> Option<bool>) -> Vec<FaultSupport> {
    let has = |name| look(name) == Some(true);
    let tc = match (has(name::TCX), has(name::CLSACT)) {
        (true, _) => Some("eBPF at tc (TCX)"),
        (false, true) => Some("eBPF at tc (clsact)"),
        (false, false) => None,
    };
    let row = |faults, needs: &[&str], mechanism: Option<&'static str>, advice| {
        let tried = mechanism.is_some() || needs.iter().all(|name| look(name).is_some());
        let advice = if tried {
            advice
        } else {
            "run with sudo, or with the capabilities listed under Capabilities"
        };
        FaultSupport {
            faults,
            mechanism,
            tried,
            advice: mechanism.is_none().then_some(advice),
        }
    };
    vec![
        row(
            "loss drop blackhole reject reset down corrupt duplicate mtu ecn",
            &[name::TCX],
            tc,
            "needs TCX (Linux 6.6) or clsact and cls_bpf, with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
        ),
        row(
            "delay reorder rate slot",
            &[name::TCX, name::TAP],
            tc.filter(|_| has(name::TAP))
                .map(|_| "eBPF at tc, delay line behind a tap device"),
            "needs tc as above, and /dev/net/tun with CAP_NET_ADMIN (in a container: --device /dev/net/tun)",
        ),
        row(
            "delay reorder, by --mechanism fq",
            &[name::TCX, name::FQ],
            tc.filter(|_| has(name::FQ))
                .map(|_| "eBPF at tc sets departure times, fq qdiscs hold packets; a veth pair for incoming packets"),
            "modprobe sch_fq; not needed with the delay line",
        ),
        row(
            "delay (constant), by --mechanism netem",
            &[name::TCX, name::NETEM],
            tc.filter(|_| has(name::NETEM) && has(name::PRIO))
                .map(|_| "eBPF at tc classifies, netem qdiscs below a prio qdisc hold packets; a veth pair for \
                incoming packets"),
            "modprobe sch_netem sch_prio; not needed with the delay line",
        ),
        row(
            "latency bandwidth timeout reset_peer slicer limit_data stall … (TCP, UDP)",
            &[],
            Some(
                "the relay, reached by hooks at connect(2) (Linux 5.8) or as a proxy of `fault daemon`",
            ),
            "",
        ),
    ]
}

impl fmt::Display for DoctorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.verdict.text)?;
        writeln!(f, "\nLinux {}", self.kernel)?;
        let sections = [
            ("System", &self.system),
            ("Capabilities", &self.capabilities),
            ("Programs", &self.programs),
            ("Traffic", &self.traffic),
        ];
        for (title, checks) in sections {
            writeln!(f, "\n{title}")?;
            for check in checks {
                let mark = mark(check.ok, check.tried);
                write!(f, "  {:<18} {mark:<4} {}", check.name, check.detail)?;
                match &check.advice {
                    Some(advice) => writeln!(f, " → {advice}")?,
                    None => writeln!(f)?,
                }
            }
        }
        writeln!(f, "\nFaults and their mechanisms on this machine")?;
        for row in &self.mechanisms {
            let answer = row.mechanism.or(row.advice).unwrap_or_default();
            let mark = mark(row.mechanism.is_some(), row.tried);
            writeln!(f, "  {}\n  {:<18} {mark:<4} {answer}", row.faults, "")?;
        }
        writeln!(f, "\nLeftovers of killed instances")?;
        let Some(leftovers) = &self.leftovers else {
            return writeln!(f, "  only root can list them → run with sudo");
        };
        if leftovers.is_empty() {
            writeln!(f, "  none")?;
        }
        for leftover in leftovers {
            writeln!(f, "  {leftover} → sudo fault clean")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packet_faults_need_a_place_at_tc() {
        let first = |there: &'static [&'static str]| {
            mechanisms(|name| Some(there.contains(&name))).remove(0)
        };
        assert_eq!(
            first(&["TCX", "clsact"]).mechanism,
            Some("eBPF at tc (TCX)")
        );
        assert_eq!(first(&["clsact"]).mechanism, Some("eBPF at tc (clsact)"));
        let none = first(&["fq"]);
        assert_eq!(none.mechanism, None);
        assert!(none.tried && none.advice.is_some());
    }

    #[test]
    fn what_can_not_be_tried_is_not_called_missing() {
        let forbidden = anyhow::Error::from(Errno::EPERM).context("can't make a namespace");
        let check = Check::new("fq", Err(forbidden), "modprobe sch_fq");
        assert_eq!((check.ok, check.tried, check.advice), (false, false, None));
        let missing = anyhow::Error::from(std::io::Error::from_raw_os_error(nix::libc::ENOENT));
        let check = Check::new("fq", Err(missing), "modprobe sch_fq");
        assert!(check.tried && check.advice.is_some());
        let first = mechanisms(|_| None).remove(0);
        assert_eq!((first.mechanism, first.tried), (None, false));
        assert!(first.advice.is_some_and(|advice| advice.contains("sudo")));
    }

    #[test]
    fn the_verdict_is_one_line() {
        let all = mechanisms(|_| Some(true));
        let cgroup = |found| Check::new("cgroup2", found, "mount it");
        let verdict = |mechanisms: &[FaultSupport], found, leftovers| {
            let verdict = DoctorVerdict::of(mechanisms, Some(&cgroup(found)), leftovers);
            assert_eq!(verdict.text.lines().count(), 1);
            (verdict.level, verdict.text)
        };
        let fine = || Ok("/sys/fs/cgroup".to_owned());
        assert_eq!(
            verdict(&all, fine(), Some(0)),
            (Level::Works, "fault works here".to_owned())
        );
        let (level, text) = verdict(&all, fine(), Some(2));
        assert!(
            level == Level::Works && text.contains("2 leftovers"),
            "{text}"
        );
        let (level, text) = verdict(&all, Err(anyhow::anyhow!("mounted read-only")), None);
        assert_eq!(level, Level::Limited);
        assert!(
            text.contains("read-only") && text.contains("--scope host"),
            "{text}"
        );
        let forbidden = anyhow::Error::from(Errno::EACCES).context("can't create a cgroup");
        let (_, text) = verdict(&all, Err(forbidden), None);
        assert!(text.contains("could not be checked"), "{text}");
        let without_tap = mechanisms(|name| Some(name != "tap"));
        let (level, text) = verdict(&without_tap, fine(), None);
        assert!(
            level == Level::Limited && text.contains("delay reorder"),
            "{text}"
        );
        let (level, text) = verdict(&mechanisms(|_| None), fine(), None);
        assert_eq!(level, Level::Unchecked, "{text}");
        assert!(
            !text.contains("unsupported") && !text.contains("not work"),
            "{text}"
        );
        let (level, text) = verdict(&mechanisms(|_| Some(false)), fine(), None);
        assert!(
            level == Level::Fails && text.contains("needs TCX"),
            "{text}"
        );
    }

    #[test]
    fn this_machine_is_told_about_and_left_as_it_was() {
        if !nix::unistd::Uid::effective().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let before = crate::sys::net::interfaces::list().unwrap();
        let report = DoctorReport::gather().unwrap();
        assert!(report.works(), "{report}");
        assert_eq!(crate::sys::net::interfaces::list().unwrap(), before);
        let own = format!("fault-{}-", std::process::id());
        let json = serde_json::to_string(&report).unwrap();
        assert!(!json.contains(&own), "a probe left its cgroup: {json}");
        for check in report.programs.iter().chain(&report.traffic) {
            assert!(check.ok || check.advice.is_some(), "no advice: {check:?}");
            assert!(check.tried, "root may try everything: {check:?}");
        }
        println!("{report}");
    }
}
