//! The thread that holds packets.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow};
use fault_common::abi::{HOLDS, Hold, LAST, hold_flag};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::schedule::{Schedule, Shapers};
use super::tap::{FRAME_MAX, HEADER_BYTES, TAG_AT, TAG_BYTES, Tap, is_super_packet};
use super::ways::{Places, number_of};
use crate::kernel::clock::monotonic_ns;
use crate::kernel::mapped::MappedArray;
use crate::process::rights::be_helper;
use crate::tell::tell;

/// Bytes that are held at most; what comes on top is lost and counted. At 1 Gbit/s these are 2 s.
pub const HELD_BYTES_MAX: usize = 256 << 20;
/// Frames read before the due ones are looked at again.
const BATCH: usize = 64;
/// Buffers that are kept for the next frames.
const SPARE_BUFFERS: usize = 4096;

/// What the delay line did.
#[derive(Debug, Default)]
pub struct Figures {
    /// Frames that were held and sent on.
    pub released: AtomicU64,
    /// Frames lost because the queue of a rate was full: the fault itself.
    pub queue_full: AtomicU64,
    /// Frames lost for want of memory.
    pub no_room: AtomicU64,
    /// Frames that the kernel did not take back.
    pub refused: AtomicU64,
}

/// The delay line at work.
pub struct DelayLine {
    figures: Arc<Figures>,
    schedule: Arc<Mutex<Schedule>>,
    stop: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl DelayLine {
    /// Starts it. `holds` is the map in which the programs tell of packets.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(
        tap: Tap,
        holds: MappedArray<Hold>,
        places: Places,
        shapers: &Shapers,
    ) -> Result<Self> {
        let figures = Arc::new(Figures::default());
        let schedule = Arc::new(Mutex::new(Schedule::new(shapers)));
        let stop = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        let line = Line {
            tap,
            holds,
            places,
            schedule: Arc::clone(&schedule),
            heap: BinaryHeap::new(),
            frames: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            sequence: 0,
            held_bytes: 0,
            figures: Arc::clone(&figures),
        };
        let (stopped, woken) = (Arc::clone(&stop), Arc::clone(&wake));
        let thread = std::thread::Builder::new()
            .name("delay-line".to_owned())
            .spawn(move || {
                be_punctual();
                be_helper(&[]);
                line.run(&stopped, &woken)
            })
            .context("starting the delay line")?;
        Ok(Self {
            figures,
            schedule,
            stop,
            wake,
            thread: Some(thread),
        })
    }

    /// Goes on with these rates and slots, from the next packet on; those that stay as they are keep what waits.
    pub fn reshape(&self, shapers: &Shapers) {
        locked(&self.schedule).reshape(shapers);
    }

    /// What it has done so far.
    #[must_use]
    pub fn figures(&self) -> Arc<Figures> {
        Arc::clone(&self.figures)
    }

    /// Sends on all that is held, and ends. Nothing should be handed to it any more.
    ///
    /// # Errors
    /// It had ended before, because the tap device failed.
    pub fn finish(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.stop.store(true, Ordering::Release);
        self.wake.write(1)?;
        thread
            .join()
            .map_err(|_| anyhow!("the delay line panicked"))?
    }
}

impl Drop for DelayLine {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tell!("fault: the delay line: {error:#}");
        }
    }
}

/// Wakes this thread when it asked for and not up to 50 µs later, and before others where that is allowed. A machine
/// that refuses the latter is a little less exact, and no more than that.
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

fn locked(schedule: &Mutex<Schedule>) -> MutexGuard<'_, Schedule> {
    schedule.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the sizes in `hold` those of `frame`. The kernel divides a super-packet that the tap does not take whole (one of
/// more than 64 KiB on loopback, or of UDP before Linux 6.2), and each of its wire packets comes with the ticket of all.
fn set_own_size(hold: &mut Hold, frame: &[u8]) {
    if hold.segments > 1 && !is_super_packet(frame) {
        hold.segments = 1;
        hold.bytes = u32::try_from(frame.len() - HEADER_BYTES - TAG_BYTES).unwrap_or(u32::MAX);
    }
}

struct Line {
    tap: Tap,
    holds: MappedArray<Hold>,
    places: Places,
    /// Changed from outside when other rules come.
    schedule: Arc<Mutex<Schedule>>,
    /// When which frame goes, and the order of those that go at the same time.
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    frames: Vec<Vec<u8>>,
    /// Entries of `frames` that are empty.
    free: Vec<usize>,
    /// Buffers to be used again.
    spare: Vec<Vec<u8>>,
    sequence: u64,
    held_bytes: usize,
    figures: Arc<Figures>,
}

impl Line {
    fn run(mut self, stop: &AtomicBool, wake: &EventFd) -> Result<()> {
        let mut buffer = vec![0; FRAME_MAX];
        loop {
            // Looked at first: what came before the end is still read below.
            let last = stop.load(Ordering::Acquire);
            let more = self.take_in(&mut buffer)?;
            let until_ns = if last { u64::MAX } else { monotonic_ns() };
            self.release_due(until_ns);
            if last && !more {
                return Ok(());
            }
            if !more {
                self.wait(wake)?;
            }
        }
    }

    /// Reads what waits, a batch at most; whether there is more.
    fn take_in(&mut self, buffer: &mut [u8]) -> Result<bool> {
        for _ in 0..BATCH {
            let Some(length) = self.tap.read(buffer)? else {
                return Ok(false);
            };
            self.hold(&buffer[..length]);
        }
        Ok(true)
    }

    fn hold(&mut self, frame: &[u8]) {
        // What the stack sends by itself through the tap has no tag of ours.
        if frame.len() < TAG_AT + 4 || frame[TAG_AT - 2..TAG_AT] != [0x88, 0xa8] {
            return;
        }
        let ticket = u16::from_be_bytes([frame[TAG_AT], frame[TAG_AT + 1]]);
        let mut hold = self.holds.get(usize::from(ticket) % HOLDS as usize);
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
        let last = if hold.flags & hold_flag::JUDGED == 0 {
            0
        } else {
            LAST
        };
        let place = (place | last).to_be_bytes();
        let copies = if hold.flags & hold_flag::TWICE == 0 {
            1
        } else {
            2
        };
        for _ in 0..copies {
            self.store(frame, place, release_ns);
        }
    }

    fn store(&mut self, frame: &[u8], place: [u8; 2], release_ns: u64) {
        if self.held_bytes + frame.len() > HELD_BYTES_MAX {
            self.figures.no_room.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut kept = self.spare.pop().unwrap_or_default();
        kept.clear();
        kept.extend_from_slice(frame);
        kept[TAG_AT..TAG_AT + 2].copy_from_slice(&place);
        self.held_bytes += frame.len();
        let slot = self.free.pop().unwrap_or(self.frames.len());
        if slot == self.frames.len() {
            self.frames.push(kept);
        } else {
            self.frames[slot] = kept;
        }
        self.sequence += 1;
        self.heap.push(Reverse((release_ns, self.sequence, slot)));
    }

    fn release_due(&mut self, now_ns: u64) {
        while let Some(&Reverse((release_ns, _, slot))) = self.heap.peek() {
            if release_ns > now_ns {
                return;
            }
            self.heap.pop();
            let frame = std::mem::take(&mut self.frames[slot]);
            self.free.push(slot);
            self.held_bytes -= frame.len();
            let counter = match self.tap.write(&frame) {
                Ok(()) => &self.figures.released,
                Err(_) => &self.figures.refused,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            // Large buffers are given back, so that a burst does not keep its memory.
            if self.spare.len() < SPARE_BUFFERS && frame.capacity() <= 4096 {
                self.spare.push(frame);
            }
        }
    }

    /// Sleeps until a frame comes, one is due, or the end.
    fn wait(&self, wake: &EventFd) -> Result<()> {
        let timeout = self.heap.peek().map(|Reverse((release_ns, _, _))| {
            let left_ns = release_ns.saturating_sub(monotonic_ns());
            libc::timespec {
                tv_sec: libc::time_t::try_from(left_ns / 1_000_000_000)
                    .unwrap_or(libc::time_t::MAX),
                tv_nsec: libc::c_long::try_from(left_ns % 1_000_000_000).unwrap_or(0),
            }
        });
        let watch = |fd: i32| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [
            watch(self.tap.as_fd().as_raw_fd()),
            watch(wake.as_fd().as_raw_fd()),
        ];
        let timeout = timeout
            .as_ref()
            .map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: two descriptors, and a timeout that lives through the call or none.
        let status = unsafe { libc::ppoll(fds.as_mut_ptr(), 2, timeout, std::ptr::null()) };
        match nix::errno::Errno::result(status) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error).context("waiting for packets"),
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
        // What is told of one packet holds, whatever passed before it.
        let mut hold = Hold {
            segments: 1,
            ..told
        };
        frame[1] = 0;
        set_own_size(&mut hold, &frame);
        assert_eq!(hold.bytes, 131_098);
    }
}
