//! The options of a session, apart from its rules.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::inject::injection::InjectionOptions;
use crate::inject::injector::Attachment;
use crate::inject::reach::IngressMechanism;
use crate::plan::mechanism::Mechanism;
use crate::sys::net::interfaces::{self, Interface, Selection};

/// Selects the traffic that rules apply to, the interfaces and the mechanisms.
#[derive(Debug)]
pub struct SessionOptions {
    /// Only traffic of this process and its descendants.
    pub pid: Option<i32>,
    /// Only traffic of the processes in this cgroup.
    pub cgroup: Option<PathBuf>,
    /// Only traffic of this container, by its name or id.
    pub container: Option<String>,
    /// Whether the rules are applied again when the container restarts.
    pub follow: bool,
    /// Only traffic in this network namespace.
    pub netns: Option<PathBuf>,
    /// The interfaces that rules are applied to, including those that appear later.
    pub selection: Selection,
    /// The requested attachment.
    pub attachment: Option<Attachment>,
    /// The mechanism for incoming packets.
    pub front: IngressMechanism,
    /// The requested mechanism to hold packets.
    pub mechanism: Option<Mechanism>,
    /// Time limit for delivering data in transit when the rules end; `None` derives it from the rules.
    pub drain: Option<Duration>,
    /// Whether rules may match port 22 and the control API on the whole host.
    pub force: bool,
    /// Whether what is done with each packet is printed (`-vv`).
    pub trace: bool,
}

impl SessionOptions {
    /// Converts to the options of an injection.
    #[must_use]
    pub fn injection_options(&self) -> InjectionOptions {
        InjectionOptions {
            attachment: self.attachment,
            front: self.front,
            trace: self.trace,
            later_interfaces: Some(self.selection.clone()),
            ..InjectionOptions::default()
        }
    }

    /// Whether the rules are limited to less than the host.
    #[must_use]
    pub fn is_given(&self) -> bool {
        self.pid.is_some()
            || self.cgroup.is_some()
            || self.container.is_some()
            || self.netns.is_some()
    }

    /// The interfaces that rules are applied to.
    ///
    /// # Errors
    /// An unknown interface, with the nearest name.
    pub fn interfaces(&self) -> Result<Vec<Interface>> {
        interfaces::select(&interfaces::list()?, &self.selection)
    }
}
