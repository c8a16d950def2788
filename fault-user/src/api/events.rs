//! The daemon's events for its watchers.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::broadcast;

/// A watcher that is more than this many events behind loses some.
const BEHIND: usize = 1024;

/// A channel to all watchers.
#[derive(Clone, Debug)]
pub struct EventChannel {
    sender: broadcast::Sender<String>,
}

impl Default for EventChannel {
    fn default() -> Self {
        Self {
            sender: broadcast::Sender::new(BEHIND),
        }
    }
}

impl EventChannel {
    /// Sends an event to all watchers; does nothing without watchers.
    pub fn tell(&self, event: &str, proxy: &str, about: &Value) {
        if self.sender.receiver_count() == 0 {
            return;
        }
        let time_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_millis());
        let line =
            json!({"time_ms": time_ms, "event": event, "proxy": proxy, "about": about}).to_string();
        if self.sender.send(line).is_err() {
            log::debug!("the last reader has disconnected");
        }
    }

    /// Starts to watch.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<String> {
        self.sender.subscribe()
    }
}
