//! Numbers with units: exact in both directions, without floating point.
//!
//! Probabilities are parts per million (`u32`, 0 to 1,000,000), durations nanoseconds, sizes bytes,
//! rates bits per second (all `u64`). A text that is finer than the unit of the result is an error,
//! never rounded.

use super::dictionary;
use super::error::{Piece, RuleError};

/// A whole, in parts per million.
pub const PPM: u32 = 1_000_000;

/// A unit's name and how many base units it is.
type Unit = (&'static str, u128);

/// Units of time in nanoseconds, the largest first.
const DURATIONS: &[Unit] = &[
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Units of size in bytes, the largest first; the bare number is bytes.
const SIZES: &[Unit] = &[
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("kB", 1_000),
    ("", 1),
];

/// Units of rate in bits per second, the largest first.
const RATES: &[Unit] = &[
    ("tbit", 1_000_000_000_000),
    ("gbit", 1_000_000_000),
    ("mbit", 1_000_000),
    ("kbit", 1_000),
    ("bit", 1),
    ("GiB/s", 8 << 30),
    ("GB/s", 8_000_000_000),
    ("MiB/s", 8 << 20),
    ("MB/s", 8_000_000),
    ("KiB/s", 8 << 10),
    ("kB/s", 8_000),
    ("B/s", 8),
];

/// Other spellings of units: what is written, what it means.
const SPELLINGS: &[(&str, &str)] = &[("µs", "us"), ("μs", "us"), ("min", "m"), ("B", "")];

/// A probability in parts per million: `30%`, `0.3`, `0.5%`, `1`.
pub(super) fn probability(piece: Piece<'_>) -> Result<u32, RuleError> {
    let (number, unit) = decimal(piece, "a probability such as `30%` or `0.3`")?;
    let scale = match unit.text() {
        "%" => u128::from(PPM / 100),
        "" => u128::from(PPM),
        _ => {
            return Err(unit
                .error(format!("unknown unit `{}`", unit.text()))
                .expected("a probability such as `30%` or `0.3`"));
        }
    };
    let over = |error: RuleError| error.expected("a probability between 0% and 100%");
    match number.times(scale) {
        Some(ppm) if ppm <= u128::from(PPM) => {
            u32::try_from(ppm).map_err(|_| over(piece.error("this probability is more than 100%")))
        }
        None if !number.above(u128::from(PPM), scale) => Err(piece
            .error("this probability is finer than 0.0001%")
            .expected("at most four digits after the decimal point of a percentage")),
        _ if unit.text().is_empty() => Err(over(piece.error("this probability is more than 1"))
            .suggest(format!("{}%", piece.text()))),
        _ => Err(over(piece.error("this probability is more than 100%")).suggest("100%")),
    }
}

/// A duration in nanoseconds: `200ms`, `5s`, `2m`, `10us`, `1h`, `1.5s`, `0`.
pub(super) fn duration(piece: Piece<'_>) -> Result<u64, RuleError> {
    let expected = "a duration such as `200ms`, `5s` or `2m`";
    let read = with_unit(piece, DURATIONS, expected, "finer than a nanosecond");
    read.map_err(|error| match sum(piece.text()) {
        Some(meant) => piece
            .error("a duration is one number and one unit")
            .suggest(meant),
        None => error,
    })
}

/// `90s` for `1m30s` and `PT1M30S`.
fn sum(text: &str) -> Option<String> {
    let lower = text.to_lowercase();
    let (mut rest, mut total_ns) = (lower.strip_prefix("pt").unwrap_or(&lower), 0_u64);
    let is_iso = rest.len() < text.len();
    let mut parts = 0;
    while !rest.is_empty() {
        let unit = rest.find(char::is_alphabetic)?;
        let length = rest[unit..].find(|c: char| c.is_ascii_digit());
        let (part, more) = rest.split_at(length.map_or(rest.len(), |length| unit + length));
        let ns = with_unit(Piece::whole(part), DURATIONS, "", "").ok()?;
        (total_ns, rest, parts) = (total_ns.checked_add(ns)?, more, parts + 1);
    }
    ((is_iso || parts > 1) && total_ns != 0).then(|| show_duration(total_ns))
}

/// A duration that is the length of something: without a unit, seconds are meant.
pub(super) fn seconds(piece: Piece<'_>) -> Result<u64, RuleError> {
    let text = format!("{}s", piece.text());
    duration(piece).map_err(|error| match duration(Piece::whole(&text)) {
        Ok(_) if error.suggestion.is_none() => error.suggest(text),
        _ => error,
    })
}

/// A duration on its own, such as `30s`, in nanoseconds.
///
/// # Errors
/// What is wrong with it.
pub fn parse_duration(text: &str) -> Result<u64, RuleError> {
    seconds(Piece::whole(text))
}

/// A size in bytes: `64KiB`, `1500`, `10kB`, `1MiB`.
pub(super) fn size(piece: Piece<'_>) -> Result<u64, RuleError> {
    let expected = "a size such as `1500`, `64KiB` or `10kB`";
    with_unit(piece, SIZES, expected, "not a whole number of bytes")
}

/// A rate in bits per second: `10mbit`, `64KiB/s`, `100kbit`, `0`.
pub(super) fn rate(piece: Piece<'_>) -> Result<u64, RuleError> {
    let expected = "a rate such as `10mbit`, `100kbit` or `64KiB/s`";
    let too_fine = "not a whole number of bits per second";
    with_unit(piece, RATES, expected, too_fine)
}

/// A whole number: `3`.
pub(super) fn count(piece: Piece<'_>) -> Result<u64, RuleError> {
    let (number, rest) = decimal(piece, "a whole number")?;
    if !rest.text().is_empty() {
        let message = format!("`{}` is not a whole number", piece.text());
        return Err(piece.error(message).expected("a whole number such as `3`"));
    }
    number
        .times(1)
        .ok_or_else(|| piece.error("this number has a fraction"))
        .and_then(|value| fits(value, piece))
        .map_err(|error| error.expected("a whole number such as `3`"))
}

/// A whole number with a sign: `-14`, `18`.
pub(super) fn signed(piece: Piece<'_>) -> Result<i64, RuleError> {
    piece.text().parse().map_err(|_| {
        piece
            .error(format!("`{}` is not a whole number", piece.text()))
            .expected("a whole number such as `18` or `-14`")
    })
}

/// The exact text of a probability: a percentage, which is never longer than the fraction.
#[must_use]
pub fn show_probability(ppm: u32) -> String {
    let (whole, rest) = (ppm / (PPM / 100), ppm % (PPM / 100));
    let text = format!("{whole}.{rest:04}");
    format!("{}%", text.trim_end_matches('0').trim_end_matches('.'))
}

/// The shortest exact text of a duration.
#[must_use]
pub fn show_duration(nanoseconds: u64) -> String {
    shortest(nanoseconds, DURATIONS.iter(), "0s")
}

/// The shortest exact text of a size.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    // Where a kilobyte has 1,000 bytes hardly anybody says so of packets: `60000` is plainer than `60kB`.
    let shown = |(name, _): &&Unit| *name != "kB";
    shortest(bytes, SIZES.iter().filter(shown), "0")
}

/// The shortest exact text of a rate.
#[must_use]
pub fn show_rate(bits_per_second: u64) -> String {
    shortest(bits_per_second, RATES.iter(), "0bit")
}

/// A decimal number as it was written: `digits / 10^decimals`.
#[derive(Clone, Copy)]
struct Decimal {
    digits: u128,
    decimals: u32,
}

impl Decimal {
    /// The number times `factor`, where that is a whole number.
    fn times(self, factor: u128) -> Option<u128> {
        let product = self.digits.checked_mul(factor)?;
        let divisor = 10_u128.pow(self.decimals);
        product.is_multiple_of(divisor).then(|| product / divisor)
    }

    /// Whether the number times `factor` is more than `limit`.
    fn above(self, limit: u128, factor: u128) -> bool {
        self.digits * factor > limit * 10_u128.pow(self.decimals)
    }
}

/// The most digits that a number may have; keeps all products within 128 bits.
const MAX_DIGITS: usize = 24;

/// Reads the number at the start of a text; the rest is its unit.
fn decimal<'a>(piece: Piece<'a>, expected: &str) -> Result<(Decimal, Piece<'a>), RuleError> {
    let text = piece.text();
    if text.starts_with('-') {
        return Err(piece
            .error("this is negative")
            .expected(expected)
            .suggest(text.trim_start_matches('-').to_owned()));
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    if text[end..].starts_with(',')
        && let Some(meant) = dictionary::decimal_point(text)
    {
        return Err(piece
            .error("a number has a decimal point and no comma")
            .suggest(meant));
    }
    let number = piece.slice(0..end);
    let (whole, fraction) = number.text().split_once('.').unwrap_or((number.text(), ""));
    if whole.is_empty() || fraction.contains('.') || number.text().ends_with('.') {
        let message = match text {
            "" => "a value is missing".to_owned(),
            _ => format!("`{text}` is not a number"),
        };
        let has_no_zero = whole.is_empty() && fraction.starts_with(|c: char| c.is_ascii_digit());
        let error = piece.error(message).expected(expected);
        return Err(error.suggest_some(has_no_zero.then(|| format!("0{text}"))));
    }
    if whole.len() + fraction.len() > MAX_DIGITS {
        return Err(number.error(format!("this number has more than {MAX_DIGITS} digits")));
    }
    let digits = format!("{whole}{fraction}")
        .parse()
        .map_err(|_| number.error("this is not a number"))?;
    let decimals = u32::try_from(fraction.len()).map_err(|_| number.error("too many digits"))?;
    Ok((Decimal { digits, decimals }, piece.slice(end..text.len())))
}

/// Reads a number with one of the units.
fn with_unit(
    piece: Piece<'_>,
    units: &[Unit],
    expected: &str,
    too_fine: &str,
) -> Result<u64, RuleError> {
    let (number, rest) = decimal(piece, expected)?;
    if rest.text().is_empty() && number.digits == 0 {
        return Ok(0);
    }
    let Some(factor) = factor(rest.text(), units) else {
        return Err(if rest.text().is_empty() {
            piece
                .error(format!("`{}` has no unit", piece.text()))
                .expected(expected)
        } else {
            let names = units
                .iter()
                .map(|(name, _)| *name)
                .filter(|n| !n.is_empty());
            rest.error(format!("unknown unit `{}`", rest.text()))
                .expected(expected)
                .nearest(rest.text(), names)
                .suggest_some(meant(rest.text(), units))
        });
    };
    let value = number.times(factor).ok_or_else(|| {
        piece
            .error(format!("this is {too_fine}"))
            .expected(expected)
    })?;
    fits(value, piece)
}

/// The unit that is most probably meant by a word of other tools.
fn meant(word: &str, units: &[Unit]) -> Option<String> {
    let by_table = |table| dictionary::look_up(table, word).map(str::to_owned);
    let meant = match units {
        DURATIONS => by_table(dictionary::TIME_UNITS),
        SIZES => by_table(dictionary::SIZE_UNITS),
        _ => dictionary::rate_unit(word),
    };
    meant.filter(|meant| factor(meant, units).is_some())
}

/// The factor of a unit by its name.
fn factor(name: &str, units: &[Unit]) -> Option<u128> {
    let find = |name: &str| units.iter().find(|(unit, _)| *unit == name).map(|u| u.1);
    let other = SPELLINGS.iter().find(|(written, _)| *written == name);
    // `Mbit` and `mbit/s` are how many people write it; the size units keep their case.
    let bits = name.strip_suffix("/s").unwrap_or(name).to_lowercase();
    find(name)
        .or_else(|| other.and_then(|(_, meant)| find(meant)))
        .or_else(|| bits.ends_with("bit").then(|| find(&bits)).flatten())
}

/// The value in 64 bits, or an error that says so.
fn fits(value: u128, piece: Piece<'_>) -> Result<u64, RuleError> {
    u64::try_from(value).map_err(|_| piece.error("this number is too large"))
}

/// `value / unit` as an exact decimal, where it has at most nine digits behind the point.
fn exact(value: u128, unit: u128) -> Option<String> {
    let mut text = (value / unit).to_string();
    let mut rest = value % unit;
    if rest != 0 {
        text.push('.');
    }
    for _ in 0..9 {
        if rest == 0 {
            break;
        }
        rest *= 10;
        text += &(rest / unit).to_string();
        rest %= unit;
    }
    (rest == 0).then_some(text)
}

/// The shortest exact text with one of the units that are not larger than the value; of equal ones the first.
fn shortest<'u>(value: u64, units: impl Iterator<Item = &'u Unit>, zero: &str) -> String {
    if value == 0 {
        return zero.to_owned();
    }
    units
        .filter(|(_, unit)| u128::from(value) >= *unit)
        .filter_map(|(name, unit)| exact(u128::from(value), *unit).map(|text| text + name))
        .min_by_key(String::len)
        .unwrap_or_else(|| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a whole text.
    fn read<T>(reader: fn(Piece<'_>) -> Result<T, RuleError>, text: &str) -> Option<T> {
        reader(Piece::whole(text)).ok()
    }

    #[test]
    fn durations() {
        for (text, ns) in [
            ("0", 0),
            ("1ns", 1),
            ("10us", 10_000),
            ("200ms", 200_000_000),
            ("1.5s", 1_500_000_000),
            ("90s", 90_000_000_000),
            ("2m", 120_000_000_000),
            ("1h", 3_600_000_000_000),
            ("0.000000001s", 1),
        ] {
            assert_eq!(read(duration, text), Some(ns), "{text}");
            assert_eq!(read(duration, &show_duration(ns)), Some(ns), "{text}");
        }
        for text in [
            "",
            "5",
            "s",
            "1.s",
            ".5s",
            "1e3s",
            "-1s",
            "+1s",
            "0.5ns",
            "99999999999h",
            "5 s",
            "5S",
            "1,5s",
        ] {
            assert_eq!(read(duration, text), None, "{text}");
        }
    }

    #[test]
    fn shortest_texts() {
        for (ns, text) in [
            (0, "0s"),
            (1, "1ns"),
            (1_500, "1.5us"),
            (200_000_000, "200ms"),
            (90_000_000_000, "90s"),
            (120_000_000_000, "2m"),
        ] {
            assert_eq!(show_duration(ns), text);
        }
        for (bytes, text) in [
            (0, "0"),
            (1500, "1500"),
            (1536, "1536"),
            (65_536, "64KiB"),
            (10_000, "10000"),
            (60_000, "60000"),
            (3_000_000, "3MB"),
            (1 << 20, "1MiB"),
            (u64::MAX, "18446744073709551615"),
        ] {
            assert_eq!(show_size(bytes), text);
            assert_eq!(read(size, text), Some(bytes));
        }
        for (bits, text) in [
            (0, "0bit"),
            (10_000_000, "10mbit"),
            (524_288, "64KiB/s"),
            (800, "800bit"),
            (8_000_000, "8mbit"),
        ] {
            assert_eq!(show_rate(bits), text);
            assert_eq!(read(rate, text), Some(bits));
        }
        for (ppm, text) in [
            (0, "0%"),
            (1, "0.0001%"),
            (5_000, "0.5%"),
            (300_000, "30%"),
            (333_333, "33.3333%"),
            (PPM, "100%"),
        ] {
            assert_eq!(show_probability(ppm), text);
            assert_eq!(read(probability, text), Some(ppm));
        }
    }

    #[test]
    fn probabilities_are_exact() {
        for ppm in 0..=PPM {
            assert_eq!(read(probability, &show_probability(ppm)), Some(ppm));
        }
        for text in [
            "100.0001%",
            "1.000001",
            "0.0000001",
            "0.00001%",
            "2",
            "%",
            "1%%",
        ] {
            assert_eq!(read(probability, text), None, "{text}");
        }
    }

    #[test]
    fn rates_by_their_spellings() {
        for text in [
            "10mbit",
            "10Mbit",
            "10MBIT",
            "10mbit/s",
            "10000kbit",
            "0.01gbit",
            "1250kB/s",
            "1.25MB/s",
        ] {
            assert_eq!(read(rate, text), Some(10_000_000), "{text}");
        }
        for text in ["10mb", "10MiB", "10", "10b", "10kb/s", "10bit/h"] {
            assert_eq!(read(rate, text), None, "{text}");
        }
    }
}
