//! Payloads from other languages: what a client sends arrives, or is refused, whatever its strings look like.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use postgres::types::Type;
use pushpop_server::Server;

use crate::world::{SOON, World, drain};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Strings that are something else in the notation of bytea, of JSON, of arrays, or of psql.
fn strings(world: &World) -> Vec<String> {
    let sql = "select array(select json_array_elements_text($1::text::json))";
    world.client().query_one(sql, &[&include_str!("../languages/strings.json")]).unwrap().get(0)
}

/// Runs psql over a script, and returns what it writes: bare, and columns and rows apart by bytes that no string has.
fn psql(world: &World, script: &str) -> Result<String, String> {
    let mut psql = Command::new(Server::shared().program("psql"))
        .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-F", "\u{2}", "-R", "\u{3}", &world.url])
        .env("PGCLIENTENCODING", "UTF8")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Whether all of it was read is told by the status.
    let _ = psql.stdin.take().unwrap().write_all(world.sql(script).as_bytes());
    let output = psql.wait_with_output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8(output.stderr).unwrap())
    }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn escaped(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    psql(&world, r"select pushpop.push('t', '\x41')").unwrap();
    assert_eq!(drain(&queue, "t"), [r"\x41"]);
}

/// How a call is written that pushes a string.
type Form = fn(&str) -> String;

/// As people write it in psql: literals of unknown type, named and not, with a cast, from a variable, from a column.
#[test]
fn strings_from_psql_arrive() {
    let world = World::new();
    let queue = world.queue();
    let strings = strings(&world);
    let forms: [(&str, Form); 8] = [
        ("literal", |s| format!("select pushpop.push('t', {});", quoted(s))),
        ("escaped", |s| format!("select pushpop.push('t', {});", escaped(s))),
        ("named", |s| format!("select pushpop.push(payload => {}, topic => 't');", quoted(s))),
        ("all", |s| {
            format!("select pushpop.push('t', {}, null, null, null, null, null, null, 25);", quoted(s))
        }),
        ("cast", |s| format!("select pushpop.push('t', {}::varchar, delay => 0);", quoted(s))),
        ("column", |s| format!("select pushpop.push('t', c) from (select {}) v(c);", quoted(s))),
        ("many", |s| {
            format!("select pushpop.push_many('t', array[gen_random_uuid()], array[{}]);", quoted(s))
        }),
        ("prepared", |s| {
            let s = quoted(s);
            format!(
                "prepare p as select pushpop.push($1, $2, headers => $3); execute p('t', {s}, null); deallocate p;"
            )
        }),
    ];
    for (form, call) in forms {
        let calls: Vec<String> = strings.iter().map(|text| call(text)).collect();
        psql(&world, &calls.join("\n")).unwrap_or_else(|e| panic!("{form}: {e}"));
        assert_eq!(drain(&queue, "t"), strings, "{form}");
    }
}

#[test]
fn json_arrives() {
    let world = World::new();
    let queue = world.queue();
    let script = r#"
        select pushpop.push('t', jsonb_build_object('path', 'C:\dir'));
        select pushpop.push('t', to_jsonb(v)) from (select 1 as id, E'a\nb' as lines) v;
        select pushpop.push('t', '"\\x41"'::jsonb);
        select pushpop.push_many('t', array[gen_random_uuid(), gen_random_uuid()], array['{"a": "\\x41"}', 'null']::jsonb[]);
    "#;
    psql(&world, script).unwrap();
    let expected = [
        r#"{"path": "C:\\dir"}"#,
        r#"{"id": 1, "lines": "a\nb"}"#,
        r#""\\x41""#,
        r#"{"a": "\\x41"}"#,
        "null",
    ];
    assert_eq!(drain(&queue, "t"), expected);
}

#[test]
fn bytes_arrive() {
    let world = World::new();
    let queue = world.queue();
    let script = r"
        select pushpop.push('t', '\x41'::bytea);
        select pushpop.push_many('t', array[gen_random_uuid()], array['\x42'::bytea]);
        select pushpop.push_many('t', array[gen_random_uuid()], array['\x43']::bytea[]);
    ";
    psql(&world, script).unwrap();
    assert_eq!(drain(&queue, "t"), ["A", "B", "C"]);
}

/// Nobody can tell which type is meant: PostgreSQL says so, and that a cast is missing.
#[test]
fn what_could_be_misread_is_refused() {
    let world = World::new();
    let queue = world.queue();
    for call in [
        "push('t', 42)",
        "push('t', true)",
        "push('t', now())",
        "push('t', null)",
        "push('t', null::bytea)",
        "push('t', null::jsonb)",
        "push('t', array['a'])",
        "push('t', '{}'::json)",
        r"push_many('t', array[gen_random_uuid()], '{\\x41}')",
        "push_many('t', array[gen_random_uuid()], null)",
        "push_many('t', array[gen_random_uuid()], array[null]::text[])",
        "push_many('t', array[gen_random_uuid()], array['a', 'b'])",
        "push_many('t', array[gen_random_uuid()], array['{}', '{}']::jsonb[])",
        "push_many('t', array[gen_random_uuid()], null::jsonb[])",
        "push_many('t', '{}', '{}'::text[])",
    ] {
        let refused = psql(&world, &format!("select pushpop.{call}"));
        assert!(refused.is_err(), "{call}: accepted");
    }
    assert_eq!(drain(&queue, "t"), Vec::<String>::new());
}

/// As drivers ask for the types of parameters to which they gave none.
#[test]
fn a_parameter_without_a_type_is_text() {
    let world = World::new();
    drop(world.queue());
    let mut client = world.client();
    let all: Vec<String> = (1..=9).map(|n| format!("${n}")).collect();
    let names =
        ["topic", "payload", "id", "delay", "ready_at", "headers", "max_attempts", "sender", "fallback"];
    for count in 2..=all.len() {
        let named: Vec<String> =
            names.iter().zip(&all[..count]).map(|(n, p)| format!("{n} => {p}")).collect();
        for arguments in [all[..count].join(", "), named.join(", ")] {
            let sql = world.sql(&format!("select pushpop.push({arguments})"));
            let prepared = client.prepare(&sql).unwrap_or_else(|e| panic!("{arguments}: {e:?}"));
            assert_eq!(prepared.params()[1], Type::TEXT, "{arguments}");
        }
    }
    for (cast, kind) in
        [("bytea", Type::BYTEA_ARRAY), ("text", Type::TEXT_ARRAY), ("jsonb", Type::JSONB_ARRAY)]
    {
        let sql = world.sql(&format!("select pushpop.push_many($1, $2, $3::{cast}[])"));
        assert_eq!(client.prepare(&sql).unwrap().params()[2], kind);
        // As one who says the type to the driver.
        let of = kind.clone();
        let sql = world.sql("select pushpop.push_many($1, $2, $3)");
        client.prepare_typed(&sql, &[Type::TEXT, Type::UUID_ARRAY, of]).unwrap();
    }
}

/// A second form of any other function could leave it to chance which one a call without types means.
#[test]
fn only_pushes_have_forms_and_these_differ_in_the_payload_alone() {
    let world = World::new();
    drop(world.queue());
    let rows = world
        .client()
        .query(
            "select proname::text, pg_get_function_arguments(oid), prosecdef, pg_get_function_result(oid)
             from pg_proc where pronamespace = $1::text::regnamespace and proname in (
               select proname from pg_proc where pronamespace = $1::text::regnamespace group by 1 having count(*) > 1)
             order by 1, 2",
            &[&world.schema],
        )
        .unwrap();
    let forms: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let names: BTreeSet<&str> = forms.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.into_iter().collect::<Vec<_>>(), ["push", "push_many"]);
    for name in ["push", "push_many"] {
        let mut shapes = BTreeSet::new();
        let mut payloads = BTreeSet::new();
        for (_, arguments) in forms.iter().filter(|(of, _)| of == name) {
            let (before, rest) = arguments.split_once("payload").unwrap();
            let (payload, after) = rest.split_once(',').unwrap();
            payloads.insert(payload.trim_start_matches('s').trim().trim_end_matches("[]").to_owned());
            shapes.insert((before.to_owned(), after.to_owned()));
        }
        assert_eq!(payloads.into_iter().collect::<Vec<_>>(), ["bytea", "jsonb", "text"], "{name}");
        assert_eq!(shapes.len(), 1, "{shapes:#?}");
    }
    assert!(rows.iter().all(|row| row.get::<_, bool>(2)), "a form that runs with the rights of its caller");
}

/// A payload that is no text does not make a pop fail, which would meet it again and again.
#[test]
fn payloads_are_shown_as_text_and_json_where_they_are() {
    let world = World::new();
    let queue = world.queue();
    let deep = "[".repeat(100_000);
    let payloads: [(&[u8], Option<&str>, Option<&str>); 10] = [
        (b"plain", Some("plain"), None),
        (b"", Some(""), None),
        (br"\x41", Some(r"\x41"), None),
        (
            br#"{"b":"C:\\dir", "a":1}"#,
            Some(r#"{"b":"C:\\dir", "a":1}"#),
            Some(r#"{"a": 1, "b": "C:\\dir"}"#),
        ),
        (br#""\u0000""#, Some(r#""\u0000""#), None),
        (b"1e9999999", Some("1e9999999"), None),
        (b"null", Some("null"), Some("null")),
        (b"\xff\xfe", None, None),
        (b"nul\0", None, None),
        (deep.as_bytes(), Some(&deep), None),
    ];
    for (payload, ..) in &payloads {
        queue.push("t", *payload).unwrap();
    }
    let mut client = world.client();
    let shown = "pushpop.as_text(payload), pushpop.as_json(payload)::text, payload";
    for source in ["pushpop.peek('t')", "pushpop.pop('t', 10)"] {
        let rows = client.query(&world.sql(&format!("select {shown} from {source}")), &[]).unwrap();
        assert_eq!(rows.len(), payloads.len());
        for (row, (payload, text, json)) in rows.iter().zip(&payloads) {
            assert_eq!(row.get::<_, &[u8]>(2), *payload);
            assert_eq!(
                (row.get::<_, Option<&str>>(0), row.get::<_, Option<&str>>(1)),
                (*text, *json),
                "{source}"
            );
        }
    }
}

/// The blocks of a page in a language.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(page)).unwrap();
    let opening = format!("```{language}\n");
    text.split(&opening).skip(1).map(|part| part.split("```").next().unwrap().to_owned()).collect()
}

/// What the README shows for psql, run by psql.
#[test]
fn the_lines_for_psql_run_as_they_are_shown() {
    let world = World::new();
    drop(world.queue());
    let block = blocks("README.md", "sql").into_iter().find(|block| block.contains("\\gset")).unwrap();
    psql(&world, &block).unwrap();
    let rows = psql(&world, "select settled from pushpop.stats('mail')").unwrap();
    assert_eq!(rows.trim_end(), "1");
}

/// A program beside this one, or of a page; its interpreter is where a variable says.
fn run(variable: &str, program: &Path, arguments: &[&str]) {
    let interpreter = std::env::var(variable).unwrap_or_else(|_| panic!("{variable} names no interpreter"));
    let output = Command::new(interpreter)
        .arg(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{variable}: {e}"));
    let told = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{}: {}", program.display(), told.join("\n"));
}

const PYTHON: &str = "PUSHPOP_TEST_PYTHON";
const NODE: &str = "PUSHPOP_TEST_NODE";

#[test]
#[ignore = "needs psycopg, which .ci/run installs"]
fn strings_from_psycopg_arrive() {
    let world = World::new();
    drop(world.queue());
    run(PYTHON, &root().join("tests/languages/push.py"), &[&world.url, &world.schema]);
}

#[test]
#[ignore = "needs node's pg, which .ci/run installs"]
fn strings_from_node_arrive() {
    let world = World::new();
    drop(world.queue());
    run(NODE, &root().join("tests/languages/push.cjs"), &[&world.url, &world.schema]);
}

/// The programs of the README, but for the URL and the schema.
#[test]
#[ignore = "needs psycopg and node's pg, which .ci/run installs"]
fn the_programs_of_the_readme_run_as_they_are_shown() {
    for (language, variable, ending) in [("python", PYTHON, "py"), ("js", NODE, "cjs")] {
        let programs = blocks("README.md", language);
        assert!(!programs.is_empty(), "{language}");
        for program in programs {
            let world = World::new();
            let queue = world.queue();
            let (url, shown) = (format!("{:?}", world.url), "\"postgres://localhost/app\"");
            assert!(program.contains(shown));
            let path = std::env::temp_dir().join(format!("{}.{ending}", world.schema));
            let program = program.replace(shown, &url).replace("pushpop.", &format!("{}.", world.schema));
            fs::write(&path, program).unwrap();
            run(variable, &path, &[]);
            let _ = fs::remove_file(&path);
            assert!(queue.topic("mail").stats().unwrap().settled() > 0, "{language}: nothing was settled");
            assert!(
                queue.pop_timeout("mail", SOON / 1000).unwrap().is_none(),
                "{language}: something is left"
            );
        }
    }
}

/// The table of the functions in the README, against the functions: names, arguments, and defaults that are numbers.
#[test]
fn the_table_of_functions_is_that_of_the_schema() {
    let world = World::new();
    drop(world.queue());
    let rows = world
        .client()
        .query(
            "select proname::text, pg_get_function_arguments(oid) from pg_proc
             where pronamespace = $1::text::regnamespace and (prosecdef or proname like 'as\\_%')",
            &[&world.schema],
        )
        .unwrap();
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, table) = readme.split_once("| function | arguments").unwrap();
    let cells = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let cells: Vec<Vec<&str>> = cells.map(|line| line.split('|').map(str::trim).collect()).collect();
    let quoted =
        |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let mut wrong = Vec::new();
    let mut known = BTreeSet::new();
    for row in &rows {
        let (name, arguments): (String, String) = (row.get(0), row.get(1));
        known.insert(name.clone());
        // What this crate asks before it calls any of them.
        let Some(cell) = cells.iter().find(|cells| quoted(cells[1]).contains(&name)).map(|cells| cells[2])
        else {
            if name != "schema_version" {
                wrong.push(format!("{name} is not in the table"));
            }
            continue;
        };
        for argument in
            arguments.split(", ").filter(|argument| !argument.is_empty() && !argument.starts_with("OUT "))
        {
            let argument = argument.trim_start_matches("INOUT ");
            let (of, default) = argument.split_once(" DEFAULT ").unwrap_or((argument, ""));
            let argument = of.split(' ').next().unwrap();
            let Some((_, said)) = cell.rsplit_once(&format!("`{argument}`")) else {
                wrong.push(format!("{name}: {argument} is not in the table"));
                continue;
            };
            let said = said.split(',').next().unwrap();
            if default.parse::<f64>().is_ok() && !said.split(' ').any(|word| word == default) {
                wrong.push(format!("{name}: {argument} is {default}, not {said}"));
            }
        }
    }
    for name in cells.iter().flat_map(|cells| quoted(cells[1])).filter(|name| !known.contains(name)) {
        wrong.push(format!("there is no {name}"));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
