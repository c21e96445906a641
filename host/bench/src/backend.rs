//! The endpoints a load can be sent to: what a request looks like and what its answer says.

use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::{Map, Value, json};

use crate::{
    client::Client,
    workload::{Content, Prompt},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// The native '/generate'.
    #[value(alias = "sgl-jax", alias = "sglang-native", alias = "torus")]
    Sglang,
    /// '/v1/completions', as any OpenAI-compatible server has it.
    #[value(alias = "openai", alias = "sglang-oai", alias = "llama-cpp", alias = "lmdeploy")]
    Vllm,
    /// '/v1/chat/completions'.
    #[value(alias = "openai-chat", alias = "vllm-chat", alias = "lmdeploy-chat")]
    SglangOaiChat,
}

/// What all requests of a run have in common.
#[derive(Clone, Debug)]
pub struct RequestOptions {
    pub model: String,
    pub stream: bool,
    pub ignore_eos: bool,
    pub logprobs: bool,
    /// Fields added to every body, over those made here.
    pub extra: Map<String, Value>,
}

/// What one request measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// From the start of the run.
    pub sent: Duration,
    /// From sending to the end of the answer.
    pub latency: Duration,
    /// When output arrived, measured from sending, and how many tokens at once; empty if the answer was not streamed.
    pub arrivals: Vec<(Duration, usize)>,
    pub prompt_tokens: usize,
    pub output_tokens: usize,
    pub cached_tokens: usize,
    pub text: String,
}

/// What came of one request: what it measured, or why it failed.
pub type Outcome = Result<Sample, String>;

impl Sample {
    pub fn time_to_first_token(&self) -> Option<Duration> {
        self.arrivals.first().map(|(at, _)| *at)
    }

    /// Time between tokens: the gap before each arrival, shared by the tokens that came with it.
    pub fn token_gaps(&self) -> impl Iterator<Item = Duration> {
        self.arrivals.windows(2).flat_map(|pair| {
            let (at, tokens) = pair[1];
            std::iter::repeat_n((at - pair[0].0) / tokens as u32, tokens)
        })
    }

    /// Time per output token after the first.
    pub fn time_per_token(&self) -> Option<Duration> {
        let gaps = self.output_tokens.checked_sub(1).filter(|gaps| *gaps > 0)?;
        Some(self.latency.checked_sub(self.time_to_first_token()?)? / gaps as u32)
    }

    fn read(&mut self, news: News, at: Duration, streamed: bool) {
        let before = self.output_tokens;
        self.output_tokens = news.output_tokens.unwrap_or(self.output_tokens).max(before);
        self.prompt_tokens = news.prompt_tokens.unwrap_or(self.prompt_tokens);
        self.cached_tokens = news.cached_tokens.unwrap_or(self.cached_tokens);
        match news.text {
            Text::Whole(text) => self.text = text,
            Text::More(text) => {
                // Endpoints that send differences do not count tokens on the way; each piece is taken for one.
                if news.output_tokens.is_none() && !text.is_empty() {
                    self.output_tokens += 1;
                }
                self.text.push_str(&text);
            }
        }
        // A total that comes after the text (usage) says how many there were, not that more arrived.
        if streamed && news.arrived && self.output_tokens > before {
            self.arrivals.push((at, self.output_tokens - before));
        }
    }
}

/// What an answer or one event of it says.
struct News {
    text: Text,
    /// Tokens so far.
    output_tokens: Option<usize>,
    prompt_tokens: Option<usize>,
    cached_tokens: Option<usize>,
    /// It carries output.
    arrived: bool,
}

enum Text {
    Whole(String),
    More(String),
}

impl Backend {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Sglang => "sglang",
            Backend::Vllm => "vllm",
            Backend::SglangOaiChat => "sglang-oai-chat",
        }
    }

    fn path(self) -> &'static str {
        match self {
            Backend::Sglang => "/generate",
            Backend::Vllm => "/v1/completions",
            Backend::SglangOaiChat => "/v1/chat/completions",
        }
    }

    fn body(self, prompt: &Prompt, options: &RequestOptions) -> Value {
        let mut body = match self {
            Backend::Sglang => native_body(prompt, options),
            Backend::Vllm => {
                let content = match &prompt.content {
                    Content::Tokens(tokens) => json!(tokens),
                    Content::Text(text) => json!(text),
                };
                let mut body = openai_body(prompt, options);
                body["prompt"] = content;
                if options.logprobs {
                    body["logprobs"] = json!(0);
                }
                body
            }
            Backend::SglangOaiChat => {
                let mut body = openai_body(prompt, options);
                body["messages"] = json!([{"role": "user", "content": prompt.content.text()}]);
                if options.logprobs {
                    body["logprobs"] = json!(true);
                }
                body
            }
        };
        if let Some(body) = body.as_object_mut() {
            body.extend(options.extra.clone());
        }
        body
    }

    fn news(self, answer: &Value) -> anyhow::Result<News> {
        if let Some(error) = answer.get("error").filter(|error| !error.is_null()) {
            bail!("{}", error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned));
        }
        let count = |value: &Value| value.as_u64().map(|count| count as usize);
        if self == Backend::Sglang {
            let meta = &answer["meta_info"];
            if meta["finish_reason"]["type"] == "abort" {
                bail!("aborted: {}", meta["finish_reason"]["message"].as_str().unwrap_or("without a reason"));
            }
            return Ok(News {
                text: Text::Whole(answer["text"].as_str().unwrap_or_default().to_owned()),
                output_tokens: count(&meta["completion_tokens"]),
                prompt_tokens: count(&meta["prompt_tokens"]),
                cached_tokens: count(&meta["cached_tokens"]),
                arrived: true,
            });
        }
        let (choice, usage) = (&answer["choices"][0], &answer["usage"]);
        let candidates = [&choice["text"], &choice["delta"]["content"], &choice["message"]["content"]];
        let text = candidates.into_iter().find_map(Value::as_str).unwrap_or_default();
        Ok(News {
            text: Text::More(text.to_owned()),
            output_tokens: count(&usage["completion_tokens"]),
            prompt_tokens: count(&usage["prompt_tokens"]),
            cached_tokens: count(&usage["prompt_tokens_details"]["cached_tokens"]),
            arrived: !text.is_empty(),
        })
    }

    /// Sends one request and reads its answer to the end.
    pub async fn measure(
        self,
        client: &Client,
        prompt: &Prompt,
        options: &RequestOptions,
        run_start: Instant,
    ) -> anyhow::Result<Sample> {
        self.measure_watched(client, prompt, options, run_start, |_| ()).await
    }

    /// [`Backend::measure`], with a look at the sample after each event of a streamed answer.
    pub async fn measure_watched(
        self,
        client: &Client,
        prompt: &Prompt,
        options: &RequestOptions,
        run_start: Instant,
        mut watch: impl FnMut(&Sample),
    ) -> anyhow::Result<Sample> {
        let body = self.body(prompt, options);
        let start = Instant::now();
        let mut sample = Sample { sent: start - run_start, ..Sample::default() };
        if options.stream {
            let mut events = client.stream(self.path(), &body).await?;
            while let Some(event) = events.next().await? {
                sample.read(self.news(&event)?, start.elapsed(), true);
                watch(&sample);
            }
        } else {
            let answer: Value = client.post(self.path(), &body).await?.json().await?;
            sample.read(self.news(&answer)?, start.elapsed(), false);
        }
        sample.latency = start.elapsed();
        Ok(sample)
    }
}

fn native_body(prompt: &Prompt, options: &RequestOptions) -> Value {
    let mut body = json!({
        "sampling_params": {
            "temperature": 0.0,
            "max_new_tokens": prompt.output_len,
            "ignore_eos": options.ignore_eos,
        },
        "stream": options.stream,
        "return_logprob": options.logprobs,
        "logprob_start_len": -1,
    });
    match &prompt.content {
        Content::Tokens(tokens) => body["input_ids"] = json!(tokens),
        Content::Text(text) => body["text"] = json!(text),
    }
    body
}

fn openai_body(prompt: &Prompt, options: &RequestOptions) -> Value {
    let mut body = json!({
        "model": options.model,
        "temperature": 0.0,
        "max_tokens": prompt.output_len,
        "stream": options.stream,
    });
    // Not part of OpenAI's API, so only sent where it changes something.
    if options.ignore_eos {
        body["ignore_eos"] = json!(true);
    }
    if options.stream {
        body["stream_options"] = json!({"include_usage": true});
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Answer;

    fn options(stream: bool) -> RequestOptions {
        RequestOptions {
            model: "m".into(),
            stream,
            ignore_eos: true,
            logprobs: false,
            extra: [("top_k".to_owned(), json!(4))].into_iter().collect(),
        }
    }

    fn prompt() -> Prompt {
        Prompt { content: Content::Tokens(vec![3, 4]), output_len: 5 }
    }

    async fn measure(backend: Backend, stream: bool, answer: Answer) -> anyhow::Result<(Sample, Value)> {
        let (url, request) = answer.serve().await;
        let client = Client::new(&url, Some("secret".into())).unwrap();
        let sample = backend.measure(&client, &prompt(), &options(stream), Instant::now()).await?;
        let request = request.await.unwrap();
        assert!(request.head.to_ascii_lowercase().contains("authorization: bearer secret"), "{}", request.head);
        Ok((sample, request.body))
    }

    fn counts(sample: &Sample) -> (usize, usize, usize, Vec<usize>) {
        let arrivals = sample.arrivals.iter().map(|(_, tokens)| *tokens).collect();
        (sample.prompt_tokens, sample.cached_tokens, sample.output_tokens, arrivals)
    }

    #[tokio::test]
    async fn native_events_carry_running_totals() {
        let event = |text: &str, tokens: usize| {
            json!({"text": text, "meta_info":
            {"completion_tokens": tokens, "prompt_tokens": 2, "cached_tokens": 1, "finish_reason": null}})
        };
        let events = [event("", 1), event("a", 2), event("abc", 5), event("abc", 5)];
        let (sample, body) = measure(Backend::Sglang, true, Answer::events(&events)).await.unwrap();
        assert_eq!(counts(&sample), (2, 1, 5, vec![1, 1, 3]));
        assert_eq!(sample.text, "abc");
        assert_eq!(sample.token_gaps().count(), 4);
        assert_eq!(body["input_ids"], json!([3, 4]));
        assert_eq!(body["sampling_params"], json!({"temperature": 0.0, "max_new_tokens": 5, "ignore_eos": true}));
        assert_eq!(body["top_k"], 4);
    }

    #[tokio::test]
    async fn completions_count_pieces_until_usage_tells() {
        let piece = |text: &str| json!({"choices": [{"index": 0, "text": text}], "usage": null});
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 1}}});
        let events = [piece("a"), piece("b"), piece(""), usage];
        let (sample, body) = measure(Backend::Vllm, true, Answer::events(&events)).await.unwrap();
        assert_eq!(counts(&sample), (2, 1, 4, vec![1, 1]));
        assert_eq!((sample.text.as_str(), &body["prompt"]), ("ab", &json!([3, 4])));
        assert_eq!(body["stream_options"], json!({"include_usage": true}));
    }

    #[tokio::test]
    async fn chat_takes_words_for_tokens() {
        let answer = json!({"choices": [{"message": {"content": "hello"}}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 5}});
        let (sample, body) = measure(Backend::SglangOaiChat, false, Answer::json(&answer)).await.unwrap();
        assert_eq!(counts(&sample), (9, 0, 5, vec![]));
        assert_eq!(sample.time_to_first_token(), None);
        assert_eq!(body["messages"], json!([{"role": "user", "content": "way day"}]));
    }

    #[tokio::test]
    async fn failures_say_why() {
        let refused = Answer::status(429, "the queue is full");
        let error = measure(Backend::Sglang, true, refused).await.unwrap_err();
        assert!(error.to_string().contains("429") && error.to_string().contains("the queue is full"), "{error}");
        let failed = Answer::events(&[json!({"error": {"message": "out of pages"}})]);
        assert_eq!(measure(Backend::Vllm, true, failed).await.unwrap_err().to_string(), "out of pages");
        let aborted = json!({"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "gone"}}});
        let error = measure(Backend::Sglang, false, Answer::json(&aborted)).await.unwrap_err();
        assert_eq!(error.to_string(), "aborted: gone");
    }

    #[tokio::test]
    async fn a_stream_that_breaks_off_is_a_failure() {
        let error =
            measure(Backend::Sglang, true, Answer::raw_events("data: {\"text\": \"a\"}\n\n")).await.unwrap_err();
        assert!(error.to_string().contains("without [DONE]"), "{error}");
    }
}
