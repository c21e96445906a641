//! Stop strings in a stream of text.

use crate::TextError;

/// Finds the first of several stop strings in text that arrives in portions.
///
/// *First* is the one that ends first, as if the text came character by character; of those that end together the
/// longest. So neither what is emitted nor what matches depends on how the text is split into portions. Text that may
/// be the beginning of a stop string is held back until it is known not to be.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    /// Whether a matched stop string belongs to the output (`no_stop_trim`).
    include_match: bool,
    /// Text not yet emitted: the longest beginning of a stop string that the text so far ends with.
    held: String,
    matched: Option<usize>,
}

/// What a portion of text came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that is certain to be output.
    pub emit: String,
    /// Index of the stop string that ended the text. Text after it is dropped, now and in later portions.
    pub matched: Option<usize>,
}

/// One stop string, matched byte by byte in constant amortised time (Knuth, Morris and Pratt).
#[derive(Clone, Debug)]
struct Pattern {
    bytes: Box<[u8]>,
    /// `borders[n]`: length of the longest proper prefix of the first `n + 1` bytes that is also their suffix.
    borders: Box<[usize]>,
    /// Bytes matched by the end of the text so far.
    progress: usize,
}

impl StopMatcher {
    /// A matcher for `stops`; with `include_match` a matched string is emitted, otherwise it is dropped.
    pub fn new(stops: Vec<String>, include_match: bool) -> Result<Self, TextError> {
        if let Some(index) = stops.iter().position(String::is_empty) {
            return Err(TextError::EmptyStopString { index });
        }
        let patterns = stops.into_iter().map(Pattern::new).collect();
        Ok(Self { patterns, include_match, held: String::new(), matched: None })
    }

    /// Takes the next portion of text.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.matched.is_some() {
            return StopOutcome { emit: String::new(), matched: self.matched };
        }
        let searched = self.held.len();
        self.held.push_str(text);
        for end in searched..self.held.len() {
            self.matched = self.advance(self.held.as_bytes()[end]);
            if let Some(index) = self.matched {
                let end = end + 1;
                let kept = if self.include_match { end } else { end - self.patterns[index].bytes.len() };
                self.held.truncate(kept);
                return StopOutcome { emit: std::mem::take(&mut self.held), matched: self.matched };
            }
        }
        let undecided = self.patterns.iter().map(|pattern| pattern.progress).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - undecided);
        StopOutcome { emit: std::mem::replace(&mut self.held, rest), matched: None }
    }

    /// The text held back, once there is no more to come.
    pub fn finish(&mut self) -> String {
        self.patterns.iter_mut().for_each(|pattern| pattern.progress = 0);
        std::mem::take(&mut self.held)
    }

    /// The stop string that ended the text.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// Index of the longest pattern that ends with `byte`.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let mut longest: Option<usize> = None;
        for index in 0..self.patterns.len() {
            let complete = self.patterns[index].advance(byte);
            let len = |index: usize| self.patterns[index].bytes.len();
            if complete && longest.is_none_or(|other| len(index) > len(other)) {
                longest = Some(index);
            }
        }
        longest
    }
}

impl Pattern {
    fn new(text: String) -> Self {
        let bytes = text.into_bytes().into_boxed_slice();
        let mut borders = vec![0; bytes.len()].into_boxed_slice();
        let mut border = 0;
        for end in 1..bytes.len() {
            while border > 0 && bytes[border] != bytes[end] {
                border = borders[border - 1];
            }
            border += usize::from(bytes[border] == bytes[end]);
            borders[end] = border;
        }
        Self { bytes, borders, progress: 0 }
    }

    /// Whether the pattern ends with `byte`.
    fn advance(&mut self, byte: u8) -> bool {
        while self.progress > 0 && self.bytes[self.progress] != byte {
            self.progress = self.borders[self.progress - 1];
        }
        self.progress += usize::from(self.bytes[self.progress] == byte);
        self.progress == self.bytes.len()
    }
}

#[cfg(test)]
#[path = "stop/tests.rs"]
mod tests;
