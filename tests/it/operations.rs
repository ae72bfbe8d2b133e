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
    for block in blocks(&document()) {
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

/// Symptoms in the words of PostgreSQL, the driver or the system, by how they begin.
const OF_OTHERS: &[&str] = &["error connecting to server:", "commit()"];

/// A text that is changed in the code has to be changed in the document.
#[test]
fn its_texts_are_those_of_the_code() {
    let mut code = String::new();
    for folder in ["src", "src/schema", "sql/0001"] {
        for entry in fs::read_dir(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let Ok(lines) = fs::read_to_string(path) else { continue };
            // A literal that goes on in the next line.
            let mut parts = lines.split("\\\n");
            code.push_str(parts.next().unwrap());
            parts.for_each(|part| code.push_str(part.trim_start()));
        }
    }
    let document = document();
    let mut checked = 0;
    for symptom in symptoms(&document) {
        let Some(text) = symptom.strip_prefix('`').and_then(|text| text.strip_suffix('`')) else { continue };
        if text.contains("SQLSTATE") || OF_OTHERS.iter().any(|words| text.starts_with(words)) {
            continue;
        }
        // Of an error of ours, the last words are added to others.
        for part in text.split([';', ',']).flat_map(|part| part.split("..")) {
            let part = part.trim().trim_matches(['"', ':']);
            let numbers = part.split(|c: char| c.is_ascii_digit()).next().unwrap().trim();
            assert!(code.contains(numbers), "{numbers:?} of {text:?} is not in the code");
        }
        checked += 1;
    }
    assert!(checked >= 12, "{checked}");
}
