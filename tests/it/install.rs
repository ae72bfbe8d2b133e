//! Installing where something is in the way: rights that are missing, versions that are, others that migrate.

use std::time::Duration;

use postgres::{Client, NoTls};
use pushpop_pg::{Error, ErrorKind};
use tracing_subscriber::filter::LevelFilter;

use crate::spans::Notes;
use crate::world::{World, drain, guarded_role, guarded_url, pop, quoted, unique, until};

fn admin() -> Client {
    Client::connect(&guarded_url("postgres", "correct", "postgres"), NoTls).unwrap()
}

#[test]
fn smoke() {
    let world = World::new();
    drop(world.queue());
    world.client().batch_execute(&world.builder().install_sql()).unwrap();
}

/// A DBA has made the schema: the role needs no right on the database.
#[test]
fn a_role_installs_into_a_schema_that_was_made_for_it() {
    let mut admin = admin();
    for (grant, to) in [("grant usage, create on schema", "to"), ("alter schema", "owner to")] {
        for by_script in [false, true] {
            let (role, url) = guarded_role(&mut admin);
            let world = World::on(&url);
            let schema = quoted(&world.schema);
            admin.batch_execute(&format!("create schema {schema}; {grant} {schema} {to} {role}")).unwrap();
            if by_script {
                world.client().batch_execute(&world.builder().install_sql()).unwrap();
            }
            let queue = world.open(world.builder().migrate(!by_script));
            queue.push("t", "m").unwrap();
            assert_eq!(drain(&queue, "t"), ["m"], "{grant}");
            drop(queue);
            world.drop_schema(&mut admin);
        }
    }
}

fn refused(world: &World) -> Error {
    let error = world.builder().connect(&world.url).map(drop).unwrap_err();
    assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Denied, Some("42501")), "{error:?}");
    let words = error.to_string();
    assert!(words.contains("(SQLSTATE 42501)") && std::error::Error::source(&error).is_some(), "{words}");
    error
}

/// A statement that an error recommends.
fn remedy(error: &Error, begins: &str) -> String {
    let words = error.to_string();
    let at = words.find(begins).unwrap_or_else(|| panic!("{words}"));
    let end = words[at..].find([':', ',']).unwrap_or_else(|| panic!("{words}"));
    words[at..at + end].to_owned()
}

/// What the error says can be run as it is, and it helps.
#[test]
fn a_right_that_is_missing_is_named() {
    let mut admin = admin();
    let (role, url) = guarded_role(&mut admin);
    let world = World::on(&url);
    let schema = quoted(&world.schema);
    let grant = remedy(&refused(&world), "grant create on database");
    assert!(grant.ends_with(&format!("\"postgres\" to \"{role}\"")), "{grant}");
    // The schema is there, and that is all.
    admin
        .batch_execute(&format!("create schema {schema}; grant usage on schema {schema} to {role}"))
        .unwrap();
    let error = refused(&world);
    assert!(error.to_string().contains("may not create tables in the schema"), "{error}");
    let grant = remedy(&error, "grant create on schema");
    admin.batch_execute(&format!("revoke usage on schema {schema} from {role}; {grant}")).unwrap();
    admin.batch_execute(&remedy(&refused(&world), "grant usage on schema")).unwrap();
    drop(world.queue());

    // It is installed, by another role.
    let (_, url) = guarded_role(&mut admin);
    let mut other = World::on(&url);
    other.schema.clone_from(&world.schema);
    admin.batch_execute(&remedy(&refused(&other), "grant usage on schema")).unwrap();
    admin.batch_execute(&remedy(&refused(&other), "grant execute on function")).unwrap();
    drop(other.open(other.builder().migrate(false)));
    world.drop_schema(&mut admin);
}

/// As after a restore of a schema alone, or in a test suite that truncates all tables.
#[test]
fn a_schema_without_its_version_is_refused() {
    for (harm, words) in [
        ("truncate pushpop.migrations", "its table migrations is empty"),
        (
            "truncate pushpop.messages, pushpop.runs, pushpop.leases, pushpop.history, pushpop.dead, pushpop.topics,
                      pushpop.behind, pushpop.figures, pushpop.migrations",
            "its table migrations is empty",
        ),
        ("drop function pushpop.schema_version()", "but not the function schema_version"),
        ("drop table pushpop.migrations", "but not the table migrations"),
        (
            "create or replace function pushpop.schema_version(out version integer, out oldest_crate text)
             language sql as 'select null::integer, null::text'",
            "migrations is empty",
        ),
    ] {
        let world = World::new();
        drop(world.queue());
        world.client().batch_execute(&world.sql(harm)).unwrap();
        for migrate in [true, false] {
            let error = world.builder().migrate(migrate).connect(&world.url).map(drop).unwrap_err();
            assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Schema, false), "{harm}: {error}");
            assert!(error.to_string().contains(words), "{harm}: {error}");
        }
    }
}

/// The script says the same, and what it says helps.
#[test]
fn a_version_that_was_lost_can_be_put_back() {
    let world = World::new();
    drop(world.queue());
    let mut client = world.client();
    client.batch_execute(&world.sql("truncate pushpop.migrations")).unwrap();
    let error = Error::from(client.batch_execute(&world.builder().install_sql()).unwrap_err()).to_string();
    client.batch_execute("rollback").unwrap();
    assert!(error.contains("its table migrations is empty") && error.contains("(1, '0.1.0')"), "{error}");
    let row = "insert into pushpop.migrations (version, oldest_crate) values (1, '0.1.0')";
    client.batch_execute(&world.sql(row)).unwrap();
    world.queue().push("t", "m").unwrap();
}

/// Whichever table is emptied by hand: what is pushed afterwards arrives.
#[test]
fn an_emptied_table_harms_no_later_message() {
    for table in ["messages", "runs", "leases", "history", "dead", "topics", "behind", "figures"] {
        let world = World::new();
        let queue = world.queue();
        queue.push_many("t", ["a", "b", "c", "d", "e"]).unwrap();
        queue.push("t", "f").unwrap();
        let held = pop(&queue, "t");
        pop(&queue, "t").fail("why").unwrap();
        pop(&queue, "t").complete().unwrap();
        world.client().batch_execute(&world.sql(&format!("truncate pushpop.{table}"))).unwrap();
        let id = queue.push("t", "new").unwrap();
        until("the new message arrives", || {
            queue
                .try_pop("t")
                .unwrap_or_else(|e| panic!("{table}: {e}"))
                .is_some_and(|lease| lease.id() == id)
        });
        let _ = held.complete();
        assert!(queue.find("t", id).unwrap().is_some());
        queue.topic("t").peek(10).unwrap();
        queue.topic("t").dead(10).unwrap();
        queue.topics().unwrap();
        queue.topic("t").redrive_all().unwrap();
        queue.topic("t").purge().unwrap();
        world.client().batch_execute(&world.sql("select pushpop.upkeep('t')")).unwrap();
    }
}

/// The rest of it is tested beside the migrations, with a second one.
#[test]
fn waiting_for_another_process_that_migrates_is_told() {
    let world = World::new();
    let mut other = world.client();
    let mut migrates = other.transaction().unwrap();
    let lock = "select pg_advisory_xact_lock(hashtextextended($1, 5706)), pg_backend_pid()";
    let pid: i32 = migrates.query_one(lock, &[&world.schema]).unwrap().get(1);
    let notes = Notes::default();
    let error = notes.of(LevelFilter::WARN, || {
        let millis = Duration::from_millis;
        let builder = world.builder().connect_timeout(millis(300)).operation_timeout(millis(400));
        builder.connect(&world.url).map(drop).unwrap_err()
    });
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Timeout, true), "{error}");
    let pid = format!("pid {pid}, ");
    assert!(error.to_string().contains(&pid) && error.to_string().contains("is migrating it"), "{error}");
    let logged = notes.logged();
    assert!(logged.contains("waiting to migrate the schema") && logged.contains(&pid), "{logged}");
    migrates.commit().unwrap();
    drop(world.queue());
}

/// Which of these calls a role is refused, each taken back.
fn refusals(client: &mut Client, role: &str, schema: &str) -> Vec<bool> {
    let calls = [
        "select {}.push('t', 'm')",
        "select {}.purge('t')",
        "select {}.stats('t')",
        "select from {}.messages",
    ];
    let mut refused = |call: &str| {
        let mut tx = client.transaction().unwrap();
        tx.batch_execute(&format!("set local role {role}")).unwrap();
        let result = tx.batch_execute(&call.replace("{}", schema));
        result.is_err_and(|e| e.code().is_some_and(|code| code.code() == "42501"))
    };
    calls.iter().map(|call| refused(call)).collect()
}

/// A dump that is restored without privileges leaves every function to everyone who may use the schema.
#[test]
fn rights_that_a_restore_has_lost_are_restored() {
    let world = World::new();
    drop(world.queue());
    let mut client = world.client();
    let (schema, role) = (&world.schema, unique("monitor"));
    let monitor = format!(
        "grant usage on schema {schema} to {role}; grant execute on function {schema}.stats to {role}"
    );
    client.batch_execute(&format!("create role {role}; {monitor}")).unwrap();
    let lose = format!(
        "update pg_proc set proacl = null where pronamespace = '{schema}'::regnamespace and proname <> 'stats'"
    );
    let warned = |migrate: bool| {
        let notes = Notes::default();
        notes.of(LevelFilter::WARN, || drop(world.open(world.builder().migrate(migrate))));
        notes.logged().contains("can be executed by everyone")
    };
    assert_eq!(refusals(&mut client, &role, schema), [true, true, false, true]);
    assert!(!warned(false));

    client.batch_execute(&lose).unwrap();
    assert_eq!(refusals(&mut client, &role, schema), [false, false, false, true]);
    assert!(warned(false), "one that does not migrate says so");
    assert!(!warned(true), "one that does has mended it");
    assert_eq!(
        refusals(&mut client, &role, schema),
        [true, true, false, true],
        "what a role was granted stays"
    );
    assert!(!warned(false));

    client.batch_execute(&lose).unwrap();
    client.batch_execute(&world.builder().install_sql()).unwrap();
    assert_eq!(refusals(&mut client, &role, schema), [true, true, false, true]);

    // Where others have functions, too, nothing is taken away by itself that may not be ours to take.
    let theirs =
        format!("{lose}; create function {schema}.theirs() returns integer language sql as 'select 1'");
    client.batch_execute(&theirs).unwrap();
    assert!(warned(true));
    client.batch_execute(&format!("set role {role}; select {schema}.theirs(); reset role")).unwrap();
    client.batch_execute(&format!("drop owned by {role}; drop role {role}")).unwrap();
}

/// One that may migrate, but does not own the functions, cannot mend it, and says so.
#[test]
fn rights_that_cannot_be_restored_are_warned_of() {
    let mut admin = admin();
    let world = World::on(&guarded_url("postgres", "correct", "postgres"));
    drop(world.queue());
    let (role, url) = guarded_role(&mut admin);
    let schema = &world.schema;
    let lose = format!(
        "grant usage on schema {schema} to {role};
         update pg_proc set proacl = null where pronamespace = '{schema}'::regnamespace"
    );
    admin.batch_execute(&lose).unwrap();
    let notes = Notes::default();
    notes.of(LevelFilter::WARN, || drop(world.builder().connect(&url).unwrap()));
    assert!(notes.logged().contains("can be executed by everyone"), "{}", notes.logged());
}

/// Whatever the defaults for new objects say of everyone.
#[test]
fn default_privileges_give_nothing_to_everyone() {
    let mut admin = admin();
    let (owner, url) = guarded_role(&mut admin);
    let role = unique("anyone");
    let defaults: String = ["tables", "functions", "schemas", "sequences", "types"]
        .map(|kind| format!("alter default privileges for role {owner} grant all on {kind} to public;"))
        .concat();
    admin
        .batch_execute(&format!(
            "create role {role}; grant create on database postgres to {owner}; {defaults}"
        ))
        .unwrap();
    let world = World::on(&url);
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    assert_eq!(refusals(&mut admin, &role, &world.schema), [true; 4]);
    admin.batch_execute(&format!("grant usage on schema {} to {role}", world.schema)).unwrap();
    assert_eq!(refusals(&mut admin, &role, &world.schema), [true; 4]);
    assert_eq!(drain(&queue, "t"), ["m"]);
}
