//! Names to addresses: what the plan compiles.

use std::io;
use std::net::{IpAddr, ToSocketAddrs};

use super::error::{Piece, RuleError};
use super::target::{Cidr, Host, PortRange, Protocol, Target, TargetRef, Targets};
use super::{Fault, Modifiers, Rule};

/// Looks up host names.
pub trait Resolver {
    /// The addresses of a host, IPv4 and IPv6.
    ///
    /// # Errors
    /// Where the look-up fails.
    fn addresses(&mut self, host: &str) -> io::Result<Vec<IpAddr>>;
}

/// The system's resolver (getaddrinfo). It blocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolver for SystemResolver {
    fn addresses(&mut self, host: &str) -> io::Result<Vec<IpAddr>> {
        Ok((host, 0)
            .to_socket_addrs()?
            .map(|address| address.ip())
            .collect())
    }
}

impl<F: FnMut(&str) -> io::Result<Vec<IpAddr>>> Resolver for F {
    fn addresses(&mut self, host: &str) -> io::Result<Vec<IpAddr>> {
        self(host)
    }
}

/// A target whose names are looked up.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ResolvedTarget {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The hosts, sorted and without those that another one covers; empty means any.
    pub hosts: Vec<Cidr>,
    /// The ports, sorted, without overlap; empty means any.
    pub ports: Vec<PortRange>,
}

/// A rule that is ready to be planned.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ResolvedRule {
    /// The target's name as the rule writes it, for reports and expectations.
    pub name: String,
    /// What it is aimed at.
    pub target: ResolvedTarget,
    /// What it does.
    pub fault: Fault,
    /// What decides whether it fires.
    pub modifiers: Modifiers,
}

impl Rule {
    /// The target that the rule's name stands for.
    ///
    /// # Errors
    /// Where there is no such target and the name is not a host's either.
    pub fn target_in(&self, targets: &Targets) -> Result<Target, RuleError> {
        let name = match &self.target {
            TargetRef::Spec(target) => return Ok(target.clone()),
            TargetRef::Name(name) => name,
        };
        if let Some(target) = targets.get(name) {
            return Ok(target.clone());
        }
        if name.contains('.') || name == "localhost" {
            let host = Some(Host::Name(name.to_ascii_lowercase()));
            return Ok(Target {
                host,
                ..Target::default()
            });
        }
        let text = self.to_string();
        let known: Vec<_> = targets.keys().map(String::as_str).collect();
        let error = Piece::whole(&text)
            .slice(0..name.len())
            .error(format!("unknown target `{name}`"))
            .nearest(name, known.iter().copied());
        Err(if known.is_empty() {
            error.expected(format!(
                "`--target {name}=tcp:PORT`, or the target itself such as `tcp:3306`"
            ))
        } else {
            error.expected(format!("one of {}", super::args::one_of(&known)))
        })
    }

    /// The rule with its target's name and host name looked up.
    ///
    /// # Errors
    /// Where the target is unknown, its host has no address, or the fault has no meaning there.
    pub fn resolve(
        &self,
        targets: &Targets,
        resolver: &mut impl Resolver,
    ) -> Result<ResolvedRule, RuleError> {
        let target = self.target_in(targets)?;
        if let Some(complaint) = self.complaint(Some(&target)) {
            return Err(self.told(complaint));
        }
        Ok(ResolvedRule {
            name: self.target.to_string(),
            target: self.resolve_target(&target, resolver)?,
            fault: self.fault.clone(),
            modifiers: self.modifiers.clone(),
        })
    }

    /// The target with its host looked up and its ports merged.
    fn resolve_target(
        &self,
        target: &Target,
        resolver: &mut impl Resolver,
    ) -> Result<ResolvedTarget, RuleError> {
        let text = self.to_string();
        let place = Piece::whole(&text).slice(0..self.target.to_string().len());
        let hosts = match &target.host {
            None => Vec::new(),
            Some(Host::Cidr(network)) => vec![*network],
            Some(Host::Name(name)) => {
                let addresses = resolver.addresses(name).map_err(|error| {
                    place.error(format!("the host `{name}` can't be looked up: {error}"))
                })?;
                if addresses.is_empty() {
                    return Err(place.error(format!("the host `{name}` has no address")));
                }
                addresses.into_iter().map(Cidr::host).collect()
            }
        };
        Ok(ResolvedTarget {
            protocol: target.protocol,
            hosts: outermost(hosts),
            ports: merged(target.ports.clone()),
        })
    }
}

/// The networks that no other one of them covers, sorted.
fn outermost(mut hosts: Vec<Cidr>) -> Vec<Cidr> {
    hosts.sort_unstable();
    hosts.dedup();
    let all = hosts.clone();
    hosts.retain(|host| !all.iter().any(|other| other != host && other.covers(host)));
    hosts
}

/// The same ports as sorted ranges that neither overlap nor touch.
fn merged(mut ports: Vec<PortRange>) -> Vec<PortRange> {
    ports.sort_unstable();
    let mut out: Vec<PortRange> = Vec::new();
    for range in ports {
        match out.last_mut() {
            Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(range.last);
            }
            _ => out.push(range),
        }
    }
    out
}
