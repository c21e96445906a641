//! The engine on a real model: tokens and logprobs against Hugging Face `transformers`, and what must hold beside.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures::{StreamExt, future::join_all};
use torus_engine::{
    EngineHandle,
    api::{Abort, AbortTarget, Engine, Event, FinishReason, LogprobOptions, SamplingParams, SubmitError},
    config::DtypeChoice,
};
use torus_weights::ResolvedModel;

use crate::{
    golden::{self, Golden, assert_golden},
    support::{answer, block_on, config, greedy, ready, request, smollm2},
};

/// A token that only the request of the fault test has.
const POISON: u32 = 49_000;

/// One engine for all tests of this file; they take turns, since they look at its counters.
fn engine() -> (MutexGuard<'static, ()>, Arc<EngineHandle>) {
    static TURN: Mutex<()> = Mutex::new(());
    static ENGINE: OnceLock<Arc<EngineHandle>> = OnceLock::new();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut config = config(ResolvedModel::Gguf(smollm2()));
    config.fail_on_token = Some(POISON);
    let engine = ENGINE.get_or_init(|| ready(config)).clone();
    engine.flush_cache().unwrap();
    (turn, engine)
}

fn goldens() -> Vec<Golden> {
    golden::cases(include_str!("data/smollm2-135m.json"))
}

#[test]
fn greedy_tokens_equal_the_reference_alone_and_with_cached_prefixes() {
    let (_turn, engine) = engine();
    for golden in goldens() {
        for round in 0..2 {
            let mut request = request("alone", &golden.prompt, greedy(32));
            request.logprobs = LogprobOptions { output: true, top_n: 5, prompt_from: None };
            let answer = block_on(answer(&engine, request));
            assert_golden(&golden, &answer);
            // The second time the whole pages of the prompt are there, but for its last token.
            let expected = if round == 0 { 0 } else { (golden.prompt.len() - 1) / 16 * 16 };
            assert_eq!(answer.cached_tokens, expected);
            golden::assert_first_top(&golden, &answer);
        }
    }
}

#[test]
fn greedy_tokens_equal_the_reference_in_a_mixed_batch() {
    let (_turn, engine) = engine();
    let goldens = goldens();
    for round in 0..2 {
        let requests = (0..16).map(|i| {
            let (golden, engine) = (&goldens[i % goldens.len()], &engine);
            async move {
                // Every third one samples, so that its neighbours are disturbed as much as can be.
                let sampling = match i % 3 {
                    2 => SamplingParams { temperature: 1.5, top_p: 0.9, repetition_penalty: 1.2, ..greedy(32) },
                    _ => greedy(32),
                };
                let greedy = sampling.temperature == 0.0;
                let answer = answer(engine, request(&format!("{round}-{i}"), &golden.prompt, sampling)).await;
                if greedy {
                    assert_golden(golden, &answer);
                }
            }
        });
        block_on(join_all(requests));
    }
    assert_eq!(engine.stats().serving_compiles, 0);
}

#[test]
fn bfloat16_begins_as_the_reference_does() {
    let mut config = config(ResolvedModel::Gguf(smollm2()));
    config.dtype = DtypeChoice::Bfloat16;
    config.schedule.max_running_requests = Some(4);
    let engine = ready(config);
    for golden in goldens() {
        let answer = block_on(answer(&engine, request("bf16", &golden.prompt, greedy(4))));
        assert_eq!(answer.tokens[0], golden.tokens[0]);
    }
}

#[test]
fn a_seed_gives_the_same_tokens_in_any_company() {
    let (_turn, engine) = engine();
    let prompt = &goldens()[1].prompt;
    let sampling = |seed| SamplingParams { temperature: 1.0, top_k: 40, seed: Some(seed), ..greedy(24) };
    let alone = block_on(answer(&engine, request("alone", prompt, sampling(7))));
    let crowd = (0..8).map(|i| answer(&engine, request(&format!("c{i}"), prompt, sampling(i))));
    let crowd = block_on(join_all(crowd));
    assert_eq!(crowd[7].tokens, alone.tokens);
    assert_ne!(crowd[3].tokens, alone.tokens);
}

#[test]
fn prompt_logprobs_equal_those_of_generation() {
    let (_turn, engine) = engine();
    let golden = &goldens()[0];
    let mut generated = request("generated", &golden.prompt, greedy(8));
    generated.logprobs = LogprobOptions { output: true, top_n: 0, prompt_from: None };
    let generated = block_on(answer(&engine, generated));
    let whole = [&golden.prompt[..], &generated.tokens].concat();
    let mut scored = request("scored", &whole, greedy(0));
    scored.logprobs = LogprobOptions { output: false, top_n: 2, prompt_from: Some(0) };
    let scored = block_on(answer(&engine, scored));
    assert!(scored.tokens.is_empty());
    assert_eq!(scored.prompt_logprobs.len(), whole.len());
    assert_eq!(scored.prompt_logprobs[0].logprob, None);
    let tail = &scored.prompt_logprobs[golden.prompt.len()..];
    for (scored, generated) in tail.iter().zip(&generated.logprobs) {
        assert_eq!(scored.token, generated.token);
        let (a, b) = (scored.logprob.unwrap(), generated.logprob.unwrap());
        assert!((a - b).abs() < 1e-3, "{a} against {b}");
        assert_eq!(scored.top[0].0, generated.token);
    }
}

#[test]
fn stop_tokens_minimum_bias_and_penalties_apply() {
    let (_turn, engine) = engine();
    let golden = &goldens()[0];
    let run = |sampling| block_on(answer(&engine, request("r", &golden.prompt, sampling)));
    let third = golden.tokens[2];
    let stopped = run(SamplingParams { stop_token_ids: vec![third], ..greedy(32) });
    assert_eq!(stopped.tokens, golden.tokens[..3]);
    assert_eq!(stopped.reason, FinishReason::Stop { token: third });
    let later = run(SamplingParams { stop_token_ids: vec![third], min_new_tokens: 6, ..greedy(32) });
    assert!(later.tokens.len() >= 6 && !later.tokens[..6].contains(&third), "{:?}", later.tokens);
    let biased = run(SamplingParams { logit_bias: vec![(1234, 1000.0)], ..greedy(3) });
    assert_eq!(biased.tokens, [1234; 3]);
    // After a request with a bias, another one in its slot has none.
    assert_eq!(run(greedy(6)).tokens, golden.tokens[..6]);
    let penalized = run(SamplingParams { frequency_penalty: 2.0, presence_penalty: 2.0, ..greedy(32) });
    assert_ne!(penalized.tokens, run(greedy(32)).tokens);
    let seen: std::collections::HashSet<_> = penalized.tokens.iter().collect();
    assert!(seen.len() > 24, "penalties keep tokens from repeating: {:?}", penalized.tokens);
}

#[test]
fn dropped_and_aborted_requests_leave_nothing_behind() {
    let (_turn, engine) = engine();
    let prompt = &goldens()[4].prompt;
    block_on(async {
        let mut streams = Vec::new();
        for i in 0..40 {
            streams.push(engine.submit(request(&format!("s{i}"), &prompt[i..], greedy(500))).unwrap());
        }
        // Some have begun, some wait.
        assert!(matches!(streams[0].next().await, Some(Event::Prefilled { .. })));
        assert_eq!(engine.abort(&AbortTarget::Id("s1".into())), 1);
        assert_eq!(engine.abort(&AbortTarget::Id("s".into())), 0, "ids are whole, not prefixes");
        let last = streams[1].by_ref().collect::<Vec<_>>().await.pop();
        assert_eq!(last, Some(Event::Finished(FinishReason::Aborted(Abort::ByUser))));
        drop(streams);
        // The engine's thread has seen all of it once it has answered another request.
        answer(&engine, request("after", &prompt[..4], greedy(1))).await;
    });
    let flushed = engine.flush_cache();
    assert!(flushed.is_ok(), "{flushed:?}");
    let stats = engine.stats();
    assert_eq!((stats.running, stats.queued), (0, 0));
    block_on(answer(&engine, request("last", &prompt[..4], greedy(1))));
    engine.flush_cache().unwrap();
    let stats = engine.stats();
    assert_eq!(stats.pages_used, 0);
}

#[test]
fn a_failing_step_fails_only_the_request_that_causes_it() {
    let (_turn, engine) = engine();
    let goldens = goldens();
    let failed_before = engine.stats().failed_steps;
    block_on(async {
        let good = goldens.iter().enumerate().map(|(i, golden)| {
            let engine = &engine;
            async move {
                let answer = answer(engine, request(&format!("good{i}"), &golden.prompt, greedy(32))).await;
                assert_golden(golden, &answer);
            }
        });
        let bad = async {
            let prompt = [&goldens[1].prompt[..], &[POISON, 5]].concat();
            let answer = answer(&engine, request("bad", &prompt, greedy(4))).await;
            assert!(matches!(answer.reason, FinishReason::Aborted(Abort::Failed(_))), "{:?}", answer.reason);
        };
        futures::join!(join_all(good), bad);
    });
    assert!(engine.stats().failed_steps > failed_before);
    engine.flush_cache().unwrap();
}

#[test]
fn what_cannot_be_served_is_refused_with_the_field() {
    let (_turn, engine) = engine();
    let refused = |request| match engine.submit(request) {
        Err(SubmitError::Invalid { field, .. }) => field,
        other => panic!("not refused: {:?}", other.err()),
    };
    assert_eq!(refused(request("r", &[], greedy(1))), "prompt");
    assert_eq!(refused(request("r", &[1, 60_000], greedy(1))), "prompt");
    assert_eq!(refused(request("r", &vec![1; 9_000], greedy(1))), "prompt");
    assert_eq!(refused(request("r", &[1], SamplingParams { top_p: 0.0, ..greedy(1) })), "top_p");
    assert_eq!(refused(request("r", &[1], SamplingParams { temperature: f32::NAN, ..greedy(1) })), "temperature");
    assert_eq!(
        refused(request("r", &[1], SamplingParams { logit_bias: vec![(1 << 20, 1.0)], ..greedy(1) })),
        "logit_bias"
    );
}
