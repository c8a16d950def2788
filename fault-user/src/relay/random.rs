//! Draws for the relay: every one is a pure function of the seed, of the toxic's name, of the connection's
//! ordinal and of the draw's ordinal, so that the same traffic gets the same faults.

use fault_common::random::mix;

/// The increment of `SplitMix64`: 2^64 divided by the golden ratio.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Folds one more number into a key.
pub(crate) const fn fold(key: u64, part: u64) -> u64 {
    mix(key.wrapping_mul(GOLDEN_GAMMA) ^ mix(part.wrapping_add(GOLDEN_GAMMA)))
}

/// Folds a name into a key.
pub(crate) fn fold_text(key: u64, text: &str) -> u64 {
    text.bytes()
        .fold(fold(key, text.len() as u64), |key, byte| {
            fold(key, u64::from(byte))
        })
}

/// A number in `0.0..1.0` from 64 random bits.
#[expect(
    clippy::cast_precision_loss,
    reason = "53 bits are kept on purpose: all that a f64 holds"
)]
pub(crate) fn unit(draw: u64) -> f64 {
    (draw >> 11) as f64 / (1_u64 << 53) as f64
}

/// Numbered draws under one key.
#[derive(Clone, Debug)]
pub(crate) struct Draws {
    key: u64,
    ordinal: u64,
}

impl Draws {
    /// Starts at draw 1 of `key`.
    pub(crate) const fn new(key: u64) -> Self {
        Self { key, ordinal: 0 }
    }

    /// The draw with this ordinal, whatever was drawn before.
    pub(crate) const fn at(&self, ordinal: u64) -> u64 {
        mix(self.key.wrapping_add(ordinal.wrapping_mul(GOLDEN_GAMMA)))
    }

    /// The next 64 bits.
    pub(crate) const fn bits(&mut self) -> u64 {
        self.ordinal += 1;
        self.at(self.ordinal)
    }

    /// The next number in `0.0..1.0`.
    pub(crate) fn unit(&mut self) -> f64 {
        unit(self.bits())
    }

    /// The next number in `0..bound` (0 for a bound of 0), by multiplication (Lemire).
    pub(crate) const fn below(&mut self, bound: u64) -> u64 {
        ((self.bits() as u128 * bound as u128) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_depend_on_every_part_of_the_key() {
        let key = |seed, name, connection| fold(fold_text(fold(0, seed), name), connection);
        let first = Draws::new(key(1, "a", 1)).bits();
        assert_eq!(first, Draws::new(key(1, "a", 1)).bits());
        assert_ne!(first, Draws::new(key(2, "a", 1)).bits());
        assert_ne!(first, Draws::new(key(1, "b", 1)).bits());
        assert_ne!(first, Draws::new(key(1, "a", 2)).bits());
    }

    #[test]
    fn units_are_uniform() {
        let mut draws = Draws::new(fold(0, 42));
        let mean = (0..10_000).map(|_| draws.unit()).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        assert!((0..1000).all(|_| draws.below(7) < 7));
        assert_eq!(draws.below(0), 0);
    }
}
