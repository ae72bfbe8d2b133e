//! A second migration, on a real server: what it waits for, and who waits for it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use pushpop_server::Server;

use super::*;

const SOON: Duration = Duration::from_secs(60);

fn client(application: &str) -> Client {
    let mut config: postgres::Config = Server::shared().url().parse().unwrap();
    config.application_name(application).connect(NoTls).unwrap()
}

/// A schema of version 1, installed, with a second migration that is still to come.
fn outdated() -> (Schema, Client) {
    let mut schema = Schema::new(&format!("it_{}", uuid::Uuid::new_v4().simple()));
    let mut client = client("migrates");
    schema.prepare(&mut client, true, Instant::now() + SOON).unwrap();
    let alter = "alter table pushpop.messages add column extra integer; alter table pushpop.runs add column extra integer;";
    let second = Migration { version: 2, oldest_crate: "0.1.0", files: Box::leak(Box::new([alter])) };
    schema.migrations = Box::leak(Box::new([MIGRATIONS[0], second]));
    (schema, client)
}

fn version(schema: &Schema) -> i32 {
    let sql = format!("select max(version) from {}.migrations", schema.identifier());
    client("looks").query_one(&sql, &[]).unwrap().get(0)
}

fn drop_schema(schema: &Schema) {
    client("drops").batch_execute(&format!("drop schema {} cascade", schema.identifier())).unwrap();
}

#[test]
fn a_second_migration_follows_the_first() {
    let (schema, mut client) = outdated();
    assert_eq!(version(&schema), 1);
    assert_eq!(
        schema.prepare(&mut client, false, Instant::now() + SOON).unwrap_err().kind(),
        ErrorKind::Schema
    );
    schema.prepare(&mut client, true, Instant::now() + SOON).unwrap();
    assert_eq!(version(&schema), 2);
    schema.prepare(&mut client, false, Instant::now() + SOON).unwrap();
    drop_schema(&schema);
}

/// The script brings any version up to date, and may be run again.
#[test]
fn the_script_does_what_is_missing() {
    let (schema, mut client) = outdated();
    for _ in 0..2 {
        client.batch_execute(&schema.install_sql()).unwrap();
        assert_eq!(version(&schema), 2);
    }
    schema.prepare(&mut client, false, Instant::now() + SOON).unwrap();
    drop_schema(&schema);
}

/// Pushes go on while a migration waits, and it goes on when the transaction in its way has ended.
#[test]
fn a_migration_that_waits_holds_nobody_up() {
    let (schema, mut migrates) = outdated();
    let (mut report, mut pushes) = (client("report"), client("pushes"));
    let mut reads = report.transaction().unwrap();
    reads.query(&schema.localize("select from pushpop.messages"), &[]).unwrap();
    pushes.batch_execute("set lock_timeout = '2s'").unwrap();
    let (done, migrated) = mpsc::channel();
    let waiting = schema.clone();
    let thread = thread::spawn(move || {
        done.send(waiting.prepare(&mut migrates, true, Instant::now() + SOON)).unwrap();
    });
    let tries = "select from pg_locks l join pg_stat_activity a using (pid)
                 where a.application_name = 'migrates' and not l.granted and l.relation = $1::text::regclass";
    let messages = schema.localize("pushpop.messages");
    let mut tries = || pushes.query_opt(tries, &[&messages]).unwrap().is_some();
    let begun = Instant::now();
    while !tries() {
        assert!(begun.elapsed() < SOON, "nothing waits for the table");
    }
    // One lands in a try, and waits until that is over.
    for _ in 0..20 {
        pushes.batch_execute(&schema.localize("select pushpop.push('t', 'm')")).unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    assert!(migrated.try_recv().is_err(), "it waits yet");
    reads.commit().unwrap();
    migrated.recv_timeout(SOON).unwrap().unwrap();
    thread.join().unwrap();
    assert_eq!(version(&schema), 2);
    drop_schema(&schema);
}

#[test]
fn a_migration_that_gives_up_names_what_is_in_its_way() {
    let (schema, mut migrates) = outdated();
    let mut report = client("the report");
    let mut reads = report.transaction().unwrap();
    let pid: i32 = reads.query_one("select pg_backend_pid()", &[]).unwrap().get(0);
    reads.query(&schema.localize("select from pushpop.messages"), &[]).unwrap();
    let error = schema.prepare(&mut migrates, true, Instant::now() + Duration::from_secs(3)).unwrap_err();
    assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Timeout, Some("55P03")), "{error:?}");
    assert!(error.is_retryable());
    let words = error.to_string();
    assert!(words.contains(&format!("pid {pid}, application \"the report\"")), "{words}");
    assert!(words.contains("idle in transaction") && words.contains("uses its tables"), "{words}");
    drop(reads);
    // A program that is stopped there has left nothing half done.
    assert_eq!(version(&schema), 1);
    schema.prepare(&mut migrates, true, Instant::now() + SOON).unwrap();
    drop_schema(&schema);
}

/// One process migrates, and says that it does to those that wait for it.
#[test]
fn another_process_that_migrates_is_named() {
    let (schema, mut migrates) = outdated();
    let mut other = client("the other");
    let mut first = other.transaction().unwrap();
    let lock = "select pg_advisory_xact_lock(hashtextextended($1, 5706)), pg_backend_pid()";
    let pid: i32 = first.query_one(lock, &[&schema.name]).unwrap().get(1);
    let error = schema.prepare(&mut migrates, true, Instant::now() + Duration::from_secs(1)).unwrap_err();
    let words = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{words}");
    assert!(words.contains(&format!("pid {pid}, application \"the other\"")), "{words}");
    assert!(words.contains("is migrating it"), "{words}");
    first.commit().unwrap();
    schema.prepare(&mut migrates, true, Instant::now() + SOON).unwrap();
    drop_schema(&schema);
}

#[test]
fn many_processes_migrate_once() {
    let (schema, _) = outdated();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| schema.prepare(&mut client("one of many"), true, Instant::now() + SOON).unwrap());
        }
    });
    assert_eq!(version(&schema), 2);
    drop_schema(&schema);
}
