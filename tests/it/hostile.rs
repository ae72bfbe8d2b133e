//! Roles and databases with settings of their own: nothing may depend on any of them.

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls, SimpleQueryMessage};
use pushpop_server::Server;

use crate::schema::use_everything;
use crate::world::{SOON, World, drain, guarded, guarded_role, guarded_url, unique, until};

/// Whatever a role or a database may carry, all at once; those that a version does not know are left out.
const SETTINGS: [(&str, &str); 50] = [
    ("standard_conforming_strings", "off"),
    ("backslash_quote", "off"),
    ("escape_string_warning", "on"),
    ("bytea_output", "escape"),
    ("datestyle", "'German, DMY'"),
    ("intervalstyle", "sql_standard"),
    ("timezone", "'Australia/Lord_Howe'"),
    ("client_encoding", "latin1"),
    ("transform_null_equals", "on"),
    ("array_nulls", "off"),
    ("row_security", "off"),
    ("plpgsql.extra_errors", "'all'"),
    ("plpgsql.extra_warnings", "'all'"),
    ("plpgsql.variable_conflict", "use_variable"),
    ("plpgsql.check_asserts", "off"),
    ("check_function_bodies", "off"),
    ("extra_float_digits", "-15"),
    ("quote_all_identifiers", "on"),
    ("xmloption", "document"),
    ("synchronous_commit", "off"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_deferrable", "on"),
    ("search_path", "''"),
    ("lock_timeout", "1"),
    ("statement_timeout", "'20s'"),
    ("idle_in_transaction_session_timeout", "'5s'"),
    ("idle_session_timeout", "'5s'"),
    ("transaction_timeout", "'20s'"),
    ("client_min_messages", "debug5"),
    ("jit", "on"),
    ("jit_above_cost", "0"),
    ("jit_inline_above_cost", "0"),
    ("jit_optimize_above_cost", "0"),
    ("force_parallel_mode", "on"),
    ("debug_parallel_query", "on"),
    ("parallel_setup_cost", "0"),
    ("parallel_tuple_cost", "0"),
    ("min_parallel_table_scan_size", "0"),
    ("seq_page_cost", "0"),
    ("random_page_cost", "1000000"),
    ("cpu_index_tuple_cost", "1000000"),
    ("cpu_operator_cost", "1000000"),
    ("from_collapse_limit", "1"),
    ("join_collapse_limit", "1"),
    ("plan_cache_mode", "force_custom_plan"),
    ("cursor_tuple_fraction", "1"),
    ("work_mem", "64"),
    ("lc_messages", "'C'"),
    ("default_table_access_method", "other_heap"),
    ("default_toast_compression", "pglz"),
];

/// Gives a role or a database all of these, and has the planner avoid everything.
pub(crate) fn embitter(admin: &mut Client, whom: &str) {
    // By a server that has another method for tables.
    let method = "select from pg_am where amname = 'other_heap'";
    if admin.query_opt(method, &[]).unwrap().is_none() {
        // Another test may have made it just now.
        let _ =
            admin.batch_execute("create access method other_heap type table handler heap_tableam_handler");
    }
    let known = |name: &str, admin: &mut Client| {
        name.starts_with("plpgsql.")
            || admin.query_opt("select from pg_settings where name = $1", &[&name]).unwrap().is_some()
    };
    admin.batch_execute("load 'plpgsql'").unwrap();
    for (name, value) in SETTINGS {
        if known(name, admin) {
            admin.batch_execute(&format!("alter {whom} set {name} = {value}")).unwrap();
        }
    }
    for row in admin
        .query("select name from pg_settings where name like 'enable\\_%' and vartype = 'bool'", &[])
        .unwrap()
    {
        admin.batch_execute(&format!("alter {whom} set {} = off", row.get::<_, String>(0))).unwrap();
    }
}

/// The URL of the shared server for a superuser with all of these, whose sessions are another role's: with
/// `PUSHPOP_TEST_HOSTILE` all tests are of this role.
pub(crate) fn url() -> Option<String> {
    std::env::var("PUSHPOP_TEST_HOSTILE").ok().filter(|on| on == "1")?;
    static MADE: OnceLock<()> = OnceLock::new();
    let url = Server::shared().url();
    MADE.get_or_init(|| {
        let mut admin = Client::connect(&url, NoTls).unwrap();
        admin.batch_execute("create role other superuser; create role hostile superuser login").unwrap();
        embitter(&mut admin, "role hostile");
        // So short that the tests' own locks and pauses would be over.
        for name in ["lock_timeout", "idle_in_transaction_session_timeout", "client_min_messages"] {
            admin.batch_execute(&format!("alter role hostile reset {name}")).unwrap();
        }
        // What the tests say themselves is plain.
        admin
            .batch_execute("alter role hostile reset search_path; alter role hostile set role = other")
            .unwrap();
    });
    Some(url.replace("postgres@", "hostile@"))
}

/// A role with all settings at once, that may create schemas, and a schema of its own; its sessions are another's.
fn hostile_role(admin: &mut Client) -> String {
    let ((role, url), (other, _)) = (guarded_role(admin), guarded_role(admin));
    admin
        .batch_execute(&format!("grant create on database postgres to {other}; grant {other} to {role}"))
        .unwrap();
    embitter(admin, &format!("role {role}"));
    admin.batch_execute(&format!("alter role {role} set role = {other}")).unwrap();
    url
}

fn admin() -> Client {
    Client::connect(&guarded_url("postgres", "correct", "postgres"), NoTls).unwrap()
}

/// Every function that clients may call, and every view, as psql sends it; and what is to come of it.
const PLAIN: &[(&str, &str)] = &[
    ("select version from pushpop.schema_version()", "1"),
    ("select duplicate from pushpop.push('p', 'a', '00000000-0000-0000-0000-00000000000a', headers => '{\"k\": \"v\"}')", "f"),
    ("select duplicate from pushpop.push('p', 'a', '00000000-0000-0000-0000-00000000000a')", "t"),
    ("select duplicate from pushpop.push('p', 'later', delay => 3600)", "f"),
    ("select duplicate from pushpop.push('p', 'old', ready_at => '2001-02-03 04:05:06Z')", "f"),
    ("select count(*) from pushpop.push_many('p', array(select gen_random_uuid() from generate_series(1, 60)),
        array(select 'm'::bytea from generate_series(1, 60)))", "0"),
    ("select count(*) from pushpop.push_many('p', array['00000000-0000-0000-0000-00000000000a', gen_random_uuid()]::uuid[],
        array['m', 'm']::bytea[], headers => array[null, '{\"a\": \"b\"}']::jsonb[])", "1"),
    ("select ready, noted from pushpop.wait_for('p')", "t|t"),
    ("select convert_from(payload, 'UTF8'), headers ->> 'k', attempt from pushpop.pop('p', lease => 60)", "old||1"),
    ("select count(*) from pushpop.pop('p', 30)", "30"),
    ("select pushpop.complete('p', p.id, p.token) from pushpop.pop('p') p", ""),
    ("select pushpop.discard('p', p.id, p.token) from pushpop.pop('p') p", ""),
    ("select pushpop.defer('p', p.id, p.token, 0.5) from pushpop.pop('p') p", ""),
    ("select pushpop.release('p', p.id, p.token) from pushpop.pop('p') p", ""),
    ("select pushpop.fail('p', p.id, p.token, 'why') from pushpop.pop('p') p", ""),
    ("select pushpop.extend('p', p.id, p.token, 600) from pushpop.pop('p') p", ""),
    ("select h.result from pushpop.pop('p') p, pushpop.heartbeat(array['p'], array[p.id], array[p.token], array[60]) h", "extended"),
    ("select count(s.place) from (select array_agg(id) as ids, array_agg(token) as tokens from pushpop.pop('p', 6)) p,
        pushpop.settle_many('p', p.ids, p.tokens, '{complete,discard,defer,release,fail,extend}',
                            array[null, null, 1, null, 1, 60], array[null, null, null, null, 'because', null]) s", "1"),
    ("select state from pushpop.find('p', '00000000-0000-0000-0000-00000000000a')", "leased"),
    ("select count(*) from pushpop.peek('p', 3)", "3"),
    ("select ready + delayed + leased + settled from pushpop.stats('p')", "64"),
    ("select leased > 30 from pushpop.all_stats() where topic = 'p'", "t"),
    ("select leased > 30 from pushpop.overview where topic = 'p'", "t"),
    ("select count(*) > 30 from pushpop.in_flight where topic = 'p'", "t"),
    ("select pushpop.cancel('p', (select id from pushpop.peek('p', 1)))", "t"),
    ("select pushpop.reschedule('p', (select id from pushpop.peek('p', 1)), 5)", "t"),
    ("select pushpop.upkeep('p')", "0"),
    ("select count(*) from pushpop.upkeep_due() n where n = 'p'", "0"),
    ("select pushpop.purge('p') > 0", "t"),
    ("select pushpop.pause('d')", ""),
    ("select pushpop.resume('d')", ""),
    ("select pushpop.set_topic('d', 60, 1, 0.25, 1.5)", ""),
    ("select lease = 60, max_attempts, backoff_first = 0.25, backoff_most = 1.5, paused from pushpop.topic_settings('d')", "t|1|t|t|f"),
    ("select pushed from pushpop.push('d', 'm', '00000000-0000-0000-0000-00000000000d')", "00000000-0000-0000-0000-00000000000d"),
    ("select pushpop.fail('d', p.id, p.token, E'Gr\\u00fcn') from pushpop.pop('d') p", ""),
    ("select last_error = E'Gr\\u00fcn' and failures -> 0 ->> 'at' like '____-__-__T%Z' from pushpop.dead_letters('d')", "t"),
    ("select count(*) from pushpop.dead_messages where topic = 'd'", "1"),
    ("select pushpop.redrive('d', array['00000000-0000-0000-0000-00000000000d']::uuid[])", "1"),
    ("select pushpop.fail('d', p.id, p.token, 'again') from pushpop.pop('d') p", ""),
    ("select redriven from pushpop.redrive_all('d')", "1"),
    ("select pushpop.fail('d', p.id, p.token, 'again') from pushpop.pop('d') p", ""),
    ("select jsonb_array_length(failures) from pushpop.dead_letters('d')", "3"),
    ("select pushpop.purge_dead('d')", "1"),
    ("select pushed from pushpop.push('d', 'm', '00000000-0000-0000-0000-0000000000dd')", "00000000-0000-0000-0000-0000000000dd"),
    ("select place, ready from pushpop.wait_for_any(array['none', 'd']) where ready", "2|t"),
    ("select part, id from pushpop.pop_any(array['none', 'd'])", "2|00000000-0000-0000-0000-0000000000dd"),
    ("select string_agg(n, ',') from pushpop.topic_names() n where n in ('d', 'p')", "d,p"),
];

/// The first row of an answer as psql -A shows it.
fn told(client: &mut Client, sql: &str) -> String {
    let answer = client.simple_query(sql).unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    let row = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.map_or(String::new(), |row| {
        (0..row.len()).map(|i| row.get(i).unwrap_or_default()).collect::<Vec<_>>().join("|")
    })
}

fn play(world: &World, client: &mut Client) {
    let begun = Instant::now();
    for (sql, expected) in PLAIN {
        assert_eq!(told(client, &world.sql(sql)), *expected, "{sql}");
    }
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

#[test]
fn plain_sql_calls_everything() {
    let world = World::new();
    world.queue();
    let mut client = world.client();
    let of = "select proname::text from pg_proc where pronamespace = $1::text::regnamespace and prosecdef
              union select viewname::text from pg_views where schemaname = $1";
    let all: BTreeSet<String> =
        client.query(of, &[&world.schema]).unwrap().iter().map(|row| row.get(0)).collect();
    let called = |name: &str| PLAIN.iter().any(|(sql, _)| sql.contains(&format!("pushpop.{name}")));
    assert_eq!(all.iter().filter(|name| !called(name)).collect::<Vec<_>>(), Vec::<&String>::new());
    play(&world, &mut client);
}

#[test]
fn a_hostile_role_installs_and_uses_everything() {
    let world = World::on(&hostile_role(&mut admin()));
    let queue = world.queue();
    let other = world.queue();
    use_everything(&queue, &other);
    drop((queue, other));
    play(&world, &mut world.client());
    let odd = "select relname::text from pg_class c join pg_am a on a.oid = c.relam
               where c.relnamespace = $1::text::regnamespace and c.relkind = 'r' and a.amname <> 'heap'";
    let odd = admin().query(odd, &[&world.schema]).unwrap();
    assert!(odd.is_empty(), "tables of another kind: {odd:?}");
}

#[test]
fn a_hostile_role_runs_the_script() {
    let world = World::on(&hostile_role(&mut admin()));
    let mut client = world.client();
    for _ in 0..2 {
        client.batch_execute(&world.builder().install_sql()).unwrap();
    }
    play(&world, &mut client);
    let queue = world.open(world.builder().migrate(false));
    queue.push("s", "m").unwrap();
    assert_eq!(drain(&queue, "s"), ["m"]);
}

/// A role that is not hostile, in a database that is; the functions are owned by one that is.
#[test]
fn a_hostile_database_serves() {
    let mut admin = admin();
    let database = unique("hostile");
    admin.batch_execute(&format!("create database {database}")).unwrap();
    let owner = hostile_role(&mut admin);
    let name = owner.split([':', '/']).nth(3).unwrap().to_owned();
    admin
        .batch_execute(&format!(
            "grant create on database {database} to {name}; alter role {name} reset role"
        ))
        .unwrap();
    embitter(&mut admin, &format!("database {database}"));
    let world = World::on(&owner.replace("/postgres", &format!("/{database}")));
    drop(world.queue());
    let (user, url) = guarded_role(&mut admin);
    let schema = &world.schema;
    world
        .client()
        .batch_execute(&format!(
            "grant usage on schema {schema} to {user}; grant execute on all functions in schema {schema} to {user};
             grant select on {schema}.overview, {schema}.in_flight, {schema}.dead_messages to {user}"
        ))
        .unwrap();
    let url = url.replace("/postgres", &format!("/{database}"));
    let open = || world.builder().connect(&url).unwrap();
    let (queue, other) = (open(), open());
    use_everything(&queue, &other);
    drop((queue, other));
    play(&world, &mut Client::connect(&url, NoTls).unwrap());
    drop(world);
    until("the database is dropped", || {
        admin.batch_execute(&format!("drop database if exists {database} with (force)")).is_ok()
    });
}

/// Idle connections are the queue's to end, not a role's.
#[test]
fn idle_connections_stay() {
    let mut admin = admin();
    if admin.query_opt("select from pg_settings where name = 'idle_session_timeout'", &[]).unwrap().is_none()
    {
        return;
    }
    let (role, url) = guarded_role(&mut admin);
    admin
        .batch_execute(&format!(
            "grant create on database postgres to {role}; alter role {role} set idle_session_timeout = 100"
        ))
        .unwrap();
    let world = World::on(&url);
    let queue = world.open(world.builder().pool_size(1));
    let pid = || {
        queue.transaction(|tx| Ok(tx.query_one("select pg_backend_pid()", &[])?.get::<_, i32>(0))).unwrap()
    };
    let first = pid();
    // Longer than one that is not told otherwise lives.
    let mut witness = Client::connect(&url, NoTls).unwrap();
    until("an idle session of this role is ended", || {
        thread::sleep(Duration::from_millis(300));
        witness.simple_query("select").is_err()
    });
    assert_eq!(pid(), first);
}

/// A transaction with one snapshot does not see what was committed since: it may move no mark past that.
#[test]
fn a_look_with_an_old_snapshot_hides_nothing() {
    for isolation in ["repeatable read", "serializable"] {
        let world = World::new();
        let queue = world.queue();
        let (mut pusher, mut reader, mut upkeep) = (world.client(), world.client(), world.client());
        let keep = world.sql("select pushpop.upkeep('t')");
        queue.push("t", "first").unwrap();
        assert_eq!(drain(&queue, "t"), ["first"]);
        upkeep.batch_execute(&keep).unwrap();
        // Stamped, and not committed, when the next mark is taken.
        let mut push = pusher.transaction().unwrap();
        push.batch_execute(&world.sql("select pushpop.push('t', 'second')")).unwrap();
        upkeep.batch_execute(&keep).unwrap();
        let mut old = reader.transaction().unwrap();
        old.batch_execute(&format!("set transaction isolation level {isolation}; select")).unwrap();
        old.query(&world.sql("select from pushpop.topics"), &[]).unwrap();
        push.commit().unwrap();
        old.batch_execute(&keep).unwrap();
        old.commit().unwrap();
        let hidden = world.sql(
            "select from pushpop.runs q join pushpop.topics t using (topic)
             where q.ready_at < t.low and not exists (select from pushpop.behind b where b.topic = q.topic)",
        );
        assert!(
            upkeep.query_opt(&hidden, &[]).unwrap().is_none(),
            "{isolation}: the mark has passed a message"
        );
        assert_eq!(drain(&queue, "t"), ["second"]);
    }
}

/// Which version the server is of: the settings above are those of all versions.
#[test]
fn smoke() {
    assert!(guarded().bin_dir().exists());
}
