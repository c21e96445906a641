use super::*;
use crate::testing::{SMOLLM2, random_portions, random_tokens};

fn stream(stop: &[&str], include_stop: bool) -> TextStream {
    let stop = stop.iter().map(|stop| stop.to_string()).collect();
    TextStream::new(SMOLLM2.clone(), TextStreamOptions { stop, include_stop, ..TextStreamOptions::default() }).unwrap()
}

/// Everything that comes out of `portions`, as one delta.
fn run(mut stream: TextStream, portions: &[&[u32]]) -> Delta {
    let mut total = Delta::default();
    let mut add = |delta: Delta| {
        total.text.push_str(&delta.text);
        total.tokens_consumed += delta.tokens_consumed;
        total.stopped = delta.stopped;
    };
    portions.iter().for_each(|portion| add(stream.push(portion)));
    add(stream.finish());
    total
}

#[test]
fn stops_at_the_token_that_completes_the_stop_string() {
    let ids = SMOLLM2.encode("One, two, three, four", false).unwrap();
    let three = SMOLLM2.encode("One, two, three", false).unwrap().len();
    let delta = run(stream(&["thr"], false), &[&ids]);
    assert_eq!(delta, Delta { text: "One, two, ".into(), stopped: Some("thr".into()), tokens_consumed: three });
    let delta = run(stream(&["thr"], true), &[&ids]);
    assert_eq!(delta.text, "One, two, thr");
}

#[test]
fn text_across_tokens_is_held_back() {
    let ids = SMOLLM2.encode("Answer\n\nUser: no", false).unwrap();
    let mut stream = stream(&["\nUser:"], false);
    let mut text = String::new();
    let mut consumed = 0;
    for id in &ids {
        let delta = stream.push(&[*id]);
        text.push_str(&delta.text);
        consumed += delta.tokens_consumed;
        assert!("Answer\n".starts_with(&text), "{text:?}");
    }
    assert_eq!(text, "Answer\n");
    assert!(consumed < ids.len());
    assert_eq!(stream.push(&ids), Delta { stopped: Some("\nUser:".into()), ..Delta::default() });
}

#[test]
fn what_was_held_back_comes_at_the_end() {
    let ids = SMOLLM2.encode("Answer\nUs", false).unwrap();
    let mut stream = stream(&["\nUser:"], false);
    assert_eq!(stream.push(&ids).text, "Answer");
    assert_eq!(stream.finish(), Delta { text: "\nUs".into(), stopped: None, tokens_consumed: 0 });
}

#[test]
fn hidden_tokens_have_no_text() {
    let end = SMOLLM2.token_to_id("<|im_end|>").unwrap();
    let ids = [SMOLLM2.encode("Hi", false).unwrap(), vec![end]].concat();
    let mut options = TextStreamOptions::default();
    options.detokenize.skip_special_tokens = false;
    let shown = TextStream::new(SMOLLM2.clone(), options.clone()).unwrap();
    assert_eq!(run(shown, &[&ids]).text, "Hi<|im_end|>");
    options.hidden_tokens = vec![end];
    let hidden = TextStream::new(SMOLLM2.clone(), options).unwrap();
    assert_eq!(run(hidden, &[&ids]), Delta { text: "Hi".into(), stopped: None, tokens_consumed: 2 });
}

#[test]
fn any_split_gives_the_same() {
    let mut stopped = 0;
    for seed in 0..500 {
        let ids = random_tokens(&SMOLLM2, seed);
        let whole = SMOLLM2.decode(&ids, true);
        // A stop string from the text itself, and one that begins like many others.
        let chars: Vec<char> = whole.chars().collect();
        let start = (seed as usize * 7) % chars.len().max(1);
        let own: String = chars.iter().skip(start).take(3).collect();
        let stops = if own.is_empty() { vec!["zzz"] } else { vec![own.as_str(), "好世"] };
        let expected = run(stream(&stops, false), &[&ids]);
        stopped += usize::from(expected.stopped.is_some());
        for include in [false, true] {
            let expected = run(stream(&stops, include), &[&ids]);
            assert_eq!(run(stream(&stops, include), &random_portions(&ids, seed)), expected, "seed {seed}");
            assert!(whole.starts_with(&expected.text), "seed {seed}");
        }
    }
    assert!(stopped > 100, "only {stopped} of 500 stopped");
}
