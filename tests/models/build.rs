//! Copies the crate's sources for the target `schedules`: once as they are, and once with the variants built in.
//! Threads, locks and time are those of `schedules/world` in both.

#![allow(clippy::expect_used, clippy::panic, reason = "a build fails by panicking")]

#[path = "schedules/variants.rs"]
mod variants;

use std::path::Path;
use std::{env, fs};

use variants::{FILES, VARIANTS};

/// What the sources take from outside, and the world has its own of.
const REPLACED: [&str; 8] = [
    "std::sync::",
    "std::thread",
    "std::time::",
    "std::collections::",
    "uuid::",
    "postgres::",
    "r2d2::",
    "fallible_iterator::",
];

fn main() {
    let out = env::var("OUT_DIR").expect("cargo sets it");
    let sources = Path::new("../../src");
    println!("cargo::rerun-if-changed=schedules/variants.rs");
    for copy in ["real", "broken"] {
        fs::create_dir_all(Path::new(&out).join(copy)).expect("a directory for the copies");
    }
    for name in FILES {
        let file = format!("{name}.rs");
        let path = sources.join(&file);
        println!("cargo::rerun-if-changed={}", path.display());
        let source = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for (copy, text) in [("real", source.clone()), ("broken", with_variants(name, source))] {
            fs::write(Path::new(&out).join(copy).join(&file), moved(&text)).expect("a copy");
        }
    }
}

/// The source with all of its variants, each behind a switch.
fn with_variants(name: &str, mut source: String) -> String {
    for variant in VARIANTS.iter().filter(|variant| variant.file == name) {
        let found = source.matches(variant.right).count();
        assert!(found == 1, "{}: what it changes is {found} times in src/{name}.rs", variant.name);
        let (title, right, wrong) = (variant.name, variant.right, variant.wrong);
        let switch = format!("{{ if super::is_on({title:?}) {{ {wrong} }} else {{ {right} }} }}");
        source = source.replacen(right, &switch, 1);
    }
    source
}

/// The source as a module two levels down, in the world of the schedules. `include!` takes no documentation of
/// the file itself, and tests have no world.
fn moved(source: &str) -> String {
    let source = source.split("\n#[cfg(test)]\n").next().unwrap_or_default();
    let lines = source.lines().filter(|line| !line.starts_with("//!"));
    let mut text = lines.collect::<Vec<_>>().join("\n").replace("crate::", "super::");
    for outside in REPLACED {
        let mut pieces = text.split(outside);
        let mut moved = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            // Not within another name or path.
            if !moved.ends_with(|c: char| c.is_alphanumeric() || "_:".contains(c)) {
                moved.push_str("crate::world::");
                moved.push_str(outside.trim_start_matches("std::"));
            } else {
                moved.push_str(outside);
            }
            moved.push_str(piece);
        }
        text = moved;
    }
    text
}
