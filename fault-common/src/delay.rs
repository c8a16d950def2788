//! How long a packet is held: distributions and their correlation, in whole numbers, so that the programs and the
//! host work out the same. Delays are at most minutes: nothing here comes near 2^63 nanoseconds.

/// A spread of one jitter: for `normal` the standard deviation, for `uniform` the largest. As tc-netem scales its
/// tables.
pub const SPREAD_ONE: i64 = 1 << 13;
/// Entries of the table of one distribution: its inverse distribution function at (n + 1/2) / 4096.
pub const TABLE_ENTRIES: u32 = 1 << 12;

/// How a delay spreads around its middle; the lower byte of `arguments[2]` of [`crate::abi::fault::DELAY`].
pub mod distribution {
    /// Evenly, between one jitter less and one more.
    pub const UNIFORM: u64 = 0;
    /// Normally.
    pub const NORMAL: u64 = 1;
    /// As a Pareto distribution of shape 3.
    pub const PARETO: u64 = 2;
    /// A quarter normally, three quarters as Pareto.
    pub const PARETO_NORMAL: u64 = 3;
    /// How many of them have a table.
    pub const TABLES: u32 = 3;
}

/// The delay for a spread in units of 1 / [`SPREAD_ONE`] jitters; never less than 0.
#[must_use]
#[inline(always)]
pub const fn delay_ns(middle_ns: u64, jitter_ns: u64, spread: i64) -> u64 {
    let delay = middle_ns.cast_signed() + ((jitter_ns.cast_signed() * spread) >> 13);
    if delay < 0 { 0 } else { delay.cast_unsigned() }
}

/// The spread of a uniform distribution for a draw of 32 bits.
#[must_use]
#[inline(always)]
pub const fn uniform(draw: u32) -> i64 {
    (((draw as u64) * (2 * SPREAD_ONE.cast_unsigned() + 1)) >> 32).cast_signed() - SPREAD_ONE
}

/// Index of the table entry for a draw of 32 bits from a distribution that has a table.
#[must_use]
#[inline(always)]
pub const fn table_index(distribution: u64, draw: u32) -> u32 {
    (low(distribution - 1) & 3) * TABLE_ENTRIES + (draw >> 20)
}

/// The lower half of a number that has no other.
#[inline(always)]
const fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// A draw that resembles the one before: their weighted mean, as `get_crandom` of Linux' `sch_netem` makes it.
/// `correlation` is of 2^32; `last` holds what came before, 0 for nothing.
#[must_use]
#[inline(always)]
pub const fn correlated(draw: u32, last: &mut u32, correlation: u64) -> u32 {
    let value = if correlation == 0 || *last == 0 {
        draw
    } else {
        let weight = (1_u64 << 32) - correlation;
        low(((draw as u64 * (weight >> 1)) + (*last as u64 * (correlation >> 1))) >> 31)
    };
    *last = value;
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::mix;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_uniform_delay_lies_within_its_jitter(draw: u32, middle in 0..60_000_000_000_u64, part in 0..=100_u64) {
            let jitter = middle * part / 100;
            let delay = delay_ns(middle, jitter, uniform(draw));
            prop_assert!(delay >= middle - jitter && delay <= middle + jitter);
        }

        #[test]
        fn a_correlated_draw_lies_between_its_parents(draw: u32, last in 1..u32::MAX, correlation in 0..=1_u64 << 32) {
            let mut memory = last;
            let value = correlated(draw, &mut memory, correlation);
            prop_assert_eq!(value, memory);
            prop_assert!(value >= draw.min(last).saturating_sub(1) && value <= draw.max(last));
        }
    }

    #[test]
    fn the_measured_correlation_is_the_wanted_one() {
        // The first-order autocorrelation of x' = (1-r) u + r x is r. 200,000 draws: its standard error is below
        // 1 / sqrt(n) = 0.0022; 3.29 of them are 0.0074.
        for percent in [0_u32, 25, 50, 90] {
            let wanted = f64::from(percent) / 100.0;
            let correlation = (u64::from(percent) << 32) / 100;
            let mut last = 0;
            let middle = f64::from(u32::MAX) / 2.0;
            let (mut variance, mut together, mut before) = (0.0, 0.0, 0.0);
            for n in 1..=200_000_u64 {
                let draw = (mix(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 32) as u32;
                let off = f64::from(correlated(draw, &mut last, correlation)) - middle;
                variance += off * off;
                together += off * before;
                before = off;
            }
            let measured = together / variance;
            assert!(
                (measured - wanted).abs() < 0.0074,
                "{measured} for {wanted}"
            );
        }
    }

    #[test]
    fn the_mean_of_uniform_draws_is_the_middle() {
        // The standard deviation of a uniform spread is 8192 / sqrt(3); of the mean of 200,000 that / sqrt(n) = 10.6,
        // times 3.29.
        let sum: i64 = (1..=200_000_u64)
            .map(|n| uniform((mix(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 32) as u32))
            .sum();
        assert!((sum / 200_000).abs() <= 35, "{}", sum / 200_000);
    }
}
