//! Server-sent events, as much of them as completions use.

/// Cuts a stream of bytes into the data of its events. Bytes may arrive in any portions.
#[derive(Debug, Default)]
pub struct SseParser {
    /// Bytes of an unfinished line.
    line: Vec<u8>,
    /// Data lines of an unfinished event.
    data: Option<String>,
}

impl SseParser {
    /// Takes bytes and returns the data of every event that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut events = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            if self.line.last() == Some(&b'\r') {
                self.line.pop();
            }
            let line = std::mem::take(&mut self.line);
            if line.is_empty() {
                events.extend(self.data.take());
            } else if let Some(value) = line.strip_prefix(b"data:") {
                let value = String::from_utf8_lossy(value.strip_prefix(b" ").unwrap_or(value));
                match &mut self.data {
                    Some(data) => {
                        data.push('\n');
                        data.push_str(&value);
                    }
                    None => self.data = Some(value.into_owned()),
                }
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] =
        "data: {\"text\":\"é\"}\n\n: ping\r\n\r\nevent: x\r\ndata:a\r\ndata: b\r\n\r\ndata: [DONE]\n\n".as_bytes();

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let expected = ["{\"text\":\"é\"}", "a\nb", "[DONE]"];
        assert_eq!(SseParser::default().push(STREAM), expected);
        for size in 1..STREAM.len() {
            let mut parser = SseParser::default();
            let events: Vec<_> = STREAM.chunks(size).flat_map(|bytes| parser.push(bytes)).collect();
            assert_eq!(events, expected, "in portions of {size}");
        }
    }

    #[test]
    fn an_unfinished_event_waits() {
        let mut parser = SseParser::default();
        assert!(parser.push(b"data: half").is_empty());
        assert!(parser.push(b" of it\n").is_empty());
        assert_eq!(parser.push(b"\n"), ["half of it"]);
    }
}
