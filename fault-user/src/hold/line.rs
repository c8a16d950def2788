//! The delay line: the thread that holds packets.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use fault_common::abi::{HOLDS, Hold, Release, hold_flag, line};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc::error::TrySendError;

use crate::hold::schedule::HoldSchedule;
use crate::hold::ways::{WayNumbers, number_of};
use crate::plan::shapers::Shapers;
use crate::relay::exchange::{Exchange, TapPacket};
use crate::sys::bpf::lease::{RENEWAL, deadline_ns, tell_lapse};
use crate::sys::bpf::mapped::MappedArray;
use crate::sys::clock::monotonic_ns;
use crate::sys::net::tap::{FRAME_MAX, HEADER_BYTES, TAG_AT, TAG_BYTES, Tap, is_super_packet};
use crate::sys::process::rights::be_helper;
use crate::tell::{step, tell};

/// Maximum number of held bytes; further packets are released at once and counted. At 1 Gbit/s these are 2 s.
pub const HELD_BYTES_MAX: usize = 256 << 20;
/// Frames that are read before due ones are released again.
const BATCH: usize = 64;
/// Number of spare buffers.
const SPARE_BUFFERS: usize = 4096;
/// Minimum interval of the heartbeat for the programs.
#[expect(clippy::cast_possible_truncation, reason = "half a second")]
const RENEWAL_NS: u64 = RENEWAL.as_nanos() as u64;

/// The maps shared by the programs and the delay line.
pub struct LineMaps {
    /// Packets on their way to the delay line.
    pub holds: MappedArray<Hold>,
    /// Packets on their way back.
    pub released: MappedArray<Release>,
    /// See [`mod@fault_common::abi::line`].
    pub state: MappedArray<u64>,
}

/// The counters of the delay line.
#[derive(Debug, Default)]
pub struct Figures {
    /// Frames that were held and released.
    pub released: AtomicU64,
    /// Frames dropped because the queue of a `rate` was full, as the rule demands.
    pub queue_full: AtomicU64,
    /// Frames that were released at once because the limit was reached.
    pub no_room: AtomicU64,
    /// Frames that the kernel did not accept.
    pub refused: AtomicU64,
    /// Whether the delay line has stopped, which was reported.
    closed: AtomicBool,
}

impl Figures {
    /// Warns once that packets are no longer held.
    fn close(&self, reason: &str) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            tell!(
                "fault: warning: the delay line has stopped ({reason}): packets are no longer delayed"
            );
        }
    }
}

/// A running delay line.
pub struct DelayLine {
    figures: Arc<Figures>,
    schedule: Arc<Mutex<HoldSchedule>>,
    stop: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    exchange: Arc<Exchange>,
    tap_index: u32,
    /// Disconnected as soon as all packets are released.
    drained: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl DelayLine {
    /// Starts the delay line with the maps that it shares with the programs.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn start(tap: Tap, maps: LineMaps, places: WayNumbers, shapers: &Shapers) -> Result<Self> {
        let tap_index = tap.index();
        let figures = Arc::new(Figures::default());
        let schedule = Arc::new(Mutex::new(HoldSchedule::new(shapers)));
        let stop = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        let exchange = Arc::new(Exchange::new(Arc::clone(&wake)));
        let mut line = Line {
            tap,
            maps,
            alive_until_ns: 0,
            ticket: 0,
            places,
            schedule: Arc::clone(&schedule),
            exchange: Arc::clone(&exchange),
            heap: BinaryHeap::new(),
            frames: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            sequence: 0,
            held_bytes: 0,
            figures: Arc::clone(&figures),
        };
        line.beat();
        let (stopped, woken) = (Arc::clone(&stop), Arc::clone(&wake));
        let (draining, drained) = channel();
        let thread = std::thread::Builder::new()
            .name("delay-line".to_owned())
            .spawn(move || {
                be_punctual();
                be_helper(&[]);
                line.run(&stopped, &woken);
                drop(draining);
                drop(line);
            })
            .context("starting the delay line")?;
        Ok(Self {
            figures,
            schedule,
            stop,
            wake,
            exchange,
            tap_index,
            drained,
            thread: Some(thread),
        })
    }

    /// Uses these rates and slots from the next packet on. Unchanged ones keep their queues.
    pub fn reshape(&self, shapers: &Shapers) {
        locked(&self.schedule).reshape(shapers);
    }

    /// The counters so far.
    #[must_use]
    pub fn figures(&self) -> Arc<Figures> {
        Arc::clone(&self.figures)
    }

    /// The exchange with relays.
    #[must_use]
    pub fn exchange(&self) -> Arc<Exchange> {
        Arc::clone(&self.exchange)
    }

    /// The index of its network device.
    #[must_use]
    pub fn tap_index(&self) -> u32 {
        self.tap_index
    }

    /// Whether it accepts packets.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.figures.closed.load(Ordering::Acquire)
    }

    /// Warns once that it no longer gets packets, with the reason.
    pub fn close(&self, reason: &str) {
        self.figures.close(reason);
    }

    /// Releases all held packets and ends. The programs must not pass packets to it any more. When this returns the
    /// packets are released; the network device is gone when the returned value is dropped.
    ///
    /// # Errors
    /// The thread can't be woken.
    pub fn finish(mut self) -> Result<ClosingLine> {
        self.end()
    }

    fn end(&mut self) -> Result<ClosingLine> {
        let Some(thread) = self.thread.take() else {
            return Ok(ClosingLine { thread: None });
        };
        self.stop.store(true, Ordering::Release);
        self.wake.write(1)?;
        let _step = step(format_args!("releasing held packets"));
        // An error: the thread has ended without saying so, which is as good.
        let _released = self.drained.recv();
        Ok(ClosingLine {
            thread: Some(thread),
        })
    }
}

/// A delay line whose packets are released, and whose network device is being removed: the kernel takes some tens of
/// milliseconds for that. Dropping this waits for it.
#[derive(Debug)]
pub struct ClosingLine {
    thread: Option<JoinHandle<()>>,
}

impl Drop for ClosingLine {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _step = step(format_args!("removing the delay line's device"));
            // If it ended early, it has reported the reason.
            drop(thread.join());
        }
    }
}

impl Drop for DelayLine {
    fn drop(&mut self) {
        match self.end() {
            Ok(ending) => drop(ending),
            Err(error) => tell!("fault: the delay line: {error:#}"),
        }
    }
}

/// Sets this thread's timer slack to its minimum, and raises its priority if permitted. Without the priority, delays
/// are only slightly less exact.
fn be_punctual() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: numbers, and a structure that lives through the call.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0);
        libc::sched_setscheduler(
            0,
            libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK,
            &raw const parameters,
        );
    }
}

fn locked(schedule: &Mutex<HoldSchedule>) -> MutexGuard<'_, HoldSchedule> {
    schedule.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sets the sizes in `hold` to those of `frame`. The kernel splits a super-packet that the tap does not accept (larger
/// than 64 KiB on loopback, or UDP before Linux 6.2), and each of its wire packets has the same ticket.
fn set_own_size(hold: &mut Hold, frame: &[u8]) {
    if hold.segments > 1 && !is_super_packet(frame) {
        hold.segments = 1;
        hold.bytes = u32::try_from(frame.len() - HEADER_BYTES - TAG_BYTES).unwrap_or(u32::MAX);
    }
}

/// The destination of a frame when it is released.
#[derive(Clone, Copy, Default)]
struct Onward {
    release: Release,
    /// The number of the relay that gets it, plus 1; 0 for none.
    relay: u16,
    to_client: bool,
}

struct Line {
    tap: Tap,
    maps: LineMaps,
    /// The last heartbeat.
    alive_until_ns: u64,
    /// The next of [`LineMaps::released`].
    ticket: u16,
    places: WayNumbers,
    /// Changed by other threads when the rules are replaced.
    schedule: Arc<Mutex<HoldSchedule>>,
    exchange: Arc<Exchange>,
    /// Frames by release time; a sequence number orders those with the same time.
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    frames: Vec<(Vec<u8>, Onward)>,
    /// Entries of `frames` that are empty.
    free: Vec<usize>,
    /// Spare buffers.
    spare: Vec<Vec<u8>>,
    sequence: u64,
    held_bytes: usize,
    figures: Arc<Figures>,
}

impl Drop for Line {
    /// However the thread ends, packets are let through from now on.
    fn drop(&mut self) {
        self.maps.state.set(line::ALIVE_UNTIL as usize, 0);
        if std::thread::panicking() {
            self.figures.close("its thread panicked");
        }
        let left = u64::try_from(self.heap.len()).unwrap_or(u64::MAX);
        self.figures.refused.fetch_add(left, Ordering::Relaxed);
    }
}

impl Line {
    fn run(&mut self, stop: &AtomicBool, wake: &EventFd) {
        if let Err(error) = self.serve(stop, wake) {
            self.maps.state.set(line::ALIVE_UNTIL as usize, 0);
            self.figures.close(&format!("{error:#}"));
        }
    }

    fn serve(&mut self, stop: &AtomicBool, wake: &EventFd) -> Result<()> {
        let mut buffer = vec![0; FRAME_MAX];
        loop {
            // Checked first, so that frames from before the end are still read below.
            let last = stop.load(Ordering::Acquire);
            let more = self.take_in(&mut buffer)?;
            self.beat();
            let until_ns = if last { u64::MAX } else { monotonic_ns() };
            self.release_due(until_ns);
            for packet in self.exchange.returned() {
                self.send(&packet.frame, packet.release);
            }
            if last && !more {
                return Ok(());
            }
            if !more {
                self.wait(wake)?;
            }
        }
    }

    /// Sends the heartbeat to the programs.
    fn beat(&mut self) {
        let until_ns = deadline_ns();
        if until_ns.saturating_sub(self.alive_until_ns) >= RENEWAL_NS {
            tell_lapse(self.alive_until_ns, "packets were not delayed");
            self.alive_until_ns = until_ns;
            self.maps.state.set(line::ALIVE_UNTIL as usize, until_ns);
            // Checked last: closing writes in the opposite order.
            if self.figures.closed.load(Ordering::Acquire) {
                self.maps.state.set(line::ALIVE_UNTIL as usize, 0);
            }
        }
    }

    /// Reads at most a batch of frames. Returns whether more are waiting.
    fn take_in(&mut self, buffer: &mut [u8]) -> Result<bool> {
        for _ in 0..BATCH {
            // Read first, because further tickets may be issued meanwhile.
            let issued = self.maps.state.get(line::ISSUED as usize);
            let Some(length) = self.tap.read(buffer)? else {
                self.maps.state.set(line::TAKEN as usize, issued);
                return Ok(false);
            };
            self.hold(&buffer[..length]);
        }
        Ok(true)
    }

    fn hold(&mut self, frame: &[u8]) {
        // Frames that the network stack itself sends through the tap have no tag.
        if frame.len() < TAG_AT + 4 || frame[TAG_AT - 2..TAG_AT] != [0x88, 0xa8] {
            return;
        }
        let ticket = u16::from_be_bytes([frame[TAG_AT], frame[TAG_AT + 1]]);
        self.note_taken(ticket);
        let mut hold = self.maps.holds.get(usize::from(ticket) % HOLDS as usize);
        set_own_size(&mut hold, frame);
        let way = (hold.interface, hold.flags & hold_flag::INGRESS != 0);
        let Some(place) = number_of(&self.places, way) else {
            self.figures.refused.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let release_ns = locked(&self.schedule).release_ns(&hold);
        let Some(release_ns) = release_ns else {
            self.figures.queue_full.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let onward = Onward {
            release: Release {
                judges: hold.judges,
                place: place.into(),
            },
            relay: hold.relay,
            to_client: hold.flags & hold_flag::TO_CLIENT != 0,
        };
        let copies = if hold.flags & hold_flag::TWICE == 0 {
            1
        } else {
            2
        };
        for _ in 0..copies {
            self.store(frame, onward, release_ns);
        }
    }

    /// Reports the progress to the programs, by the lower half of a ticket number.
    fn note_taken(&mut self, ticket: u16) {
        let issued = self.maps.state.get(line::ISSUED as usize);
        let [low, high, ..] = issued.to_le_bytes();
        let behind = u16::from_le_bytes([low, high]).wrapping_sub(ticket);
        let taken = issued.wrapping_sub(u64::from(behind));
        self.maps.state.set(line::TAKEN as usize, taken);
    }

    /// Holds a frame until its release time, or releases it at once if the limit is reached.
    fn store(&mut self, frame: &[u8], onward: Onward, release_ns: u64) {
        let mut kept = self.spare.pop().unwrap_or_default();
        kept.clear();
        let has_room = self.held_bytes + frame.len() <= HELD_BYTES_MAX
            && kept.try_reserve(frame.len()).is_ok()
            && self.heap.try_reserve(1).is_ok()
            && self.frames.try_reserve(1).is_ok()
            && (self.free)
                .try_reserve((self.frames.len() + 1).saturating_sub(self.free.len()))
                .is_ok();
        if !has_room {
            self.figures.no_room.fetch_add(1, Ordering::Relaxed);
            self.send(frame, onward.release);
            return;
        }
        kept.extend_from_slice(frame);
        self.held_bytes += frame.len();
        let slot = self.free.pop().unwrap_or(self.frames.len());
        if slot == self.frames.len() {
            self.frames.push((kept, onward));
        } else {
            self.frames[slot] = (kept, onward);
        }
        self.sequence += 1;
        self.heap.push(Reverse((release_ns, self.sequence, slot)));
    }

    /// Releases a frame and tells the programs its destination.
    fn send(&mut self, frame: &[u8], release: Release) {
        self.ticket = self.ticket.wrapping_add(1);
        self.maps.released.set(self.ticket.into(), release);
        let (before, after) = frame.split_at(TAG_AT);
        let ticket = self.ticket.to_be_bytes();
        let parts = [before, &ticket, &after[2..]].map(std::io::IoSlice::new);
        let counter = match self.tap.write_parts(&parts) {
            Ok(()) => &self.figures.released,
            Err(_) => &self.figures.refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn release_due(&mut self, now_ns: u64) {
        while let Some(&Reverse((release_ns, _, slot))) = self.heap.peek() {
            if release_ns > now_ns {
                return;
            }
            self.heap.pop();
            let (frame, onward) = std::mem::take(&mut self.frames[slot]);
            self.free.push(slot);
            self.held_bytes -= frame.len();
            if onward.relay != 0 {
                self.give(frame, onward);
                continue;
            }
            self.send(&frame, onward.release);
            // Large buffers are freed, so that a burst does not keep its memory.
            if self.spare.len() < SPARE_BUFFERS && frame.capacity() <= 4096 {
                self.spare.push(frame);
            }
        }
    }

    /// Gives a frame to its relay, or releases it if the relay has ended or does not keep up.
    fn give(&mut self, frame: Vec<u8>, onward: Onward) {
        let packet = TapPacket {
            frame: Bytes::from(frame),
            release: onward.release,
            to_client: onward.to_client,
        };
        let packet = match self.exchange.give(usize::from(onward.relay) - 1, packet) {
            Ok(()) => return,
            Err(TrySendError::Closed(packet)) => packet,
            Err(TrySendError::Full(packet)) => {
                self.figures.no_room.fetch_add(1, Ordering::Relaxed);
                packet
            }
        };
        self.send(&packet.frame, packet.release);
    }

    /// Sleeps until a frame arrives, is due or returns from a relay, or until the end.
    fn wait(&self, wake: &EventFd) -> Result<()> {
        let next_ns = self
            .heap
            .peek()
            .map(|Reverse((release_ns, _, _))| *release_ns);
        let left_ns = next_ns.map_or(RENEWAL_NS, |next_ns| {
            next_ns.saturating_sub(monotonic_ns()).min(RENEWAL_NS)
        });
        let timeout = libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::c_long::try_from(left_ns).unwrap_or(0),
        };
        let watch = |fd: i32| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [
            watch(self.tap.as_fd().as_raw_fd()),
            watch(wake.as_fd().as_raw_fd()),
        ];
        // SAFETY: two descriptors, and a timeout that lives through the call.
        let status =
            unsafe { libc::ppoll(fds.as_mut_ptr(), 2, &raw const timeout, std::ptr::null()) };
        match nix::errno::Errno::result(status) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting for packets"),
        }
        match wake.read() {
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
            Err(error) => Err(error).context("being woken"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_super_packet_has_the_size_of_its_own() {
        let told = Hold {
            bytes: 131_098,
            segments: 2,
            ..Hold::default()
        };
        let mut frame = vec![0; HEADER_BYTES + TAG_BYTES + 65_549];
        for (kind, bytes, segments) in [(0, 65_549, 1), (1, 131_098, 2)] {
            let mut hold = told;
            frame[1] = kind;
            set_own_size(&mut hold, &frame);
            assert_eq!((hold.bytes, hold.segments), (bytes, segments));
        }
        // The description of a packet does not depend on earlier packets.
        let mut hold = Hold {
            segments: 1,
            ..told
        };
        frame[1] = 0;
        set_own_size(&mut hold, &frame);
        assert_eq!(hold.bytes, 131_098);
    }
}
