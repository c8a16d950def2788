//! The fewest of some things that still fail together, by delta debugging.

use anyhow::Result;

/// Leaves out what is not needed, as long as the rest still fails: `ddmin` (Zeller and Hildebrandt, "Simplifying and
/// Isolating Failure-Inducing Input", IEEE Transactions on Software Engineering 28, 2002). None of what is left can be
/// left out alone. All together are known to fail.
///
/// # Errors
/// Those of `fails`.
pub async fn fewest<T: Clone>(
    all: &[T],
    mut fails: impl AsyncFnMut(&[T]) -> Result<bool>,
) -> Result<Vec<T>> {
    let mut left = all.to_vec();
    let mut chunks = 2;
    'smaller: while left.len() > 1 {
        let size = left.len().div_ceil(chunks);
        for from in (0..left.len()).step_by(size) {
            let chunk = left[from..(from + size).min(left.len())].to_vec();
            if fails(&chunk).await? {
                (left, chunks) = (chunk, 2);
                continue 'smaller;
            }
        }
        // Of two chunks each is what is left without the other one.
        let is_more = left.len().div_ceil(size) > 2;
        for from in (0..left.len()).step_by(size).filter(|_| is_more) {
            let rest = [&left[..from], &left[(from + size).min(left.len())..]].concat();
            if fails(&rest).await? {
                (left, chunks) = (rest, (chunks - 1).max(2));
                continue 'smaller;
            }
        }
        if size == 1 {
            break;
        }
        chunks = (chunks * 2).min(left.len());
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::super::experimenter::tests::block_on;
    use super::*;

    #[test]
    fn what_is_needed_is_left() {
        let all: Vec<u32> = (0..100).collect();
        for needed in [vec![7], vec![0, 99], vec![3, 4, 50, 98], (0..100).collect()] {
            let mut tries = 0;
            let left = block_on(fewest(&all, async |some: &[u32]| {
                tries += 1;
                Ok(needed.iter().all(|one| some.contains(one)))
            }));
            assert_eq!(left.unwrap(), needed);
            // The bound of the paper.
            assert!(tries <= 100 * 100 + 3 * 100, "{tries}");
        }
    }

    #[test]
    fn of_two_each_is_tried_once() {
        let mut tried = Vec::new();
        let left = block_on(fewest(&['a', 'b'], async |some: &[char]| {
            tried.push(some.to_vec());
            Ok(false)
        }));
        assert_eq!(left.unwrap(), ['a', 'b']);
        assert_eq!(tried, [['a'], ['b']]);
    }
}
