//! Random numbers that a seed repeats, and a hash of payloads.

use std::time::Duration;

/// SplitMix64: small, and good enough to choose whom to kill.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Chance(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// One of so many, as a place in a list.
    pub(crate) fn place(&mut self, count: usize) -> usize {
        usize::try_from(self.below(count as u64)).unwrap_or_default()
    }

    /// Between half and one and a half of `time`.
    pub(crate) fn around(&mut self, time: Duration) -> Duration {
        time / 2 + self.up_to(time)
    }

    pub(crate) fn up_to(&mut self, time: Duration) -> Duration {
        Duration::from_micros(
            self.below(u64::try_from(time.as_micros()).unwrap_or(u64::MAX).saturating_add(1)),
        )
    }
}

/// FNV-1a, of 64 bits.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}
