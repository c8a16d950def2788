//! The bpf(2) system call for probes: tiny programs, loaded, attached for an instant, closed.
//!
//! aya loads whole objects; a probe is two instructions, and its error number is the answer.
use nix::libc;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `BPF_PROG_LOAD` and `BPF_LINK_CREATE` of `enum bpf_cmd` in `linux/bpf.h`.
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

/// Numbers of `enum bpf_prog_type`.
pub(crate) mod program_type {
    pub const SCHED_CLS: u32 = 3;
    pub const XDP: u32 = 6;
    pub const CGROUP_SOCK_ADDR: u32 = 18;
    pub const SK_LOOKUP: u32 = 30;
}

/// Numbers of `enum bpf_attach_type`.
pub(crate) mod attach_type {
    pub const CGROUP_INET4_CONNECT: u32 = 10;
    pub const SK_LOOKUP: u32 = 36;
    pub const XDP: u32 = 37;
    pub const TCX_INGRESS: u32 = 46;
    pub const TCX_EGRESS: u32 = 47;
}

/// `XDP_FLAGS_SKB_MODE`: in the stack rather than the driver, which works on every interface.
pub(crate) const XDP_GENERIC: u32 = 1 << 1;

/// The part of `union bpf_attr` for `BPF_PROG_LOAD` up to `expected_attach_type` (Linux 4.17).
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The part for `BPF_LINK_CREATE`, with room for what TCX adds (Linux 6.6). Zeros mean "none".
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    of_the_type: [u64; 2],
}

/// Loads `r0 = result; exit`.
///
/// # Errors
/// The kernel's: `EINVAL` for a type it doesn't know, `EPERM` without the right capability.
pub(crate) fn load(prog_type: u32, expected_attach_type: u32, result: i32) -> io::Result<OwnedFd> {
    // struct bpf_insn: opcode, registers, offset, immediate. 0xb7 is "mov64 r0, imm", 0x95 "exit".
    let mut code = [0u8; 16];
    code[0] = 0xb7;
    code[4..8].copy_from_slice(&result.to_ne_bytes());
    code[8] = 0x95;
    let mut attr = ProgLoad {
        prog_type,
        insn_cnt: 2,
        insns: code.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
        expected_attach_type,
        ..ProgLoad::default()
    };
    attr.prog_name[..11].copy_from_slice(b"fault_probe");
    call(PROG_LOAD, &attr)
}

/// Attaches a program until the returned link is closed. `target` is an interface index or a
/// descriptor, as the type wants it.
///
/// # Errors
/// The kernel's: `EINVAL` for a type it doesn't know.
pub(crate) fn link(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let attr = LinkCreate {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target,
        attach_type,
        flags,
        ..LinkCreate::default()
    };
    call(LINK_CREATE, &attr)
}

/// Makes a bpf(2) call that returns a new descriptor, which the kernel opens close-on-exec.
fn call<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: the structures start like union bpf_attr, their size is given along, and all they
    // point to outlives the call; a non-negative result is a descriptor that nobody else owns.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        );
        match RawFd::try_from(fd) {
            Ok(fd) if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
