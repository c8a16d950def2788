//! Counter-based randomness: a draw is a pure function of a key and of ordinals.
//!
//! There is no state to share between CPUs or to lose: the n-th packet of a connection gets the
//! same draw whenever it comes and wherever it is judged.

/// 2^64 divided by the golden ratio, the increment of `SplitMix64`.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The fixed-point one of probabilities: [`chance`] with this threshold is always true.
pub const ALWAYS: u64 = 1 << 32;

/// What a draw is for, so that two decisions about one packet do not depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Lane {
    /// The `p=` modifier.
    Probability = 1,
    /// The fault's own percentage.
    Fault = 2,
    /// The state change of a Markov loss model.
    Transition = 3,
    /// Which alternative of a `mix` a connection gets.
    Mix = 4,
    /// The first bit to flip; the following bits use the following lanes.
    Bit = 0x100,
}

/// The finaliser of `SplitMix64`: a bijection of 64 bits in which every input bit affects every output
/// bit with a probability near one half.
///
/// Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
/// with the constants of Stafford's variant 13.
#[must_use]
#[inline(always)]
pub const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The key of a rule: what the seed of the run and the rule's ordinal (from 0) make of each other.
#[must_use]
pub const fn rule_key(seed: u64, ordinal: u32) -> u64 {
    mix(mix(seed.wrapping_add(GOLDEN_GAMMA)) ^ mix((ordinal as u64 + 1).wrapping_mul(GOLDEN_GAMMA)))
}

/// What a draw is a function of, beside the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ordinals {
    /// The connection's ordinal among those that the rule has seen, from 1.
    pub connection: u32,
    /// The packet's ordinal in its connection and direction, from 1.
    pub packet: u64,
    /// The direction: 0 to the server, 1 to the client.
    pub direction: u8,
    /// Which fragment of the packet it is: see [`crate::packet::Packet::fragment`].
    pub fragment: u16,
}

/// Draws 64 bits for one purpose (`lane`, a [`Lane`] or one that follows it) of one packet.
#[must_use]
#[inline(always)]
pub const fn draw(key: u64, ordinals: Ordinals, lane: u64) -> u64 {
    let connection = ((ordinals.connection as u64) << 1) | (ordinals.direction as u64 & 1);
    let stream = mix(key ^ connection.wrapping_mul(GOLDEN_GAMMA));
    let purpose = (lane << 48) | ((ordinals.fragment as u64) << 32);
    mix(stream.wrapping_add(ordinals.packet.wrapping_mul(GOLDEN_GAMMA)) ^ purpose)
}

/// Whether a draw falls below a probability of `threshold` / 2^32.
#[must_use]
#[inline(always)]
pub const fn chance(draw: u64, threshold: u64) -> bool {
    (draw >> 32) < threshold
}

/// Turns parts per million (0 to 1,000,000, more counts as 1,000,000) into a threshold for
/// [`chance`], rounded to the nearest; 1,000,000 becomes [`ALWAYS`].
#[must_use]
pub const fn threshold_from_ppm(ppm: u32) -> u64 {
    let ppm = if ppm > 1_000_000 { 1_000_000 } else { ppm };
    (((ppm as u64) << 32) + 500_000) / 1_000_000
}

/// Scales a draw to `0..bound`, by multiplication (Lemire), so that no division is needed.
#[must_use]
#[inline(always)]
pub const fn below(draw: u64, bound: u32) -> u32 {
    (((draw >> 32) * bound as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ordinals(connection: u32, packet: u64, direction: u8) -> Ordinals {
        Ordinals {
            connection,
            packet,
            direction,
            fragment: 0,
        }
    }

    #[test]
    fn mix_gives_the_outputs_of_splitmix64() {
        // The first outputs of SplitMix64 with seed 0, as its reference implementation prints them.
        assert_eq!(mix(GOLDEN_GAMMA), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix(GOLDEN_GAMMA.wrapping_mul(2)), 0x6e78_9e6a_a1b9_65f4);
        assert_eq!(mix(GOLDEN_GAMMA.wrapping_mul(3)), 0x06c4_5d18_8009_454f);
    }

    #[test]
    fn thresholds_are_exact_at_the_ends() {
        assert_eq!(threshold_from_ppm(0), 0);
        assert_eq!(threshold_from_ppm(500_000), 1 << 31);
        assert_eq!(threshold_from_ppm(1_000_000), ALWAYS);
        assert!(chance(u64::MAX, ALWAYS));
        assert!(!chance(0, 0));
    }

    #[test]
    fn a_rate_lies_within_its_binomial_interval() {
        // 99.9% two-sided: 3.29 standard deviations of 200,000 draws. The seeds are fixed.
        for (ppm, seed) in [(1_000, 1), (100_000, 2), (300_000, 3), (900_000, 4)] {
            let threshold = threshold_from_ppm(ppm);
            let key = rule_key(seed, 0);
            let drawn = 200_000_u32;
            let hits: u32 = (1..=drawn)
                .map(|n| {
                    u32::from(chance(
                        draw(key, ordinals(n % 50, u64::from(n / 50), 0), 2),
                        threshold,
                    ))
                })
                .sum();
            let p = f64::from(ppm) / 1e6;
            let deviation = (f64::from(drawn) * p * (1.0 - p)).sqrt();
            let off = (f64::from(hits) - f64::from(drawn) * p).abs();
            assert!(off <= 3.29 * deviation, "{hits} of {drawn} at {p}");
        }
    }

    #[test]
    fn neighbouring_ordinals_do_not_share_draws() {
        let key = rule_key(42, 3);
        let base = draw(key, ordinals(1, 1, 0), 1);
        assert_ne!(base, draw(key, ordinals(2, 1, 0), 1));
        assert_ne!(base, draw(key, ordinals(1, 2, 0), 1));
        assert_ne!(base, draw(key, ordinals(1, 1, 1), 1));
        assert_ne!(base, draw(key, ordinals(1, 1, 0), 2));
        let fragment = Ordinals {
            fragment: 185,
            ..ordinals(1, 1, 0)
        };
        assert_ne!(base, draw(key, fragment, 1));
        assert_ne!(base, draw(rule_key(42, 4), ordinals(1, 1, 0), 1));
        assert_ne!(base, draw(rule_key(43, 3), ordinals(1, 1, 0), 1));
    }

    proptest! {
        #[test]
        fn below_stays_below(value: u64, bound in 1_u32..) {
            prop_assert!(below(value, bound) < bound);
        }

        #[test]
        fn a_larger_threshold_fires_on_at_least_the_same_draws(value: u64, a in 0..=ALWAYS, b in 0..=ALWAYS) {
            let (low, high) = if a < b { (a, b) } else { (b, a) };
            prop_assert!(!chance(value, low) || chance(value, high));
        }
    }
}
