//! Topics, and names and values of headers, that break out of whatever they can.

use std::thread;
use std::time::Duration;

use pushpop_pg::NewMessage;

use crate::world::{World, text};

const PIECES: [&str; 40] = [
    "'", "\"", "''", "\\", "\\'", "$$", "$1", "${x}", ";", "--", "/*", "*/", "%", "_", "%s", "{}", "{0}",
    "\n", "\r\n", "\t", "\u{0}1", " ", "\u{a0}", "\u{202e}", "\u{feff}", "é", "e\u{301}", "ß", "İ", "🦀",
    "null", "NULL", "true", "0", "-1", "pg_", "E'\\x00'", "<b>", "\u{1}", "\u{7f}",
];

/// The same ones in every run, and no two alike: a number stands at the end.
fn hostile(number: usize) -> String {
    let mut seed = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut name = String::new();
    for _ in 0..=number % 12 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        // NUL cannot be stored, and is refused: see limits.
        name.push_str(&PIECES[(seed % 40) as usize].replace('\0', "0"));
    }
    if number.is_multiple_of(50) {
        name = name.repeat(30).chars().take(60).collect();
    }
    name.push_str(&number.to_string());
    name
}

#[test]
fn ten_thousand_names_come_back_as_they_were() {
    let world = World::new();
    let queue = world.queue();
    let count = 10_000;
    let threads = 40;
    thread::scope(|scope| {
        for first in 0..threads {
            let queue = &queue;
            scope.spawn(move || {
                for number in (first..count).step_by(threads) {
                    let name = hostile(number);
                    let message = NewMessage::new(name.clone()).header(name.clone(), name.clone());
                    queue.push(&name, message).unwrap();
                    let lease = queue.pop_timeout(&name, Duration::from_secs(30)).unwrap().unwrap();
                    assert_eq!((lease.topic(), text(lease.payload())), (name.as_str(), name.clone()));
                    assert_eq!(lease.header(&name), Some(name.as_str()));
                    lease.complete().unwrap();
                }
            });
        }
    });
    let topics = queue.topics().unwrap();
    assert_eq!(topics.len(), count);
    assert!(topics.iter().all(|topic| topic.settled() == 1 && topic.leased() == 0));
}
