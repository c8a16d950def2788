//! Rights that are given up once everything is set up.
//!
//! Capabilities and `no_new_privs` belong to threads. Each helper thread gives up its own as it starts; the first
//! thread, which sets up, starts CMD and heals, does so when CMD runs. The bounding set stays: CMD is somebody else's
//! program, and what it may do through sudo is not for `fault` to say.
use crate::doctor::capabilities::Capability;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::SigSet;

/// `_LINUX_CAPABILITY_VERSION_3`: two words of each set.
const VERSION: u32 = 0x2008_0522;

/// One 32-bit word of the three sets (`struct __user_cap_data_struct`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Words {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// From here on the calling thread has no capability but these, and only those of them that it had. Neither it nor what
/// it starts can get any back.
///
/// # Errors
/// The kernel refuses, which a seccomp filter can make it do.
pub fn keep_only(capabilities: &[Capability]) -> Result<()> {
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
        Errno::result(set).context("giving up capabilities")?;
    }
    Ok(())
}

/// Makes the calling thread a helper: it keeps these capabilities, and signals are for the others. A handler that runs
/// here could not pass them on.
pub fn be_helper(capabilities: &[Capability]) {
    let settled = SigSet::all()
        .thread_block()
        .context("blocking signals")
        .and_then(|()| keep_only(capabilities));
    if let Err(error) = settled {
        log::warn!("a helper thread keeps rights that it does not need: {error:#}");
    }
}
