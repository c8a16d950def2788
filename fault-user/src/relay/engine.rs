//! The worker threads that carry the relay's connections.
//!
//! Each worker is a reactor of its own: a connection lives and dies on one thread, so that a byte which
//! arrives is forwarded without waking another thread, and nothing that the control API does can hold it up.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use super::timer;
use crate::doctor::capabilities::Capability;
use crate::process::netns::NetworkNamespace;
use crate::process::rights::{be_helper, disown_sockets};

struct Worker {
    handle: Handle,
    load: Arc<AtomicUsize>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.load.fetch_add(1, Ordering::Relaxed);
        let load = Load(Arc::clone(&self.load));
        self.handle.spawn(async move {
            task.await;
            drop(load);
        });
    }
}

/// The threads; dropping it ends them and every connection that they carry.
pub struct Engine {
    workers: Vec<Worker>,
}

/// Counts one task of a worker for as long as it lives.
struct Load(Arc<AtomicUsize>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Engine {
    /// Starts `threads` workers (at least one).
    ///
    /// # Errors
    ///
    /// When a thread or its reactor can't be made.
    pub fn start(threads: usize) -> io::Result<Arc<Self>> {
        Self::start_in(threads, None).map_err(io::Error::other)
    }

    /// The same inside a network namespace: all sockets that the workers open are of it.
    ///
    /// # Errors
    ///
    /// When a thread or its reactor can't be made, or the namespace can't be entered.
    pub fn start_in(
        threads: usize,
        namespace: Option<&NetworkNamespace>,
    ) -> anyhow::Result<Arc<Self>> {
        // A new thread is in the namespace of the one that starts it.
        let start = || {
            let workers = (0..threads.max(1)).map(start_worker);
            Ok(workers.collect::<io::Result<_>>()?)
        };
        let workers = match namespace {
            Some(namespace) => namespace.enter(start)?,
            None => start()?,
        };
        Ok(Arc::new(Self { workers }))
    }

    /// Starts one worker for each CPU that this process may use.
    ///
    /// # Errors
    ///
    /// When a thread or its reactor can't be made.
    pub fn start_per_cpu() -> io::Result<Arc<Self>> {
        Self::start(std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// Runs a task on the worker that carries the fewest.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let least = self
            .workers
            .iter()
            .min_by_key(|worker| worker.load.load(Ordering::Relaxed));
        least.unwrap_or(&self.workers[0]).spawn(task);
    }

    /// Runs what has to do with clients' handshakes, all of it on one worker: a client waits until none is left to wake.
    pub(crate) fn spawn_beside_handshakes(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.workers[0].spawn(task);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            // Dropping the sender is the signal.
            drop(worker.stop.take());
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker
                .thread
                .take()
                .filter(|thread| thread.thread().id() != std::thread::current().id())
                && thread.join().is_err()
            {
                log::error!("a relay worker had panicked");
            }
        }
    }
}

/// What a worker keeps, if it has it: marking its sockets behind rules, and listening as a proxy.
const RIGHTS: [Capability; 3] = [
    Capability::NetAdmin,
    Capability::Bpf,
    Capability::NetBindService,
];

fn start_worker(index: usize) -> io::Result<Worker> {
    let (stop, stopped) = oneshot::channel::<()>();
    let (tell, handle) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("relay-{index}"))
        .spawn(move || {
            // Made here: without a thread there is no runtime either, which an asynchronous caller may not drop.
            let runtime = Builder::new_current_thread()
                .enable_all()
                .event_interval(31)
                .build();
            let (made, runtime) = match runtime {
                Ok(runtime) => (Ok(runtime.handle().clone()), Some(runtime)),
                Err(error) => (Err(error), None),
            };
            // Who starts it waits for this.
            let told = tell.send(made);
            let (Some(runtime), Ok(())) = (runtime, told) else {
                return;
            };
            disown_sockets();
            be_helper(&RIGHTS);
            runtime.block_on(async {
                tokio::select! {
                    // The sender is only ever dropped: that ends the worker.
                    _closed = stopped => {}
                    ended = timer::drive() => if let Err(error) = ended {
                        log::error!("the relay's clock failed: {error}");
                    }
                }
            });
        })?;
    Ok(Worker {
        handle: handle.recv().map_err(io::Error::other)??,
        load: Arc::default(),
        stop: Some(stop),
        thread: Some(thread),
    })
}
