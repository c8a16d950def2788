//! Checks requirements before anything is changed; an unmet one gives one line.
use super::probe;
use crate::sys::bpf::features::{load, program_type};
use crate::sys::process::capabilities::{Capability, Rights};
use crate::sys::process::cgroup::Hierarchy;
use nix::libc;
use std::fmt;
use std::io;
use std::path::Path;

/// A requirement of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Loading network programs and attaching them: `CAP_BPF`, `CAP_PERFMON`, `CAP_NET_ADMIN`, and bpf(2) itself.
    Programs,
    /// A tc hook: TCX, or clsact with `cls_bpf`. Checked in a temporary network namespace, which takes a few
    /// milliseconds.
    TcHook,
    /// A cgroup for the command.
    Cgroup,
    /// Becoming another user.
    SwitchUser,
    /// Entering other namespaces.
    Namespaces,
    /// The kernel's own BTF, for programs that read its structures.
    Btf,
}

/// The unmet requirements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmet(Vec<String>);

impl Unmet {
    /// One line for each unmet requirement, with a remedy.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Unmet {}

/// Checks all requirements without lasting changes.
///
/// # Errors
/// [`Unmet`] with all unmet requirements.
pub fn preflight(needs: &[Need]) -> Result<(), Unmet> {
    let rights = Rights::read().map_err(|error| Unmet(vec![format!("{error:#}")]))?;
    let mut lines = missing_rights(&rights, needs);
    for need in needs {
        let missing = match need {
            // Without the privilege to load programs, the check is pointless.
            Need::Programs | Need::TcHook if !lines.is_empty() => None,
            Need::Programs => bpf_error(&rights),
            Need::TcHook => tc_error(),
            Need::Cgroup => cgroup_error(),
            Need::Btf => btf_error(Path::new("/sys/kernel/btf/vmlinux")),
            Need::SwitchUser | Need::Namespaces => None,
        };
        lines.extend(missing);
    }
    if lines.is_empty() {
        Ok(())
    } else {
        Err(Unmet(lines))
    }
}

/// The missing capabilities; one line for an ordinary user.
fn missing_rights(rights: &Rights, needs: &[Need]) -> Vec<String> {
    let missing: Vec<Capability> = needs
        .iter()
        .flat_map(|need| match need {
            Need::Programs => &[Capability::Bpf, Capability::Perfmon, Capability::NetAdmin][..],
            Need::SwitchUser => &[Capability::Setuid, Capability::Setgid],
            Need::Namespaces => &[Capability::SysAdmin],
            Need::TcHook | Need::Cgroup | Need::Btf => &[],
        })
        .copied()
        .filter(|capability| !rights.has(*capability))
        .collect();
    if missing.is_empty() {
        if needs.contains(&Need::Programs) && rights.in_user_namespace {
            return vec![
                "this is a user namespace (a rootless container), but loading programs needs root of the host: run \
                 fault on the host or in a rootful container"
                    .to_owned(),
            ];
        }
        return Vec::new();
    }
    if !rights.is_root {
        let names: Vec<&str> = missing.iter().map(|capability| capability.name()).collect();
        return vec![format!(
            "not root, and no CAP_{}: run fault with sudo",
            names.join(", CAP_")
        )];
    }
    let line = |capability: &Capability| {
        let name = capability.name();
        let purpose = capability.purpose();
        format!("no CAP_{name} ({purpose}): in a container add --cap-add {name} or --privileged")
    };
    missing.iter().map(line).collect()
}

/// The reason why bpf(2) doesn't load a program of two instructions.
fn bpf_error(rights: &Rights) -> Option<String> {
    let error = load(program_type::SCHED_CLS, 0, -1).err()?;
    Some(explain_bpf(&error, rights))
}

pub(crate) fn explain_bpf(error: &io::Error, rights: &Rights) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no bpf(2): use one with CONFIG_BPF_SYSCALL=y".into(),
        Some(libc::EPERM | libc::EACCES) if !rights.has(Capability::Bpf) => {
            "no CAP_BPF: run fault with sudo, in a container with --cap-add BPF".into()
        }
        Some(libc::EPERM | libc::EACCES) if rights.has_seccomp => {
            "bpf(2) is blocked by seccomp: run the container with --security-opt seccomp=unconfined, with \
             --cap-add SYS_ADMIN (many profiles then allow it), or with --privileged"
                .into()
        }
        Some(libc::EPERM | libc::EACCES)
            if rights.lockdown.as_deref() == Some("confidentiality") =>
        {
            "bpf(2) is blocked by kernel lockdown: boot with lockdown=integrity or less".into()
        }
        Some(libc::EPERM | libc::EACCES) => {
            "bpf(2) is denied by a security module (SELinux, AppArmor): allow it for fault".into()
        }
        Some(libc::EINVAL) => {
            "this kernel has no tc programs: use one with CONFIG_NET_CLS_BPF=y (Linux 5.10 or later)"
                .into()
        }
        _ => format!("bpf(2) does not work: {error}"),
    }
}

fn tc_error() -> Option<String> {
    let hooks = probe::in_throw_away_netns(probe::tc_hooks);
    match hooks {
        Ok((tcx, clsact)) if tcx.is_err() && clsact.is_err() => Some(
            "this kernel has neither TCX (Linux 6.6) nor clsact with cls_bpf: modprobe sch_ingress \
             cls_bpf"
                .to_owned(),
        ),
        // If no namespace can be created, attaching itself will fail.
        Ok(_) | Err(_) => None,
    }
}

fn cgroup_error() -> Option<String> {
    match Hierarchy::find() {
        Ok(hierarchy) if hierarchy.is_writable() => None,
        Ok(hierarchy) => {
            let path = hierarchy.path().display();
            Some(format!(
                "cgroup2 at {path} is mounted read-only: mount -o remount,rw {path}, or --scope host"
            ))
        }
        Err(error) => Some(format!("{error:#}, or --scope host")),
    }
}

fn btf_error(path: &Path) -> Option<String> {
    let advice = "this kernel has no BTF: use one with CONFIG_DEBUG_INFO_BTF=y";
    (!path.exists()).then(|| advice.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};

    #[test]
    fn root_on_a_good_machine_has_all_it_needs() {
        if !nix::unistd::Uid::effective().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let needs = [
            Need::Programs,
            Need::TcHook,
            Need::Cgroup,
            Need::SwitchUser,
            Need::Namespaces,
        ];
        assert_eq!(preflight(&needs), Ok(()));
    }

    /// In a thread, since the capabilities of a thread are its own.
    fn without(capability: u32, check: impl FnOnce() + Send + 'static) {
        if !nix::unistd::Uid::effective().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let thread = std::thread::spawn(move || {
            drop_capability(capability);
            check();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn drop_capability(bit: u32) {
        let header = [0x2008_0522u32, 0];
        let mut sets = [0u32; 6];
        let (word, bit) = (bit as usize / 32, bit % 32);
        // SAFETY: two words of each of three sets, as version 3 of the header says.
        unsafe {
            let got = libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr());
            assert_eq!(got, 0);
            sets[word * 3] &= !(1 << bit);
            assert_eq!(
                libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()),
                0
            );
        }
    }

    #[test]
    fn a_missing_capability_is_one_line_that_says_what_to_do() {
        without(12, || {
            let unmet = preflight(&[Need::Programs, Need::TcHook]).unwrap_err();
            assert_eq!(
                unmet.lines(),
                [
                    "no CAP_NET_ADMIN (attaching programs, qdiscs, taps): in a container add \
                     --cap-add NET_ADMIN or --privileged"
                ]
            );
        });
        without(21, || {
            let unmet = preflight(&[Need::Programs, Need::Namespaces]).unwrap_err();
            assert_eq!(unmet.lines().len(), 1, "CAP_BPF is still there: {unmet}");
            assert!(unmet.to_string().contains("--cap-add SYS_ADMIN"), "{unmet}");
        });
    }

    #[test]
    fn errors_of_bpf_name_their_cause() {
        let mut rights = Rights::read().unwrap();
        let mut explain = |errno, seccomp, lockdown: &str| {
            rights.has_seccomp = seccomp;
            rights.lockdown = Some(lockdown.to_owned());
            explain_bpf(&io::Error::from_raw_os_error(errno), &rights)
        };
        assert!(explain(libc::EPERM, true, "none").contains("seccomp=unconfined"));
        assert!(explain(libc::EPERM, false, "confidentiality").contains("lockdown=integrity"));
        assert!(explain(libc::EPERM, false, "none").contains("security module"));
        assert!(explain(libc::ENOSYS, true, "none").contains("CONFIG_BPF_SYSCALL"));
    }

    #[test]
    fn a_read_only_cgroup2_is_told() {
        if !nix::unistd::Uid::effective().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let thread = std::thread::spawn(|| {
            // A mount namespace of this thread's own, so nobody else's cgroups change.
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let none: Option<&str> = None;
            let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
            nix::mount::mount(none, "/", none, private, none).unwrap();
            let path = Hierarchy::find().unwrap().path().to_owned();
            let flags = nix::mount::MsFlags::MS_REMOUNT
                | nix::mount::MsFlags::MS_BIND
                | nix::mount::MsFlags::MS_RDONLY;
            nix::mount::mount(none, &path, none, flags, none).unwrap();
            cgroup_error()
        });
        let line = thread.join().unwrap();
        let line = line.expect("it is read-only");
        assert!(line.contains("mount -o remount,rw"), "{line}");
    }
}
