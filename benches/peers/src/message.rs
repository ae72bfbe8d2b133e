//! What is pushed.

use pushpop_measure::Result;
use serde::{Deserialize, Serialize};

/// A message with a number of its own, and 64 bytes as JSON: most peers take nothing else.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Message {
    pub(crate) number: u64,
    filler: String,
}

impl Message {
    pub(crate) fn new(number: u64) -> Message {
        let brackets = r#"{"number":,"filler":""}"#.len();
        let digits = number.checked_ilog10().unwrap_or(0) as usize + 1;
        Message { number, filler: "-".repeat(64 - brackets - digits) }
    }

    /// As the bytes that a queue of bytes is given.
    pub(crate) fn bytes(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Message> {
        Ok(serde_json::from_slice(bytes)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn has_64_bytes() {
        for number in [0, 9, 10, 12_345, u64::MAX] {
            let bytes = Message::new(number).bytes().unwrap();
            assert_eq!(bytes.len(), 64);
            assert_eq!(Message::read(&bytes).unwrap().number, number);
        }
    }
}
