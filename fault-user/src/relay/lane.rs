//! One direction of a connection: from a socket through the stages to the other socket.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::AsRawFd as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use nix::sys::socket::{MsgFlags, send};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::attributes::CloseMode;
use super::budget::{self, Counted};
use super::pipe::Pipe;
use super::pipeline::{Item, Output, Owner, Pipeline};
use super::socket::{has_peer_ended, unread};
use super::stage::{Chunk, End, ROOM};
use super::toxic::Toxic;

/// What a read of a bare lane asks for; one that fills it says that splicing pays.
const SMALL_READ: usize = 32 * 1024;
/// A splice that moves less than this says that copying is cheaper.
const SMALL_SPLICE: usize = 8 * 1024;
/// How many steps a lane takes before others have their turn.
const STEPS: usize = 16;
/// How many pieces it moves between its stages meanwhile.
const PIECES: usize = 256;
/// How many pieces it writes meanwhile.
const WRITES: usize = 32;
/// After how long it takes no further step.
const TURN: Duration = Duration::from_micros(200);
/// When a lane looks again whether there is memory to read into.
const MEMORY_RETRY: Duration = Duration::from_millis(20);

thread_local! {
    /// Where every read of this thread goes first: an idle connection has no buffer.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; ROOM]);
}

/// A read that fills at least this much of a buffer gives the buffer away instead of being copied out of it.
const LARGE_READ: usize = ROOM / 2;
/// How many used buffers a thread keeps for reads to come.
const KEPT_BUFFERS: usize = 64;

thread_local! {
    static USED: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer that a chunk owns; a large one goes back to its thread's store with the chunk.
struct Filled {
    buffer: Vec<u8>,
    size: usize,
    _counted: Counted,
}

impl Filled {
    fn new(buffer: Vec<u8>, size: usize) -> Self {
        let counted = Counted::new(buffer.len());
        Self {
            buffer,
            size,
            _counted: counted,
        }
    }
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.size]
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        if self.buffer.len() < ROOM {
            return;
        }
        let buffer = std::mem::take(&mut self.buffer);
        let kept = USED.try_with(|used| {
            let mut used = used.borrow_mut();
            if used.len() < KEPT_BUFFERS {
                used.push(buffer);
            }
        });
        if kept.is_err() {
            log::trace!("the thread ends: its buffers are freed");
        }
    }
}

/// The first `size` bytes of a read as a chunk's data.
fn keep(scratch: &mut Vec<u8>, size: usize) -> Bytes {
    if size < LARGE_READ {
        return Bytes::from_owner(Filled::new(scratch[..size].to_vec(), size));
    }
    let next = USED
        .with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| vec![0; ROOM]);
    let buffer = std::mem::replace(scratch, next);
    Bytes::from_owner(Filled::new(buffer, size))
}

/// What a step came to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Something moved.
    Moved,
    /// Nothing can move until a socket or a timer wakes the task.
    Idle,
}

/// How far the output has been written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flushed {
    All,
    /// The sink takes nothing more at the moment.
    Blocked,
    /// Others have their turn first.
    Paused,
}

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A toxic or a peer wants it so.
    Close(CloseMode),
    /// As `Close`, once the server's host has received everything.
    Abort(CloseMode),
    /// The user or the end of the relay wants it so: each end that has got all that there was for it
    /// gets an orderly end, any other a reset.
    Leave,
}

/// Waits for a socket's error while nothing is read from it.
type ErrorWatch = Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>;

/// What is known of a lane's source.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Source {
    #[default]
    Open,
    /// Its host has reset the connection: its end of stream is a reset, not a FIN.
    Broken,
    /// Nothing more comes from it.
    Ended,
}

/// Urgent bytes on their way through a lane whose stages neither add nor remove bytes.
#[derive(Default)]
struct Urgent {
    /// Bytes that were read, and written.
    read: u64,
    written: u64,
    /// How many bytes come before each.
    marks: VecDeque<u64>,
}

impl Urgent {
    /// Writes what the sink takes of these bytes, those that are urgent as such.
    fn write(&mut self, sink: &TcpStream, data: &[u8]) -> io::Result<usize> {
        let before = self.marks.front().map(|mark| mark - self.written);
        let count = match before.map(usize::try_from) {
            Some(Ok(0)) => {
                let send = || Ok(send(sink.as_raw_fd(), &data[..1], MsgFlags::MSG_OOB)?);
                let count = sink.try_io(Interest::WRITABLE, send)?;
                self.marks.pop_front();
                count
            }
            Some(Ok(before)) => sink.try_write(&data[..before.min(data.len())])?,
            Some(Err(_)) | None => sink.try_write(data)?,
        };
        self.written += count as u64;
        Ok(count)
    }
}

/// Whether the next byte of a socket is urgent.
fn is_at_mark(socket: &TcpStream) -> bool {
    let mut is_there: libc::c_int = 0;
    // SAFETY: SIOCATMARK writes one int.
    let status = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCATMARK, &raw mut is_there) };
    status == 0 && is_there != 0
}

/// `linux/sockios.h`.
const SIOCATMARK: libc::Ioctl = 0x8905;

#[derive(Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "they are independent of each other: no state machine has them for its states"
)]
pub(crate) struct Lane {
    pipeline: Pipeline,
    urgent: Urgent,
    output: Output,
    pipe: Option<Pipe>,
    /// Splicing pays at the moment.
    bulk: bool,
    source: Source,
    /// The end has been passed on, or there is nobody to pass it on to.
    pub(crate) finished: bool,
    watch: Option<ErrorWatch>,
    /// The socket has reported an error while nothing was read from it.
    reset_seen: bool,
    pub(crate) deadline: Option<Instant>,
    /// Counts what it has moved, so that a change is seen.
    pub(crate) moves: u64,
    /// Something has come from its source, its end included.
    pub(crate) has_read: bool,
    /// It has let others have their turn, and goes on by itself.
    is_paused: bool,
}

/// What a lane that goes on waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitsFor {
    /// Its source has nothing.
    Source,
    /// What it holds goes on at some time, or when its sink takes it.
    Time,
    /// A change of its toxics: by themselves they let nothing pass.
    Change,
}

/// The ends of a lane and where it counts.
pub(crate) struct Ports<'a> {
    pub(crate) source: &'a Arc<TcpStream>,
    pub(crate) sink: &'a Arc<TcpStream>,
    /// Nothing is read from the source yet.
    pub(crate) is_withheld: bool,
    pub(crate) received: &'a AtomicU64,
    pub(crate) sent: &'a AtomicU64,
}

impl Lane {
    /// Fits the stages to the toxics; what lies in the pipe goes through the new ones.
    pub(crate) fn reconcile(
        &mut self,
        toxics: &[Arc<Toxic>],
        owner: &Owner<'_>,
        now: Instant,
    ) -> io::Result<()> {
        self.pipeline
            .reconcile(toxics, owner, now, &mut self.output);
        if !self.pipeline.keeps_length() {
            // Where they end up is not known any more: they stay in the stream.
            self.urgent.marks.clear();
        }
        if !self.pipeline.is_bare()
            && let Some(mut pipe) = self.pipe.take()
        {
            let data = Bytes::from(pipe.read_all()?);
            if !data.is_empty() {
                self.pipeline.push(Chunk::new(data, now), &mut self.output);
            }
        }
        Ok(())
    }

    /// Puts bytes in as if they had come from the source.
    pub(crate) fn inject(&mut self, data: Bytes, now: Instant) {
        if !self.finished && self.source != Source::Ended {
            self.urgent.read += data.len() as u64;
            self.pipeline.push(Chunk::new(data, now), &mut self.output);
        }
    }

    /// Answers that the stages gave for the other direction.
    pub(crate) fn take_replies(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.output.replies)
    }

    /// Whether nothing must go in the other direction any more.
    pub(crate) const fn is_aborting(&self) -> bool {
        self.output.aborting
    }

    /// The source has reset the connection, or takes no more data as the sink of the other lane: what it has sent is still
    /// forwarded, then it is a reset.
    pub(crate) fn source_is_broken(&mut self) {
        if self.source == Source::Open {
            self.source = Source::Broken;
        }
    }

    /// Whether nothing more comes from the source than what it has sent.
    pub(crate) fn is_ending(&self, source: &TcpStream) -> bool {
        self.source == Source::Ended || has_peer_ended(source)
    }

    /// Whether the source's end is known, so that no reset can be found by reading it.
    pub(crate) fn source_has_ended(&self) -> bool {
        self.source == Source::Ended
    }

    /// Whether something was said that concerns the relay's other connections.
    pub(crate) fn take_concern(&mut self) -> bool {
        std::mem::take(&mut self.output.concerns_others)
    }

    /// Whether something is on its way.
    fn holds(&self) -> bool {
        !self.output.items.is_empty() || self.piped() > 0 || !self.pipeline.is_empty()
    }

    fn piped(&self) -> usize {
        self.pipe.as_ref().map_or(0, Pipe::held)
    }

    /// What it waits for after it has been polled; nothing more comes of one that is finished.
    pub(crate) fn waits_for(&self) -> WaitsFor {
        let is_closed = self.pipeline.room(Instant::now()) == 0 && self.source != Source::Ended;
        if self.finished {
            WaitsFor::Source
        } else if self.is_paused {
            WaitsFor::Time
        } else if self.holds() {
            let goes_on =
                self.deadline.is_some() || !self.output.items.is_empty() || self.piped() > 0;
            if goes_on {
                WaitsFor::Time
            } else {
                WaitsFor::Change
            }
        } else if is_closed {
            WaitsFor::Change
        } else {
            WaitsFor::Source
        }
    }

    /// Whether it is about to read: there is something at the source that it has not been woken for yet.
    pub(crate) fn is_about_to_read(&self, source: &TcpStream) -> bool {
        !self.finished
            && self.source != Source::Ended
            && self.waits_for() == WaitsFor::Source
            && (unread(source) > 0 || has_peer_ended(source))
    }

    /// Bytes that are on their way, those that wait to be read from the source included.
    pub(crate) fn undelivered(&self, source: &TcpStream) -> usize {
        if self.finished {
            return 0;
        }
        let unread = if self.source == Source::Ended {
            0
        } else {
            unread(source)
        };
        self.pipeline.bytes() + self.output.bytes + self.piped() + unread
    }

    /// Whether bytes or an end for the sink are known to be on their way.
    pub(crate) fn owes(&self, source: &TcpStream) -> bool {
        !self.finished && (self.holds() || self.undelivered(source) > 0)
    }

    /// Moves what can be moved.
    ///
    /// # Errors
    ///
    /// `Err(Some)` when the connection ends; `Err(None)` when the sink does not take data any more.
    pub(crate) fn poll(
        &mut self,
        context: &mut Context<'_>,
        ports: &Ports<'_>,
    ) -> Result<(), Option<Ending>> {
        self.deadline = None;
        self.is_paused = false;
        let (mut pieces, mut writes) = (PIECES, WRITES);
        let mut begun = None;
        for _ in 0..STEPS {
            let mut now = None;
            if !self.pipeline.is_bare() {
                let instant = Instant::now();
                if instant > *begun.get_or_insert(instant) + TURN {
                    break;
                }
                self.deadline = self
                    .pipeline
                    .advance(instant, &mut self.output, &mut pieces);
                now = Some(instant);
            }
            if let Some(mode) = self.output.now {
                return Err(Some(Ending::Close(mode)));
            }
            if self.finished && self.source != Source::Ended {
                return Ok(());
            }
            let had_items = !self.output.items.is_empty();
            let flushed = self.flush(context, ports, &mut writes)?;
            if flushed == Flushed::Paused || pieces == 0 {
                break;
            }
            let filled = self.fill(context, ports, flushed == Flushed::Blocked, now);
            // What was flushed has made room for what the stages may hold.
            let may_advance = had_items && flushed == Flushed::All && !self.pipeline.is_bare();
            if filled == Step::Idle && !may_advance {
                if flushed == Flushed::All {
                    self.pipeline.starved();
                }
                return Ok(());
            }
            self.moves += 1;
        }
        // Others have their turn, then it goes on.
        self.is_paused = true;
        self.moves += 1;
        context.waker().wake_by_ref();
        Ok(())
    }

    /// Writes what has come out, as far as the sink takes it, in at most so many `writes`.
    fn flush(
        &mut self,
        context: &mut Context<'_>,
        ports: &Ports<'_>,
        writes: &mut usize,
    ) -> Result<Flushed, Option<Ending>> {
        while let Some(pipe) = self.pipe.as_mut().filter(|pipe| pipe.held() > 0) {
            match ports
                .sink
                .try_io(Interest::WRITABLE, || pipe.drain(ports.sink))
            {
                Ok(count) => {
                    self.urgent.written += count as u64;
                    count_bytes(ports.sent, count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if ports.sink.poll_write_ready(context).is_pending() {
                        return Ok(Flushed::Blocked);
                    }
                }
                Err(error) => return Err(self.sink_failed(&error)),
            }
        }
        loop {
            match self.output.items.front_mut() {
                None => return Ok(Flushed::All),
                Some(Item::End(end)) => {
                    let end = *end;
                    self.output.items.pop_front();
                    self.pass_end(end, ports)?;
                }
                Some(Item::Data(_) | Item::Packet(..)) if *writes == 0 => {
                    return Ok(Flushed::Paused);
                }
                Some(Item::Data(data) | Item::Packet(data, _)) => {
                    match self.urgent.write(ports.sink, data) {
                        Ok(count) => {
                            *writes -= 1;
                            self.moves += 1;
                            count_bytes(ports.sent, count);
                            self.output.bytes -= count;
                            data.advance(count);
                            if data.is_empty() {
                                self.output.items.pop_front();
                            }
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            if ports.sink.poll_write_ready(context).is_pending() {
                                return self.blocked();
                            }
                        }
                        Err(error) => return Err(self.sink_failed(&error)),
                    }
                }
            }
        }
    }

    /// The sink takes nothing. If the source has reset the connection nobody waits for the rest.
    fn blocked(&self) -> Result<Flushed, Option<Ending>> {
        match self.output.items.back() {
            Some(Item::End(End::Close(CloseMode::Rst))) => Err(Some(Ending::Close(CloseMode::Rst))),
            _ => Ok(Flushed::Blocked),
        }
    }

    fn pass_end(&mut self, end: End, ports: &Ports<'_>) -> Result<(), Option<Ending>> {
        match end {
            End::Close(mode) => Err(Some(Ending::Close(mode))),
            End::Abort(mode) => Err(Some(Ending::Abort(mode))),
            End::Fin => {
                self.finished = true;
                let socket = socket2::SockRef::from(&**ports.sink);
                socket
                    .shutdown(std::net::Shutdown::Write)
                    .map_err(|error| self.sink_failed(&error))
            }
        }
    }

    fn sink_failed(&mut self, error: &io::Error) -> Option<Ending> {
        log::trace!("a write failed: {error}");
        self.finished = true;
        self.output.items = VecDeque::new();
        self.output.bytes = 0;
        self.pipe = None;
        None
    }

    /// Reads what the stages or, without stages, the sink have room for.
    fn fill(
        &mut self,
        context: &mut Context<'_>,
        ports: &Ports<'_>,
        is_blocked: bool,
        now: Option<Instant>,
    ) -> Step {
        if self.source == Source::Ended {
            // Between its FIN and the other direction's the source can still reset the connection.
            return self.watch_for_reset(context, ports);
        }
        if self.finished {
            return Step::Idle;
        }
        let room = match now {
            _ if ports.is_withheld => 0,
            Some(now) => self.pipeline.room(now),
            None if is_blocked || !self.output.items.is_empty() => 0,
            None => SMALL_READ,
        };
        if room == 0 {
            return self.watch_for_reset(context, ports);
        }
        if now.is_some() && budget::is_used_up() && !self.pipeline.is_empty() {
            let retry = Instant::now() + MEMORY_RETRY;
            self.deadline = Some(self.deadline.map_or(retry, |deadline| deadline.min(retry)));
            return self.watch_for_reset(context, ports);
        }
        self.watch = None;
        let read = match now {
            _ if is_at_mark(ports.source) => self.read_urgent(ports, now),
            None if self.bulk => self.splice(ports),
            None => self.copy(ports),
            Some(now) => self.read(ports, room.min(ROOM), now),
        };
        match read {
            Ok(0) => {
                let end = if self.source == Source::Broken {
                    End::Close(CloseMode::Rst)
                } else {
                    End::Fin
                };
                self.source_ends(end);
                Step::Moved
            }
            Ok(count) => {
                self.has_read = true;
                self.urgent.read += count as u64;
                count_bytes(ports.received, count);
                Step::Moved
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.pipe = None;
                match ports.source.poll_read_ready(context) {
                    Poll::Pending => Step::Idle,
                    Poll::Ready(_) => Step::Moved,
                }
            }
            Err(error) => {
                log::trace!("a read failed: {error}");
                self.source_ends(End::Close(CloseMode::Rst));
                Step::Moved
            }
        }
    }

    fn source_ends(&mut self, end: End) {
        self.has_read = true;
        self.source = Source::Ended;
        self.pipeline.end(end, Instant::now(), &mut self.output);
    }

    /// Nothing is read now, so a reset can only be learnt from the socket's error. It ends the connection
    /// unless a stage still has bytes that it holds on purpose.
    fn watch_for_reset(&mut self, context: &mut Context<'_>, ports: &Ports<'_>) -> Step {
        if !self.reset_seen {
            let watch = self.watch.get_or_insert_with(|| {
                let source = Arc::clone(ports.source);
                Box::pin(async move { source.ready(Interest::ERROR).await.map(|_| ()) })
            });
            if watch.as_mut().poll(context).is_pending() {
                return Step::Idle;
            }
            // A future that is done must not be asked again.
            self.watch = None;
            self.reset_seen = true;
        }
        let nothing_waits = !self.output.items.is_empty() || self.source == Source::Ended;
        if self.pipeline.is_bare() || self.pipeline.is_empty() && nothing_waits {
            self.output.now = Some(CloseMode::Rst);
            return Step::Moved;
        }
        Step::Idle
    }

    /// Reads into memory and tries to write it at once.
    fn copy(&mut self, ports: &Ports<'_>) -> io::Result<usize> {
        SCRATCH.with_borrow_mut(|scratch| {
            let scratch = &mut scratch[..SMALL_READ];
            let count = ports.source.try_read(scratch)?;
            self.bulk = count == scratch.len();
            // Whatever a failure is, the next flush meets it again and handles it.
            let written = ports.sink.try_write(&scratch[..count]).unwrap_or_default();
            self.urgent.written += written as u64;
            count_bytes(ports.sent, written);
            if written < count {
                self.output
                    .push(Bytes::copy_from_slice(&scratch[written..count]));
            }
            Ok(count)
        })
    }

    fn splice(&mut self, ports: &Ports<'_>) -> io::Result<usize> {
        let pipe = match &mut self.pipe {
            Some(pipe) => pipe,
            None => match Pipe::take() {
                Ok(pipe) => self.pipe.insert(pipe),
                Err(error) => {
                    log::debug!("no pipe to splice with: {error}");
                    return self.copy(ports);
                }
            },
        };
        let spliced = ports
            .source
            .try_io(Interest::READABLE, || pipe.fill(ports.source));
        match &spliced {
            Ok(count) => self.bulk = *count >= SMALL_SPLICE,
            Err(_) => self.bulk = false,
        }
        if !self.bulk && self.pipe.as_ref().is_some_and(|pipe| pipe.held() == 0) {
            self.pipe = None;
        }
        spliced
    }

    /// Reads the urgent byte that comes next.
    fn read_urgent(&mut self, ports: &Ports<'_>, now: Option<Instant>) -> io::Result<usize> {
        let mut byte = [0];
        let count = ports.source.try_read(&mut byte)?;
        if count == 0 {
            return Ok(0);
        }
        if self.pipeline.keeps_length() {
            self.urgent.marks.push_back(self.urgent.read);
        }
        let data = Bytes::copy_from_slice(&byte);
        let chunk = Chunk::new(data, now.unwrap_or_else(Instant::now));
        self.pipeline.push(chunk, &mut self.output);
        Ok(count)
    }

    /// Reads into memory, for the stages.
    fn read(&mut self, ports: &Ports<'_>, room: usize, now: Instant) -> io::Result<usize> {
        let data = SCRATCH.with_borrow_mut(|scratch| {
            let count = ports.source.try_read(&mut scratch[..room])?;
            Ok::<_, io::Error>(keep(scratch, count))
        })?;
        let count = data.len();
        if count > 0 {
            self.pipeline.push(Chunk::new(data, now), &mut self.output);
        }
        Ok(count)
    }
}

fn count_bytes(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// A connected pair of sockets.
    async fn pair() -> io::Result<(TcpStream, Arc<TcpStream>)> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let peer = TcpStream::connect(listener.local_addr()?).await?;
        Ok((peer, Arc::new(listener.accept().await?.0)))
    }

    #[tokio::test]
    async fn nothing_is_read_from_a_source_that_is_withheld() {
        let (mut client, source) = pair().await.expect("loopback");
        let (_server, sink) = pair().await.expect("loopback");
        client.write_all(b"hello").await.expect("write");
        source.readable().await.expect("it comes");
        let mut lane = Lane::default();
        for (is_withheld, left) in [(true, 5), (false, 0)] {
            let ports = Ports {
                source: &source,
                sink: &sink,
                is_withheld,
                received: &AtomicU64::new(0),
                sent: &AtomicU64::new(0),
            };
            let polled =
                std::future::poll_fn(|context| Poll::Ready(lane.poll(context, &ports))).await;
            assert_eq!(polled, Ok(()));
            assert_eq!(unread(&source), left);
            assert_eq!(lane.has_read, !is_withheld);
        }
    }
}
