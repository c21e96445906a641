use proptest::prelude::*;

use super::*;

fn matcher(stops: &[&str]) -> StopMatcher {
    StopMatcher::new(stops.iter().map(|stop| stop.to_string()).collect(), false).unwrap()
}

/// What a stream of portions comes to: everything emitted, and the match.
fn run<'a>(mut matcher: StopMatcher, portions: impl IntoIterator<Item = &'a str>) -> (String, Option<usize>) {
    let mut emitted = String::new();
    for portion in portions {
        emitted.push_str(&matcher.push(portion).emit);
    }
    emitted.push_str(&matcher.finish());
    (emitted, matcher.matched())
}

/// The definition, by brute force: the match that ends first, the longest of those.
fn expected(stops: &[String], text: &str) -> (String, Option<usize>) {
    for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        let ends_here = (0..stops.len()).filter(|&index| text[..end].ends_with(&stops[index]));
        // `max_by_key` takes the last of equals; equal strings are the same stop, named by its first index.
        if let Some(index) = ends_here.rev().max_by_key(|&index| stops[index].len()) {
            return (text[..end - stops[index].len()].to_owned(), Some(index));
        }
    }
    (text.to_owned(), None)
}

#[test]
fn held_back_while_undecided() {
    let mut matcher = matcher(&["\nUser:"]);
    assert_eq!(matcher.push("Hello\n").emit, "Hello");
    assert_eq!(matcher.push("Us").emit, "");
    assert_eq!(matcher.push("eful\nUse").emit, "\nUseful");
    assert_eq!(matcher.push("r: bye"), StopOutcome { emit: String::new(), matched: Some(0) });
    assert_eq!(matcher.push("more"), StopOutcome { emit: String::new(), matched: Some(0) });
    assert_eq!(matcher.finish(), "");
}

#[test]
fn finish_releases_what_was_held() {
    let mut matcher = matcher(&["###"]);
    assert_eq!(matcher.push("a##").emit, "a");
    assert_eq!(matcher.finish(), "##");
    assert_eq!(matcher.matched(), None);
}

#[test]
fn the_match_can_be_kept() {
    let mut matcher = StopMatcher::new(vec!["END".into()], true).unwrap();
    assert_eq!(matcher.push("the EN").emit, "the ");
    assert_eq!(matcher.push("D and more"), StopOutcome { emit: "END".into(), matched: Some(0) });
}

#[test]
fn first_end_wins_then_the_longest() {
    assert_eq!(run(matcher(&["abcd", "bc"]), ["xabcd"]), ("xa".into(), Some(1)));
    assert_eq!(run(matcher(&["END", "\nEND"]), ["x\nEND"]), ("x".into(), Some(1)));
    assert_eq!(run(matcher(&["bcx", "ab"]), ["zabcx"]), ("z".into(), Some(1)));
}

#[test]
fn overlapping_beginnings_are_not_lost() {
    assert_eq!(run(matcher(&["aab"]), ["a", "a", "a", "b"]), ("a".into(), Some(0)));
    assert_eq!(run(matcher(&["abab!"]), ["ababab!"]), ("ab".into(), Some(0)));
}

#[test]
fn characters_are_never_cut() {
    // "é" and "è" share their first byte.
    let mut matcher = matcher(&["é."]);
    assert_eq!(matcher.push("caf").emit, "caf");
    assert_eq!(matcher.push("è").emit, "è");
    assert_eq!(matcher.push("é").emit, "");
    assert_eq!(matcher.push("🙂").emit, "é🙂");
}

#[test]
fn empty_strings_are_refused() {
    let error = StopMatcher::new(vec!["a".into(), String::new()], false).unwrap_err();
    assert!(matches!(error, TextError::EmptyStopString { index: 1 }), "{error}");
    assert_eq!(run(matcher(&[]), ["a", "b"]), ("ab".into(), None));
}

/// Few distinct characters, so that matches and near misses are common.
fn words() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof![Just('a'), Just('b'), Just('é'), Just('è'), Just('🙂')], 0..24)
        .prop_map(String::from_iter)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn splitting_changes_nothing(
        text in words(),
        stops in proptest::collection::vec("[abéè🙂]{1,4}", 0..4),
        cuts in proptest::collection::vec(any::<bool>(), 24),
    ) {
        let mut portions = vec![String::new()];
        for (char, &cut) in text.chars().zip(&cuts) {
            portions.last_mut().unwrap().push(char);
            if cut {
                portions.push(String::new());
            }
        }
        let matcher = StopMatcher::new(stops.clone(), false).unwrap();
        let outcome = run(matcher.clone(), portions.iter().map(String::as_str));
        prop_assert_eq!(&outcome, &run(matcher, [text.as_str()]));
        prop_assert_eq!(outcome, expected(&stops, &text));
    }
}
