//! What a run is asked for besides its rules.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::inject::injection::InjectionOptions;
use crate::inject::injector::Attachment;
use crate::inject::reach::IngressMechanism;
use crate::plan::mechanism::Mechanism;
use crate::sys::net::interfaces::{self, Interface, Selection};

/// Whose traffic is touched, where, and by what means.
#[derive(Debug)]
pub struct Options {
    /// Only traffic of this process and its descendants.
    pub pid: Option<i32>,
    /// Only traffic of the processes in this cgroup.
    pub cgroup: Option<PathBuf>,
    /// Only traffic of this container, by its name or id.
    pub container: Option<String>,
    /// Whether the rules are applied again when the container is back.
    pub follow: bool,
    /// Only traffic in this network namespace.
    pub netns: Option<PathBuf>,
    /// Which interfaces the rules are put on, those that appear later included.
    pub selection: Selection,
    /// The attachment that was asked for.
    pub attachment: Option<Attachment>,
    /// What judges packets that arrive.
    pub front: IngressMechanism,
    /// What was asked to hold packets.
    pub mechanism: Option<Mechanism>,
    /// How long data may take to arrive when the rules end; nothing leaves it to the rules.
    pub drain: Option<Duration>,
    /// Whether rules may reach port 22 and the control API on the whole host.
    pub force: bool,
}

impl Options {
    /// How the programs are put on interfaces.
    #[must_use]
    pub fn injection_options(&self) -> InjectionOptions {
        InjectionOptions {
            attachment: self.attachment,
            front: self.front,
            later_interfaces: Some(self.selection.clone()),
            ..InjectionOptions::default()
        }
    }

    /// Whether something smaller than the host was named.
    #[must_use]
    pub fn is_given(&self) -> bool {
        self.pid.is_some()
            || self.cgroup.is_some()
            || self.container.is_some()
            || self.netns.is_some()
    }

    /// The interfaces that rules are put on.
    ///
    /// # Errors
    /// An unknown one, with the nearest name.
    pub fn interfaces(&self) -> Result<Vec<Interface>> {
        interfaces::select(&interfaces::list()?, &self.selection)
    }
}
