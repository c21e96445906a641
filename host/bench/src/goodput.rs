//! Limits that an answer must keep to in order to count as good.

use std::str::FromStr;

use crate::{backend::Sample, report::milliseconds};

/// A time of a request that can be limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timing {
    FirstToken,
    PerToken,
    /// The longest time between two tokens.
    TokenGap,
    Latency,
}

/// The most that a time of a request may be, written as `ttft:500`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    timing: Timing,
    most_ms: f64,
}

impl Limit {
    /// Whether a request kept to the limit. A time that it does not have, as an answer of one token has no time per
    /// token after the first, exceeds nothing.
    pub fn holds(&self, sample: &Sample) -> bool {
        let measured = match self.timing {
            Timing::FirstToken => sample.time_to_first_token(),
            Timing::PerToken => sample.time_per_token(),
            Timing::TokenGap => sample.token_gaps().max(),
            Timing::Latency => Some(sample.latency),
        };
        measured.is_none_or(|measured| milliseconds(measured) <= self.most_ms)
    }
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, most_ms) = text.split_once(':').ok_or("expected NAME:MILLISECONDS, as in 'ttft:500'")?;
        let timing = match name {
            "ttft" => Timing::FirstToken,
            "tpot" => Timing::PerToken,
            "itl" => Timing::TokenGap,
            "e2el" | "e2e" => Timing::Latency,
            _ => return Err(format!("'{name}' cannot be limited; known are ttft, tpot, itl and e2el")),
        };
        match most_ms.parse() {
            Ok(most_ms) if most_ms > 0.0 => Ok(Self { timing, most_ms }),
            _ => Err(format!("'{most_ms}' is no number of milliseconds above 0")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn holds(limit: &str, sample: &Sample) -> bool {
        limit.parse::<Limit>().unwrap().holds(sample)
    }

    #[test]
    fn limits_hold_up_to_their_value() {
        let ms = Duration::from_millis;
        // Gaps of 20 and 60 ms: 40 ms per token after the first.
        let arrivals = vec![(ms(100), 1), (ms(120), 1), (ms(180), 1)];
        let sample = Sample { latency: ms(180), arrivals, output_tokens: 3, ..Sample::default() };
        let verdicts = ["ttft:100", "ttft:99.9", "tpot:40", "tpot:39", "itl:60", "itl:59", "e2el:180", "e2e:179"]
            .map(|limit| holds(limit, &sample));
        assert_eq!(verdicts, [true, false, true, false, true, false, true, false]);
        assert!(holds("tpot:1", &Sample { output_tokens: 1, ..sample }));
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for (text, expected) in [("ttft", "NAME:"), ("speed:3", "'speed'"), ("itl:x", "'x'"), ("itl:0", "'0'")] {
            let error = text.parse::<Limit>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
