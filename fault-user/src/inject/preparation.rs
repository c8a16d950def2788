//! Loads and attaches the programs of a plan, without applying its rules.

use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};
use fault_common::abi::{NAMES_MAX, PLACES, RULES_MAX, holder, modifier};
use fault_common::dns::{DOCKER, DockerPorts};
use nix::errno::Errno;

use super::connections;
use super::distributions;
use super::divider::Divider;
use super::places::Reservation;
use super::xdp;
use crate::hold::qdiscs::Qdiscs;
use crate::inject::follow::InterfaceWatcher;
use crate::inject::idle::Idle;
use crate::inject::injection::{InjectionOptions, PreparedInjection};
use crate::inject::injector::{Attachment, Capacity, ClockResolution, Injector, LoadOptions};
use crate::inject::reach::IngressMechanism;
use crate::inject::reach::{InterfaceSet, may_let_loopback_come_back, note, places};
use crate::inject::tracer::Tracer;
use crate::plan::Plan;
use crate::plan::needs::Needs;
use crate::plan::tables::{PacketRule, ProtocolClass, RuleTables, compile};
use crate::sys::net::interfaces::{Interface, list};
use crate::sys::net::ip_address;
use crate::sys::net::own_links::link_name;
use crate::sys::net::tap::Tap;
use crate::sys::process::sockets;
use crate::sys::version;
use crate::tell::step;
use crate::undo::change::join;
use crate::undo::instance::{Instance, Marks};
use crate::undo::journal::Journal;

/// Loads and attaches the programs of a plan. They do nothing before [`PreparedInjection::start`].
///
/// # Errors
/// A system call fails, or an interface can't be used; attached programs are then removed.
pub fn prepare(
    plan: &Plan,
    interfaces: &[Interface],
    injection_options: &InjectionOptions,
) -> Result<PreparedInjection> {
    prepare_noting(plan, interfaces, injection_options, None)
}

/// As [`prepare`], for a caller that has already started this process's journal.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_noting(
    plan: &Plan,
    interfaces: &[Interface],
    injection_options: &InjectionOptions,
    journal: Option<Journal>,
) -> Result<PreparedInjection> {
    let mut journal = journal;
    let instance = join()?;
    let qdiscs = match plan.qdiscs()? {
        Some(kind) => {
            let number = instance.number();
            let record = |change| note(&mut journal, change);
            Some(Qdiscs::install(kind, interfaces, number, record)?)
        }
        None => None,
    };
    prepare_behind(
        instance,
        qdiscs,
        plan,
        interfaces,
        injection_options,
        journal,
    )
}

/// As [`prepare_noting`], with the qdiscs that hold packets already set up.
fn prepare_behind(
    instance: Instance,
    qdiscs: Option<Qdiscs>,
    plan: &Plan,
    interfaces: &[Interface],
    injection_options: &InjectionOptions,
    mut journal: Option<Journal>,
) -> Result<PreparedInjection> {
    let entries = plan.entries();
    let tables = compile(&entries, None)?;
    let unheld = plan.holds().then(|| check_holding(interfaces));
    let unheld = unheld.transpose()?.flatten();
    let create_tap = || Tap::create(&link_name(instance.number()), "a delay");
    let tap = plan.needs_delay_line().then(create_tap).transpose()?;
    // Streams need no packet program. Rules that may be replaced may become rules for packets.
    let has_packets = !entries.is_empty() || injection_options.live;
    let interfaces = if has_packets { interfaces } else { &[] };
    let device = tap.as_ref().map(device_of).transpose()?;
    let is_needed = has_packets && (injection_options.divides || Needs::of(&entries).divides());
    let created = is_needed.then(|| create_divider(instance.number(), &mut journal));
    let (divider, undivided) = match created.transpose() {
        Ok(divider) => (divider, None),
        Err(error) => (None, Some(error)),
    };
    let places = places(interfaces, device.as_ref(), divider.as_ref());
    let attachment = injection_options
        .attachment
        .unwrap_or_else(Attachment::of_kernel);
    let reservation = (attachment == Attachment::Tcx)
        .then(|| Reservation::start(&places))
        .transpose()?;
    let front = choose_front(&entries, injection_options);
    let mut options = LoadOptions {
        tap: tap.as_ref().map(Tap::index),
        divider: divider.as_ref().map(Divider::index),
        xdp: front.is_ok_and(|front| front != IngressMechanism::Tc),
        number: instance.number(),
        marks: instance.marks(),
        ..options(plan, &entries, &tables, injection_options, qdiscs.as_ref())?
    };
    let unmatched = find_docker(&mut options, interfaces)?;
    let mut injector = Injector::load(&options)?;
    injector.repeat(injection_options.replay.as_deref().unwrap_or_default())?;
    let mut reach = InterfaceSet::new(injector, interfaces, qdiscs, journal, instance)?;
    (reach.divider, reach.undivided) = (divider, undivided);
    if options.docker_ports != DockerPorts::default() && options.needs.answers() {
        reach.let_loopback_come_back("answered")?;
    }
    if plan.holds() && (injection_options.live || distributions::are_needed(&entries)) {
        let _step = step(format_args!("computing the tables of distributions"));
        reach.injector.write_spreads()?;
    }
    let attached = reach.attach_all(tap, &plan.shapers(), &places, reservation);
    // Some vendors' kernels have the version of TCX but not TCX itself.
    if attached.is_err()
        && injection_options.attachment.is_none()
        && reach.injector.attachment() == Attachment::Tcx
        && attached.as_ref().is_err_and(is_tcx_missing)
    {
        let (qdiscs, journal) = (reach.qdiscs.take(), reach.journal.take());
        drop(reach);
        // With another number: links of the first one may still be disappearing.
        let instance = join()?;
        let injection_options = InjectionOptions {
            attachment: Some(Attachment::Clsact),
            ..injection_options.clone()
        };
        return prepare_behind(
            instance,
            qdiscs,
            plan,
            interfaces,
            &injection_options,
            journal,
        );
    }
    attached?;
    match front {
        Ok(front) => reach.attach_xdp(front)?,
        Err(reason) => reach.notes.push(format!("XDP is not used: {reason}")),
    }
    reach.notes.extend(unheld);
    reach.notes.extend(unmatched);
    let start = |reach: &mut InterfaceSet| Tracer::start(reach.injector.take_traces()?, plan);
    let traced = injection_options.trace.then(|| start(&mut reach));
    let mut named = entries.iter().flat_map(|rule| &rule.protocols);
    let concern_datagrams = injection_options.live || named.any(|one| *one == ProtocolClass::Udp);
    let reach = Arc::new(Mutex::new(reach));
    let later_interfaces = injection_options
        .later_interfaces
        .clone()
        .filter(|_| has_packets)
        .map(|selection| InterfaceWatcher::watch(selection, Arc::clone(&reach)))
        .transpose()?;
    Ok(PreparedInjection {
        later_interfaces,
        idle: Idle::prepare(&entries, injection_options.live)?,
        entries,
        reach,
        scope: None,
        names: tables.named(),
        concern_datagrams,
        has_packets,
        tracer: traced.transpose()?,
    })
}

/// Creates the device that divides super-packets.
fn create_divider(number: u32, journal: &mut Option<Journal>) -> Result<Divider> {
    let _step = step(format_args!(
        "creating the device that divides super-packets"
    ));
    Divider::create(number, |change| note(journal, change))
}

/// The network device of the delay line.
fn device_of(tap: &Tap) -> Result<Interface> {
    list()?
        .into_iter()
        .find(|interface| interface.index == tap.index())
        .context("the tap device has disappeared")
}

/// A note about interfaces on which packets can't be held.
///
/// # Errors
/// There is no interface on which packets can be held.
fn check_holding(interfaces: &[Interface]) -> Result<Option<String>> {
    let unable: Vec<_> = interfaces
        .iter()
        .filter(|one| !one.can_hold)
        .map(|one| one.name.as_str())
        .collect();
    let names = unable.join(", ");
    ensure!(
        unable.len() < interfaces.len(),
        "`delay`, `rate`, `reorder` and `slot` can't hold packets of {names}: name another interface, or use a fault \
         such as `loss`"
    );
    Ok((!unable.is_empty())
        .then(|| format!("forwarded packets of {names} can't be held: they are let through")))
}

/// Chooses the mechanism for incoming packets; an error if the requested one is unsupported.
fn choose_front(
    entries: &[PacketRule],
    injection_options: &InjectionOptions,
) -> Result<IngressMechanism, &'static str> {
    if injection_options.front == IngressMechanism::Tc {
        return Ok(IngressMechanism::Tc);
    }
    let suits = if injection_options.live {
        Err("the rules are going to be replaced by others")
    } else if !version::at_least(5, 12) {
        Err("it needs Linux 5.12")
    } else {
        xdp::suits(entries)
    };
    match (suits, injection_options.front) {
        (Ok(()), front) => Ok(front),
        (Err(reason), IngressMechanism::Xdp) => Err(reason),
        // XDP was not requested.
        (Err(_), _) => Ok(IngressMechanism::Tc),
    }
}

/// The options for loading the programs, without the tap device and XDP.
fn options(
    plan: &Plan,
    entries: &[PacketRule],
    tables: &RuleTables,
    injection_options: &InjectionOptions,
    qdiscs: Option<&Qdiscs>,
) -> Result<LoadOptions> {
    let mut options = fixed_options(plan, entries, tables, injection_options)?;
    if injection_options.live {
        options = live_options(options);
    }
    if let Some(qdiscs) = qdiscs {
        options.holder = plan.held_by.holder();
        options.detour = qdiscs.detour().map(|(near, _)| near.index);
    }
    if qdiscs.is_some() || plan.needs_delay_line() {
        options.places = PLACES / 2;
    }
    if let Some(decisions) = &injection_options.replay {
        options.replay = Some(u32::try_from(decisions.len())?);
    }
    Ok(options)
}

/// Options for rules that are not replaced: unneeded features are left out.
fn fixed_options(
    plan: &Plan,
    entries: &[PacketRule],
    tables: &RuleTables,
    injection_options: &InjectionOptions,
) -> Result<LoadOptions> {
    let needs = Needs::of(entries);
    Ok(LoadOptions {
        capacity: Capacity {
            connections: if entries.is_empty() {
                1
            } else {
                connections::capacity()
            },
            ..Capacity::of(tables)?
        },
        events: injection_options.events,
        trace: injection_options.trace,
        attachment: injection_options.attachment,
        needs,
        scoped: entries.iter().any(|rule| rule.scope.is_some()),
        matches: entries.len(),
        clock: if plan.holds() || needs.modifiers & modifier::WINDOW != 0 {
            ClockResolution::Exact
        } else {
            ClockResolution::Tick
        },
        number: 0,
        marks: Marks::NONE,
        tap: None,
        holder: holder::DELAY_LINE,
        detour: None,
        places: 0,
        divider: None,
        replay: None,
        xdp: false,
        docker_ports: DockerPorts::default(),
    })
}

/// Tells the programs the ports of Docker's DNS server. Says so if rules can't match there.
fn find_docker(options: &mut LoadOptions, interfaces: &[Interface]) -> Result<Option<String>> {
    if !interfaces.iter().any(|interface| interface.loopback) {
        return Ok(None);
    }
    let ports = docker_ports()?;
    let is_there = ports != DockerPorts::default();
    if is_there && options.needs.answers() && !may_let_loopback_come_back() {
        return Ok(Some(
            "no rule matches queries to Docker's DNS server, because they can't be answered: \
             /proc/sys is read-only"
                .to_owned(),
        ));
    }
    options.docker_ports = ports;
    Ok(None)
}

/// The ports of Docker's DNS server in the calling thread's network namespace. Nothing else is expected to have sockets at
/// its address.
fn docker_ports() -> Result<DockerPorts> {
    let mut ports = DockerPorts::default();
    for socket in sockets::list()? {
        if socket.remote.is_none() && socket.local.ip() == ip_address(DOCKER) {
            match socket.protocol {
                sockets::Transport::Udp => ports.udp = socket.local.port(),
                sockets::Transport::Tcp => ports.tcp = socket.local.port(),
            }
        }
    }
    Ok(ports)
}

/// Options for rules that may be replaced.
fn live_options(first: LoadOptions) -> LoadOptions {
    /// The maps are this many times larger than the first rules need.
    const ROOM: u32 = 4;
    let needed = first.capacity;
    LoadOptions {
        capacity: Capacity {
            rules: (needed.rules * ROOM).clamp(256, RULES_MAX),
            classes: (needed.classes * ROOM).max(1024),
            hosts: (needed.hosts * ROOM).max(256),
            scopes: (needed.scopes * ROOM).max(16),
            names: u32::try_from(NAMES_MAX).unwrap_or(u32::MAX),
            connections: connections::capacity(),
        },
        needs: Needs::ALL,
        scoped: true,
        matches: usize::MAX,
        clock: ClockResolution::Exact,
        ..first
    }
}

/// Whether the error means that the kernel has no TCX.
fn is_tcx_missing(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| {
            matches!(
                io.raw_os_error().map(Errno::from_raw),
                Some(Errno::EINVAL | Errno::EOPNOTSUPP)
            )
        })
    })
}
