//! The privileges of this process.
use anyhow::{Context, Result};
use nix::unistd::Uid;
use std::fs;

/// A capability that fault may need (capabilities(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Capability {
    /// Access to files of other users.
    DacOverride,
    /// Signals to any process.
    Kill,
    /// Another primary or supplementary group.
    Setgid,
    /// Another user.
    Setuid,
    /// Listening on ports below 1024.
    NetBindService,
    /// Interfaces, qdiscs, filters, taps; attaching network programs.
    NetAdmin,
    /// Raw sockets, to answer from servers' addresses.
    NetRaw,
    /// Other users' descriptors in `/proc`.
    SysPtrace,
    /// Other namespaces; stands in for `Bpf` and `Perfmon`, and is the only one before Linux 5.8.
    SysAdmin,
    /// The verifier's full pointer arithmetic.
    Perfmon,
    /// Maps and programs.
    Bpf,
}

impl Capability {
    /// The capabilities that a machine or container may lack, in the kernel's order.
    pub const ALL: [Self; 8] = [
        Self::Kill,
        Self::Setgid,
        Self::Setuid,
        Self::NetAdmin,
        Self::SysPtrace,
        Self::SysAdmin,
        Self::Perfmon,
        Self::Bpf,
    ];

    /// Its number in `linux/capability.h`.
    pub(crate) fn bit(self) -> u32 {
        match self {
            Self::DacOverride => 1,
            Self::Kill => 5,
            Self::Setgid => 6,
            Self::Setuid => 7,
            Self::NetBindService => 10,
            Self::NetAdmin => 12,
            Self::NetRaw => 13,
            Self::SysPtrace => 19,
            Self::SysAdmin => 21,
            Self::Perfmon => 38,
            Self::Bpf => 39,
        }
    }

    /// Its name without `CAP_`, as used by `--cap-add`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DacOverride => "DAC_OVERRIDE",
            Self::Kill => "KILL",
            Self::Setgid => "SETGID",
            Self::Setuid => "SETUID",
            Self::NetBindService => "NET_BIND_SERVICE",
            Self::NetAdmin => "NET_ADMIN",
            Self::NetRaw => "NET_RAW",
            Self::SysPtrace => "SYS_PTRACE",
            Self::SysAdmin => "SYS_ADMIN",
            Self::Perfmon => "PERFMON",
            Self::Bpf => "BPF",
        }
    }

    /// Its purpose.
    #[must_use]
    pub fn purpose(self) -> &'static str {
        match self {
            Self::DacOverride => "writing reports into folders of other users",
            Self::Kill => "passing signals on to a command of another user",
            Self::Setgid | Self::Setuid => "running the command as another user",
            Self::NetBindService => "listening on ports below 1024",
            Self::NetAdmin => "attaching programs, qdiscs, taps",
            Self::NetRaw => "answering clients from their servers' addresses",
            Self::SysPtrace => {
                "inspecting processes of other containers and users (--container, --pid)"
            }
            Self::SysAdmin => "entering other namespaces (--netns, --container)",
            Self::Perfmon => "loading programs: the verifier's full pointer arithmetic",
            Self::Bpf => "loading programs and maps",
        }
    }
}

/// The privileges of the calling thread, and their restrictions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rights {
    /// Whether the effective user is root in its own user namespace.
    pub is_root: bool,
    /// The effective set, bit n for capability n.
    effective: u64,
    /// A seccomp filter is active.
    pub has_seccomp: bool,
    /// Not the initial user namespace: capabilities count only inside.
    pub in_user_namespace: bool,
    /// `none`, `integrity`, `confidentiality`; `None` when the kernel has no lockdown.
    pub lockdown: Option<String>,
}

impl Rights {
    /// Reads them from `/proc` and `/sys`.
    ///
    /// # Errors
    /// When `/proc` is not mounted or not in the form of proc(5).
    pub fn read() -> Result<Self> {
        let path = "/proc/thread-self/status";
        let status =
            fs::read_to_string(path).with_context(|| format!("can't read {path}: mount /proc"))?;
        let map = fs::read_to_string("/proc/self/uid_map")
            .context("can't read /proc/self/uid_map: mount /proc")?;
        // Missing without the lockdown LSM or securityfs; then it is unknown.
        let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").ok();
        Self::parse(&status, &map, lockdown.as_deref())
            .with_context(|| format!("{path} does not have the format of proc(5)"))
    }

    fn parse(status: &str, uid_map: &str, lockdown: Option<&str>) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.strip_prefix(':').map(str::trim)
        };
        let whole_range = ["0", "0", "4294967295"];
        Some(Self {
            is_root: Uid::effective().is_root(),
            effective: u64::from_str_radix(field("CapEff")?, 16).ok()?,
            // Absent in a kernel without seccomp.
            has_seccomp: field("Seccomp").is_some_and(|mode| mode != "0"),
            in_user_namespace: !uid_map.split_ascii_whitespace().eq(whole_range),
            lockdown: lockdown.and_then(selected),
        })
    }

    /// Whether a capability, or one that includes it, is in the effective set.
    #[must_use]
    pub fn has(&self, capability: Capability) -> bool {
        let is_set = |capability: Capability| self.effective >> capability.bit() & 1 == 1;
        let stands_in = matches!(capability, Capability::Bpf | Capability::Perfmon);
        is_set(capability) || (stands_in && is_set(Capability::SysAdmin))
    }
}

/// The word in brackets: `none [integrity] confidentiality`.
fn selected(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "         0          0 4294967295\n";

    fn rights(effective: &str, seccomp: &str, map: &str, lockdown: Option<&str>) -> Rights {
        let status = format!("Name:\tx\nCapEff:\t{effective}\nSeccomp:\t{seccomp}\n");
        Rights::parse(&status, map, lockdown).unwrap()
    }

    #[test]
    fn sys_admin_stands_in_for_bpf_and_perfmon_only() {
        let admin = rights("0000000000200000", "0", WHOLE, None);
        assert!(admin.has(Capability::Bpf) && admin.has(Capability::Perfmon));
        assert!(!admin.has(Capability::NetAdmin) && !admin.has_seccomp);
        let bpf = rights("0000008000001000", "2", WHOLE, None);
        assert!(bpf.has(Capability::Bpf) && bpf.has(Capability::NetAdmin) && bpf.has_seccomp);
        assert!(!bpf.has(Capability::SysAdmin) && !bpf.has(Capability::Perfmon));
    }

    #[test]
    fn user_namespaces_and_lockdown_are_seen() {
        let found = rights(
            "0",
            "0",
            "0 1000 1\n",
            Some("none integrity [confidentiality]\n"),
        );
        assert!(found.in_user_namespace);
        assert_eq!(found.lockdown.as_deref(), Some("confidentiality"));
        let found = rights("0", "0", WHOLE, Some("[none] integrity confidentiality\n"));
        assert_eq!(
            (found.in_user_namespace, found.lockdown.as_deref()),
            (false, Some("none"))
        );
        assert!(Rights::parse("CapEff:\tzz\n", WHOLE, None).is_none());
    }
}
