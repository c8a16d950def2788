//! A rule's stream fault as the relay takes it.

use anyhow::{Result, bail};

use crate::relay::Fault as Toxic;
use crate::relay::fault;
use crate::relay::fault::{CloseMode, Probability};
use crate::rule::{
    Acts, CloseHow, CorruptAt, CorruptDataMode, ErrorReply, Fault, LifetimeFrom, MixArm, faults,
};

/// Parts per million as a share of one.
#[must_use]
pub fn share(ppm: u32) -> f64 {
    f64::from(ppm) / 1e6
}

/// What `dir=both` puts on the way to the server: of a mix only the arms that act on each direction by itself. The
/// others act once, on the way to the client.
///
/// # Errors
/// As [`toxic`].
pub fn one_way_part(rule: &Fault) -> Result<Toxic> {
    let mut toxic = toxic(rule)?;
    if let (Toxic::Mix(mix), Fault::Mix(arms)) = (&mut toxic, rule) {
        for (share, arm) in mix.faults.iter_mut().zip(&arms.arms) {
            if arm.fault.part_that(Acts::OneWay).is_none() {
                share.fault = Toxic::Noop(fault::Nothing {});
            }
        }
    }
    Ok(toxic)
}

/// The relay's fault for a rule's.
///
/// # Errors
/// What has no meaning on a stream, or is finer than the relay's milliseconds.
pub fn toxic(rule: &Fault) -> Result<Toxic> {
    Ok(match rule {
        Fault::Latency(faults::Latency {
            latency_ns,
            jitter_ns,
        }) => Toxic::Latency(fault::Latency {
            latency: milliseconds(*latency_ns)?,
            jitter: milliseconds(*jitter_ns)?,
        }),
        Fault::Bandwidth(faults::Bandwidth {
            bits_per_second,
            shared,
        }) => Toxic::Bandwidth(fault::Bandwidth {
            rate: fault::Rate(kilobytes(*bits_per_second)),
            shared: *shared,
        }),
        Fault::SlowClose(faults::SlowClose { delay_ns }) => Toxic::SlowClose(fault::SlowClose {
            delay: milliseconds(*delay_ns)?,
        }),
        Fault::Timeout(faults::Timeout { timeout_ns }) => Toxic::Timeout(fault::Timeout {
            timeout: milliseconds(*timeout_ns)?,
        }),
        Fault::ResetPeer(faults::ResetPeer { timeout_ns }) => Toxic::ResetPeer(fault::ResetPeer {
            timeout: milliseconds(*timeout_ns)?,
        }),
        Fault::Slicer(faults::Slicer {
            average_size_bytes,
            size_variation_bytes,
            delay_ns,
        }) => Toxic::Slicer(fault::Slicer {
            average_size: number(*average_size_bytes),
            size_variation: number(*size_variation_bytes),
            delay: number(delay_ns / 1000),
        }),
        Fault::LimitData(faults::LimitData { bytes, shared }) => {
            Toxic::LimitData(fault::LimitData {
                bytes: number(*bytes),
                shared: *shared,
                every: false,
            })
        }
        other => return ending(other),
    })
}

/// Faults that end connections, or change what they carry.
fn ending(rule: &Fault) -> Result<Toxic> {
    let nothing = fault::Nothing {};
    Ok(match rule {
        Fault::NoAccept(_) => Toxic::NoAccept(nothing),
        Fault::Stall(_) => Toxic::Stall(nothing),
        Fault::Discard(_) => Toxic::Discard(nothing),
        Fault::CloseOnData(faults::CloseOnData { how }) => {
            Toxic::CloseOnData(fault::CloseOnData { mode: mode(*how) })
        }
        Fault::Close(faults::Close { count, how }) => Toxic::Close(fault::Close {
            count: number(count.unwrap_or(0)),
            mode: mode(*how),
        }),
        Fault::CorruptData(faults::CorruptData { mode, at }) => {
            Toxic::CorruptData(fault::CorruptData {
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
            })
        }
        Fault::Lifetime(faults::Lifetime {
            time_ns,
            jitter_ns,
            from,
        }) => Toxic::Lifetime(fault::Lifetime {
            time: milliseconds(*time_ns)?,
            jitter: milliseconds(*jitter_ns)?,
            from: match from {
                LifetimeFrom::Connect => fault::LifetimeStart::Connect,
                LifetimeFrom::FirstData => fault::LifetimeStart::FirstData,
            },
            mode: CloseMode::Fin,
        }),
        Fault::Coalesce(faults::Coalesce {
            min_bytes,
            max_wait_ns,
        }) => Toxic::Coalesce(fault::Coalesce {
            min_bytes: number(*min_bytes),
            max_wait: milliseconds(*max_wait_ns)?,
        }),
        Fault::Substitute(faults::Substitute { regex, replacement }) => {
            Toxic::Substitute(fault::Substitute {
                regex: regex.clone(),
                replacement: replacement.clone(),
                max_wait: 0,
            })
        }
        Fault::Error(error) => Toxic::Error(error_reply(&error.reply)?),
        Fault::Transient(faults::Transient { errors, reply }) => {
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
        Fault::Abort(_) => Toxic::Abort(fault::Abort::default()),
        Fault::Mix(mix) => Toxic::Mix(fault::Mix {
            faults: mix.arms.iter().map(arm).collect::<Result<_>>()?,
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
