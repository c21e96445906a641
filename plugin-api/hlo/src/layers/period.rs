//! What of a sequence of layers repeats.

/// Runs of layers of one class each, the whole of which comes several times in a row.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Segment {
    /// The first layer.
    first: usize,
    pub repeats: usize,
    /// The lengths of the runs.
    pub runs: Vec<usize>,
}

impl Segment {
    /// The layers of a run, in all repetitions.
    pub fn layers(&self, run: usize) -> Vec<usize> {
        let (period, before): (usize, usize) = (self.runs.iter().sum(), self.runs[..run].iter().sum());
        let begin = |repetition| self.first + repetition * period + before;
        (0..self.repeats).flat_map(|repetition| begin(repetition)..begin(repetition) + self.runs[run]).collect()
    }
}

/// Cuts a sequence of classes into segments, from the front: each the one that covers most layers with repetitions, of
/// the shortest period; where nothing repeats, one run.
pub(super) fn segments(classes: &[usize]) -> Vec<Segment> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for class in classes {
        match runs.last_mut() {
            Some((last, len)) if last == class => *len += 1,
            _ => runs.push((*class, 1)),
        }
    }
    let (mut segments, mut first, mut rest) = (Vec::new(), 0, &runs[..]);
    while !rest.is_empty() {
        let best = (1..=rest.len() / 2).rev().max_by_key(|period| {
            let repeats = repeats(rest, *period);
            if repeats > 1 { layers(&rest[..period * repeats]) } else { 0 }
        });
        let period = best.filter(|period| repeats(rest, *period) > 1).unwrap_or(1);
        let repeats = repeats(rest, period);
        segments.push(Segment { first, repeats, runs: rest[..period].iter().map(|(_, len)| *len).collect() });
        first += layers(&rest[..period * repeats]);
        rest = &rest[period * repeats..];
    }
    segments
}

fn layers(runs: &[(usize, usize)]) -> usize {
    runs.iter().map(|(_, len)| len).sum()
}

/// How many times the first runs come in a row.
fn repeats(runs: &[(usize, usize)], period: usize) -> usize {
    runs.chunks_exact(period).take_while(|chunk| *chunk == &runs[..period]).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(classes: &[usize]) -> Vec<(usize, usize, Vec<usize>)> {
        let segments = segments(classes);
        let mut covered: Vec<_> =
            segments.iter().flat_map(|s| (0..s.runs.len()).flat_map(|run| s.layers(run)).collect::<Vec<_>>()).collect();
        covered.sort_unstable();
        assert_eq!(covered, (0..classes.len()).collect::<Vec<_>>());
        segments.into_iter().map(|s| (s.first, s.repeats, s.runs)).collect()
    }

    #[test]
    fn equal_layers_are_one_run() {
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[0]), [(0, 1, vec![1])]);
        assert_eq!(of(&[0; 36]), [(0, 1, vec![36])]);
        assert_eq!(of(&[&[0; 28][..], &[1; 8]].concat()), [(0, 1, vec![28]), (28, 1, vec![8])]);
    }

    #[test]
    fn a_pattern_of_kinds_is_a_period_and_a_tail() {
        let pattern = |count: usize| (0..count).map(|i| usize::from(i % 6 == 5)).collect::<Vec<_>>();
        assert_eq!(of(&pattern(18)), [(0, 3, vec![5, 1])]);
        assert_eq!(of(&pattern(26)), [(0, 4, vec![5, 1]), (24, 1, vec![2])]);
        assert_eq!(of(&[0, 1, 0, 1, 0, 1]), [(0, 3, vec![1, 1])]);
        assert_eq!(
            of(&[1, 0, 0, 1, 0, 0, 0, 1]),
            [(0, 1, vec![1]), (1, 1, vec![2]), (3, 1, vec![1]), (4, 1, vec![3]), (7, 1, vec![1])]
        );
    }

    #[test]
    fn the_layers_of_a_run_are_those_of_all_repetitions() {
        let segment = Segment { first: 2, repeats: 2, runs: vec![2, 1] };
        assert_eq!((segment.layers(0), segment.layers(1)), (vec![2, 3, 5, 6], vec![4, 7]));
    }
}
