//! Bytes that arrive in arbitrary portions, as text.

/// Turns a stream of bytes into text with the result of [`String::from_utf8_lossy`] on the whole, whatever the portions.
///
/// A sequence that may still become a character is held back (at most three bytes); one that cannot becomes U+FFFD.
#[derive(Clone, Debug, Default)]
pub(crate) struct Utf8Stream {
    /// The beginning of a character.
    pending: Vec<u8>,
}

impl Utf8Stream {
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        if self.pending.is_empty() {
            self.decode(bytes, text);
        } else {
            let mut joined = std::mem::take(&mut self.pending);
            joined.extend_from_slice(bytes);
            self.decode(&joined, text);
        }
    }

    /// Gives up waiting for the rest of a character.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }

    fn decode(&mut self, bytes: &[u8], text: &mut String) {
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            if chunks.peek().is_none() && is_beginning_of_character(invalid) {
                self.pending.extend_from_slice(invalid);
            } else {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }
}

fn is_beginning_of_character(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_split_gives_what_the_whole_gives() {
        let cases: [&[u8]; 8] = [
            "plain, é, 好, 🙂, 👩‍👩‍👧".as_bytes(),
            b"\xF0\x9F\x99",
            b"\xE5\xA5a\xE5\xA5",
            b"\xF0\x9F\x41\xFF\xFE\xC3",
            b"\x80\x80\xBF",
            b"\xED\xA0\x80 surrogate",
            b"\xF4\x90\x80\x80 above the last code point",
            b"\xC0\xAF overlong",
        ];
        for bytes in cases {
            for portion in 1..=bytes.len() {
                let (mut stream, mut text) = (Utf8Stream::default(), String::new());
                bytes.chunks(portion).for_each(|part| stream.push(part, &mut text));
                stream.finish(&mut text);
                assert_eq!(text, String::from_utf8_lossy(bytes), "{bytes:?} in portions of {portion}");
            }
        }
    }

    #[test]
    fn a_character_appears_when_it_is_complete() {
        let (mut stream, mut text) = (Utf8Stream::default(), String::new());
        for &byte in &"🙂".as_bytes()[..3] {
            stream.push(&[byte], &mut text);
            assert_eq!(text, "");
        }
        stream.push(&"🙂".as_bytes()[3..], &mut text);
        assert_eq!(text, "🙂");
        stream.finish(&mut text);
        assert_eq!(text, "🙂");
    }
}
