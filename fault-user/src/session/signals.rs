//! The signals that end `fault inject` and `fault daemon`.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::sys::process::signals;

/// The signals that end `fault inject` and `fault daemon`.
pub struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
    /// `None` under nohup(1).
    hangup: Option<Signal>,
}

impl EndSignals {
    /// Has SIGINT end the process until [`EndSignals::listen`], also where it is switched off: a shell script does that
    /// to what it starts in the background, and one that came before the rules are applied would be lost. What runs in
    /// the background is ended by `kill -INT` all the same.
    ///
    /// # Errors
    /// There is no such signal.
    pub fn heed() -> anyhow::Result<()> {
        if signals::is_ignored(libc::SIGINT)? {
            signals::reset(libc::SIGINT)?;
        }
        Ok(())
    }

    /// Handles the signals from now on.
    ///
    /// # Errors
    /// The signals can't be handled.
    pub fn listen() -> anyhow::Result<Self> {
        let hangup = if signals::is_ignored(libc::SIGHUP)? {
            None
        } else {
            Some(signal(SignalKind::hangup())?)
        };
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup,
        })
    }

    /// Waits for one of the signals.
    pub async fn come(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hangup => {}
        }
    }
}
