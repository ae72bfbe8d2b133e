//! Databases of other encodings than UTF-8: what they cannot store, and what they store that is no text.

use std::sync::atomic::{AtomicUsize, Ordering};

use postgres::{Client, NoTls};
use pushpop_pg::{ErrorKind, NewMessage, Worker};
use tracing_subscriber::filter::LevelFilter;

use crate::spans::Notes;
use crate::world::{World, drain, pop, unique, until, url};

/// A database of an encoding, and the schema of a test in it.
struct Encoded {
    world: Option<World>,
    database: String,
}

impl Encoded {
    fn new(encoding: &str) -> Encoded {
        let database = unique("encoded");
        let create =
            format!("create database {database} encoding '{encoding}' locale 'C' template template0");
        Client::connect(url(), NoTls).unwrap().batch_execute(&create).unwrap();
        let place = url().rsplit_once('/').unwrap().0;
        Encoded { world: Some(World::on(&format!("{place}/{database}"))), database }
    }

    fn world(&self) -> &World {
        self.world.as_ref().unwrap()
    }
}

impl Drop for Encoded {
    fn drop(&mut self) {
        self.world = None;
        let drop = format!("drop database if exists {} with (force)", self.database);
        if let Err(e) = Client::connect(url(), NoTls).and_then(|mut client| client.batch_execute(&drop)) {
            eprintln!("database {} is left behind: {e}", self.database);
        }
    }
}

#[test]
fn smoke() {
    let encoded = Encoded::new("LATIN1");
    let queue = encoded.world().queue();
    queue.push("gr\u{fc}n", NewMessage::new("m").header("gr\u{fc}n", "\u{fc}")).unwrap();
    let lease = pop(&queue, "gr\u{fc}n");
    assert_eq!(lease.header("gr\u{fc}n"), Some("\u{fc}"));
    lease.complete().unwrap();
}

/// A failure is recorded whatever its words are, and no more of them is replaced than must be.
#[test]
fn a_failure_is_recorded_whatever_its_words() {
    let many: String = ('\u{2190}'..'\u{2200}').collect();
    let kanji = "\u{65e5}\u{672c}\u{8a9e}";
    for (encoding, words, stored) in [
        ("LATIN1", "gr\u{fc}n \u{2192} \u{20ac}", "gr\u{fc}n \\u{2192} \\u{20ac}"),
        ("LATIN2", "\u{151} \u{2192}", "\u{151} \\u{2192}"),
        ("WIN1252", "\u{20ac} \u{2192}", "\u{20ac} \\u{2192}"),
        ("EUC_JP", &format!("{kanji} \u{1f980}"), &format!("{kanji} \\u{{1f980}}")),
        ("SQL_ASCII", "gr\u{fc}n \u{2192}", "gr\u{fc}n \u{2192}"),
        ("UTF8", "\u{2192} \u{1f980}", "\u{2192} \u{1f980}"),
        ("LATIN1", "nul \0", "nul \\u{fffd}"),
    ] {
        let encoded = Encoded::new(encoding);
        let queue = encoded.world().queue();
        let id = queue.push("t", "m").unwrap();
        pop(&queue, "t").fail(words).unwrap();
        let message = queue.find("t", id).unwrap().unwrap();
        assert_eq!((message.last_error(), message.attempt()), (Some(stored), 1), "{encoding}");
    }
    // Many of them are replaced, too, and those of a neighbour in the same statement are not.
    let encoded = Encoded::new("LATIN1");
    let queue = encoded.world().queue();
    queue.push_many("t", ["m"; 8]).unwrap();
    let leases = queue.pop_many("t", 8, std::time::Duration::ZERO).unwrap();
    let ids: Vec<_> = leases.iter().map(|lease| lease.id()).collect();
    std::thread::scope(|scope| {
        for (i, lease) in leases.into_iter().enumerate() {
            let many = &many;
            scope.spawn(move || lease.fail(if i == 0 { many.as_str() } else { "gr\u{fc}n" }).unwrap());
        }
    });
    for (i, id) in ids.into_iter().enumerate() {
        let message = queue.find("t", id).unwrap().unwrap();
        let error = message.last_error().unwrap();
        assert_eq!(error, if i == 0 { many.escape_unicode().to_string() } else { "gr\u{fc}n".to_owned() });
    }
}

/// What is the caller's to change is refused, by its name, and nothing is stored.
#[test]
fn a_topic_or_header_that_cannot_be_stored_is_invalid() {
    let encoded = Encoded::new("LATIN1");
    let queue = encoded.world().queue();
    let with = |name: &str, value: &str| NewMessage::new("m").header("plain", "x").header(name, value);
    let errors = [
        ("the topic", queue.push("\u{2192}", "m").unwrap_err()),
        ("the topic", queue.push_many("\u{2192}", ["m", "n"]).unwrap_err()),
        ("the topic", queue.transaction(|tx| queue.push_in(tx, "\u{2192}", "m")).unwrap_err()),
        ("the topic", queue.try_pop("\u{2192}").map(drop).unwrap_err()),
        ("the topic", queue.pop("\u{2192}").map(drop).unwrap_err()),
        ("the topic", queue.pop_any(&["t", "\u{2192}"], std::time::Duration::MAX).map(drop).unwrap_err()),
        ("the topic", queue.find("\u{2192}", pushpop_pg::uuid::Uuid::nil()).map(drop).unwrap_err()),
        ("the topic", queue.topic("\u{2192}").stats().map(drop).unwrap_err()),
        ("the topic", queue.topic("\u{2192}").peek(1).map(drop).unwrap_err()),
        ("the topic", queue.topic("\u{2192}").pause().unwrap_err()),
        ("the header \"k\"", queue.push("t", with("k", "\u{2192}")).unwrap_err()),
        ("the header \"\u{2192}\"", queue.push("t", with("\u{2192}", "v")).unwrap_err()),
        ("the header \"k\"", queue.push_many("t", [with("a", "b"), with("k", "\u{2192}")]).unwrap_err()),
        (
            "the header \"k\"",
            queue.transaction(|tx| queue.push_in(tx, "t", with("k", "\u{2192}"))).unwrap_err(),
        ),
    ];
    for (what, error) in errors {
        assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Invalid, false), "{error}");
        let words = format!("{what} cannot be stored: the encoding of the database has no '\u{2192}'");
        assert!(error.to_string().contains(&words) && error.to_string().contains("LATIN1"), "{error}");
    }
    assert!(queue.topics().unwrap().is_empty());
}

/// Nobody else in the same statement hears of it.
#[test]
fn a_topic_that_cannot_be_stored_harms_no_other() {
    let encoded = Encoded::new("LATIN1");
    let queue = encoded.world().queue();
    std::thread::scope(|scope| {
        for i in 0..16 {
            let queue = &queue;
            scope.spawn(move || {
                for _ in 0..10 {
                    let topic = if i % 4 == 0 { "\u{2192}".to_owned() } else { format!("t{i}") };
                    let pushed = queue.push(&topic, "m").map_err(|e| e.kind());
                    assert_eq!(pushed.err(), (i % 4 == 0).then_some(ErrorKind::Invalid), "{topic}");
                    let popped = queue.try_pop(&topic).map_err(|e| e.kind());
                    assert_eq!(popped.err(), (i % 4 == 0).then_some(ErrorKind::Invalid), "{topic}");
                }
            });
        }
    });
}

#[test]
fn a_worker_goes_on_without_a_topic_that_cannot_be_stored() {
    let encoded = Encoded::new("LATIN1");
    let queue = encoded.world().queue();
    let handled = AtomicUsize::new(0);
    let worker = || {
        let count = |_: &pushpop_pg::Job| {
            handled.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        Worker::new(&queue).handle("\u{2192}", 2, |_| Ok(())).handle("a", 2, count).handle_any(
            &["b", "\u{2190}", "c"],
            2,
            count,
        )
    };
    queue.push("a", "m").unwrap();
    queue.push("b", "m").unwrap();
    assert_eq!(worker().run_until_idle().unwrap(), 2);
    let running = worker();
    let stopper = running.stopper();
    std::thread::scope(|scope| {
        let run = scope.spawn(|| running.run().unwrap());
        for (i, topic) in ["a", "b", "c"].into_iter().cycle().take(12).enumerate() {
            queue.push(topic, "m").unwrap();
            until("it is handled", || handled.load(Ordering::Relaxed) == i + 3);
        }
        stopper.stop();
        let _ = run.join().unwrap();
    });
    // With nothing else to do it ends, and says why.
    let alone = Worker::new(&queue).handle("\u{2192}", 2, |_| Ok(()));
    assert_eq!(alone.run().unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(alone.run_until_idle().unwrap_err().kind(), ErrorKind::Invalid);
}

/// A database without an encoding stores any bytes. It is warned of, and no row blocks what is around it.
#[test]
fn bytes_that_are_no_text_block_nothing() {
    let encoded = Encoded::new("SQL_ASCII");
    let world = encoded.world();
    let notes = Notes::default();
    let queue = notes.of(LevelFilter::WARN, || world.queue());
    assert!(notes.logged().contains("the encoding of the database is SQL_ASCII"), "{}", notes.logged());
    let mut client = world.client();
    client.batch_execute("set client_encoding = sql_ascii; set standard_conforming_strings = on").unwrap();
    let mut run = |sql: &str| client.batch_execute(&world.sql(sql)).unwrap();
    run("select pushpop.push(E'b\\xe9d', 'm'); select pushpop.pause(E'w\\xe9rse')");
    run("select pushpop.push('t', 'first', headers => jsonb_build_object(E'n\\xe9', E'v\\xe9'))");
    run("select pushpop.fail('t', p.id, p.token, E'wh\\xe9', 0) from pushpop.pop('t') p");
    queue.push("t", "second").unwrap();
    let names: Vec<String> = queue.topics().unwrap().iter().map(|stats| stats.topic().to_owned()).collect();
    assert_eq!(names, ["b\u{fffd}d", "t", "w\u{fffd}rse"]);
    assert_eq!(queue.topic("t").peek(10).unwrap().len(), 2);
    let lease = pop(&queue, "t");
    assert_eq!(lease.last_error(), Some("wh\u{fffd}"));
    assert_eq!(lease.header("n\u{fffd}"), Some("v\u{fffd}"));
    lease.complete().unwrap();
    assert_eq!(drain(&queue, "t"), ["second"]);

    // The words of an error are cut by bytes there.
    queue.push("t", NewMessage::new("cut").max_attempts(1)).unwrap();
    pop(&queue, "t").fail(format!("x{}", "\u{2192}".repeat(8000))).unwrap();
    let dead = queue.topic("t").dead(1).unwrap();
    assert!(dead[0].last_error().unwrap().starts_with("x\u{2192}"));
}
/// The names of others' topics, in the notifications, do not end the connection that listens.
#[test]
fn a_topic_that_is_no_text_does_not_deafen() {
    let encoded = Encoded::new("SQL_ASCII");
    let world = encoded.world();
    let queue = world.open(world.builder().poll_interval(crate::world::SOON * 2));
    let mut client = world.client();
    client.batch_execute("set client_encoding = sql_ascii").unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pop(&queue, "t").complete().unwrap());
        crate::world::until_listening(world, &mut world.client());
        let pid = "select pid from pg_stat_activity where application_name = $1 and query ilike 'listen%'";
        let mut looks = world.client();
        let mut pid = || looks.query_opt(pid, &[&world.schema]).unwrap().map(|row| row.get::<_, i32>(0));
        let listens = pid();
        client.batch_execute(&world.sql("select pushpop.push(E'b\\xe9d', 'm')")).unwrap();
        client.batch_execute(&world.sql("select pushpop.push('t', 'm')")).unwrap();
        waiting.join().unwrap();
        assert_eq!(pid(), listens);
    });
}
