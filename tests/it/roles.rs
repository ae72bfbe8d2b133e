//! Who may do what: roles by the rights that they are given, against every function and table.

use std::collections::{BTreeMap, BTreeSet};

use postgres::Client;

use crate::world::{World, unique};

/// The functions that a role needs for its part, and those that it calls beside them.
const PARTS: [(&str, &[&str]); 4] = [
    ("producer", &["push", "push_many", "schema_version"]),
    (
        "consumer",
        &[
            "pop",
            "pop_any",
            "wait_for",
            "wait_for_any",
            "settle_many",
            "complete",
            "discard",
            "defer",
            "release",
            "fail",
            "extend",
            "heartbeat",
            "upkeep",
            "upkeep_due",
            "schema_version",
        ],
    ),
    (
        "monitor",
        &[
            "stats",
            "all_stats",
            "topic_names",
            "topic_settings",
            "find",
            "peek",
            "dead_letters",
            "schema_version",
        ],
    ),
    (
        "operator",
        &[
            "pause",
            "resume",
            "set_topic",
            "cancel",
            "reschedule",
            "redrive",
            "redrive_all",
            "purge",
            "purge_dead",
            "schema_version",
        ],
    ),
];

/// A call of each function that clients may call, with arguments that are good.
const CALLS: [(&str, &str); 37] = [
    ("push", "push('t', 'm'::bytea)"),
    ("push", "push('t', 'm')"),
    ("push", "push('t', '1'::jsonb)"),
    ("push_many", "push_many('t', array[gen_random_uuid()], array['m'::bytea])"),
    ("push_many", "push_many('t', array[gen_random_uuid()], array['m'])"),
    ("push_many", "push_many('t', array[gen_random_uuid()], array['1'::jsonb])"),
    ("pop", "pop('t')"),
    ("pop_any", "pop_any(array['t'])"),
    ("wait_for", "wait_for('t')"),
    ("wait_for_any", "wait_for_any(array['t'])"),
    ("settle_many", "settle_many('t', array[gen_random_uuid()], array['x'::bytea], array['complete'])"),
    ("complete", "complete('t', gen_random_uuid(), 'x')"),
    ("discard", "discard('t', gen_random_uuid(), 'x')"),
    ("defer", "defer('t', gen_random_uuid(), 'x', 1)"),
    ("release", "release('t', gen_random_uuid(), 'x')"),
    ("fail", "fail('t', gen_random_uuid(), 'x', 'why')"),
    ("extend", "extend('t', gen_random_uuid(), 'x', 60)"),
    ("heartbeat", "heartbeat(array['t'], array[gen_random_uuid()], array['x'::bytea], array[60])"),
    ("upkeep", "upkeep('t')"),
    ("upkeep_due", "upkeep_due()"),
    ("stats", "stats('t')"),
    ("all_stats", "all_stats()"),
    ("topic_names", "topic_names()"),
    ("topic_settings", "topic_settings('t')"),
    ("find", "find('t', gen_random_uuid())"),
    ("peek", "peek('t')"),
    ("dead_letters", "dead_letters('t')"),
    ("pause", "pause('t')"),
    ("resume", "resume('t')"),
    ("set_topic", "set_topic('t', null, null, null, null)"),
    ("cancel", "cancel('t', gen_random_uuid())"),
    ("reschedule", "reschedule('t', gen_random_uuid())"),
    ("redrive", "redrive('t', array[gen_random_uuid()])"),
    ("redrive_all", "redrive_all('t')"),
    ("purge", "purge('t')"),
    ("purge_dead", "purge_dead('t')"),
    ("schema_version", "schema_version()"),
];

/// Runs a statement as a role, and takes it back. Returns whether the role lacks a right for it.
fn is_refused(client: &mut Client, role: &str, sql: &str) -> bool {
    let mut tx = client.transaction().unwrap();
    tx.batch_execute(&format!("set local role {role}")).unwrap();
    match tx.execute(sql, &[]) {
        Ok(_) => false,
        // A lease that is not there: the function was called.
        Err(e) if e.code().is_some_and(|code| code.code() == "PP001") => false,
        Err(e) => {
            assert_eq!(e.code().unwrap().code(), "42501", "{role}: {sql}: {e}");
            true
        }
    }
}

fn names(client: &mut Client, sql: &str) -> BTreeSet<String> {
    client.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn every_role_can_do_its_part_and_no_more() {
    let world = World::new();
    world.queue();
    let mut client = world.client();
    let schema = &world.schema;
    let definers = names(
        &mut client,
        &format!("select proname from pg_proc where pronamespace = '{schema}'::regnamespace and prosecdef"),
    );
    let known: BTreeSet<String> = CALLS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(definers, known, "a function that clients may call, and this test does not");
    let granted: BTreeSet<String> =
        PARTS.iter().flat_map(|(_, functions)| *functions).map(|name| (*name).to_owned()).collect();
    assert_eq!(granted, known, "a function that belongs to nobody's part");

    let mut roles: BTreeMap<&str, (String, &[&str])> = BTreeMap::new();
    for (part, functions) in PARTS.into_iter().chain([("guest", &[][..]), ("stranger", &[][..])]) {
        let role = unique(part);
        client.batch_execute(&format!("create role {role}")).unwrap();
        if part != "stranger" {
            client.batch_execute(&format!("grant usage on schema {schema} to {role}")).unwrap();
        }
        for function in functions {
            // A push has a form for each type of payload.
            let forms = format!(
                "select oid::regprocedure::text from pg_proc
                 where pronamespace = '{schema}'::regnamespace and proname = '{function}'"
            );
            for form in names(&mut client, &forms) {
                client.batch_execute(&format!("grant execute on function {form} to {role}")).unwrap();
            }
        }
        roles.insert(part, (role, functions));
    }

    let mut relations = |kind: &str| {
        let of = format!("relnamespace = '{schema}'::regnamespace and relkind = '{kind}'");
        names(&mut client, &format!("select relname::text from pg_class where {of}"))
    };
    let (tables, views) = (relations("r"), relations("v"));
    assert!(!tables.is_empty() && !views.is_empty());
    for (role, functions) in roles.values() {
        for (name, call) in CALLS {
            let refused = is_refused(&mut client, role, &format!("select {schema}.{call}"));
            assert_eq!(refused, !functions.contains(&name), "{role}: {name}");
        }
        for view in &views {
            assert!(is_refused(&mut client, role, &format!("select from {schema}.{view}")), "{role}: {view}");
        }
        for table in &tables {
            for sql in ["select from", "delete from"] {
                assert!(
                    is_refused(&mut client, role, &format!("{sql} {schema}.{table}")),
                    "{role}: {sql} {table}"
                );
            }
            assert!(is_refused(&mut client, role, &format!("truncate {schema}.{table}")), "{role}: {table}");
        }
        assert!(is_refused(&mut client, role, &format!("create table {schema}.mine (id integer)")), "{role}");
        assert!(is_refused(&mut client, role, &format!("drop schema {schema} cascade")), "{role}");
    }
    for (role, _) in roles.into_values() {
        client.batch_execute(&format!("drop owned by {role}; drop role {role}")).unwrap();
    }
}

/// The rights that the documentation grants in one line are those to all functions. What is internal runs with the
/// rights of its caller, so that is no way around the tables' rights.
#[test]
fn internal_functions_have_the_rights_of_their_callers() {
    let world = World::new();
    world.queue();
    let mut client = world.client();
    let (schema, role) = (&world.schema, unique("all"));
    client
        .batch_execute(&format!(
            "create role {role}; grant usage on schema {schema} to {role};
             grant execute on all functions in schema {schema} to {role}"
        ))
        .unwrap();
    for call in [
        "give_back('t', gen_random_uuid(), 1, 'release', now(), null, null)",
        "reclaim('t', now(), 1)",
        "note_look('t', now())",
        "lock_topic('t')",
        "take_runs('t', now(), now(), 1, 1)",
        "settle_single('t', gen_random_uuid(), decode(repeat('00', 26), 'hex'), 'complete', now(), 1, true)",
        "settle_done('t', array[gen_random_uuid()], array['x'::bytea], 'complete', now(), 1, true)",
        "tidy_lease('t', 'x', 1)",
        "prove('t', gen_random_uuid(), decode(repeat('00', 26), 'hex'))",
        "move_deadline('t', gen_random_uuid(), 1, 'x', now())",
        "bottom('t')",
        "enqueue('t', now(), now(), now(), now(), 1, 0, array[gen_random_uuid()])",
        "split_run('t', '(0,1)', 1)",
        "begin_sweep('t', now(), now() - interval '1 hour')",
        "set_aside('t', array[gen_random_uuid()], array[1], now())",
    ] {
        assert!(is_refused(&mut client, &role, &format!("select {schema}.{call}")), "{call}");
    }
    client.batch_execute(&format!("drop owned by {role}; drop role {role}")).unwrap();
}
