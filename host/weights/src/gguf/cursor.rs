//! Reading the header front to back, never past its end.

/// What is wrong with the file.
pub(super) type Fault = String;

/// Longest string value; chat templates are the longest real ones, some 20 kB.
const MAX_STRING_BYTES: usize = 16 << 20;

pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
    file_len: usize,
}

impl<'a> Cursor<'a> {
    /// Over the part of a file that may hold its header.
    pub fn new(bytes: &'a [u8], file_len: usize) -> Self {
        Self { bytes, position: 0, file_len }
    }

    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes left.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        if len > self.remaining() {
            let (position, file_len) = (self.position, self.file_len);
            return Err(match self.bytes.len() == file_len {
                true => {
                    format!("it ends at byte {file_len}, inside its header ({len} more bytes expected at {position})")
                }
                false => format!("its header is larger than the {} bytes allowed", self.bytes.len()),
            });
        }
        let taken = &self.bytes[self.position..][..len];
        self.position += len;
        Ok(taken)
    }

    pub fn skip(&mut self, len: usize) -> Result<(), Fault> {
        self.take(len).map(drop)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of things, of which there may be `max`.
    pub fn count(&mut self, what: &str, max: u64) -> Result<u64, Fault> {
        match self.u64()? {
            count if count <= max => Ok(count),
            count => Err(format!("it claims {count} {what}; at most {max} are read")),
        }
    }

    /// Copied before it is checked, because the file may change under the mapping.
    pub fn string(&mut self, max_bytes: usize, what: &str) -> Result<String, Fault> {
        let len = self.count(&format!("bytes of {what}"), max_bytes as u64)? as usize;
        let at = self.position;
        String::from_utf8(self.take(len)?.to_vec()).map_err(|_| format!("{what} at byte {at} is not UTF-8"))
    }

    pub fn value_string(&mut self) -> Result<String, Fault> {
        self.string(MAX_STRING_BYTES, "a string")
    }
}
