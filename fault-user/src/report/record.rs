//! Writes decisions that fire to a file during the run.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow};
use fault_common::abi::{DecisionKey, Event, action, direction, rule_uid, state_of};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::inject::records::DecisionEvents;
use crate::relay::{DecisionLog, StreamDecision};
use crate::sys::process::rights::be_helper;

/// Interval in milliseconds at which the recorder checks whether to end.
const PATIENCE_MS: u16 = 50;

/// A line of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Recorded {
    /// Of a packet rule.
    Packet(Decision),
    /// Of a stream rule.
    Stream(StreamDecision),
}

/// A decision about a packet that fired, in the file's format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The rule's entry, from 1, in the order of the rules.
    pub rule: u32,
    /// The connection's ordinal among those of the rule, from 1.
    pub connection: u32,
    /// The packet's ordinal in its connection and direction, from 1.
    pub packet: u64,
    /// The packet's ordinal among those that passed the rule's filters, inside or outside its windows. A replay finds
    /// the packet by it.
    pub seen: u32,
    /// `to-server` or `to-client`.
    pub direction: Cow<'static, str>,
    /// For a later fragment, its offset in the datagram in units of eight bytes; otherwise 0 and omitted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub fragment: u16,
    /// The action.
    pub action: Cow<'static, str>,
    /// Bytes on the wire.
    pub bytes: u32,
    /// Wire packets.
    pub segments: u16,
    /// The time in nanoseconds of `CLOCK_MONOTONIC`.
    pub time_ns: u64,
}

impl From<Event> for Decision {
    fn from(event: Event) -> Self {
        Self {
            rule: state_of(event.rule) + 1,
            connection: event.connection,
            packet: event.packet,
            seen: event.seen,
            direction: Cow::Borrowed(if event.direction == direction::TO_SERVER {
                "to-server"
            } else {
                "to-client"
            }),
            fragment: event.fragment,
            action: Cow::Borrowed(action_name(event.action)),
            bytes: event.bytes,
            segments: event.segments,
            time_ns: event.time_ns,
        }
    }
}

impl Decision {
    /// The key by which the programs find the decision, and the ordinal with which it was made.
    #[must_use]
    pub fn key(&self) -> (DecisionKey, u64) {
        let key = DecisionKey {
            rule: rule_uid(1, self.rule.saturating_sub(1)),
            connection: self.connection,
            seen: self.seen,
            direction: u16::from(self.direction == "to-client"),
            fragment: self.fragment,
        };
        (key, self.packet)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields so")]
fn is_zero(fragment: &u16) -> bool {
    *fragment == 0
}

/// The name of an action in reports.
#[must_use]
pub fn action_name(action: u8) -> &'static str {
    match action {
        action::DROP => "drop",
        action::DROP_CHECKSUM => "drop-checksum",
        action::REJECT_RST => "reject-rst",
        action::REJECT_ICMP => "reject-icmp",
        action::RESET => "reset",
        action::CORRUPT => "corrupt",
        action::DUPLICATE => "duplicate",
        action::ECN => "ecn",
        action::HOLD => "hold",
        action::OVERTAKE => "overtake",
        _ => "unknown",
    }
}

/// The recording thread.
pub struct Recorder {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
    path: PathBuf,
}

impl Recorder {
    /// Starts writing the `events` and the decisions in `log` to `file`, which is at `path`, one JSON object per line.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn start(
        events: DecisionEvents,
        log: Arc<DecisionLog>,
        file: File,
        path: PathBuf,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || {
                be_helper(&[]);
                record(events, &log, BufWriter::new(file), &stopped)
            })
            .context("starting the thread that records events")?;
        Ok(Self { stop, thread, path })
    }

    /// Writes the remaining events and closes the file.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn finish(self) -> Result<()> {
        self.stop.store(true, Ordering::Release);
        let result = self
            .thread
            .join()
            .map_err(|_| anyhow!("the recorder panicked"))?;
        result.with_context(|| format!("can't write {}", self.path.display()))
    }
}

fn record(
    mut events: DecisionEvents,
    log: &DecisionLog,
    mut file: BufWriter<File>,
    stop: &AtomicBool,
) -> Result<()> {
    let (mut batch, mut streams) = (Vec::new(), Vec::new());
    loop {
        // Checked first, so that events from before the end are still drained below.
        let last = stop.load(Ordering::Acquire);
        events.drain(&mut batch);
        log.drain(&mut streams);
        let packets = batch.drain(..).map(|event| Recorded::Packet(event.into()));
        for line in packets.chain(streams.drain(..).map(Recorded::Stream)) {
            serde_json::to_writer(&mut file, &line)?;
            file.write_all(b"\n")?;
        }
        if last {
            file.flush()?;
            return Ok(());
        }
        let mut waiting = [PollFd::new(events.fd(), PollFlags::POLLIN)];
        poll(&mut waiting, PollTimeout::from(PATIENCE_MS))?;
    }
}
