//! A load in one word of the command line: `in=512,out=128,clients=8,requests=32`.

use std::str::FromStr;

use crate::workload::{Dataset, WorkloadArgs};

/// Equal requests of random tokens, sent by clients that each wait for their answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// As it was written.
    pub name: String,
    pub clients: usize,
    input_len: usize,
    output_len: usize,
    requests: usize,
    /// Tokens that all prompts begin with, on top of `input_len`.
    prefix_len: usize,
}

impl Scenario {
    /// The workload, with everything that the scenario leaves open from `base`.
    pub fn workload(&self, base: &WorkloadArgs) -> WorkloadArgs {
        let base = base.clone();
        if self.prefix_len > 0 {
            return WorkloadArgs {
                dataset_name: Dataset::GeneratedSharedPrefix,
                gsp_num_groups: 1,
                gsp_prompts_per_group: self.requests,
                gsp_system_prompt_len: self.prefix_len,
                gsp_question_len: self.input_len,
                gsp_output_len: self.output_len,
                ..base
            };
        }
        WorkloadArgs {
            dataset_name: Dataset::Random,
            num_prompts: self.requests,
            random_input_len: self.input_len,
            random_output_len: self.output_len,
            random_range_ratio: 1.0,
            ..base
        }
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let [mut input_len, mut output_len, mut clients, mut requests, mut prefix_len] = [None; 5];
        for part in text.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("'{part}' is not of the form KEY=N"))?;
            let field = match key.trim() {
                "in" => &mut input_len,
                "out" => &mut output_len,
                "clients" => &mut clients,
                "requests" => &mut requests,
                "prefix" => &mut prefix_len,
                _ => return Err(format!("'{key}' is unknown; known are in, out, clients, requests and prefix")),
            };
            let value: usize = value.trim().parse().map_err(|_| format!("{key}: '{value}' is no whole number"))?;
            if field.replace(value).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        let needed = |key: &str, value: Option<usize>| match value {
            Some(0) => Err(format!("{key} must be at least 1")),
            Some(value) => Ok(value),
            None => Err(format!("{key}=N is missing")),
        };
        let clients = needed("clients", clients)?;
        Ok(Self {
            name: text.to_owned(),
            clients,
            input_len: needed("in", input_len)?,
            output_len: needed("out", output_len)?,
            requests: needed("requests", requests.or(Some(clients)))?,
            prefix_len: prefix_len.unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::workload::{Content, generate};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        workload: WorkloadArgs,
    }

    fn prompts(scenario: &str, seed: u64) -> Vec<(Vec<u32>, usize)> {
        let scenario: Scenario = scenario.parse().unwrap();
        let base = WorkloadArgs { seed, ..Cli::parse_from(["bench"]).workload };
        let prompts = generate(&scenario.workload(&base), 0..1000).unwrap().into_iter();
        let ids = prompts.map(|prompt| match prompt.content {
            Content::Tokens(tokens) => (tokens, prompt.output_len),
            Content::Text(text) => panic!("{text}"),
        });
        ids.collect()
    }

    #[test]
    fn prompts_are_as_the_scenario_says() {
        let equal = prompts("in=6,out=3,clients=2,requests=5", 1);
        assert_eq!(equal.len(), 5);
        assert!(equal.iter().all(|(tokens, output_len)| tokens.len() == 6 && *output_len == 3));
        assert_eq!(equal, prompts("requests=5,out=3,in=6,clients=1", 1));
        assert_ne!(equal, prompts("in=6,out=3,clients=2,requests=5", 2));

        let shared = prompts("in=2,out=3,clients=4,prefix=7", 1);
        assert_eq!(shared.len(), 4, "as many requests as clients");
        assert!(shared.iter().all(|(tokens, _)| tokens.len() == 9 && tokens[..7] == shared[0].0[..7]));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("in=1,out=1", "clients=N is missing"),
            ("in=1,out=0,clients=1", "out must"),
            ("in=1,in=2", "in is given twice"),
            ("size=1", "'size' is unknown"),
            ("in=x", "in: 'x'"),
            ("8", "'8' is not"),
        ] {
            let error = text.parse::<Scenario>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
