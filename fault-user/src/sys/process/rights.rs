//! Drops capabilities and other privileges after the setup.
//!
//! Capabilities, `no_new_privs`, seccomp filters and Landlock domains belong to threads. Each helper thread drops its
//! own when it starts. The main thread, which sets up, starts CMD and restores everything, drops them when CMD runs.
//! The bounding set stays, because it would restrict what CMD can do through sudo.
//!
//! The filters list forbidden system calls: a list of allowed ones would break with new versions of the standard
//! library, tokio or the C library. Root without capabilities still owns most files and may start any program, so
//! threads that read from the network are denied both: [`confine`].
use crate::sys::process::capabilities::Capability;
use anyhow::{Context, Result};
use landlock::{
    ABI, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::SigSet;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::path::Path;

/// `_LINUX_CAPABILITY_VERSION_3`: two words of each set.
const VERSION: u32 = 0x2008_0522;

/// System calls that no thread needs after the setup: other processes' memory, the kernel itself, mounts, the clock,
/// keys, and interfaces with a history of vulnerabilities. Most of them need a capability, but not on every kernel.
const NEVER: [libc::c_long; 38] = [
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_syslog,
];

/// Further system calls that are forbidden except on the main thread of a run, which needs them to restore everything,
/// to follow a container and to probe.
const NEVER_CONFINED: [libc::c_long; 4] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_setns,
    libc::SYS_unshare,
];

/// One 32-bit word of the three sets (`struct __user_cap_data_struct`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Words {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Drops all capabilities of the calling thread except these, and forbids the system calls of `NEVER`. Neither the
/// thread nor its children can regain them.
///
/// # Errors
/// A system call fails, for example because of a seccomp filter.
pub fn keep_only(capabilities: &[Capability]) -> Result<()> {
    keep_capabilities(capabilities)?;
    forbid(&NEVER)
}

/// Forbids the calling thread to start programs, to enter namespaces, and with Landlock (Linux 5.13) to create, change
/// or remove files, except for removing `socket`. Must be called after [`keep_only`].
///
/// # Errors
/// A system call fails, or the folder of `socket` does not exist.
pub fn confine(socket: Option<&Path>) -> Result<()> {
    forbid(&NEVER_CONFINED)?;
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_write(ABI::V3) | AccessFs::Execute)?
        .create()?;
    if let Some(path) = socket {
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let folder = PathFd::new(folder.unwrap_or(Path::new(".")))?;
        rules = rules.add_rule(PathBeneath::new(folder, AccessFs::RemoveFile))?;
    }
    rules
        .restrict_self()
        .context("restricting access to files")?;
    Ok(())
}

/// Makes system calls fail with EPERM in the calling thread and its children.
fn forbid(calls: &[libc::c_long]) -> Result<()> {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let architecture = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture)?;
    let program: BpfProgram = filter.try_into()?;
    let program = libc::sock_fprog {
        len: u16::try_from(program.len())?,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // Kernels before 5.16 would otherwise slow the thread down to mitigate a leak that only concerns programs that run
    // untrusted code.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: instructions of the kernel's own form, as many as said, which outlive the call.
    let set = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    match Errno::result(set) {
        // A kernel without filters.
        Ok(_) | Err(Errno::ENOSYS | Errno::EINVAL) => Ok(()),
        Err(error) => Err(error).context("setting a seccomp filter"),
    }
}

fn keep_capabilities(capabilities: &[Capability]) -> Result<()> {
    let header = [VERSION, 0];
    let mut sets = [Words::default(); 2];
    let ambient = libc::PR_CAP_AMBIENT_CLEAR_ALL;
    // SAFETY: the header and two words of each set, as the version says, which outlive the calls.
    unsafe {
        Errno::result(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
            .context("setting no_new_privs")?;
        Errno::result(libc::prctl(libc::PR_CAP_AMBIENT, ambient, 0, 0, 0))
            .context("clearing the ambient capabilities")?;
        let got = libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr());
        Errno::result(got).context("reading the capabilities")?;
        for (index, words) in (0_u32..).zip(&mut sets) {
            let kept = capabilities
                .iter()
                .map(|one| one.bit())
                .filter(|bit| bit / 32 == index)
                .fold(0, |kept, bit| kept | 1 << (bit % 32));
            words.permitted &= kept;
            words.effective = words.permitted;
            words.inheritable = 0;
        }
        let set = libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr());
        Errno::result(set).context("dropping capabilities")?;
    }
    Ok(())
}

/// Creates the calling thread's sockets as an unprivileged user from now on, if it has the capability for that.
/// Otherwise a relayed connection would let its client pass for root with servers that check the owner, as the control
/// API does.
pub fn disown_sockets() {
    const NOBODY: u32 = 65_534;
    if nix::unistd::geteuid().is_root() {
        nix::unistd::setfsuid(NOBODY.into());
    }
}

/// Makes the calling thread a helper: it keeps only these capabilities, is confined, and blocks signals, because a
/// handler on it could not forward them.
pub fn be_helper(capabilities: &[Capability]) {
    settle(capabilities, || confine(None));
}

/// [`be_helper`] for a thread that accesses sockets of other processes, which Landlock would forbid.
pub fn be_helper_beside_others(capabilities: &[Capability]) {
    settle(capabilities, || forbid(&NEVER_CONFINED));
}

fn settle(capabilities: &[Capability], confine: impl FnOnce() -> Result<()>) {
    let settled = SigSet::all()
        .thread_block()
        .context("blocking signals")
        .and_then(|()| keep_only(capabilities))
        .and_then(|()| confine());
    if let Err(error) = settled {
        log::warn!("a helper thread keeps capabilities that it does not need: {error:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::fs;
    use std::io::ErrorKind;
    use std::process::Command;

    /// Rights of a thread are its own.
    fn apart(work: impl FnOnce() + Send + 'static) {
        if let Err(panic) = std::thread::spawn(work).join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn has_landlock() -> bool {
        const VERSION: libc::c_long = 1;
        let none = std::ptr::null::<u8>();
        // SAFETY: no attributes are read when the version is asked for.
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, VERSION) > 0 }
    }

    fn trace_me() -> nix::Result<libc::c_long> {
        // SAFETY: no memory is involved. It would only let this process's parent trace it.
        Errno::result(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) })
    }

    #[test]
    fn the_first_thread_still_starts_programs_and_writes_files() {
        apart(|| {
            keep_only(&[]).unwrap();
            assert_eq!(trace_me(), Err(Errno::EPERM));
            assert!(Command::new("true").status().unwrap().success());
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("report"), "x").unwrap();
        });
    }

    #[test]
    fn a_helper_starts_nothing_and_changes_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("there");
        fs::write(&path, "as it was").unwrap();
        let kept = path.clone();
        apart(move || {
            be_helper(&[]);
            assert_eq!(trace_me(), Err(Errno::EPERM));
            // It needs no capability.
            assert_eq!(unshare(CloneFlags::CLONE_FILES), Err(Errno::EPERM));
            let started = Command::new("true").status().map_err(|error| error.kind());
            assert_eq!(started.unwrap_err(), ErrorKind::PermissionDenied);
            assert_eq!(fs::read_to_string(&path).unwrap(), "as it was");
            if !has_landlock() {
                eprintln!("skipped: needs landlock");
                return;
            }
            let refused = [
                fs::write(&path, "changed"),
                fs::write(path.with_extension("new"), ""),
                fs::remove_file(&path),
            ];
            for one in refused {
                assert_eq!(one.unwrap_err().kind(), ErrorKind::PermissionDenied);
            }
        });
        assert_eq!(fs::read_to_string(kept).unwrap(), "as it was");
    }

    #[test]
    fn a_socket_may_be_removed_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        fs::write(&path, "").unwrap();
        apart(move || {
            keep_only(&[]).unwrap();
            confine(Some(&path)).unwrap();
            assert!(!has_landlock() || fs::write(&path, "x").is_err());
            fs::remove_file(&path).unwrap();
        });
    }
}
