//! What errors say, and what nothing may say.

use std::error::Error as _;
use std::process::Command;
use std::time::Duration;

use expect_test::expect;
use pushpop_pg::{
    Backoff, Error, ErrorKind, Message, NewMessage, Observer, Queue, SettleError, Worker, uuid::Uuid,
};
use tracing_subscriber::fmt::format::FmtSpan;

use crate::world::{World, guarded_url, pop, stats};

/// An error as a reader sees it: in one line, in full, and its causes.
fn shown(error: &Error) -> String {
    let mut text = format!("{error}\n{error:?}\n");
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!("  because: {cause} / {cause:?}\n"));
        source = cause.source();
    }
    text
}

#[test]
fn smoke() {
    let world = World::new();
    let error = world.queue().push("", "m").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().starts_with("push on topic"), "{error}");
}

#[test]
fn errors_say_what_failed_on_what_and_why() {
    let world = World::new();
    let queue = world.open(world.builder().keep_settled(Duration::ZERO));
    let id = Uuid::from_u128(0x67e5_5044_10b1_426f_9247_bb68_0e5f_e0c8);
    let mut all = String::new();
    let mut add = |error: Error| all.push_str(&shown(&error));

    add(queue.push("a\"b", NewMessage::new("m").max_attempts(0)).unwrap_err());
    queue.push("mail", NewMessage::new("m").with_id(id)).unwrap();
    let stale = pop(&queue.with_lease(Duration::from_secs(1)), "mail");
    let fresh = pop(&queue, "mail");
    add(queue.transaction(|tx| stale.complete_in(tx)).unwrap_err());
    add(stale.complete().unwrap_err().into());
    world.client().batch_execute(&world.sql("delete from pushpop.messages")).unwrap();
    add(fresh.fail("why").unwrap_err().into());
    add(queue.transaction(|tx| Ok(tx.batch_execute("select 1/0")?)).unwrap_err());
    queue.close();
    add(queue.pop("mail").map(drop).unwrap_err());

    add(Queue::connect("postgres://postgres@127.0.0.1:1/postgres").map(drop).unwrap_err());
    add(Queue::connect(&guarded_url("postgres", "hunter2", "postgres")).map(drop).unwrap_err());
    add(Queue::connect(&guarded_url("postgres", "correct", "nosuch")).map(drop).unwrap_err());
    expect![[r#"
        push on topic "a\"b": a message has 1 to 32767 attempts, not 0
        Error { kind: Invalid, message: "push on topic \"a\\\"b\": a message has 1 to 32767 attempts, not 0", sqlstate: None, indeterminate: false }
        complete on topic "mail": the lease of message 67e55044-10b1-426f-9247-bb680e5fe0c8 of topic mail is lost (SQLSTATE PP001): it expired and was handed on, or was settled before
        Error { kind: LeaseLost, message: "complete on topic \"mail\": the lease of message 67e55044-10b1-426f-9247-bb680e5fe0c8 of topic mail is lost (SQLSTATE PP001): it expired and was handed on, or was settled before", sqlstate: Some("PP001"), indeterminate: false }
          because: ERROR: the lease of message 67e55044-10b1-426f-9247-bb680e5fe0c8 of topic mail is lost / postgres::Error("ERROR: the lease of message 67e55044-10b1-426f-9247-bb680e5fe0c8 of topic mail is lost")
        complete on topic "mail": the lease expired and was handed on, or was settled before
        Error { kind: LeaseLost, message: "complete on topic \"mail\": the lease expired and was handed on, or was settled before", sqlstate: None, indeterminate: false }
        fail on topic "mail": the message is not stored any more; the call may have taken effect
        Error { kind: NotFound, message: "fail on topic \"mail\": the message is not stored any more; the call may have taken effect", sqlstate: None, indeterminate: true }
        transaction: division by zero (SQLSTATE 22012)
        Error { kind: Database, message: "transaction: division by zero (SQLSTATE 22012)", sqlstate: Some("22012"), indeterminate: false }
          because: ERROR: division by zero / postgres::Error("ERROR: division by zero")
        pop on topic "mail": the queue is closed
        Error { kind: Closed, message: "pop on topic \"mail\": the queue is closed", sqlstate: None, indeterminate: false }
        connect: 127.0.0.1:1: error connecting to server: Connection refused (os error 111)
        Error { kind: Connection, message: "connect: 127.0.0.1:1: error connecting to server: Connection refused (os error 111)", sqlstate: None, indeterminate: false }
          because: error connecting to server / postgres::Error("error connecting to server")
          because: Connection refused (os error 111) / Os { code: 111, kind: ConnectionRefused, message: "Connection refused" }
        connect: password authentication failed for user "postgres" (SQLSTATE 28P01)
        Error { kind: Denied, message: "connect: password authentication failed for user \"postgres\" (SQLSTATE 28P01)", sqlstate: Some("28P01"), indeterminate: false }
          because: FATAL: password authentication failed for user "postgres" / postgres::Error("FATAL: password authentication failed for user \"postgres\"")
        connect: database "nosuch" does not exist (SQLSTATE 3D000)
        Error { kind: Schema, message: "connect: database \"nosuch\" does not exist (SQLSTATE 3D000)", sqlstate: Some("3D000"), indeterminate: false }
          because: FATAL: database "nosuch" does not exist / postgres::Error("FATAL: database \"nosuch\" does not exist")
    "#]].assert_eq(&all);
}

#[test]
fn errors_keep_their_causes() {
    let refused = Queue::connect("postgres://postgres@127.0.0.1:1/postgres").map(drop).unwrap_err();
    let mut source = refused.source();
    let mut io = None;
    while let Some(cause) = source {
        io = io.or_else(|| cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind));
        source = cause.source();
    }
    assert_eq!(io, Some(std::io::ErrorKind::ConnectionRefused), "{refused:?}");
}

#[test]
fn a_failed_settle_gives_the_lease_back() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let stale = pop(&queue.with_lease(Duration::from_secs(1)), "t");
    let fresh = pop(&queue, "t");
    let failed: SettleError = stale.complete().unwrap_err();
    assert_eq!(failed.error().kind(), ErrorKind::LeaseLost);
    assert_eq!(failed.to_string(), failed.error().to_string());
    assert_eq!(failed.source().unwrap().to_string(), failed.error().to_string());
    assert!(format!("{failed:?}").contains("LeaseLost"));
    let (lease, error) = failed.into_parts();
    assert_eq!((lease.id(), error.kind()), (fresh.id(), ErrorKind::LeaseLost));

    // `?` turns it into an error, of the queue's or of any kind.
    fn ours(lease: pushpop_pg::Lease) -> Result<(), Error> {
        Ok(lease.release()?)
    }
    fn any(lease: pushpop_pg::Lease) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(lease.discard()?)
    }
    assert_eq!(ours(lease).unwrap_err().kind(), ErrorKind::LeaseLost);
    any(fresh).unwrap();
}

#[test]
fn errors_of_the_drivers_become_ours() {
    let world = World::new();
    let mut client = world.client();
    let code = |client: &mut postgres::Client, sql: &str| Error::from(client.batch_execute(sql).unwrap_err());
    let error = code(&mut client, "select 1/0");
    assert_eq!(
        (error.kind(), error.sqlstate(), error.is_retryable()),
        (ErrorKind::Database, Some("22012"), false)
    );
    let error = code(&mut client, "select from no_such_table");
    assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Schema, Some("42P01")));
    let raise =
        |state: &str| format!("do $$ begin raise exception 'raised' using errcode = '{state}'; end $$");
    for (state, kind, retryable) in [
        ("40001", ErrorKind::Database, true),
        ("40P01", ErrorKind::Database, true),
        ("55P03", ErrorKind::Database, true),
        ("53300", ErrorKind::Connection, true),
        ("53100", ErrorKind::Connection, true),
        ("57P01", ErrorKind::Connection, true),
        ("57P03", ErrorKind::Connection, true),
        ("25006", ErrorKind::Connection, true),
        ("08006", ErrorKind::Connection, true),
        ("08P01", ErrorKind::Connection, true),
        ("40003", ErrorKind::Database, true),
        ("42P05", ErrorKind::Database, true),
        ("26000", ErrorKind::Database, true),
        ("58030", ErrorKind::Database, true),
        ("57014", ErrorKind::Timeout, true),
        ("42501", ErrorKind::Denied, false),
        ("28000", ErrorKind::Denied, false),
        ("22023", ErrorKind::Invalid, false),
        ("23505", ErrorKind::Database, false),
        ("PP001", ErrorKind::LeaseLost, false),
    ] {
        let error = code(&mut client, &raise(state));
        assert_eq!((error.kind(), error.is_retryable()), (kind, retryable), "{state}");
        assert_eq!(error.sqlstate(), Some(state));
        // Somebody between does not know what became of the statement.
        let is_unknown = state.starts_with("08") || state == "40003";
        assert_eq!(error.is_indeterminate(), is_unknown, "{error:?}");
        assert_eq!(
            error.to_string().contains("Builder::pooler"),
            matches!(state, "42P05" | "26000"),
            "{error}"
        );
        assert!(error.to_string().contains("raised") && error.to_string().contains(state), "{error}");
    }
}

const SECRET: &str = "tell-nobody-of-this";

/// The secret as text, in hexadecimal and as a list of numbers, as it could be written by mistake.
fn assert_silent(what: &str, text: &str) {
    let hex: String = SECRET.bytes().map(|b| format!("{b:02x}")).collect();
    let list: Vec<String> = SECRET.bytes().map(|b| b.to_string()).collect();
    for form in [SECRET, &hex, &hex.to_uppercase(), &list.join(", "), &list.join(",")] {
        if let Some(at) = text.find(form) {
            let line = text[..at].rfind('\n').map_or(0, |i| i + 1);
            let end = text[at..].find('\n').map_or(text.len(), |i| at + i);
            panic!("{what} tells the secret: {}", &text[line..end]);
        }
    }
}

#[test]
fn no_payload_or_password_is_shown() {
    let world = World::new();
    let queue = world.queue();
    let message = NewMessage::new(SECRET);
    assert_silent("NewMessage", &format!("{message:?}"));
    let id = queue.push("t", message).unwrap();
    let lease = pop(&queue, "t");
    assert_silent("Lease", &format!("{lease:?}"));
    assert_silent("Message", &format!("{:?}", queue.find("t", id).unwrap()));
    assert_silent("Queue", &format!("{queue:?} {:?} {:?}", queue.iter("t"), queue.topic("t")));
    assert_silent("Builder", &format!("{:?}", world.builder()));
    let url = guarded_url("postgres", SECRET, "postgres");
    assert_silent("a refused password", &shown(&Queue::connect(&url).map(drop).unwrap_err()));
    let url = format!("postgres://postgres:{SECRET}@127.0.0.1:1/postgres");
    assert_silent("a refused connection", &shown(&Queue::connect(&url).map(drop).unwrap_err()));

    // The server quotes the row that it refuses.
    let refuse = format!("alter table pushpop.messages add check (payload <> '{SECRET}') not valid");
    world.client().batch_execute(&world.sql(&refuse)).unwrap();
    let error = queue.push("t", SECRET).unwrap_err();
    assert_eq!(error.sqlstate(), Some("23514"));
    assert_silent("a refused row", &shown(&error));
    let error = queue.push_many("t", [SECRET, "other"]).unwrap_err();
    assert_silent("a refused batch", &shown(&error));
    let error = queue.transaction(|tx| queue.push_in(tx, "t", SECRET)).unwrap_err();
    assert_silent("a refused row in a transaction", &shown(&error));
    let failed = lease.complete().unwrap_err();
    assert_silent("a refused settle", &format!("{failed} {failed:?} {}", shown(failed.error())));
}

#[test]
fn what_is_debugged_says_what_it_is() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let worker = Worker::new(&queue).handle("t", 1, |job| {
        let shown = format!("{job:?}");
        assert!(shown.starts_with("Job {") && shown.contains(&job.id().to_string()), "{shown}");
        Ok(())
    });
    let lease = pop(&queue, "t");
    let message: &Message = &lease;
    for (name, part, shown) in [
        ("Queue", "closed: false", format!("{queue:?}")),
        ("Builder", "pool_size", format!("{:?}", world.builder())),
        ("NewMessage", "bytes: 1", format!("{:?}", NewMessage::new("m"))),
        ("Message", &*message.id().to_string(), format!("{message:?}")),
        ("Lease", "topic: \"t\"", format!("{lease:?}")),
        ("Backoff", "", format!("{:?}", Backoff::fixed(Duration::from_secs(1)))),
        ("Worker", "topics: [[\"t\"]]", format!("{worker:?}")),
        ("Stopper", "cause: None", format!("{:?}", worker.stopper())),
    ] {
        assert!(shown.starts_with(name) && shown.contains(part), "{shown}");
    }
    lease.release().unwrap();
    assert_eq!(worker.run_until_idle().unwrap(), 1);
    assert_eq!(stats(&queue, "t").settled(), 1);
    queue.close();
    assert!(format!("{queue:?}").contains("closed: true"), "{queue:?}");
}

/// An error of a statement says nothing about its connection.
#[test]
fn a_refused_call_keeps_its_connection() {
    let world = World::new();
    let queue = world.open(world.builder().pool_size(1));
    let mut client = world.client();
    queue.push("t", "m").unwrap();
    let mut backend = || -> i32 {
        let sql = "select pid from pg_stat_activity where application_name = $1";
        client.query_one(sql, &[&world.schema]).unwrap().get(0)
    };
    let pid = backend();
    let mut admin = world.client();
    refuse(&world, &mut admin, "P0042", i64::MAX);
    for _ in 0..3 {
        assert_eq!(queue.push("t", "m").unwrap_err().sqlstate(), Some("P0042"));
        assert_eq!(queue.push_many("t", ["m", "n"]).unwrap_err().sqlstate(), Some("P0042"));
    }
    assert_eq!(tries(&world, &mut admin), 6, "nothing is tried again that was refused");
    admin.batch_execute(&world.sql("drop trigger refuse on pushpop.messages")).unwrap();
    queue.push("t", "m").unwrap();
    assert_eq!(backend(), pid);
}

/// Has every insert of a message raise an error: the first of them, or all.
fn refuse(world: &World, client: &mut postgres::Client, code: &str, first: i64) {
    // What is drawn from a sequence stays drawn: it counts the tries.
    let sql = format!(
        "drop sequence if exists pushpop.tries;
         create sequence pushpop.tries;
         create or replace function pushpop.refuse_it() returns trigger language plpgsql as $$
         begin
           if nextval('pushpop.tries') <= {first} then
             raise exception 'refused' using errcode = '{code}';
           end if;
           return new;
         end $$;
         drop trigger if exists refuse on pushpop.messages;
         create trigger refuse before insert on pushpop.messages for each row execute function pushpop.refuse_it()"
    );
    client.batch_execute(&world.sql(&sql)).unwrap();
}

fn tries(world: &World, client: &mut postgres::Client) -> i64 {
    client.query_one(&world.sql("select last_value from pushpop.tries"), &[]).unwrap().get(0)
}

/// An id or a token makes it safe to repeat whatever the queue sends.
#[test]
fn what_was_undone_by_a_conflict_is_repeated() {
    let world = World::new();
    let queue = world.open(world.builder().operation_timeout(Duration::from_secs(4)));
    let mut client = world.client();
    for code in ["40001", "40P01", "55P03"] {
        refuse(&world, &mut client, code, 3);
        queue.push("t", code).unwrap();
        assert_eq!(tries(&world, &mut client), 4, "{code}");
        refuse(&world, &mut client, code, 3);
        queue.push_many("t", [code, code]).unwrap();

        // Not without end.
        refuse(&world, &mut client, code, i64::MAX);
        let error = queue.push("t", "m").unwrap_err();
        assert_eq!((error.sqlstate(), error.is_retryable()), (Some(code), true), "{error:?}");
        assert!(!error.is_indeterminate() && (2..100).contains(&tries(&world, &mut client)), "{error:?}");
        // A transaction is for its owner to repeat.
        refuse(&world, &mut client, code, 1);
        let push = || queue.transaction(|tx| queue.push_in(tx, "t", code));
        let error = push().unwrap_err();
        assert_eq!((error.sqlstate(), error.is_retryable()), (Some(code), true), "{error:?}");
        push().unwrap();
    }
    assert_eq!(crate::world::drain(&queue, "t").len(), 12);
}

/// As a proxy or a coordinator answers that has lost the server behind it.
#[test]
fn what_somebody_between_does_not_know_is_indeterminate() {
    let world = World::new();
    let queue = world.open(world.builder().pool_size(1));
    let mut client = world.client();
    let lease = {
        queue.push("t", "m").unwrap();
        pop(&queue, "t")
    };
    let sessions = |client: &mut postgres::Client| -> Vec<i32> {
        let sql = "select pid from pg_stat_activity where application_name = $1 order by pid";
        client.query(sql, &[&world.schema]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    let before = sessions(&mut client);
    for code in ["08006", "08000", "08003"] {
        refuse(&world, &mut client, code, i64::MAX);
        let failed = [
            queue.push("t", "m").map(drop).unwrap_err(),
            queue.push_many("t", ["m", "n"]).map(drop).unwrap_err(),
            queue.transaction(|tx| queue.push_in(tx, "t", "m")).map(drop).unwrap_err(),
        ];
        for error in failed {
            assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Connection, Some(code)), "{error:?}");
            assert!(error.is_retryable() && error.is_indeterminate(), "{error:?}");
        }
        assert_eq!(tries(&world, &mut client), 3, "nothing is repeated on another connection");
        assert_eq!(sessions(&mut client), before, "the connection stays");
    }
    client.batch_execute(&world.sql("drop trigger refuse on pushpop.messages")).unwrap();
    lease.complete().unwrap();

    // One that is answered by a commit.
    let at_commit =
        "create constraint trigger refuse after insert on pushpop.messages deferrable initially deferred
         for each row execute function pushpop.refuse_it()";
    client.batch_execute(&world.sql(at_commit)).unwrap();
    let error = queue.transaction(|tx| queue.push_in(tx, "t", "m")).map(drop).unwrap_err();
    assert!(error.is_retryable() && error.is_indeterminate(), "{error:?}");
    assert_eq!(sessions(&mut client), before, "the connection stays");
}

/// The driver logs every parameter of a statement at the debug level.
#[test]
fn no_payload_or_password_reaches_a_log() {
    const CHILD: &str = "PUSHPOP_TEST_LOGS_TO";
    if let Ok(url) = std::env::var(CHILD) {
        return talk(&url);
    }
    let mut admin =
        postgres::Client::connect(&guarded_url("postgres", "correct", "postgres"), postgres::NoTls).unwrap();
    let role = crate::world::unique("role");
    admin
        .batch_execute(&format!(
            "create role {role} login password '{SECRET}'; grant create on database postgres to {role}"
        ))
        .unwrap();
    // In a process of its own, as a subscriber is there for all of it.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "errors::no_payload_or_password_reaches_a_log", "--nocapture", "--test-threads=1"])
        .env(CHILD, guarded_url(&role, SECRET, "postgres"))
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let logs =
        format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    let tail: String = logs.lines().rev().take(20).collect::<Vec<_>>().join("\n");
    assert!(output.status.success(), "{tail}");
    assert!(logs.contains("TRACE") || logs.contains("DEBUG"), "no logs: {tail}");
    assert!(logs.contains("tokio_postgres"), "no logs of the driver's: {tail}");
    assert!(logs.contains("pushpop_pg"), "no logs of ours: {tail}");
    assert!(logs.contains("pushpop.settle{"), "no spans: {tail}");
    assert_silent("a log", &logs);
}

/// As after a failover that left us with a standby: the answer says that nothing was done.
#[test]
fn a_server_that_only_reads_has_done_nothing() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let lease = pop(&queue, "t");
    let mut config = world.config();
    config.options("-c default_transaction_read_only=on");
    let reader = world.builder().connect_with(config).unwrap();
    let refused = [
        reader.push("t", "m").map(drop).unwrap_err(),
        reader.try_pop("t").map(drop).unwrap_err(),
        reader.transaction(|tx| reader.push_in(tx, "t", "m")).map(drop).unwrap_err(),
        reader.transaction(|tx| lease.complete_in(tx)).unwrap_err(),
    ];
    for error in refused {
        assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Connection, Some("25006")), "{error:?}");
        assert!(error.is_retryable() && !error.is_indeterminate(), "{error:?}");
    }
    lease.complete().unwrap();
}

struct Panics;

impl Observer for Panics {
    fn pushed(&self, _: &pushpop_pg::Pushed<'_>) {
        panic!("on purpose")
    }
}

/// Uses all of the queue with the secret, and everything logged.
fn talk(url: &str) {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_span_events(FmtSpan::NEW | FmtSpan::CLOSE)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let schema = crate::world::unique("it");
    let builder = || Queue::builder().schema(&schema).observer(Panics);
    let queue = builder().connect(url).unwrap();
    let message = || NewMessage::new(SECRET);
    queue.push("t", message()).unwrap();
    queue.push_many("t", [message(), message().header("k", SECRET)]).unwrap();
    queue.transaction(|tx| queue.push_in(tx, "t", message())).unwrap();
    let mut lease = pop(&queue, "t");
    lease.extend(Duration::from_secs(60)).unwrap();
    queue.transaction(|tx| lease.complete_in(tx)).unwrap();
    lease.complete().unwrap();
    pop(&queue, "t").fail(SECRET).unwrap();
    pop(&queue, "t").release().unwrap();
    queue.topic("t").peek(10).unwrap();
    queue.topic("t").purge().unwrap();
    assert!(queue.pop_timeout("t", Duration::from_millis(100)).unwrap().is_none());
    Queue::connect(&url.replace(SECRET, "wrong")).map(drop).unwrap_err();
    Queue::connect(&url.replace("/postgres", "/nosuch")).map(drop).unwrap_err();
    // Failures, and connections that break.
    let refuse = "select pg_terminate_backend(pid) from pg_stat_activity where usename = current_user and pid <> pg_backend_pid()";
    queue.transaction(|tx| Ok(tx.batch_execute(refuse)?)).unwrap();
    queue.push("t", message()).unwrap();
    let pooled = builder().pooler(true).connect(url).unwrap();
    pooled.push("t", message()).unwrap();
    pooled.push_many("t", [message(), message()]).unwrap();
    pop(&pooled, "t").complete().unwrap();
    let id = message().id();
    let twice = [message().with_id(id), message().with_id(id)];
    queue.push_many("t", twice).unwrap();
    queue.close();
}
