//! Packets that the delay line gives to relays, and takes back to send them on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use fault_common::abi::Release;
use nix::sys::eventfd::EventFd;
use tokio::sync::mpsc::{self, error::TrySendError};

/// How many packets wait for one relay at most; further ones go on at once, and are counted.
const WAITING: usize = 1 << 14;

/// A packet as it passes the tap, and where it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapPacket {
    /// The frame, with what the tap puts in front of it.
    pub frame: Bytes,
    /// Where it goes on.
    pub release: Release,
    /// It comes from the service.
    pub to_client: bool,
}

/// The one end is the delay line's thread, the other one the relays.
pub struct Exchange {
    relays: Mutex<Vec<Option<mpsc::Sender<TapPacket>>>>,
    returned: Mutex<Vec<TapPacket>>,
    /// Wakes the delay line.
    wake: Arc<EventFd>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Exchange {
    /// An exchange without relays; `wake` wakes the delay line.
    #[must_use]
    pub const fn new(wake: Arc<EventFd>) -> Self {
        Self {
            relays: Mutex::new(Vec::new()),
            returned: Mutex::new(Vec::new()),
            wake,
        }
    }

    /// From now on the packets for relay `number` come here, until the receiver is gone.
    #[must_use]
    pub fn subscribe(&self, number: usize) -> mpsc::Receiver<TapPacket> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let mut relays = locked(&self.relays);
        if relays.len() <= number {
            relays.resize(number + 1, None);
        }
        relays[number] = Some(sender);
        receiver
    }

    /// Gives a packet to relay `number`.
    ///
    /// # Errors
    /// The relay is not there, or does not keep up: the packet comes back.
    pub fn give(&self, number: usize, packet: TapPacket) -> Result<(), TrySendError<TapPacket>> {
        match locked(&self.relays).get(number) {
            Some(Some(relay)) => relay.try_send(packet),
            _ => Err(TrySendError::Closed(packet)),
        }
    }

    /// Takes a packet back, to be sent on.
    pub fn give_back(&self, packet: TapPacket) {
        let mut returned = locked(&self.returned);
        returned.push(packet);
        if returned.len() == 1
            && let Err(error) = self.wake.write(1)
        {
            log::debug!("the delay line takes packets back when it looks: {error}");
        }
    }

    /// All that have come back since the last time.
    #[must_use]
    pub fn returned(&self) -> Vec<TapPacket> {
        std::mem::take(&mut *locked(&self.returned))
    }
}
