//! The figures by which servers are compared, and the spread of their ratios over rounds.

use serde_json::{Value, json};

use crate::{report::Report, stats::Summary};

/// A number of a report.
pub struct Figure {
    pub key: &'static str,
    /// With its unit.
    pub title: &'static str,
    /// `None` where it was not measured, as the time between tokens of answers of one token.
    of: fn(&Report) -> Option<f64>,
}

fn percentile(samples: &Summary, percent: f64) -> Option<f64> {
    (!samples.is_empty()).then(|| samples.percentile(percent))
}

/// All of them, in the order of tables.
pub const FIGURES: [Figure; 10] = [
    Figure { key: "output_throughput", title: "output tok/s", of: |report| Some(report.output_throughput()) },
    Figure { key: "total_throughput", title: "total tok/s", of: |report| Some(report.total_throughput()) },
    Figure { key: "p50_ttft_ms", title: "TTFT p50 (ms)", of: |report| percentile(&report.first_token, 50.0) },
    Figure { key: "p99_ttft_ms", title: "TTFT p99 (ms)", of: |report| percentile(&report.first_token, 99.0) },
    Figure { key: "p50_tpot_ms", title: "TPOT p50 (ms)", of: |report| percentile(&report.per_token, 50.0) },
    Figure { key: "p99_tpot_ms", title: "TPOT p99 (ms)", of: |report| percentile(&report.per_token, 99.0) },
    Figure { key: "p50_itl_ms", title: "ITL p50 (ms)", of: |report| percentile(&report.token_gap, 50.0) },
    Figure { key: "p99_itl_ms", title: "ITL p99 (ms)", of: |report| percentile(&report.token_gap, 99.0) },
    Figure { key: "p50_e2e_latency_ms", title: "e2e p50 (ms)", of: |report| percentile(&report.latency, 50.0) },
    Figure { key: "p99_e2e_latency_ms", title: "e2e p99 (ms)", of: |report| percentile(&report.latency, 99.0) },
];

/// A figure of two servers over the same rounds.
#[derive(Debug)]
pub struct Comparison {
    pub key: &'static str,
    pub title: &'static str,
    pub first: Summary,
    pub second: Summary,
    /// First over second, one for each round: what disturbs a whole round disturbs both, and cancels.
    pub ratio: Summary,
}

impl Comparison {
    /// Compares rounds in pairs; `None` if the figure was not measured in each, or is 0 where it divides.
    pub fn of(figure: &Figure, first: &[Report], second: &[Report]) -> Option<Self> {
        let values = |reports: &[Report]| reports.iter().map(figure.of).collect::<Option<Vec<f64>>>();
        let (first, second) = (values(first)?, values(second)?);
        let ratio: Vec<_> = first.iter().zip(&second).map(|(first, second)| first / second).collect();
        ratio.iter().all(|ratio| ratio.is_finite()).then(|| Self {
            key: figure.key,
            title: figure.title,
            first: Summary::new(first),
            second: Summary::new(second),
            ratio: Summary::new(ratio),
        })
    }

    pub fn json(&self) -> Value {
        let spread = |summary: &Summary| json!({"median": summary.median(), "min": summary.percentile(0.0), "max": summary.percentile(100.0)});
        json!({"first": spread(&self.first), "second": spread(&self.second), "ratio": spread(&self.ratio)})
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::Sample;

    /// One request of `tokens` tokens that took `latency_ms`, the whole of the round.
    fn round(tokens: usize, latency_ms: u64) -> Report {
        let latency = Duration::from_millis(latency_ms);
        let sample = Sample { latency, prompt_tokens: 10, output_tokens: tokens, ..Sample::default() };
        Report::new(latency, &[Ok(sample)], &[])
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        // 20, 40, 5 tokens a second against 10, 10, 10.
        let first = [round(20, 1000), round(20, 500), round(20, 4000)];
        let second = [round(10, 1000), round(10, 1000), round(10, 1000)];
        let output = Comparison::of(&FIGURES[0], &first, &second).unwrap();
        let values = json!({"first": {"median": 20.0, "min": 5.0, "max": 40.0},
            "second": {"median": 10.0, "min": 10.0, "max": 10.0}, "ratio": {"median": 2.0, "min": 0.5, "max": 4.0}});
        assert_eq!(output.json(), values);
        let latency = FIGURES.iter().find(|figure| figure.key == "p50_e2e_latency_ms").unwrap();
        assert_eq!(Comparison::of(latency, &first, &second).unwrap().ratio, Summary::new([1.0, 0.5, 4.0]));
    }

    #[test]
    fn what_was_not_measured_is_not_compared() {
        let (first, second) = ([round(20, 1000)], [round(10, 1000)]);
        let compared: Vec<_> = FIGURES
            .iter()
            .filter_map(|figure| Comparison::of(figure, &first, &second))
            .map(|comparison| comparison.key)
            .collect();
        assert_eq!(compared, ["output_throughput", "total_throughput", "p50_e2e_latency_ms", "p99_e2e_latency_ms"]);
    }
}
