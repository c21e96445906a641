//! Pearson's test of counts against probabilities.

/// The statistic, and the threshold that counts drawn with these probabilities exceed once in a million times (by the
/// approximation of Wilson and Hilferty, 1931). Cells of fewer than five expected counts are put together.
pub(crate) fn test(counts: &[u64], probabilities: &[f64]) -> (f64, f64) {
    const EXPECTED_MIN: f64 = 5.0;
    /// The quantile of the normal distribution above which lies one in a million.
    const QUANTILE: f64 = 4.753;
    let draws = counts.iter().sum::<u64>() as f64;
    let mut cells: Vec<(f64, f64)> = Vec::new();
    let mut rare = (0.0, 0.0);
    for (count, probability) in counts.iter().zip(probabilities) {
        let expected = probability * draws;
        if expected < EXPECTED_MIN {
            rare = (rare.0 + *count as f64, rare.1 + expected);
        } else {
            cells.push((*count as f64, expected));
        }
    }
    if rare.1 > 0.0 {
        cells.push(rare);
    }
    let statistic = cells.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
    let freedom = cells.len() as f64 - 1.0;
    let spread = 2.0 / (9.0 * freedom);
    (statistic, freedom * (1.0 - spread + QUANTILE * spread.sqrt()).powi(3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_those_of_tables() {
        let (statistic, threshold) = test(&[100; 11], &[1.0 / 11.0; 11]);
        assert!(statistic < 1e-9);
        // Ten degrees of freedom: 48.9 at a tail of one in a million.
        assert!((threshold - 48.9).abs() < 1.0, "{threshold}");
    }

    #[test]
    fn counts_that_are_off_exceed_it() {
        let (statistic, threshold) = test(&[5_300, 4_700], &[0.5, 0.5]);
        assert!(statistic > threshold);
        let (statistic, threshold) = test(&[5_050, 4_950], &[0.5, 0.5]);
        assert!(statistic < threshold);
    }
}
