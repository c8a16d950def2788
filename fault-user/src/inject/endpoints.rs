//! Counts the endpoints that processes connected to, sent datagrams to or bound sockets to. They explain why a rule
//! never matched.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::{CgroupSock, CgroupSockAddr};
use fault_common::abi::{Endpoint, endpoint};
use nix::errno::Errno;

use crate::rule::Protocol;
use crate::sys::bpf::cgroup_link::{CgroupLink, Hook};
use crate::sys::bpf::object::program;
use crate::sys::bpf::verifier;
use crate::sys::net::ip_address;

/// An endpoint and how often it was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointUse {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Whether sockets were bound to it; otherwise processes connected or sent to it.
    pub is_bound: bool,
    /// Whether it was used in another network namespace than that of the rules.
    pub is_elsewhere: bool,
    /// The number of uses.
    pub times: u64,
}

/// All endpoints that processes used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Endpoints that are counted individually.
    pub known: Vec<EndpointUse>,
    /// The number of uses of endpoints that did not fit into the map.
    pub left_out: u64,
    /// The number of connects to Unix sockets (counted from Linux 6.7 on).
    pub unix: u64,
}

/// Attaches the programs that count the endpoints of a cgroup's processes.
///
/// # Errors
/// A system call fails.
pub(super) fn attach(ebpf: &mut Ebpf, cgroup: &Path) -> Result<Vec<CgroupLink>> {
    let mut links = Vec::new();
    for (name, hook) in [
        ("fault_dial4", Hook::Connect4),
        ("fault_dial6", Hook::Connect6),
        ("fault_dial_send4", Hook::Send4),
        ("fault_dial_send6", Hook::Send6),
    ] {
        let program: &mut CgroupSockAddr = program(ebpf, name)?;
        program
            .load()
            .map_err(|error| anyhow!(verifier::summary(name, &error)))?;
        links.push(CgroupLink::attach(program.fd()?.as_fd(), cgroup, hook)?);
    }
    for (name, hook) in [
        ("fault_bound4", Hook::PostBind4),
        ("fault_bound6", Hook::PostBind6),
    ] {
        let program: &mut CgroupSock = program(ebpf, name)?;
        program
            .load()
            .map_err(|error| anyhow!(verifier::summary(name, &error)))?;
        links.push(CgroupLink::attach(program.fd()?.as_fd(), cgroup, hook)?);
    }
    let Some(Map::Array(counter)) = ebpf.map("UNIX_CONNECTS") else {
        return Err(anyhow!("the eBPF object has no array UNIX_CONNECTS"));
    };
    match unix_connects(counter) {
        Ok(program) => links.push(CgroupLink::attach(
            program.as_fd(),
            cgroup,
            Hook::UnixConnect,
        )?),
        // Unsupported before Linux 6.7.
        Err(Errno::EINVAL) => {}
        Err(error) => return Err(error).context("loading the program that counts Unix sockets"),
    }
    Ok(links)
}

/// Reads the counters. `netns` is the cookie of the rules' network namespace, or 0 if unknown; `only_here` leaves out
/// other namespaces, and what is bound to ports of the kernel's choice.
///
/// # Errors
/// A map can't be accessed.
pub(super) fn read(ebpf: &Ebpf, netns: u64, only_here: bool) -> Result<Endpoints> {
    let known: HashMap<&MapData, Endpoint, u64> = map(ebpf, "ENDPOINTS")?.try_into()?;
    let first = |name| -> Result<u64> {
        let array: Array<&MapData, u64> = map(ebpf, name)?.try_into()?;
        Ok(array.get(&0, 0)?)
    };
    let mut endpoints = Endpoints {
        known: Vec::new(),
        left_out: first("ENDPOINTS_LEFT_OUT")?,
        // Their namespaces are not counted.
        unix: if only_here {
            0
        } else {
            first("UNIX_CONNECTS")?
        },
    };
    let ephemeral = ephemeral_ports()?;
    for entry in &known {
        let (key, times) = entry?;
        // Of a whole host, sockets at a port of the kernel's choice are no services. Many of them are `fault`'s own.
        let is_left_out =
            |one: &EndpointUse| one.is_elsewhere || one.is_bound && ephemeral.contains(&one.port);
        let one = EndpointUse::of(&key, times, netns);
        endpoints
            .known
            .extend(one.filter(|one| !(only_here && is_left_out(one))));
    }
    Ok(endpoints)
}

/// The ports that the kernel chooses from.
fn ephemeral_ports() -> Result<RangeInclusive<u16>> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .context("can't read which ports the kernel chooses from")?;
    let ends: Vec<_> = text.split_whitespace().map(str::parse).collect();
    match ends.as_slice() {
        [Ok(first), Ok(last)] => Ok(*first..=*last),
        _ => bail!("/proc/sys/net/ipv4/ip_local_port_range is not two ports: {text}"),
    }
}

fn map<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a Map> {
    ebpf.map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))
}

impl EndpointUse {
    /// Decodes a key; `None` for protocols other than TCP and UDP.
    fn of(key: &Endpoint, times: u64, netns: u64) -> Option<Self> {
        let protocol = match i32::from(key.protocol) {
            libc::IPPROTO_TCP => Protocol::Tcp,
            libc::IPPROTO_UDP => Protocol::Udp,
            _ => return None,
        };
        Some(Self {
            protocol,
            address: ip_address(key.address),
            port: key.port,
            is_bound: key.act == endpoint::BOUND,
            is_elsewhere: netns != 0 && key.netns != netns,
            times,
        })
    }
}

/// Loads a program for `BPF_CGROUP_UNIX_CONNECT` that counts its calls in the first entry of `counter`. Done by hand,
/// because aya does not support such programs.
fn unix_connects(counter: &MapData) -> Result<OwnedFd, Errno> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const CGROUP_SOCK_ADDR: u32 = 18;
    /// The start of `union bpf_attr` for that command.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        kind: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log: [u64; 2],
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        hook: u32,
    }
    let map = u64::from(counter.fd().as_fd().as_raw_fd().cast_unsigned());
    // Each is code, registers (source and destination), offset, immediate value: `struct bpf_insn`.
    let instruction = |code: u64, registers: u64, offset: i16, value: u64| {
        code | registers << 8 | u64::from(offset.cast_unsigned()) << 16 | value << 32
    };
    let program = [
        instruction(0x62, 0x0a, -4, 0),          // *(u32 *)(r10 - 4) = 0
        instruction(0xbf, 0xa2, 0, 0),           // r2 = r10
        instruction(0x07, 0x02, 0, 0xffff_fffc), // r2 += -4
        instruction(0x18, 0x11, 0, map),         // r1 = the map
        0,
        instruction(0x85, 0, 0, 1),    // r0 = bpf_map_lookup_elem(r1, r2)
        instruction(0x15, 0x00, 2, 0), // if r0 == 0 skip the next two
        instruction(0xb7, 0x01, 0, 1), // r1 = 1
        instruction(0xdb, 0x10, 0, 0), // lock *(u64 *)r0 += r1
        instruction(0xb7, 0x00, 0, 1), // r0 = 1
        instruction(0x95, 0, 0, 0),    // return r0
    ];
    let attributes = Attributes {
        kind: CGROUP_SOCK_ADDR,
        instruction_count: 11,
        instructions: program.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        name: *b"fault_unix\0\0\0\0\0\0",
        hook: Hook::UnixConnect as u32,
        ..Attributes::default()
    };
    // SAFETY: what the structure points to lives through the call, and its size is told.
    let program = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    let program = i32::try_from(Errno::result(program)?).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the call has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(program) })
}
