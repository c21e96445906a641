//! The prompts of a run.

use std::{fs, ops::Range, path::PathBuf};

use anyhow::{Context, bail, ensure};
use rand::{RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

/// One request's input and how many tokens it asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    pub content: Content,
    pub output_len: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Tokens(Vec<u32>),
    Text(String),
}

/// Words that most tokenizers know as one token each, with the space before them.
const WORDS: [&str; 32] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "number", "night", "point", "home",
];

impl Content {
    /// Random tokens as text, for endpoints that take only text: a word for each.
    pub fn text(&self) -> String {
        match self {
            Content::Text(text) => text.clone(),
            Content::Tokens(tokens) => {
                let words: Vec<_> = tokens.iter().map(|token| WORDS[*token as usize % WORDS.len()]).collect();
                words.join(" ")
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dataset {
    /// Random tokens, lengths drawn from a range.
    #[value(alias = "random-ids")]
    Random,
    /// Groups of prompts, each group with a long common beginning.
    GeneratedSharedPrefix,
    /// A file of conversations in ShareGPT's format; the first turn is the prompt.
    Sharegpt,
    /// A file of JSON lines, each with 'prompt' or 'conversations', and 'output_len' if lengths differ.
    Custom,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Workload")]
pub struct WorkloadArgs {
    #[arg(long, value_name = "NAME", default_value = "random")]
    pub dataset_name: Dataset,
    /// File of the dataset (sharegpt, custom)
    #[arg(long, value_name = "FILE")]
    pub dataset_path: Option<PathBuf>,
    /// Requests to send (of generated-shared-prefix: all of its groups)
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub num_prompts: usize,
    /// Output tokens of each request (sharegpt, custom lines without 'output_len')
    #[arg(long, value_name = "TOKENS")]
    pub sharegpt_output_len: Option<usize>,
    /// Longest prompt (random)
    #[arg(long, alias = "random-input", value_name = "TOKENS", default_value_t = 1024)]
    pub random_input_len: usize,
    /// Longest output (random)
    #[arg(long, alias = "random-output", value_name = "TOKENS", default_value_t = 1024)]
    pub random_output_len: usize,
    /// Shortest lengths as a share of the longest; 1 makes all equal (random)
    #[arg(long, value_name = "0..1", default_value_t = 0.0)]
    pub random_range_ratio: f64,
    /// Groups that share a beginning
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub gsp_num_groups: usize,
    /// Prompts of each group
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub gsp_prompts_per_group: usize,
    /// Length of a group's common beginning
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub gsp_system_prompt_len: usize,
    /// Length of what follows it
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub gsp_question_len: usize,
    /// Output tokens of each request (generated-shared-prefix)
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub gsp_output_len: usize,
    /// Send random prompts as words instead of token ids, for servers that take only text
    #[arg(long)]
    pub text_prompts: bool,
    /// Seed of prompts, lengths, order and arrivals
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// The token ids that random prompts are made of. The default lies above the special tokens and below the size of any
/// usual vocabulary, so the same prompts fit all models.
pub fn token_range(vocab_size: Option<u64>) -> Range<u32> {
    const USUAL: Range<u32> = 1_000..10_000;
    match vocab_size {
        Some(size) if size < u64::from(USUAL.end) => (size / 10) as u32..size.max(1) as u32,
        _ => USUAL,
    }
}

/// Makes the prompts of a run.
pub fn generate(args: &WorkloadArgs, tokens: Range<u32>) -> anyhow::Result<Vec<Prompt>> {
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let mut prompts = match args.dataset_name {
        Dataset::Random => random(args, tokens, &mut rng)?,
        Dataset::GeneratedSharedPrefix => shared_prefix(args, tokens, &mut rng),
        Dataset::Sharegpt => {
            let content = read(args)?;
            let conversations: Vec<Value> = serde_json::from_str(&content)
                .with_context(|| format!("--dataset-path {}: is no JSON list", path_of(args)))?;
            let usable =
                conversations.iter().filter(|line| line["conversations"].as_array().is_some_and(|c| c.len() > 1));
            sample(
                usable.filter_map(|line| from_line(line, args).transpose()).collect::<Result<_, _>>()?,
                args,
                &mut rng,
            )
        }
        Dataset::Custom => {
            let content = read(args)?;
            let lines = content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let prompts = lines.map(|(number, line)| {
                let whereabouts = || format!("--dataset-path {}: line {}", path_of(args), number + 1);
                let line: Value = serde_json::from_str(line).with_context(whereabouts)?;
                from_line(&line, args)?.with_context(|| format!("{} has no prompt", whereabouts()))
            });
            sample(prompts.collect::<Result<_, _>>()?, args, &mut rng)
        }
    };
    ensure!(!prompts.is_empty(), "the workload has no prompts; see --dataset-name, --dataset-path and --num-prompts");
    if args.text_prompts {
        for prompt in &mut prompts {
            prompt.content = Content::Text(prompt.content.text());
        }
    }
    Ok(prompts)
}

fn random(args: &WorkloadArgs, tokens: Range<u32>, rng: &mut ChaCha8Rng) -> anyhow::Result<Vec<Prompt>> {
    ensure!((0.0..=1.0).contains(&args.random_range_ratio), "--random-range-ratio must be in 0..1");
    let range = |longest: usize| ((longest as f64 * args.random_range_ratio) as usize).max(1)..=longest.max(1);
    let (inputs, outputs) = (range(args.random_input_len), range(args.random_output_len));
    // Lengths first, so that they stay the same when the token range differs.
    let lengths: Vec<_> =
        (0..args.num_prompts).map(|_| (rng.random_range(inputs.clone()), rng.random_range(outputs.clone()))).collect();
    let prompts = lengths.into_iter().map(|(input_len, output_len)| Prompt {
        content: Content::Tokens(random_tokens(input_len, tokens.clone(), rng)),
        output_len,
    });
    Ok(prompts.collect())
}

/// `count` token ids drawn from `tokens`.
pub fn random_tokens(count: usize, tokens: Range<u32>, rng: &mut ChaCha8Rng) -> Vec<u32> {
    (0..count).map(|_| rng.random_range(tokens.clone())).collect()
}

fn shared_prefix(args: &WorkloadArgs, tokens: Range<u32>, rng: &mut ChaCha8Rng) -> Vec<Prompt> {
    let mut prompts = Vec::with_capacity(args.gsp_num_groups * args.gsp_prompts_per_group);
    for _ in 0..args.gsp_num_groups {
        let beginning = random_tokens(args.gsp_system_prompt_len, tokens.clone(), rng);
        for _ in 0..args.gsp_prompts_per_group {
            let mut prompt = beginning.clone();
            prompt.extend(random_tokens(args.gsp_question_len, tokens.clone(), rng));
            prompts.push(Prompt { content: Content::Tokens(prompt), output_len: args.gsp_output_len });
        }
    }
    prompts.shuffle(rng);
    prompts
}

fn path_of(args: &WorkloadArgs) -> String {
    args.dataset_path.as_deref().map_or_else(String::new, |path| path.display().to_string())
}

fn read(args: &WorkloadArgs) -> anyhow::Result<String> {
    let Some(path) = &args.dataset_path else { bail!("--dataset-path is missing: this dataset is read from a file") };
    fs::read_to_string(path).with_context(|| format!("--dataset-path {}", path.display()))
}

/// The prompt of a line: `prompt`, or the first turn of `conversations`. `None` if it has neither.
fn from_line(line: &Value, args: &WorkloadArgs) -> anyhow::Result<Option<Prompt>> {
    let first = &line["conversations"][0];
    let candidates = [&line["prompt"], &first["value"], &first["content"]];
    let Some(text) = candidates.into_iter().find_map(Value::as_str).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let given = line["output_len"].as_u64().map(|len| len as usize).or(args.sharegpt_output_len);
    let output_len = given.context(
        "how many tokens to generate is not known: give --sharegpt-output-len (or 'output_len' in each line of a \
         custom dataset)",
    )?;
    Ok(Some(Prompt { content: Content::Text(text.to_owned()), output_len }))
}

fn sample(mut prompts: Vec<Prompt>, args: &WorkloadArgs, rng: &mut ChaCha8Rng) -> Vec<Prompt> {
    prompts.shuffle(rng);
    prompts.truncate(args.num_prompts);
    prompts
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        workload: WorkloadArgs,
    }

    fn args(line: &str) -> WorkloadArgs {
        Cli::parse_from(["bench"].into_iter().chain(line.split_whitespace())).workload
    }

    fn tokens(prompt: &Prompt) -> &[u32] {
        match &prompt.content {
            Content::Tokens(tokens) => tokens,
            Content::Text(text) => panic!("expected tokens, found {text:?}"),
        }
    }

    #[test]
    fn random_prompts_keep_to_their_ranges_and_depend_on_the_seed_alone() {
        let options = "--num-prompts 200 --random-input 40 --random-output 10 --random-range-ratio 0.5";
        let prompts = generate(&args(options), token_range(None)).unwrap();
        assert_eq!(prompts, generate(&args(options), token_range(None)).unwrap());
        assert_ne!(prompts, generate(&args(&format!("{options} --seed 2")), token_range(None)).unwrap());
        assert_eq!(prompts.len(), 200);
        for prompt in &prompts {
            assert!((20..=40).contains(&tokens(prompt).len()) && (5..=10).contains(&prompt.output_len));
            assert!(tokens(prompt).iter().all(|token| (1_000..10_000).contains(token)));
        }
        let shortest = prompts.iter().map(|prompt| tokens(prompt).len()).min();
        assert_eq!(shortest, Some(20));
    }

    #[test]
    fn a_ratio_of_one_makes_all_lengths_equal() {
        let options = "--num-prompts 9 --random-input-len 7 --random-output-len 3 --random-range-ratio 1";
        let prompts = generate(&args(options), 0..5).unwrap();
        assert!(prompts.iter().all(|prompt| tokens(prompt).len() == 7 && prompt.output_len == 3));
        assert!(generate(&args("--random-range-ratio 1.5"), 0..5).is_err());
    }

    #[test]
    fn words_follow_the_tokens() {
        let prompts = generate(&args("--num-prompts 1 --random-input-len 3 --random-range-ratio 1"), 0..5).unwrap();
        let text = "--num-prompts 1 --random-input-len 3 --random-range-ratio 1 --text-prompts";
        let words = generate(&args(text), 0..5).unwrap();
        assert_eq!(words[0].content, Content::Text(prompts[0].content.text()));
        assert_eq!(Content::Tokens(vec![0, 33, 2]).text(), "time year people");
    }

    #[test]
    fn a_small_vocabulary_narrows_the_tokens() {
        assert_eq!(token_range(Some(49_152)), 1_000..10_000);
        assert_eq!(token_range(Some(512)), 51..512);
    }

    #[test]
    fn groups_share_their_beginning() {
        let options = "--dataset-name generated-shared-prefix --gsp-num-groups 3 --gsp-prompts-per-group 4 \
                       --gsp-system-prompt-len 6 --gsp-question-len 2 --gsp-output-len 5";
        let prompts = generate(&args(options), token_range(None)).unwrap();
        let mut beginnings: Vec<_> = prompts.iter().map(|prompt| &tokens(prompt)[..6]).collect();
        beginnings.sort_unstable();
        beginnings.dedup();
        assert_eq!((prompts.len(), beginnings.len()), (12, 3));
        assert!(prompts.iter().all(|prompt| tokens(prompt).len() == 8 && prompt.output_len == 5));
    }

    fn file(content: &str) -> (tempfile::NamedTempFile, String) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        let path = file.path().display().to_string();
        (file, path)
    }

    #[test]
    fn conversations_of_one_turn_are_left_out() {
        let (_file, path) = file(
            r#"[{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
                {"conversations": [{"from": "human", "value": "alone"}]}]"#,
        );
        let options = format!("--dataset-name sharegpt --dataset-path {path}");
        let prompts = generate(&args(&format!("{options} --sharegpt-output-len 8")), 0..1).unwrap();
        assert_eq!(prompts, [Prompt { content: Content::Text("Hi".into()), output_len: 8 }]);
        let error = generate(&args(&options), 0..1).unwrap_err();
        assert!(error.to_string().contains("--sharegpt-output-len"), "{error}");
    }

    #[test]
    fn a_custom_line_without_prompt_is_named() {
        let (_file, path) = file("{\"prompt\": \"a\", \"output_len\": 3}\n\n{\"text\": \"b\"}\n");
        let error = generate(&args(&format!("--dataset-name custom --dataset-path {path}")), 0..1).unwrap_err();
        assert!(error.to_string().ends_with("line 3 has no prompt"), "{error}");
    }
}
