//! Whether every message was done, and none twice.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::Result;

/// How many bytes a payload has.
const SIZE: usize = 64;

/// The payload of a message: its number, eight times over.
pub fn payload(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(SIZE / 8)
}

/// The number of a payload. One that nobody made is an error.
pub fn number(payload: &[u8]) -> Result<u64> {
    let (numbers, rest) = payload.as_chunks::<8>();
    match numbers {
        [first, others @ ..]
            if payload.len() == SIZE && rest.is_empty() && others.iter().all(|n| n == first) =>
        {
            Ok(u64::from_le_bytes(*first))
        }
        _ => Err(format!("a payload of {} bytes came back that nobody pushed", payload.len()).into()),
    }
}

/// Knows which messages were pushed and which were done.
///
/// Threads write to lists of their own, which are brought together at the end.
#[derive(Debug, Default)]
pub struct Check {
    next: AtomicU64,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    pushed: Vec<u64>,
    done: Vec<u64>,
}

impl Check {
    /// Nothing was pushed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The list of one thread. It counts when it is dropped.
    pub fn tally(&self) -> Tally<'_> {
        Tally { check: self, seen: Seen::default() }
    }

    /// Fails if a message was lost, done twice, or done and never pushed. Returns how many were done.
    pub fn finish(self) -> Result<u64> {
        let Seen { mut pushed, mut done } = self.seen.into_inner().unwrap_or_else(PoisonError::into_inner);
        pushed.sort_unstable();
        done.sort_unstable();
        if let Some(pair) = done.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("message {} was done twice", pair[0]).into());
        }
        if pushed == done {
            return Ok(done.len() as u64);
        }
        let lost = pushed.iter().filter(|n| done.binary_search(n).is_err()).count();
        let foreign = done.iter().filter(|n| pushed.binary_search(n).is_err()).count();
        Err(format!("{lost} of {} messages were lost, {foreign} came from elsewhere", pushed.len()).into())
    }
}

/// What one thread pushed and did.
#[derive(Debug)]
pub struct Tally<'a> {
    check: &'a Check,
    seen: Seen,
}

impl Tally<'_> {
    /// A number that no other message has.
    pub fn next(&self) -> u64 {
        self.check.next.fetch_add(1, Ordering::Relaxed)
    }

    /// So many numbers that no other message has.
    pub fn next_many(&self, count: usize) -> std::ops::Range<u64> {
        let first = self.check.next.fetch_add(count as u64, Ordering::Relaxed);
        first..first + count as u64
    }

    /// A message was pushed.
    pub fn pushed(&mut self, number: u64) {
        self.seen.pushed.push(number);
    }

    /// A message was worked and settled.
    pub fn done(&mut self, number: u64) {
        self.seen.done.push(number);
    }
}

impl Drop for Tally<'_> {
    fn drop(&mut self) {
        let mut all = self.check.seen.lock().unwrap_or_else(PoisonError::into_inner);
        all.pushed.append(&mut self.seen.pushed);
        all.done.append(&mut self.seen.done);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn checked(pushed: &[u64], done: &[u64]) -> Result<u64> {
        let check = Check::new();
        pushed.iter().for_each(|n| check.tally().pushed(*n));
        done.iter().for_each(|n| check.tally().done(*n));
        check.finish()
    }

    #[test]
    fn finds_what_is_lost_doubled_or_foreign() {
        assert_eq!(checked(&[1, 2, 3], &[3, 1, 2]).unwrap(), 3);
        assert_eq!(checked(&[1, 2], &[2, 1, 2]).unwrap_err().to_string(), "message 2 was done twice");
        assert!(
            checked(&[1, 2, 3], &[1, 3]).unwrap_err().to_string().starts_with("1 of 3 messages were lost")
        );
        assert!(checked(&[1], &[1, 7]).unwrap_err().to_string().ends_with("1 came from elsewhere"));
    }

    #[test]
    fn knows_its_payloads() {
        assert_eq!(number(&payload(77)).unwrap(), 77);
        let mut spoilt = payload(77);
        spoilt[20] ^= 1;
        assert!(number(&spoilt).is_err());
        assert!(number(&payload(77)[..56]).is_err());
    }
}
