//! What products are tested against: plain sums in f64.

/// `x · wᵀ` for `x` `[rows, columns]` and `w` `[outputs, columns]`, and for each element the sum of the magnitudes of
/// its terms, which rounding errors are relative to.
pub fn product(x: &[f32], w: &[f32], columns: usize) -> (Vec<f64>, Vec<f64>) {
    let dot = |x: &[f32], w: &[f32], term: fn(f64) -> f64| -> f64 {
        x.iter().zip(w).map(|(x, w)| term(f64::from(*x) * f64::from(*w))).sum()
    };
    let pairs = || x.chunks_exact(columns).flat_map(|x| w.chunks_exact(columns).map(move |w| (x, w)));
    let sums = pairs().map(|(x, w)| dot(x, w, |term| term)).collect();
    (sums, pairs().map(|(x, w)| dot(x, w, f64::abs)).collect())
}
