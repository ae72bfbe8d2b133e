//! The rules of the repository.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use postgres::{Client, NoTls};
use pushpop_pg::Queue;
use pushpop_server::Server;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The files below a folder, by their paths from the root.
fn files(folder: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                if !matches!(name, "target" | ".git") {
                    folders.push(path);
                }
            } else {
                found.insert(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found
}

fn updating() -> bool {
    std::env::var("UPDATE_EXPECT").is_ok_and(|v| v == "1")
}

#[test]
fn smoke() {
    assert!(files("src").contains("src/lib.rs") && files("sql").contains("sql/0001/tables.sql"));
}

#[test]
fn every_file_of_sql_is_used() {
    let schema = read("src/schema.rs");
    let scripts: Vec<String> = files("sql").into_iter().filter(|f| f.ends_with(".sql")).collect();
    assert!(!scripts.is_empty());
    for file in scripts {
        assert_eq!(schema.matches(&format!("include_str!(\"../{file}\")")).count(), 1, "{file}");
    }
}

/// SQL without its comments, statement by statement; functions are cut at their inner semicolons too.
fn statements(sql: &str) -> Vec<String> {
    let lines: Vec<&str> = sql.lines().map(|line| line.split("--").next().unwrap()).collect();
    lines.join("\n").split(';').map(str::to_lowercase).collect()
}

#[test]
fn no_star_reaches_a_client() {
    for file in files("sql").into_iter().chain(files("src")) {
        for statement in statements(&read(&file)) {
            for star in ["returning *", "select *"] {
                // As in `select * from pushpop.pop(..)` in the words about other languages.
                let shown = file.ends_with(".rs") && statement.contains("//!");
                assert!(shown || !statement.contains(star), "{file}: {}", statement.trim());
            }
        }
    }
}

/// What it means depends on `standard_conforming_strings`, which a role may have turned off.
#[test]
fn no_literal_has_a_backslash() {
    for file in files("sql").iter().filter(|f| f.ends_with(".sql")) {
        for statement in statements(&read(file)) {
            assert!(!statement.contains('\\'), "{file}: {}", statement.trim());
        }
    }
}

/// A predicate with it is a filter, not an index condition: it is volatile.
#[test]
fn no_predicate_reads_the_clock() {
    for file in files("sql").iter().filter(|f| f.ends_with(".sql")) {
        for statement in statements(&read(file)) {
            let condition = statement.find("where").map_or("", |at| &statement[at..]);
            assert!(!condition.contains("clock_timestamp"), "{file}: {}", statement.trim());
        }
    }
}

/// The invariant of the low watermark is kept by the functions of one file.
#[test]
fn one_file_keeps_the_order() {
    let changes =
        ["insert into pushpop.runs", "insert into pushpop.behind", "delete from pushpop.behind", "set low ="];
    for file in files("sql").iter().filter(|f| f.ends_with(".sql")) {
        for statement in statements(&read(file)) {
            let found = changes.iter().find(|change| statement.contains(**change));
            // A sweep and the upkeep of each minute take the watermark back: that is always safe.
            let lowers = statement.contains("set low = '-infinity'");
            assert!(
                found.is_none() || lowers || file.ends_with("/order.sql"),
                "{file}: {}",
                statement.trim()
            );
        }
    }
}

#[test]
fn scripts_open_with_a_sentence() {
    for file in files("sql").iter().filter(|f| f.ends_with(".sql")) {
        assert!(read(file).starts_with("-- "), "{file}");
    }
    for file in files("src").iter().filter(|f| f.ends_with(".rs")) {
        assert!(read(file).starts_with("//! "), "{file}");
    }
}

/// A subscriber is foreign code: it is run by `outside` or by the teller, which see to it that no lock is held, and that a
/// panic ends there.
#[test]
fn nothing_is_logged_but_by_way_of_outside() {
    let mut logs = 0;
    for file in files("src") {
        let source = read(&file);
        for (at, _) in source.match_indices("tracing::") {
            let rest = &source[at + "tracing::".len()..];
            if !["trace!", "debug!", "info!", "warn!", "error!"].iter().any(|level| rest.starts_with(level)) {
                continue;
            }
            let before: String = source[..at].split_whitespace().collect();
            let before = before.trim_end_matches('{');
            let is_told = ["outside(||", "note(||", "note(move||"].iter().any(|way| before.ends_with(way));
            assert!(is_told, "{file}: {}", rest.lines().next().unwrap_or_default());
            logs += 1;
        }
    }
    assert!(logs > 20, "{logs}");
}

#[test]
fn no_file_grows_to_a_thousand_lines() {
    for file in files("src").into_iter().chain(files("sql")).chain(files("tests/it")) {
        assert!(read(&file).lines().count() < 1000, "{file}");
    }
}

#[test]
fn the_changelog_names_the_version() {
    let version = env!("CARGO_PKG_VERSION");
    assert!(read("CHANGELOG.md").contains(version), "{version}");
}

#[test]
fn alerts_are_over_figures_that_there_are() {
    let rules = read("examples/prometheus-rules.yml");
    let figures = format!("{}{}", read("src/metrics.rs"), read("examples/metrics/src/main.rs"));
    let expressions: Vec<&str> = rules.lines().filter(|line| line.contains("expr: ")).collect();
    assert!(expressions.len() >= 5);
    for expression in expressions {
        let at = expression.find("pushpop_").unwrap_or_else(|| panic!("{expression}"));
        let name = expression[at..].split(|c: char| !c.is_ascii_lowercase() && c != '_').next().unwrap();
        assert!(figures.contains(&format!("\"{name}\"")), "{name}");
    }
}

#[test]
fn no_path_of_a_machine_is_written_down() {
    let patterns = ["work", "home", "root", "Users"].map(|name| format!("/{name}/"));
    let text =
        |f: &String| [".rs", ".sql", ".md", ".toml", ".txt", ".sh", ".yml"].iter().any(|e| f.ends_with(e));
    let checked: Vec<String> = files("").into_iter().filter(|f| text(f) || f.starts_with(".ci/")).collect();
    assert!(checked.len() > 30);
    for file in checked {
        for pattern in &patterns {
            assert!(!read(&file).contains(pattern.as_str()), "{file} contains {pattern}");
        }
    }
}

// The public interface.

/// The public items of the crate by a scan of its text: what `lib.rs` re-exports, with its methods,
/// variants, fields and implementations.
fn public_items() -> BTreeSet<String> {
    let lib = read("src/lib.rs");
    let mut names = BTreeSet::new();
    let mut items = BTreeSet::new();
    for line in lib.lines().filter_map(|l| l.strip_prefix("pub use ")) {
        let line = line.trim_end_matches(';');
        let list = line.rsplit("::").next().unwrap().trim_matches(['{', '}']);
        for name in list.split(',').map(str::trim) {
            names.insert(name.to_owned());
            if line.starts_with('{') {
                items.insert(format!("pub use {name}"));
            }
        }
    }
    for file in files("src").iter().filter(|f| f.ends_with(".rs") && *f != "src/lib.rs") {
        scan(&read(file), &names, &mut items);
    }
    items
}

/// The type that a line opens a block of, if it is a public one.
fn owner<'a>(line: &str, names: &'a BTreeSet<String>) -> Option<&'a String> {
    let header = line.split(" where").next().unwrap().trim_end_matches([' ', '{']);
    let subject = header.rsplit(" for ").next().unwrap();
    let subject =
        if subject.starts_with("impl<") { subject.split_once("> ").map_or("", |s| s.1) } else { subject };
    let word = subject.split(['<', ':', '(', ' ']).rfind(|w| names.contains(*w))?;
    names.get(word)
}

fn scan(source: &str, names: &BTreeSet<String>, items: &mut BTreeSet<String>) {
    let mut block: Option<(String, &str)> = None;
    let mut macros = false;
    let mut lines = source.lines().peekable();
    while let Some(line) = lines.next() {
        let item = line.trim_start();
        let indent = line.len() - item.len();
        if item.is_empty() || item.starts_with("//") || item.starts_with('#') {
            continue;
        }
        // A signature may go on for some lines.
        let mut whole = item.to_owned();
        let signature = ["pub fn ", "fn ", "impl", "pub struct", "pub enum", "pub trait", "pub type"];
        if signature.iter().any(|s| item.starts_with(s)) && !macros {
            while !whole.ends_with(['{', ';', '}']) && lines.peek().is_some() {
                whole = format!("{whole} {}", lines.next().unwrap().trim());
            }
        }
        let text = whole.replace("( ", "(").replace(", )", ")").replace(",)", ")");
        let text = text.split(" {").next().unwrap().trim_end_matches([';', '{', ' ', ',']);

        if indent == 0 {
            macros = line == "events! {";
            block = None;
            let kind = ["pub struct ", "pub enum ", "pub trait ", "pub type ", "impl"]
                .into_iter()
                .find(|k| text.starts_with(k));
            let Some(kind) = kind else { continue };
            let Some(name) = owner(text, names) else { continue };
            if kind != "impl" || text.contains(" for ") {
                let private = if kind == "pub struct " { '(' } else { '\0' };
                items.insert(text.split(private).next().unwrap().to_owned());
            }
            if whole.ends_with('{') && !(kind == "impl" && text.contains(" for ")) {
                block = Some((name.clone(), kind));
            }
        } else if macros {
            if let Some(name) = item.strip_suffix(" {").filter(|n| names.contains(*n)) {
                items.insert(format!("pub struct {name}<'a>"));
                items.insert(format!("{name}::topic: &str"));
                block = Some((name.to_owned(), "event"));
            } else if let (Some((name, _)), Some(field)) = (&block, item.strip_suffix(',')) {
                items.insert(format!("{name}::{field}"));
            }
        } else if let Some((name, kind)) = &block {
            match *kind {
                "impl" | "pub struct "
                    if indent == 4 && text.starts_with("pub ") && !text.starts_with("pub(") =>
                {
                    items.insert(format!(
                        "{name}::{}",
                        text.trim_start_matches("pub ").trim_start_matches("fn ")
                    ));
                }
                "pub trait " if indent == 4 && text.starts_with("fn ") => {
                    items.insert(format!("{name}::{}", text.trim_start_matches("fn ")));
                }
                "pub enum " if indent == 4 && text.chars().next().is_some_and(char::is_uppercase) => {
                    items.insert(format!("{name}::{text}"));
                }
                _ => {}
            }
        }
    }
}

/// An item that the interface did not have from the start carries its reason: `item # reason`.
#[test]
fn the_public_items_are_those_that_are_listed() {
    let path = root().join("tests/public-api.txt");
    let listed: BTreeMap<String, String> = fs::read_to_string(&path)
        .unwrap_or_default()
        .lines()
        .map(|line| line.split_once(" # ").unwrap_or((line, "")))
        .map(|(item, reason)| (item.trim().to_owned(), reason.to_owned()))
        .collect();
    let items = public_items();
    assert!(items.iter().any(|i| i.starts_with("Queue::push(")), "the scan finds nothing: {items:#?}");
    if updating() {
        let mut text = String::new();
        for item in &items {
            match listed.get(item).filter(|reason| !reason.is_empty()) {
                Some(reason) => writeln!(text, "{item} # {reason}").unwrap(),
                None => writeln!(text, "{item}").unwrap(),
            }
        }
        fs::write(&path, text).unwrap();
        return;
    }
    let new: Vec<&String> = items.iter().filter(|i| !listed.contains_key(*i)).collect();
    let gone: Vec<&String> = listed.keys().filter(|i| !items.contains(*i)).collect();
    assert!(
        new.is_empty() && gone.is_empty(),
        "UPDATE_EXPECT=1 rewrites the list\nnew: {new:#?}\ngone: {gone:#?}"
    );
}

// The schema.

/// A dump without what differs from one release of PostgreSQL to the next.
fn dump(server: &Server, url: &str) -> String {
    let output = Command::new(server.program("pg_dump"))
        .args(["--schema-only", "--no-owner", "--schema=pushpop", url])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let noise = ["--", "SET ", "\\restrict", "\\unrestrict", "SELECT pg_catalog.set_config"];
    let mut normal = String::new();
    for line in text.lines() {
        let drop = line.trim().is_empty() || noise.iter().any(|n| line.starts_with(n));
        if !drop {
            normal.push_str(line);
            normal.push('\n');
        }
    }
    normal
}

#[test]
fn the_migrated_schema_is_the_golden_one() {
    let server = Server::shared();
    let database = crate::world::unique("golden");
    let mut admin = Client::connect(&server.url(), NoTls).unwrap();
    admin.batch_execute(&format!("create database {database}")).unwrap();
    let url = format!("{}/{database}", server.url().rsplit_once('/').unwrap().0);
    drop(Queue::connect(&url).unwrap());
    let dumped = dump(server, &url);
    let _ = admin.batch_execute(&format!("drop database {database} with (force)"));

    let path = root().join("tests/schema.sql");
    if updating() {
        fs::write(&path, dumped).unwrap();
        return;
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    if let Some((line, (is, was))) = dumped.lines().zip(golden.lines()).enumerate().find(|(_, (a, b))| a != b)
    {
        panic!("line {}: {is:?} instead of {was:?}; UPDATE_EXPECT=1 rewrites the dump", line + 1);
    }
    assert_eq!(dumped.lines().count(), golden.lines().count(), "UPDATE_EXPECT=1 rewrites the dump");
}
