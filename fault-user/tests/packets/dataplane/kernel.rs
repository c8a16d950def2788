//! The programs, loaded in a network namespace of the test's own and run by `BPF_PROG_TEST_RUN`.

use aya::programs::{TestRun as _, TestRunOptions};
use fault_common::abi::{COUNTERS, Counter, Event, NAMES_MAX, rule_uid};
use fault_common::dns::DockerPorts;
use fault_user::inject::injector::{Attachment, Capacity, Clock, Injector, Options, Side};
use fault_user::inject::records::Events;
use fault_user::plan::Plan;
use fault_user::plan::needs::Needs;
use fault_user::plan::tables::{PacketRule, compile};
use fault_user::rule::{Rule, Targets};
use fault_user::sys::clock::monotonic_ns;
use fault_user::undo::instance::Marks;

use crate::support::place::{enter_fresh, ip};

/// What a program returned.
pub const NEXT: u32 = u32::MAX;
/// A packet that vanishes at egress under TCX: a redirect to nowhere.
pub const VANISHED: u32 = 7;
/// A packet that is dropped at ingress.
pub const SHOT: u32 = 2;
/// What XDP loses.
pub const XDP_DROP: u32 = 1;
/// What XDP lets pass.
pub const XDP_PASS: u32 = 2;

pub struct Kernel {
    pub injector: Injector,
    pub events: Events,
    /// A device that is not loopback.
    device: u32,
    capacity: Capacity,
    /// How many rule sets there have been.
    age: u32,
}

/// Rules written as text, as the kernel takes them.
pub fn compiled(rules: &[&str]) -> Vec<PacketRule> {
    let rules: Vec<_> = rules
        .iter()
        .map(|text| {
            let rule: Rule = text.parse().unwrap_or_else(|error| panic!("{error}"));
            let unknown = &mut |_: &str| Ok(Vec::new());
            let resolved = rule.resolve(&Targets::new(), unknown).unwrap();
            (rule, resolved)
        })
        .collect();
    Plan::new(&rules, 7, None, None).unwrap().entries()
}

/// What became of one packet.
#[derive(Debug)]
pub struct Ran {
    pub code: u32,
    pub frame: Vec<u8>,
}

impl Kernel {
    /// A fresh network namespace, with loopback and a veth pair up, and maps of this size.
    pub fn new(rules: u32, classes: u32) -> Self {
        Self::remembering(rules, classes, 1 << 16)
    }

    /// The same with room for so many connections.
    pub fn remembering(rules: u32, classes: u32, connections: u32) -> Self {
        enter_fresh();
        for words in [
            "link add t0 type veth peer name t1",
            "link set t0 up",
            "link set t1 up",
        ] {
            ip(words);
        }
        let device = nix::net::if_::if_nametoindex("t0").unwrap();
        let capacity = Capacity {
            rules,
            classes,
            hosts: 256,
            names: u32::try_from(NAMES_MAX).unwrap(),
            scopes: 16,
            connections,
        };
        Self::load(device, capacity, Needs::ALL, usize::MAX, false)
    }

    /// Programs for these rules alone, as a run loads them, in the same namespace.
    pub fn fit(&mut self, rules: &[PacketRule]) {
        let capacity = Capacity::of(&compile(rules, None).unwrap()).unwrap();
        *self = Self::load(self.device, capacity, Needs::of(rules), rules.len(), false);
    }

    /// The same programs with what `-vv` adds to them.
    pub fn trace(&mut self) {
        let capacity = self.capacity;
        *self = Self::load(self.device, capacity, Needs::ALL, usize::MAX, true);
    }

    fn load(device: u32, capacity: Capacity, needs: Needs, matches: usize, trace: bool) -> Self {
        let mut injector = Injector::load(&Options {
            capacity,
            events: true,
            trace,
            // Nothing is attached: this only fixes what is returned for a packet that vanishes.
            attachment: Some(Attachment::Tcx),
            needs,
            scoped: true,
            matches,
            tap: None,
            holder: 0,
            detour: None,
            places: 0,
            divider: None,
            replay: None,
            xdp: false,
            docker_ports: DockerPorts::default(),
            clock: Clock::Exact,
            number: 0,
            marks: Marks {
                instance: 1,
                netns_mark: 1,
                netns_tag: 1,
            },
        })
        .expect("the maps");
        let events = injector.take_events().unwrap();
        Self {
            injector,
            events,
            device,
            capacity,
            age: 0,
        }
    }

    /// Applies rules given as text.
    pub fn install(&mut self, rules: &[&str]) {
        let mut entries = compiled(rules);
        // New rules each time, that remember nothing of those before them.
        self.age += 1;
        for rule in &mut entries {
            rule.entry.uid = rule_uid(self.age, rule.entry.state);
        }
        self.install_entries(&entries, 0);
    }

    /// Applies compiled rules, as if they had been applied for `age_ns`.
    pub fn install_entries(&mut self, rules: &[PacketRule], age_ns: u64) {
        let tables = compile(rules, None).unwrap();
        self.injector
            .install(&tables, monotonic_ns() - age_ns)
            .unwrap();
    }

    /// Runs a program on a frame as if it passed loopback (egress) or a veth device.
    pub fn run(&mut self, side: Side, loopback: bool, frame: &[u8]) -> Ran {
        let mut context = [0_u8; 192];
        let device = if loopback { 1 } else { self.device };
        context[40..44].copy_from_slice(&device.to_ne_bytes());
        let mut output = vec![0; frame.len() + 256];
        let program = self
            .injector
            .program(side, true)
            .unwrap_or_else(|error| panic!("{error:?}"));
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut output);
        options.ctx_in = Some(&context);
        let result = program.test_run(options).expect("a test run");
        output.truncate(usize::try_from(result.data_size_out).unwrap());
        Ran {
            code: result.return_value,
            frame: output,
        }
    }

    /// Runs the XDP program on a frame: what it returns.
    pub fn run_xdp(&mut self, frame: &[u8]) -> u32 {
        let program = self
            .injector
            .xdp_program()
            .unwrap_or_else(|error| panic!("{error:?}"));
        let mut output = vec![0; frame.len() + 256];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut output);
        program.test_run(options).expect("a test run").return_value
    }

    /// Runs the egress program of loopback.
    pub fn out(&mut self, frame: &[u8]) -> Ran {
        self.run(Side::Egress, true, frame)
    }

    pub fn take_events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        self.events.drain(&mut events);
        events
    }

    /// The counters that are not what they were, by their number, except those of no packet.
    pub fn changed_since(&self, before: &[u64]) -> Vec<(u32, u64)> {
        let now = self.injector.counters().unwrap();
        (0..COUNTERS)
            .zip(now.iter().zip(before))
            .filter(|(index, _)| {
                ![Counter::FlowEntered, Counter::FlowRuleEntered]
                    .map(|counter| counter as u32)
                    .contains(index)
            })
            .filter(|(_, (now, before))| now != before)
            .map(|(index, (now, before))| (index, now - before))
            .collect()
    }

    /// Asserts that running `frame` passes it unchanged and counts `counter` once and nothing else.
    pub fn expect_pass(&mut self, what: &str, frame: &[u8], counter: Option<Counter>) {
        let before = self.injector.counters().unwrap();
        let ran = self.out(frame);
        assert_eq!((ran.code, ran.frame.as_slice()), (NEXT, frame), "{what}");
        let expected: Vec<_> = counter
            .map(|counter| (counter as u32, 1))
            .into_iter()
            .collect();
        assert_eq!(self.changed_since(&before), expected, "{what}");
    }
}
