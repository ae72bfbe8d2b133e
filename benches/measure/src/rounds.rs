//! Rounds in which contenders take turns, so that a slow minute of the machine hits all of them.

use crate::{Line, Result};

/// The name of the system that the others are compared with.
pub const FLOOR: &str = "floor";

/// Lets `measure` measure each contender once a round, every other round in the opposite order, and
/// returns the line of the medians of each.
///
/// Where one of them is the floor, each line gets its ratio to that of the same round, before the
/// medians are taken.
pub fn rounds<T>(
    count: usize,
    contenders: &[T],
    mut measure: impl FnMut(&T) -> Result<Line>,
) -> Result<Vec<Line>> {
    let mut of_each = vec![Vec::new(); contenders.len()];
    for round in 0..count {
        let mut order: Vec<usize> = (0..contenders.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for i in order {
            of_each[i].push(measure(&contenders[i])?);
        }
        let floor =
            of_each.iter().find(|lines| lines[round].system == FLOOR).map(|lines| lines[round].clone());
        for lines in &mut of_each {
            if let Some(floor) = &floor {
                lines[round].compare(floor);
            }
        }
    }
    Ok(of_each.iter().filter_map(|lines| Line::median(lines)).collect())
}

/// The middle of some figures: of an even number, the lower of the two. `None` of none.
pub fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn compares_within_each_round() {
        let mut speed = 0.0;
        let lines = rounds(3, &[(FLOOR, 10.0), ("queue", 5.0)], |(system, rate)| {
            speed += 1.0;
            Ok(Line { msgs_per_s: Some(rate * speed), ..Line::new("work", *system) })
        });
        let ratios: Vec<_> = lines.unwrap().iter().map(|line| line.ratio_to_floor).collect();
        // Floor and queue ran at speeds 1 and 2, then 4 and 3, then 5 and 6.
        assert_eq!(ratios, [Some(1.0), Some(0.6)]);
    }

    #[test]
    fn takes_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }
}
