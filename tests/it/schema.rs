//! The schema: who installs it, what it is called, and whom it serves.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use postgres::{Client, NoTls};
use pushpop_pg::{ErrorKind, NewMessage, Queue, TopicSettings};

use crate::world::{SOON, World, drain, guarded, guarded_role, guarded_url, pop, quoted, stats, text};

fn guarded_admin() -> Client {
    Client::connect(&guarded_url("postgres", "correct", "postgres"), NoTls).unwrap()
}

#[test]
fn smoke() {
    let world = World::new();
    let _queue = world.queue();
    let row = world.client().query_one(&world.sql("select * from pushpop.schema_version()"), &[]).unwrap();
    assert_eq!(row.get::<_, i32>(0), 1);
}

#[test]
fn a_role_that_may_not_create_is_told_what_to_run() {
    let mut admin = guarded_admin();
    let (role, url) = guarded_role(&mut admin);
    let world = World::on(&url);
    let error = world.builder().connect(&url).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
    let words = error.to_string();
    assert!(words.contains("install_sql") && words.contains("grant create on database"), "{words}");
    assert!(std::error::Error::source(&error).is_some());

    // What it says helps.
    admin.batch_execute(&format!("grant create on database postgres to {role}")).unwrap();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    assert_eq!(drain(&queue, "t"), ["m"]);
}

#[test]
fn without_migrate_an_empty_database_is_refused() {
    let world = World::new();
    let error = world.builder().migrate(false).connect(&world.url).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(error.to_string().contains("install_sql"), "{error}");
    let sql = "select from pg_namespace where nspname = $1";
    assert!(world.client().query_opt(sql, &[&world.schema]).unwrap().is_none(), "nothing was created");
}

#[test]
fn install_sql_is_all_that_is_needed() {
    let world = World::new();
    world.client().batch_execute(&world.builder().install_sql()).unwrap();
    let queue = world.open(world.builder().migrate(false));
    queue.push("t", "m").unwrap();
    assert_eq!(drain(&queue, "t"), ["m"]);
    // One that migrates finds nothing to do.
    world.queue().push("t", "again").unwrap();
    assert_eq!(drain(&queue, "t"), ["again"]);
}

/// Names that break out of quotes, patterns or psql's own variables.
fn hostile_names() -> Vec<String> {
    let long = format!("{}é", "x".repeat(61));
    assert_eq!(long.len(), 63);
    [
        "two words",
        "quo\"te",
        "apo'strophe",
        "both\"'\"'",
        "back\\slash",
        "end\\",
        "Ünï-cödé 🦀",
        "select",
        "UPPER",
        "pushpop.x",
        "schema pushpop",
        "my'pushpop'",
        "%s%I",
        ":name",
        ":'name'",
        "--",
        "/*",
        ";",
        "a.b",
        "{0}",
        "e'x'",
    ]
    .into_iter()
    .map(str::to_owned)
    .chain([long, "y".repeat(63)])
    .collect()
}

/// Every function of the schema, by way of the queue.
pub(crate) fn use_everything(queue: &Queue, other: &Queue) {
    queue.push("t", NewMessage::new("a").header("k", "v")).unwrap();
    queue.push_many("t", ["b", "c", "d", "e", "f", "g"]).unwrap();
    let mut lease = pop(queue, "t");
    assert_eq!((text(lease.payload()).as_str(), lease.header("k")), ("a", Some("v")));
    lease.extend(Duration::from_secs(600)).unwrap();
    lease.complete().unwrap();
    pop(queue, "t").discard().unwrap();
    pop(queue, "t").fail("why").unwrap();
    pop(queue, "t").defer(Duration::from_secs(60)).unwrap();
    let released = pop(queue, "t");
    let id = released.id();
    released.release().unwrap();
    assert!(queue.find("t", id).unwrap().is_some());
    queue.transaction(|tx| queue.push_in(tx, "t", "h").map(drop)).unwrap();
    let leases = queue.pop_many("t", 2, SOON).unwrap();
    queue.transaction(|tx| leases[0].complete_in(tx)).unwrap();
    let stats = stats(queue, "t");
    assert_eq!((stats.settled(), stats.dead()), (3, 0));
    assert!(!queue.topic("t").peek(10).unwrap().is_empty());
    assert_eq!(queue.topics().unwrap().len(), 1);
    assert!(queue.topic("t").purge().unwrap() > 0);
    assert!(queue.try_pop("none").unwrap().is_none());
    look_after(queue);
    // By notification: the channel has the schema's name.
    thread::scope(|scope| {
        let waiting = scope.spawn(|| pop(queue, "wake"));
        thread::sleep(Duration::from_millis(50));
        other.push("wake", "x").unwrap();
        waiting.join().unwrap().complete().unwrap();
    });
}

fn look_after(queue: &Queue) {
    let topic = queue.topic("care");
    let settings =
        TopicSettings::default().with_max_attempts(1).with_lease(SOON).with_backoff(SOON / 2, SOON);
    topic.set(&settings).unwrap();
    assert_eq!(topic.settings().unwrap(), settings);
    let id = queue.push("care", "m").unwrap();
    for _ in 0..2 {
        pop(queue, "care").fail("why").unwrap();
        assert_eq!(topic.dead(10).unwrap()[0].failures()[0].error(), "why");
        assert_eq!(topic.redrive(&[id]).unwrap(), 1);
        pop(queue, "care").fail("why").unwrap();
        assert_eq!(topic.redrive_all().unwrap(), 1);
    }
    assert!(topic.reschedule(id, SOON).unwrap() && topic.cancel(id).unwrap());
    queue.push("care", "m").unwrap();
    topic.pause().unwrap();
    assert!(queue.try_pop("care").unwrap().is_none());
    topic.resume().unwrap();
    pop(queue, "care").fail("why").unwrap();
    assert_eq!(topic.purge_dead(Duration::ZERO).unwrap(), 1);
}

/// Does something with each of the names, some at a time.
fn with_each_name(work: impl Fn(&str) + Sync) {
    let names = Mutex::new(hostile_names());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some(name) = names.lock().unwrap().pop() else { return };
                    work(&name);
                }
            });
        }
    });
}

#[test]
fn any_name_serves_as_a_schema() {
    with_each_name(|name| {
        let mut world = World::new();
        world.schema = name.to_owned();
        let open = || Queue::builder().schema(name).pool_size(1).connect(&world.url);
        let queue = open().unwrap_or_else(|e| panic!("{name:?}: {e}"));
        use_everything(&queue, &open().unwrap());
        let upkeep = world.sql("select pushpop.upkeep('t')");
        world.client().query(&upkeep, &[]).unwrap_or_else(|e| panic!("{name:?}: {e:?}"));
    });
}

/// A comment of the scripts ends with its line: what followed the name was run as SQL.
#[test]
fn a_name_with_a_line_break_is_refused_or_serves() {
    for name in ["\n", "a\nb", "\r\n", "\t", "\u{1}", "x\n; drop table pushpop.messages; --"] {
        let mut world = World::new();
        world.schema = name.to_owned();
        match Queue::builder().schema(name).connect(&world.url) {
            Err(e) => assert_eq!(e.kind(), ErrorKind::Invalid, "{name:?}: {e}"),
            Ok(queue) => {
                queue.push("t", "m").unwrap();
                assert_eq!(drain(&queue, "t"), ["m"], "{name:?}");
            }
        }
    }
}

#[test]
fn psql_installs_any_name() {
    let url = guarded_url("postgres", "correct", "postgres");
    with_each_name(|name| {
        let mut world = World::on(&url);
        world.schema = name.to_owned();
        let mut psql = Command::new(guarded().program("psql"))
            .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-v", "name=oops", &url])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let script = Queue::builder().schema(name).install_sql();
        // Whether all of it was read is told by the status.
        let _ = psql.stdin.take().unwrap().write_all(script.as_bytes());
        let output = psql.wait_with_output().unwrap();
        assert!(output.status.success(), "{name:?}: {}", String::from_utf8_lossy(&output.stderr));
        let queue = Queue::builder().schema(name).migrate(false).connect(&url).unwrap();
        queue.push("t", "m").unwrap();
        assert_eq!(drain(&queue, "t"), ["m"], "{name:?}");
    });
}

#[test]
fn two_schemas_are_two_queues() {
    let (one, two) = (World::new(), World::new());
    let (first, second) = (one.queue(), two.queue());
    first.push("t", "m").unwrap();
    assert!(second.try_pop("t").unwrap().is_none());
    assert_eq!(drain(&first, "t"), ["m"]);
}

#[test]
fn a_newer_schema_that_still_serves_is_accepted() {
    let world = World::new();
    drop(world.queue());
    let newer = world.sql("insert into pushpop.migrations (version, oldest_crate) values (99, '0.0.1')");
    world.client().batch_execute(&newer).unwrap();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    world.open(world.builder().migrate(false)).push("t", "m").unwrap();
}

#[test]
fn a_newer_schema_that_does_not_serve_is_refused() {
    let world = World::new();
    drop(world.queue());
    let newer = world.sql("insert into pushpop.migrations (version, oldest_crate) values (99, '7.8.9')");
    world.client().batch_execute(&newer).unwrap();
    for migrate in [true, false] {
        let error = world.builder().migrate(migrate).connect(&world.url).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Schema, "{error}");
        let words = error.to_string();
        let names_both =
            words.contains("7.8.9") && words.contains(env!("CARGO_PKG_VERSION")) && words.contains("99");
        assert!(names_both, "{words}");
    }
}

/// With a search path of the user's own, its tables, functions and operators come first.
#[test]
fn nothing_depends_on_the_search_path() {
    let world = World::on(&guarded_url("postgres", "correct", "postgres"));
    let evil = crate::world::unique("evil");
    let mut admin = guarded_admin();
    admin
        .batch_execute(&format!(
            "create schema {evil};
             set search_path = {evil}, pg_catalog;
             create table messages (topic text, payload bytea);
             create table runs (topic text);
             create table topics (topic text);
             create function now() returns timestamptz language sql as 'select timestamptz ''epoch''';
             create function clock_timestamp() returns timestamptz language sql as 'select timestamptz ''epoch''';
             create function statement_timestamp() returns timestamptz language sql as 'select timestamptz ''epoch''';
             create function cardinality(anyarray) returns integer language sql as 'select 0';
             create function octet_length(text) returns integer language sql as 'select 0';
             create function octet_length(bytea) returns integer language sql as 'select 0';
             create function no(text, text) returns boolean language sql as 'select false';
             create function no(uuid, uuid) returns boolean language sql as 'select false';
             create function no(bytea, bytea) returns boolean language sql as 'select false';
             create operator = (leftarg = text, rightarg = text, function = no);
             create operator <> (leftarg = text, rightarg = text, function = no);
             create operator = (leftarg = uuid, rightarg = uuid, function = no);
             create operator = (leftarg = bytea, rightarg = bytea, function = no);"
        ))
        .unwrap();
    let config = || {
        let mut config = world.config();
        config.options(&format!("-c search_path={evil},pg_catalog"));
        config
    };
    let queue = world.builder().connect_with(config()).unwrap();
    let other = world.builder().connect_with(config()).unwrap();
    use_everything(&queue, &other);

    // A lost lease is an error in a transaction, whatever its operators say.
    let fast = queue.with_lease(Duration::from_secs(1));
    fast.push("lost", "m").unwrap();
    let stale = pop(&fast, "lost");
    pop(&queue, "lost").complete().unwrap();
    let error = queue.transaction(|tx| stale.complete_in(tx)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeaseLost, "{error:?}");
    admin.batch_execute(&format!("drop schema {evil} cascade")).unwrap();
}

/// A temporary table is looked up before all others; one named like ours captured pushed payloads.
#[test]
fn a_temporary_table_captures_nothing() {
    let world = World::new();
    let queue = world.queue();
    let mut client = world.client();
    client
        .batch_execute(&world.sql(
            "create temp table messages (like pushpop.messages including all);
             create temp table runs (like pushpop.runs including all);
             create temp table topics (like pushpop.topics including all);
             create temp table leases (like pushpop.leases including all);
             set search_path = pg_temp, public",
        ))
        .unwrap();
    let mut tx = client.transaction().unwrap();
    queue.push_in(&mut tx, "t", "secret").unwrap();
    tx.commit().unwrap();
    client
        .query(
            &world.sql("select pushpop.push_many('t', array[gen_random_uuid()], array['\\x00'::bytea])"),
            &[],
        )
        .unwrap();
    let captured = client
        .query_one("select (select count(*) from messages) + (select count(*) from runs) + (select count(*) from topics)", &[])
        .unwrap();
    assert_eq!(captured.get::<_, i64>(0), 0);
    let first = queue.try_pop("t").unwrap().unwrap();
    assert_eq!(text(first.payload()), "secret");
    let mut tx = client.transaction().unwrap();
    first.complete_in(&mut tx).unwrap();
    tx.commit().unwrap();
    assert_eq!(client.query_one("select count(*) from leases", &[]).unwrap().get::<_, i64>(0), 0);
    assert_eq!(stats(&queue, "t").settled(), 1);
}

#[test]
fn others_may_execute_nothing() {
    let world = World::on(&guarded_url("postgres", "correct", "postgres"));
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let mut admin = guarded_admin();
    let (role, url) = guarded_role(&mut admin);
    // Even where somebody let them see the schema.
    admin.batch_execute(&format!("grant usage on schema {} to {role}", quoted(&world.schema))).unwrap();
    let mut client = Client::connect(&url, NoTls).unwrap();

    let functions = admin
        .query(
            "select p.proname::text, has_function_privilege($1, p.oid, 'execute') from pg_proc p
             where p.pronamespace = $2::text::regnamespace",
            &[&role, &quoted(&world.schema)],
        )
        .unwrap();
    assert!(functions.len() > 20);
    for row in &functions {
        assert!(!row.get::<_, bool>(1), "anyone may execute {}", row.get::<_, String>(0));
    }
    for call in ["pushpop.push('t', 'x')", "pushpop.pop('t')", "pushpop.stats('t')", "pushpop.purge('t')"] {
        let error = client.query(&world.sql(&format!("select {call}")), &[]).unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42501", "{call}");
    }
    for table in [
        "messages",
        "runs",
        "leases",
        "history",
        "dead",
        "topics",
        "behind",
        "figures",
        "migrations",
        "overview",
        "in_flight",
        "dead_messages",
    ] {
        let error = client.query(&world.sql(&format!("select 1 from pushpop.{table}")), &[]).unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42501", "{table}");
    }
}

#[test]
fn a_role_works_with_the_right_to_execute_alone() {
    let world = World::on(&guarded_url("postgres", "correct", "postgres"));
    drop(world.queue());
    let mut admin = guarded_admin();
    let (role, url) = guarded_role(&mut admin);
    let schema = quoted(&world.schema);
    admin
        .batch_execute(&format!(
            "grant usage on schema {schema} to {role}; grant execute on all functions in schema {schema} to {role}"
        ))
        .unwrap();
    let queue = world.builder().connect(&url).unwrap();
    let other = world.builder().connect(&url).unwrap();
    use_everything(&queue, &other);
}
