//! The blocks of the pages, as a reader copies them, and the figures in them.
//!
//! A block of Rust in a page of Markdown is a program, or items, without hidden lines. Of one in the documentation of a crate
//! the visible lines are a program, or items, or what stands in a function that returns a `Result`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The files below a folder that end like this, by their paths from the root.
fn files(folder: &str, ending: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && !matches!(name, "target" | ".git") {
                folders.push(path);
            } else if path.is_file() && name.ends_with(ending) {
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// A block as it stands in a file, from the line after its fence.
struct Block {
    file: String,
    line: usize,
    kind: String,
    text: String,
}

/// The blocks of a page, or of the comments of a source file that rustdoc shows.
fn blocks(file: &str) -> Vec<Block> {
    let text = read(file);
    let is_page = file.ends_with(".md");
    let shown = |line: &str| -> Option<String> {
        if is_page {
            return Some(line.to_owned());
        }
        let comment = line.trim_start();
        let comment = comment.strip_prefix("///").or_else(|| comment.strip_prefix("//!"))?;
        Some(comment.strip_prefix(' ').unwrap_or(comment).to_owned())
    };
    let mut blocks: Vec<Block> = Vec::new();
    let mut is_open = false;
    for (number, line) in text.lines().enumerate() {
        let Some(line) = shown(line) else { continue };
        if let Some(kind) = line.strip_prefix("```") {
            if !is_open {
                let (file, kind) = (file.to_owned(), kind.to_owned());
                blocks.push(Block { file, line: number + 2, kind, text: String::new() });
            }
            is_open = !is_open;
        } else if is_open {
            let block = blocks.last_mut().unwrap();
            block.text.push_str(&line);
            block.text.push('\n');
        }
    }
    assert!(!is_open, "{file}: a block that does not end");
    blocks
}

impl Block {
    /// Whether it is Rust that shall compile. Without a word rustdoc takes it for that, and a page for text.
    fn is_rust(&self) -> bool {
        let words: Vec<&str> = self.kind.split(',').filter(|word| !word.is_empty()).collect();
        let others = words.iter().any(|word| !matches!(*word, "rust" | "no_run" | "should_panic" | "ignore"));
        !others && (self.file.ends_with(".rs") || words.contains(&"rust"))
    }

    /// What a reader sees, and copies.
    fn visible(&self) -> String {
        let mut text = String::new();
        for line in self.text.lines() {
            let is_hidden = line.trim() == "#" || line.trim_start().starts_with("# ");
            if !is_hidden || self.file.ends_with(".md") {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }

    /// A module that compiles if the block does.
    fn module(&self) -> String {
        let text = self.visible();
        let items = ["fn ", "struct ", "impl ", "use ", "#[", "}", "pub ", "//"];
        if text.contains("fn main()") {
            format!(
                "{text}\nconst _: fn() = || {{ fn ends<T: std::process::Termination>(_: fn() -> T) {{}} ends(main) }};\n"
            )
        } else if text
            .lines()
            .all(|line| line.is_empty() || line.starts_with(' ') || items.iter().any(|i| line.starts_with(i)))
        {
            text
        } else {
            format!("fn main() -> Result<(), Box<dyn std::error::Error>> {{\n{text}\nOk(())\n}}\n")
        }
    }

    /// The feature of the crate without which it cannot compile, and whether it is on.
    fn is_possible(&self) -> bool {
        let needs = [
            (".signals()", cfg!(feature = "signals")),
            ("Metrics", cfg!(feature = "metrics")),
            ("json(", cfg!(feature = "json")),
            ("rustls", cfg!(feature = "rustls")),
        ];
        needs.iter().all(|(word, is_on)| *is_on || !self.text.contains(word))
    }
}

fn all_blocks() -> Vec<Block> {
    let pages = files("", ".md").into_iter().chain(files("src", ".rs"));
    pages.flat_map(|file| blocks(&file)).collect()
}

#[test]
fn smoke() {
    let blocks = all_blocks();
    let rust: Vec<&Block> = blocks.iter().filter(|block| block.is_rust()).collect();
    assert!(rust.iter().filter(|block| block.file == "README.md").count() >= 4);
    assert!(rust.iter().any(|block| block.file == "docs/operations.md"));
    assert!(rust.iter().filter(|block| block.file.starts_with("src/")).count() >= 25);
    assert!(rust.len() < blocks.len());
}

/// A page shows them.
#[test]
fn pages_have_no_hidden_lines() {
    for block in all_blocks().iter().filter(|block| block.file.ends_with(".md") && block.is_rust()) {
        for line in block.text.lines() {
            assert!(line != "#" && !line.starts_with("# "), "{}:{}: {line}", block.file, block.line);
        }
    }
}

/// Those of a crate hide the frame of an example, nothing that it needs.
#[test]
fn every_block_compiles_as_it_is_shown() {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("documents");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(scratch.join("src")).unwrap();
    fs::copy(root().join("Cargo.lock"), scratch.join("Cargo.lock")).unwrap();
    let mut lib = String::from("#![allow(warnings)]\n");
    for block in all_blocks().iter().filter(|block| block.is_rust() && block.is_possible()) {
        let name = block.file.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let name = format!("{}_line_{}", name.to_lowercase(), block.line);
        fs::write(scratch.join("src").join(format!("{name}.rs")), block.module()).unwrap();
        writeln!(lib, "mod {name};").unwrap();
    }
    fs::write(scratch.join("src/lib.rs"), lib).unwrap();

    let features = [
        ("json", cfg!(feature = "json")),
        ("metrics", cfg!(feature = "metrics")),
        ("rustls", cfg!(feature = "rustls")),
        ("signals", cfg!(feature = "signals")),
    ];
    let features: Vec<&str> = features.iter().filter(|(_, is_on)| *is_on).map(|(name, _)| *name).collect();
    let mut manifest = format!(
        "[package]\nname = \"documents\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
         pushpop-pg = {{ path = {:?}, features = {features:?} }}\n",
        root()
    );
    if cfg!(feature = "rustls") {
        manifest.push_str(
            "rustls = { version = \"*\", default-features = false }\ntokio-postgres-rustls = \"*\"\n",
        );
    }
    fs::write(scratch.join("Cargo.toml"), manifest).unwrap();

    // The lock is that of the repository, so that nothing is fetched.
    let checked = Command::new(env!("CARGO"))
        .args(["check", "--jobs=1", "--quiet", "--offline", "--color=never"])
        .arg("--target-dir")
        .arg(scratch.with_file_name("documents-target"))
        .current_dir(&scratch)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

/// The words between these two in a file: literals of the code, or between backticks.
fn words(file: &str, from: &str, to: &str, quote: char) -> BTreeSet<String> {
    let text = read(file);
    let (_, rest) = text.split_once(from).unwrap_or_else(|| panic!("{file}: no {from:?}"));
    let (part, _) = rest.split_once(to).unwrap_or_else(|| panic!("{file}: no {to:?} after {from:?}"));
    part.split(quote).skip(1).step_by(2).map(str::to_owned).collect()
}

/// The documentation names all values that a label of a figure, or a word of an event, can have.
#[test]
fn words_of_events_are_those_of_the_code() {
    let kinds = words("src/lane.rs", "fn word(self) -> &'static str {", "\n    }\n", '"');
    assert!(kinds.len() >= 4, "{kinds:?}");
    assert_eq!(words("src/metrics.rs", "/// `kind` is ", ". ", '`'), kinds);
    assert_eq!(words("src/observer.rs", "    Flight {\n", "kind:", '`'), kinds);

    let mut verbs = words("src/calls.rs", "fn word(&self) -> &'static str {", "\n    }\n", '"');
    assert!(verbs.len() >= 6, "{verbs:?}");
    assert_eq!(words("src/observer.rs", "        /// Its id.\n        id: Uuid,\n", "outcome:", '`'), verbs);
    assert_eq!(words("src/observer.rs", "/// What was attempted", "outcome:", '`'), verbs);
    // An extension has a figure of its own.
    assert!(verbs.remove("extend"));
    assert_eq!(words("src/metrics.rs", "| messages that were settled: ", " |\n", '`'), verbs);
}

/// What was measured is what is published, and of all that takes part.
#[test]
fn the_published_figures_are_those_that_were_measured() {
    let results = read("benches/peers/results.jsonl");
    let field = |line: &str, name: &str| -> Option<String> {
        let (_, rest) = line.split_once(&format!("\"{name}\":"))?;
        // A text, or a number.
        match rest.strip_prefix('"') {
            Some(text) => Some(text.split('"').next()?.to_owned()),
            None => Some(rest.split([',', '}']).next()?.to_owned()),
        }
    };
    let mut expected = Vec::new();
    for line in results.lines() {
        let number = |name: &str| -> String {
            let Some(value) = field(line, name) else { return String::new() };
            let digits = format!("{:.0}", value.parse::<f64>().unwrap());
            let (thousands, rest) = digits.split_at(digits.len().saturating_sub(3));
            if thousands.is_empty() { rest.to_owned() } else { format!("{thousands},{rest}") }
        };
        let name = field(line, "system").unwrap();
        let shown = if name == "pushpop-pg" { "**pushpop-pg**" } else { &name };
        let cells = ["in_turn", "push", "drain", "msgs_per_s", "cpu_us"].map(number).join(" | ");
        expected.push(format!("| {shown} | {cells} |"));
    }
    let readme = read("README.md");
    let (_, performance) = readme.split_once("\n## Performance\n").unwrap();
    let rows = performance.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |"));
    assert_eq!(rows.collect::<Vec<_>>(), expected);
    let drawn = read("benches/peers/results.svg").matches("text-anchor=\"end\"").count();
    assert_eq!(drawn, expected.len());
}
