//! The tables of the distributions from which the programs draw delays.

use fault_common::abi::fault;
use fault_common::delay::{SPREAD_ONE, TABLE_ENTRIES, distribution};

use crate::plan::tables::PacketRule;

/// The largest spread of a table, as of tc-netem's: four jitters.
const SPREAD_MAX: f64 = 4.0;
/// Shape of the Pareto distribution, as of tc-netem's.
const SHAPE: f64 = 3.0;

/// Whether a rule draws from a table. To compute them takes tens of milliseconds.
#[must_use]
pub fn are_needed(rules: &[PacketRule]) -> bool {
    rules.iter().any(|rule| {
        let [_, jitter_ns, form, ..] = rule.entry.arguments;
        rule.entry.fault == fault::DELAY && jitter_ns != 0 && form & 0xff != distribution::UNIFORM
    })
}

/// All tables in sequence, in the layout of [`fault_common::delay::table_index`].
#[must_use]
pub fn tables() -> Vec<i64> {
    let names = [
        distribution::NORMAL,
        distribution::PARETO,
        distribution::PARETO_NORMAL,
    ];
    names
        .into_iter()
        .flat_map(|name| (0..TABLE_ENTRIES).map(move |entry| scaled(spread(name, entry))))
        .collect()
}

/// The inverse distribution function in the middle of one of the table's parts, in jitters.
fn spread(name: u64, entry: u32) -> f64 {
    let u = (f64::from(entry) + 0.5) / f64::from(TABLE_ENTRIES);
    match name {
        distribution::NORMAL => normal(u),
        distribution::PARETO => pareto(u),
        _ => 0.25 * normal(u) + 0.75 * pareto(u),
    }
}

fn scaled(spread: f64) -> i64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "8192, and at most four times that"
    )]
    let scaled = (spread.clamp(-SPREAD_MAX, SPREAD_MAX) * SPREAD_ONE as f64).round() as i64;
    scaled
}

/// Pareto's distribution of shape 3, with mean 0 and standard deviation 1: `(1 - u)^(-1/3)` has mean 3/2 and
/// variance 3/4.
fn pareto(u: f64) -> f64 {
    let mean = SHAPE / (SHAPE - 1.0);
    let deviation = (SHAPE / ((SHAPE - 1.0).powi(2) * (SHAPE - 2.0))).sqrt();
    ((1.0 - u).powf(-1.0 / SHAPE) - mean) / deviation
}

/// The standard normal distribution's inverse, by bisection of its distribution function.
fn normal(u: f64) -> f64 {
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if distribution_function(middle) < u {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// The standard normal distribution function, by its Taylor series. Source: Marsaglia, "Evaluating the normal
/// distribution", Journal of Statistical Software 11(4), 2004.
fn distribution_function(x: f64) -> f64 {
    if x < -8.0 {
        return 0.0;
    }
    let (mut sum, mut term, mut n) = (x, x, 1.0);
    // Until a term no longer changes the sum.
    while (sum + term).to_bits() != sum.to_bits() {
        n += 2.0;
        term = term * x * x / n;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(table: &[i64]) -> (f64, f64) {
        let values = || {
            table
                .iter()
                .map(|value| f64::from(i32::try_from(*value).unwrap()) / 8192.0)
        };
        let count = f64::from(TABLE_ENTRIES);
        let mean = values().sum::<f64>() / count;
        let variance = values().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        (mean, variance.sqrt())
    }

    #[test]
    fn only_rules_that_draw_from_tables_need_them() {
        use crate::plan::Plan;
        use crate::rule::{Rule, SystemResolver, Targets};
        for (text, needed) in [
            ("tcp:9 delay=5ms", false),
            ("tcp:9 delay=5ms~2ms", false),
            ("tcp:9 delay=5ms~2ms,dist:normal", true),
            ("tcp:9 loss=5%", false),
        ] {
            let rule: Rule = text.parse().unwrap();
            let resolved = rule.resolve(&Targets::new(), &mut SystemResolver).unwrap();
            let plan = Plan::new(&[(rule, resolved)], 1, None, None).unwrap();
            assert_eq!(are_needed(&plan.entries()), needed, "{text}");
        }
    }

    #[test]
    fn the_tables_have_the_moments_of_their_distributions() {
        let tables = tables();
        let entries = TABLE_ENTRIES as usize;
        let (mean, deviation) = moments(&tables[..entries]);
        assert!(
            mean.abs() < 1e-3 && (deviation - 1.0).abs() < 5e-3,
            "{mean} {deviation}"
        );
        // Pareto's tail is cut off at four jitters, as in tc-netem.
        let (mean, deviation) = moments(&tables[entries..2 * entries]);
        assert!(
            (-0.05..0.0).contains(&mean) && (0.7..1.0).contains(&deviation),
            "{mean} {deviation}"
        );
        assert!((-0.5774..-0.5773).contains(&pareto(0.0)));
        for table in tables.chunks(entries) {
            assert!(table.is_sorted());
        }
    }

    #[test]
    fn the_normal_distribution_has_its_known_quantiles() {
        for (u, x) in [
            (0.5, 0.0),
            (0.841_344_746, 1.0),
            (0.977_249_868, 2.0),
            (0.001_349_898, -3.0),
        ] {
            assert!((normal(u) - x).abs() < 1e-6, "{u}");
        }
    }
}
