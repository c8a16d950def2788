//! `delay`: packets are held.

use fault_common::decide::KEEP_ORDER;
use fault_common::delay::distribution;

use super::Latency;
use super::prelude::*;

/// The longest packet delay: 60 s.
pub const MAX_DELAY_NS: u64 = 60 * SECOND;

words! {
    /// How a delay spreads around its middle.
    #[derive(Default)]
    Distribution {
        /// Every value between delay - jitter and delay + jitter is equally likely.
        #[default]
        Uniform = "uniform",
        /// The jitter is the standard deviation of a normal distribution.
        Normal = "normal",
        /// Mostly early, with a long tail.
        Pareto = "pareto",
        /// A quarter normal and three quarters Pareto, as in tc-netem.
        ParetoNormal = "paretonormal",
    }
}

fault! {
    /// Packets are held.
    Delay: packet("delay", "every packet is held, the handshake included").listed(90), check: spread_needs_jitter;

    /// The middle of the delay in nanoseconds, at most 60 s.
    delay_ns: u64 => spread("delay", ValueKind::Duration, "jitter", "middle of the delay, at most 60s");
    /// How far it spreads, in nanoseconds; at most the delay.
    jitter_ns: u64 = 0 => named("jitter", ValueKind::Duration, "how far it spreads, at most the delay");
    /// How it spreads.
    distribution: Distribution = Distribution::default() => short(
        "dist",
        named(
            "distribution",
            ValueKind::Word(Distribution::WORDS),
            "how it spreads; `uniform` when absent",
        ),
    );
    /// How much one delay resembles the one before, in parts per million.
    correlation: u32 = 0 => short(
        "corr",
        named("correlation", ValueKind::Probability, "how much a delay resembles the one before"),
    );
    /// Packets of one flow never overtake each other.
    keep_order: bool = false => short(
        "keep-order",
        named("keep_order", ValueKind::Flag, "packets of one flow never overtake each other"),
    );
}

/// An error where an argument that shapes the jitter comes without one.
fn spread_needs_jitter(args: &Args<'_>) -> Result<(), RuleError> {
    let has_jitter = u64::read(args, "jitter")?.is_some_and(|jitter_ns| jitter_ns != 0);
    for name in ["distribution", "correlation"] {
        if !has_jitter && args.piece(name).is_some() {
            return Err(args
                .error(name, format!("the {name} has no effect without a jitter"))
                .expected("a jitter such as `delay=200ms~50ms`"));
        }
    }
    Ok(())
}

impl Definition for Delay {
    fn complaint(&self) -> Option<Complaint> {
        jittered("delay", self.delay_ns, self.jitter_ns, MAX_DELAY_NS)
    }

    fn packet(&self) -> Option<PacketAction> {
        let form = match self.distribution {
            Distribution::Uniform => distribution::UNIFORM,
            Distribution::Normal => distribution::NORMAL,
            Distribution::Pareto => distribution::PARETO,
            Distribution::ParetoNormal => distribution::PARETO_NORMAL,
        };
        let order = if self.keep_order { KEEP_ORDER } else { 0 };
        let arguments = [
            self.delay_ns,
            self.jitter_ns,
            form | order,
            threshold_from_ppm(self.correlation),
        ];
        Some(PacketAction::new(fault::DELAY, arguments).per_wire_packet(self.jitter_ns != 0))
    }

    fn on_streams(&self) -> Option<Fault> {
        let is_plain = self.distribution == Distribution::Uniform && self.correlation == 0;
        is_plain.then_some(Fault::Latency(Latency {
            latency_ns: self.delay_ns,
            jitter_ns: self.jitter_ns,
        }))
    }

    fn held_ns(&self) -> u64 {
        self.delay_ns.saturating_add(self.jitter_ns)
    }

    fn overlap(&self) -> Overlap {
        Overlap::OneValue
    }
}
