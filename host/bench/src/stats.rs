//! Summaries of samples.

/// Mean, spread and percentiles of samples; all zero where there are none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    sorted: Vec<f64>,
}

impl Summary {
    pub fn new(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<_> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        Self { sorted }
    }

    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// The samples of several summaries together.
    pub fn pooled<'a>(summaries: impl IntoIterator<Item = &'a Self>) -> Self {
        Self::new(summaries.into_iter().flat_map(|summary| summary.sorted.iter().copied()))
    }

    pub fn mean(&self) -> f64 {
        if self.sorted.is_empty() { 0.0 } else { self.sorted.iter().sum::<f64>() / self.sorted.len() as f64 }
    }

    /// Standard deviation of the samples themselves (not an estimate for a population they were drawn from).
    pub fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares = self.sorted.iter().map(|sample| (sample - mean).powi(2));
        if self.sorted.is_empty() { 0.0 } else { (squares.sum::<f64>() / self.sorted.len() as f64).sqrt() }
    }

    /// The value below which `percent` of the samples lie, interpolated linearly between neighbours.
    pub fn percentile(&self, percent: f64) -> f64 {
        let Some(last) = self.sorted.len().checked_sub(1) else { return 0.0 };
        let rank = (percent / 100.0).clamp(0.0, 1.0) * last as f64;
        let below = rank.floor();
        let (low, high) = (self.sorted[below as usize], self.sorted[rank.ceil() as usize]);
        low + (high - low) * (rank - below)
    }

    pub fn median(&self) -> f64 {
        self.percentile(50.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate_between_neighbours() {
        let summary = Summary::new([4.0, 1.0, 3.0, 2.0]);
        let percentiles = [0.0, 25.0, 50.0, 90.0, 100.0].map(|percent| summary.percentile(percent));
        assert_eq!(percentiles, [1.0, 1.75, 2.5, 3.7, 4.0]);
    }

    #[test]
    fn mean_and_deviation() {
        let summary = Summary::new([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!((summary.mean(), summary.deviation(), summary.median()), (5.0, 2.0, 4.5));
    }

    #[test]
    fn pooled_samples_are_sorted_again() {
        let pooled = Summary::pooled(&[Summary::new([5.0, 1.0]), Summary::new([]), Summary::new([3.0])]);
        assert_eq!(pooled, Summary::new([1.0, 3.0, 5.0]));
    }

    #[test]
    fn nothing_and_one_sample() {
        let nothing = Summary::new([]);
        assert_eq!((nothing.mean(), nothing.deviation(), nothing.percentile(99.0)), (0.0, 0.0, 0.0));
        let one = Summary::new([3.0]);
        assert_eq!((one.mean(), one.deviation(), one.percentile(99.0)), (3.0, 0.0, 3.0));
    }
}
