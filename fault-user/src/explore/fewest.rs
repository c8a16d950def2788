//! The fewest of some things that still fail together, by delta debugging.

use anyhow::Result;

/// Leaves out what is not needed, as long as the rest still fails: `ddmin` (Zeller and Hildebrandt, "Simplifying and
/// Isolating Failure-Inducing Input", IEEE Transactions on Software Engineering 28, 2002). None of what is left can be
/// left out alone. All together are known to fail. They are divided into `chunks` at first, 2 or more.
///
/// `fails` says nothing when no more can be tried; then the fewest so far are the result.
///
/// # Errors
/// Those of `fails`.
pub async fn fewest<T: Clone>(
    all: &[T],
    mut chunks: usize,
    mut fails: impl AsyncFnMut(&[T]) -> Result<Option<bool>>,
) -> Result<Vec<T>> {
    let mut left = all.to_vec();
    'smaller: while left.len() > 1 {
        let size = left.len().div_ceil(chunks);
        for from in (0..left.len()).step_by(size) {
            let chunk = left[from..(from + size).min(left.len())].to_vec();
            let Some(is_enough) = fails(&chunk).await? else {
                break 'smaller;
            };
            if is_enough {
                (left, chunks) = (chunk, 2);
                continue 'smaller;
            }
        }
        // Of two chunks each is what is left without the other one.
        let is_more = left.len().div_ceil(size) > 2;
        for from in (0..left.len()).step_by(size).filter(|_| is_more) {
            let rest = [&left[..from], &left[(from + size).min(left.len())..]].concat();
            let Some(is_enough) = fails(&rest).await? else {
                break 'smaller;
            };
            if is_enough {
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
            let left = block_on(fewest(&all, 2, async |some: &[u32]| {
                tries += 1;
                Ok(Some(needed.iter().all(|one| some.contains(one))))
            }));
            assert_eq!(left.unwrap(), needed);
            // The bound of the paper.
            assert!(tries <= 100 * 100 + 3 * 100, "{tries}");
        }
    }

    #[test]
    fn of_two_each_is_tried_once() {
        let mut tried = Vec::new();
        let left = block_on(fewest(&['a', 'b'], 2, async |some: &[char]| {
            tried.push(some.to_vec());
            Ok(Some(false))
        }));
        assert_eq!(left.unwrap(), ['a', 'b']);
        assert_eq!(tried, [['a'], ['b']]);
    }

    #[test]
    fn when_no_more_can_be_tried_the_fewest_so_far_are_left() {
        let all: Vec<u32> = (0..8).collect();
        let mut tries = 0;
        let left = block_on(fewest(&all, 2, async |some: &[u32]| {
            tries += 1;
            Ok((tries < 3).then(|| some.contains(&5)))
        }));
        assert_eq!((left.unwrap(), tries), (vec![4, 5, 6, 7], 3));
    }
}
