//! A rule's stream fault as the relay takes it.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::relay::Fault as Toxic;
use crate::relay::fault;
use crate::relay::fault::{CloseMode, Probability};
use crate::rule::{CloseHow, CorruptAt, CorruptDataMode, ErrorReply, Fault, LifetimeFrom, MixArm};

/// Parts per million as a share of one.
#[must_use]
pub fn share(ppm: u32) -> f64 {
    f64::from(ppm) / 1e6
}

/// Whether the fault acts on each direction by itself, so that `dir=both` puts it on both.
#[must_use]
pub fn is_one_way(fault: &Fault) -> bool {
    matches!(
        fault,
        Fault::Latency { .. }
            | Fault::Bandwidth { .. }
            | Fault::SlowClose { .. }
            | Fault::Slicer { .. }
            | Fault::LimitData { .. }
            | Fault::Stall
            | Fault::Discard
            | Fault::CloseOnData { .. }
            | Fault::CorruptData { .. }
            | Fault::Coalesce { .. }
            | Fault::Substitute { .. }
    ) || matches!(fault, Fault::Mix(arms) if arms.iter().any(|arm| is_one_way(&arm.fault)))
}

/// What `dir=both` puts on the way to the server: of a mix only the arms that act on each direction by itself. The
/// others act once, on the way to the client.
///
/// # Errors
/// As [`toxic`].
pub fn one_way_part(rule: &Fault) -> Result<Toxic> {
    let mut toxic = toxic(rule)?;
    if let (Toxic::Mix(mix), Fault::Mix(arms)) = (&mut toxic, rule) {
        for (share, arm) in mix.faults.iter_mut().zip(arms) {
            if !is_one_way(&arm.fault) {
                share.fault = Toxic::Noop(fault::Nothing {});
            }
        }
    }
    Ok(toxic)
}

/// How long the fault holds each byte or end of a stream at most, where it says so itself.
#[must_use]
pub fn delay(fault: &Fault) -> Duration {
    match fault {
        Fault::Latency {
            latency_ns,
            jitter_ns,
        } => Duration::from_nanos(latency_ns.saturating_add(*jitter_ns)),
        Fault::SlowClose { delay_ns } | Fault::Slicer { delay_ns, .. } => {
            Duration::from_nanos(*delay_ns)
        }
        Fault::Timeout { timeout_ns } | Fault::ResetPeer { timeout_ns } => {
            Duration::from_nanos(*timeout_ns)
        }
        Fault::Coalesce { max_wait_ns, .. } => Duration::from_nanos(*max_wait_ns),
        Fault::Mix(arms) => {
            let delays = arms.iter().map(|arm| delay(&arm.fault));
            delays.max().unwrap_or_default()
        }
        _ => Duration::ZERO,
    }
}

/// The relay's fault for a rule's.
///
/// # Errors
/// What has no meaning on a stream, or is finer than the relay's milliseconds.
pub fn toxic(rule: &Fault) -> Result<Toxic> {
    Ok(match rule {
        Fault::Latency {
            latency_ns,
            jitter_ns,
        } => Toxic::Latency(fault::Latency {
            latency: milliseconds(*latency_ns)?,
            jitter: milliseconds(*jitter_ns)?,
        }),
        Fault::Bandwidth {
            bits_per_second,
            shared,
        } => Toxic::Bandwidth(fault::Bandwidth {
            rate: fault::Rate(kilobytes(*bits_per_second)),
            shared: *shared,
        }),
        Fault::SlowClose { delay_ns } => Toxic::SlowClose(fault::SlowClose {
            delay: milliseconds(*delay_ns)?,
        }),
        Fault::Timeout { timeout_ns } => Toxic::Timeout(fault::Timeout {
            timeout: milliseconds(*timeout_ns)?,
        }),
        Fault::ResetPeer { timeout_ns } => Toxic::ResetPeer(fault::ResetPeer {
            timeout: milliseconds(*timeout_ns)?,
        }),
        Fault::Slicer {
            average_size_bytes,
            size_variation_bytes,
            delay_ns,
        } => Toxic::Slicer(fault::Slicer {
            average_size: number(*average_size_bytes),
            size_variation: number(*size_variation_bytes),
            delay: number(delay_ns / 1000),
        }),
        Fault::LimitData { bytes, shared } => Toxic::LimitData(fault::LimitData {
            bytes: number(*bytes),
            shared: *shared,
            every: false,
        }),
        other => return ending(other),
    })
}

/// Faults that end connections, or change what they carry.
fn ending(rule: &Fault) -> Result<Toxic> {
    let nothing = fault::Nothing {};
    Ok(match rule {
        Fault::NoAccept => Toxic::NoAccept(nothing),
        Fault::Stall => Toxic::Stall(nothing),
        Fault::Discard => Toxic::Discard(nothing),
        Fault::CloseOnData { how } => Toxic::CloseOnData(fault::CloseOnData { mode: mode(*how) }),
        Fault::Close { count, how } => Toxic::Close(fault::Close {
            count: number(count.unwrap_or(0)),
            mode: mode(*how),
        }),
        Fault::CorruptData { mode, at } => Toxic::CorruptData(fault::CorruptData {
            mode: match mode {
                CorruptDataMode::Flip => fault::CorruptMode::Flip,
                CorruptDataMode::Zero => fault::CorruptMode::Zero,
                CorruptDataMode::Random => fault::CorruptMode::Random,
            },
            probability: match at {
                CorruptAt::Probability(ppm) => Some(Probability(share(*ppm))),
                CorruptAt::Offset(_) => None,
            },
            offset: match at {
                CorruptAt::Probability(_) => None,
                CorruptAt::Offset(offset) => Some(*offset),
            },
        }),
        Fault::Lifetime {
            time_ns,
            jitter_ns,
            from,
        } => Toxic::Lifetime(fault::Lifetime {
            time: milliseconds(*time_ns)?,
            jitter: milliseconds(*jitter_ns)?,
            from: match from {
                LifetimeFrom::Connect => fault::LifetimeStart::Connect,
                LifetimeFrom::FirstData => fault::LifetimeStart::FirstData,
            },
            mode: CloseMode::Fin,
        }),
        Fault::Coalesce {
            min_bytes,
            max_wait_ns,
        } => Toxic::Coalesce(fault::Coalesce {
            min_bytes: number(*min_bytes),
            max_wait: milliseconds(*max_wait_ns)?,
        }),
        Fault::Substitute { regex, replacement } => Toxic::Substitute(fault::Substitute {
            regex: regex.clone(),
            replacement: replacement.clone(),
            max_wait: 0,
        }),
        Fault::Error(reply) => Toxic::Error(error_reply(reply)?),
        Fault::Transient { errors, reply } => {
            let reply = reply.as_ref().map(error_reply).transpose()?;
            let reply = reply.unwrap_or_else(|| fault::ErrorReply {
                protocol: fault::Protocol::None,
                ..fault::ErrorReply::default()
            });
            Toxic::Transient(fault::Transient {
                count: number(*errors),
                protocol: reply.protocol,
                status: reply.status,
                message: reply.message,
                size: reply.size,
                per_connection: false,
            })
        }
        Fault::Abort => Toxic::Abort(fault::Abort::default()),
        Fault::Mix(arms) => Toxic::Mix(fault::Mix {
            faults: arms.iter().map(arm).collect::<Result<_>>()?,
        }),
        other => bail!("`{}` does not act on a stream", other.name()),
    })
}

fn arm(arm: &MixArm) -> Result<fault::Share> {
    let toxic = toxic(&arm.fault)?;
    if toxic.is_proxy_wide() {
        bail!(
            "`{}` acts on the service as a whole: it can't be part of a mix",
            arm.fault.name()
        );
    }
    Ok(fault::Share {
        share: Probability(share(arm.probability)),
        fault: toxic,
    })
}

/// A rule's error as the relay has it.
fn error_reply(reply: &ErrorReply) -> Result<fault::ErrorReply> {
    let (protocol, message) = match reply {
        ErrorReply::Http(_) => (fault::Protocol::Http, &None),
        ErrorReply::Redis(text) => (fault::Protocol::Redis, text),
        ErrorReply::Mysql(text) => (fault::Protocol::Mysql, text),
        ErrorReply::Smtp(text) => (fault::Protocol::Smtp, text),
        ErrorReply::Memcache(text) => (fault::Protocol::Memcache, text),
        ErrorReply::Random(_) => (fault::Protocol::Random, &None),
    };
    let status = match reply {
        ErrorReply::Http(statuses) => statuses.clone(),
        _ => Vec::new(),
    };
    let size = match reply {
        ErrorReply::Random(bytes) => Some(*bytes),
        _ => None,
    };
    fault::check_reply(&status, message.as_deref(), size).map_err(anyhow::Error::msg)?;
    Ok(fault::ErrorReply {
        protocol,
        status,
        message: message.clone(),
        size,
    })
}

fn mode(how: CloseHow) -> CloseMode {
    match how {
        CloseHow::Fin => CloseMode::Fin,
        CloseHow::Rst => CloseMode::Rst,
    }
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn milliseconds(ns: u64) -> Result<i64> {
    if !ns.is_multiple_of(1_000_000) {
        bail!("stream faults count time in whole milliseconds: use 1ms or a multiple");
    }
    Ok(number(ns / 1_000_000))
}

/// Kilobytes per second.
#[expect(
    clippy::cast_precision_loss,
    reason = "no link has a rate that needs more than 52 bits"
)]
fn kilobytes(bits_per_second: u64) -> f64 {
    bits_per_second as f64 / 8000.0
}
