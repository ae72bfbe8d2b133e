//! What `docs/operations.md` says: its queries run, its grants are enough, its texts are ours.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::{ErrorKind, Job, NewMessage, Worker};

use crate::world::{World, guarded_role, guarded_url, pop, stats, until};

fn read(path: &str) -> String {
    fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path))
        .unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn document() -> String {
    read("docs/operations.md")
}

/// The blocks of SQL.
fn blocks(document: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    for part in document.split("```sql\n").skip(1) {
        blocks.push(part.split("```").next().unwrap().to_owned());
    }
    blocks
}

/// The headings below "Troubleshooting" that name a symptom.
fn symptoms(document: &str) -> Vec<&str> {
    document.lines().filter_map(|line| line.strip_prefix("#### ")).collect()
}

#[test]
fn smoke() {
    let document = document();
    assert!(symptoms(&document).len() >= 15);
    assert!(blocks(&document).len() >= 15);
}

/// As GitHub makes it of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
}

#[test]
fn links_lead_somewhere() {
    let document = document();
    let headings = document.lines().filter(|line| line.starts_with('#'));
    let anchors: BTreeSet<String> =
        headings.map(|line| anchor(line.trim_start_matches(['#', ' ']))).collect();
    let mut links = 0;
    for target in document.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
        links += 1;
        match target.strip_prefix('#') {
            Some(target) => assert!(anchors.contains(target), "#{target}"),
            None => {
                let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs").join(target);
                assert!(path.exists(), "{target}");
            }
        }
    }
    assert!(links > 20);
}

#[test]
fn its_queries_run() {
    let world = World::new();
    let queue = world.queue();
    queue.push("mail", "m").unwrap();
    drop(queue);
    let mut client = world.client();
    let mut run = 0;
    let document = document();
    let within_lines = quotes(&document).into_iter().map(|(_, quote)| quote);
    let within_lines = within_lines.filter(|quote| {
        quote.starts_with("select ") && (quote.contains(" pushpop.") || quote.contains("()"))
    });
    for block in blocks(&document).into_iter().chain(within_lines) {
        // Roles and databases belong to the whole server.
        if ["alter role", "database app", " to producer"].iter().any(|words| block.contains(words)) {
            continue;
        }
        let sql = world.sql(&block).replace("'pushpop'", &format!("'{}'", world.schema));
        let mut tx = client.transaction().unwrap();
        tx.batch_execute(&sql).unwrap_or_else(|e| panic!("{e:?} in\n{block}"));
        tx.rollback().unwrap();
        run += 1;
    }
    assert!(run >= 15, "{run}");
}

/// A function that the crate calls anew needs a grant.
#[test]
fn its_grants_are_enough_and_not_too_much() {
    let world = World::on(&guarded_url("postgres", "correct", "postgres"));
    drop(world.queue());
    let mut admin = world.client();
    let (producer, producer_url) = guarded_role(&mut admin);
    let (consumer, consumer_url) = guarded_role(&mut admin);
    let (monitor, monitor_url) = guarded_role(&mut admin);
    let grants = blocks(&document())
        .into_iter()
        .find(|block| block.contains("on function") && block.contains("to producer"))
        .expect("the grants");
    let grants = grants
        .replace("schema pushpop", &format!("schema {}", world.schema))
        .replace("'pushpop'", &format!("'{}'", world.schema))
        .replace("producer", &producer)
        .replace("consumer", &consumer)
        .replace("monitor", &monitor);
    admin.batch_execute(&world.sql(&grants)).unwrap();
    let open = |url: &str| world.builder().migrate(false).connect(url).unwrap();
    let is_denied = |error: pushpop_pg::Error| {
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        assert!(error.to_string().contains("permission denied for function"), "{error}");
    };

    let producer = open(&producer_url);
    producer.push("mail", "1").unwrap();
    producer.push_many("mail", ["2", "3", "4", "5", "6", "7", "8"]).unwrap();
    producer.transaction(|tx| producer.push_in(tx, "mail", "9")).unwrap();
    producer.push("slow", NewMessage::new("1").max_attempts(1)).unwrap();
    let mut client = postgres::Client::connect(&producer_url, postgres::NoTls).unwrap();
    let pushes = "select pushpop.push('other', '10'), pushpop.push('other', '10'::jsonb),
                         pushpop.push_many('other', array[gen_random_uuid()], array['10'])";
    client.batch_execute(&world.sql(pushes)).unwrap();
    is_denied(producer.try_pop("mail").map(drop).unwrap_err());

    let consumer = open(&consumer_url);
    pop(&consumer, "mail").complete().unwrap();
    pop(&consumer, "mail").discard().unwrap();
    pop(&consumer, "mail").defer(Duration::ZERO).unwrap();
    pop(&consumer, "mail").release().unwrap();
    pop(&consumer, "mail").fail("why").unwrap();
    let mut lease = pop(&consumer, "mail");
    lease.extend(Duration::from_secs(60)).unwrap();
    consumer.transaction(|tx| lease.complete_in(tx)).unwrap();
    let lease = pop(&consumer, "mail");
    consumer.transaction(|tx| lease.discard_in(tx)).unwrap();
    assert!(consumer.pop_timeout("empty", Duration::from_millis(100)).unwrap().is_none());
    Worker::new(&consumer).handle("mail", 2, |_: &Job| Ok(())).run_until_idle().unwrap();
    // Until its lease has been extended.
    let length = consumer.with_lease(Duration::from_secs(6));
    let handled = Worker::new(&length)
        .handle("slow", 1, |job: &Job| {
            let mut client = world.client();
            let sql = world.sql("select lease_until from pushpop.find('slow', $1)");
            let mut deadline =
                || client.query_one(&sql, &[&job.id()]).unwrap().get::<_, Option<OffsetDateTime>>(0);
            let first = deadline();
            until("the lease is extended", || deadline() > first);
            Ok(())
        })
        .run_until_idle();
    assert_eq!(handled.unwrap(), 1);
    assert_eq!(stats(&world.queue(), "slow").settled(), 1);
    is_denied(consumer.push("mail", "m").map(drop).unwrap_err());
    is_denied(consumer.topic("mail").purge().map(drop).unwrap_err());
    let mut client = postgres::Client::connect(&consumer_url, postgres::NoTls).unwrap();
    client.batch_execute(&world.sql("select pushpop.upkeep('mail'), pushpop.upkeep_due()")).unwrap();
    client
        .batch_execute(
            &world.sql("select pushpop.as_text(payload), pushpop.as_json(payload) from pushpop.pop('mail')"),
        )
        .unwrap();

    let monitor = open(&monitor_url);
    assert!(monitor.topics().unwrap().iter().any(|stats| stats.topic() == "mail"));
    is_denied(monitor.try_pop("mail").map(drop).unwrap_err());
    let mut client = postgres::Client::connect(&monitor_url, postgres::NoTls).unwrap();
    for view in ["overview", "in_flight", "dead_messages"] {
        client.batch_execute(&world.sql(&format!("select from pushpop.{view}"))).unwrap();
    }
    let refused = client.batch_execute(&world.sql("select from pushpop.messages")).unwrap_err();
    let refused = pushpop_pg::Error::from(refused).to_string();
    assert_eq!(refused, "permission denied for table messages (SQLSTATE 42501)");

    let (all, all_url) = guarded_role(&mut admin);
    let grant = format!(
        "grant usage on schema {0} to {all}; grant execute on all functions in schema {0} to {all}",
        world.schema
    );
    admin.batch_execute(&grant).unwrap();
    let operator = open(&all_url);
    operator.topic("mail").pause().unwrap();
    operator.topic("mail").redrive_all().unwrap();
    let mut client = postgres::Client::connect(&all_url, postgres::NoTls).unwrap();
    client.batch_execute(&world.sql("select from pushpop.messages")).unwrap_err();
}

/// Texts of PostgreSQL, the driver or the system that the document quotes.
const TEXTS_OF_OTHERS: &[&str] = &[
    "error connecting to server",
    "Connection refused (os error 111)",
    "Connection refused",
    "failed to lookup address information",
    "password authentication failed for user \"..\"",
    "invalid configuration",
    "password missing",
    "no pg_hba.conf entry for host .., no encryption",
    "error performing TLS handshake",
    "server does not support TLS",
    "sorry, too many clients already",
    "remaining connection slots are reserved for non-replication superuser connections",
    "too many connections for role \"..\"",
    "cannot execute INSERT in a read-only transaction",
    "database does not allow writes",
    "prepared statement \"..\" already exists",
    "does not exist",
    "permission denied for schema pushpop",
    "permission denied for table messages",
    "permission denied for function pop",
    "permission denied for function heartbeat",
    "permission denied for function upkeep",
    "for function ..",
    "for database ..",
    "function .. does not exist",
    "relation \"messages\" already exists",
    "role \"owner\" does not exist",
    "connection closed",
    "the database system is shutting down",
    "canceling statement due to lock timeout",
    "current transaction is aborted, commands ignored until end of transaction block",
    "terminating connection due to idle-in-transaction timeout",
    "No space left on device",
    "could not extend file \"..\"",
    "200000 are dead but not yet removable",
    "no response",
    "could not serialize access ..",
    "deadlock detected",
    "connection to the remote node failed",
    "too many notifications in the NOTIFY queue",
    "is among those with the oldest transactions",
    ".. due to transaction timeout",
];

/// What is typed elsewhere than in a block of SQL, by how it begins.
const COMMANDS: &[&str] = &[
    "select ",
    "grant ",
    "create subscription ",
    "vacuum ",
    "rollback ",
    "show ",
    "pushpop.",
    "pg_isready ",
    "host=",
    "terminationGracePeriodSeconds:",
];

/// Names of PostgreSQL's, or of other programs.
const NAMES_OF_OTHERS: &[&str] = &[
    "--no-privileges",
    "--schema",
    "--schema-only",
    "RUST_LOG=pushpop_pg=debug",
    "SyncRep",
    "TimeoutStopSec=65",
    "active",
    "analyze",
    "autovacuum_naptime",
    "commit()",
    "connection limit",
    "default_transaction_read_only",
    "examples/prometheus-rules.yml",
    "hot_standby_feedback",
    "idle_in_transaction_session_timeout",
    "max_connections",
    "open_for",
    "pg_drop_replication_slot",
    "pg_dump",
    "pg_monitor",
    "pg_wal",
    "pool_mode",
    "preStop",
    "psql",
    "superuser_reserved_connections",
    "synchronous_standby_names",
    "target_session_attrs=read-write",
    "xmin",
];

/// The literals of a source file, Rust or SQL: what it can say.
fn literals(file: &str, text: &str) -> Vec<String> {
    let (quote, comment) = if file.ends_with(".sql") { ('\'', "--") } else { ('"', "//") };
    // A comment behind a line of SQL may have an apostrophe; of Rust, a literal may have two slashes.
    let lines = text.lines().map(|line| match line.find(comment) {
        Some(at) if quote == '\'' || line[..at].trim().is_empty() => &line[..at],
        _ => line,
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    let mut literals = Vec::new();
    let mut rest = text.replace("'\"'", "").replace("'\\\"'", "");
    while let Some(at) = rest.find(quote) {
        let mut literal = String::new();
        let mut chars = rest[at + 1..].char_indices().peekable();
        let mut end = rest.len();
        while let Some((i, c)) = chars.next() {
            match c {
                '\\' if quote == '"' => match chars.next() {
                    // A literal that goes on in the next line.
                    Some((_, '\n')) => while chars.next_if(|(_, c)| c.is_whitespace()).is_some() {},
                    Some((_, escaped)) => literal.push(escaped),
                    None => {}
                },
                c if c == quote => {
                    end = at + 1 + i + 1;
                    break;
                }
                c => literal.push(c),
            }
        }
        literals.push(literal);
        rest = rest.split_off(end);
    }
    literals
}

/// What stands between backticks, but for blocks, each with the number of its line.
fn quotes(document: &str) -> Vec<(usize, String)> {
    let mut quotes = Vec::new();
    let mut text = String::new();
    let mut in_block = false;
    for line in document.lines() {
        in_block ^= line.starts_with("```");
        if !in_block && !line.starts_with("```") {
            text.push_str(line);
        }
        text.push('\n');
    }
    let mut at = 0;
    while let Some(begin) = text[at..].find('`').map(|found| at + found) {
        let ticks = text[begin..].chars().take_while(|c| *c == '`').count();
        let fence = "`".repeat(ticks);
        let end = begin + ticks + text[begin + ticks..].find(&fence).expect("a quote that does not end");
        let line = text[..begin].matches('\n').count() + 1;
        quotes.push((line, text[begin + ticks..end].replace('\n', " ")));
        at = end + ticks;
    }
    quotes
}

/// A text without what differs from one time to the next: names in quotes, and numbers.
fn pieces(text: &str) -> Vec<String> {
    let mut fixed = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '"' {
            chars.by_ref().find(|c| *c == '"');
            fixed.push('\0');
        } else if c.is_ascii_digit() {
            while chars.next_if(|c| c.is_ascii_digit() || *c == '.').is_some() {}
            chars.next_if_eq(&'s');
            fixed.push('\0');
        } else {
            fixed.push(c);
        }
    }
    let fixed = fixed.replace("..", "\0").replace(": ", "\0").replace("; ", "\0");
    fixed.split('\0').map(|piece| piece.trim().to_owned()).filter(|piece| piece.len() > 1).collect()
}

/// A text that is changed in the code has to be changed in the document: error texts, log lines, names, wherever they stand.
#[test]
fn its_texts_are_those_of_the_code() {
    let mut code = String::new();
    let mut said = Vec::new();
    let mut folders: Vec<PathBuf> =
        ["src", "sql/0001"].map(|folder| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder)).into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            said.extend(literals(path.to_str().unwrap(), &text));
            code.push_str(&text);
        }
    }
    let others: Vec<Vec<String>> = TEXTS_OF_OTHERS.iter().map(|text| pieces(text)).collect();
    let mut used = BTreeSet::new();
    let (mut wrong, mut ours) = (Vec::new(), 0);
    for (line, quote) in quotes(&document()) {
        if COMMANDS.iter().any(|command| quote.starts_with(command)) {
            for call in quote.split("pushpop.").skip(1) {
                let name = call.split(|c: char| !c.is_ascii_lowercase() && c != '_').next().unwrap();
                if !code.contains(&format!("pushpop.{name}")) {
                    wrong.push(format!("{line}: pushpop.{name}"));
                }
            }
            continue;
        }
        if let Some(name) = NAMES_OF_OTHERS.iter().find(|name| **name == quote) {
            used.insert(*name);
            continue;
        }
        // As in Builder::pooler(true), or ErrorKind::Timeout.
        if let Some((of, rest)) =
            quote.split_once("::").filter(|(of, _)| of.chars().all(char::is_alphanumeric))
        {
            let member = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
            let is_there = code.contains(&format!("fn {member}"))
                || code.lines().any(|line| line.trim_start().starts_with(member));
            if !is_there && of != "std" {
                wrong.push(format!("{line}: {quote}"));
            }
            continue;
        }
        if !quote.contains(' ') {
            let name = quote.split('(').next().unwrap();
            if !code.contains(name) {
                wrong.push(format!("{line}: {quote} is no name of the code, nor listed as one of others"));
            }
            continue;
        }
        let quote = quote.split(" (SQLSTATE").next().unwrap();
        let mut is_ours = false;
        let parts = pieces(quote);
        if let Some(at) = others.iter().position(|text| *text == parts) {
            used.insert(TEXTS_OF_OTHERS[at]);
            continue;
        }
        for piece in parts {
            let of_topic = piece.strip_suffix(" on topic");
            if said.iter().any(|literal| literal.contains(&piece) || of_topic == Some(literal)) {
                is_ours = true;
            } else if let Some(at) = others.iter().position(|text| text.contains(&piece)) {
                used.insert(TEXTS_OF_OTHERS[at]);
            } else {
                wrong.push(format!(
                    "{line}: {piece:?} of {quote:?} is neither in the code nor listed as a text of others"
                ));
            }
        }
        ours += usize::from(is_ours);
    }
    for text in TEXTS_OF_OTHERS.iter().chain(NAMES_OF_OTHERS) {
        if !used.contains(text) {
            wrong.push(format!("{text:?} is listed, and not in the document"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(ours >= 25, "{ours}");
}
