//! A pooler in transaction mode between the queues and the shared server, where the tests are told to have one: what is
//! not possible through it, and what comes of it when nobody says that it is there.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use pushpop_pg::{ErrorKind, Queue, Worker};
use pushpop_server::Server;

use crate::world::{SOON, World, until};

/// The URL through the program that `PUSHPOP_TEST_PGBOUNCER` names, if it names one.
pub(crate) fn url() -> Option<&'static str> {
    static URL: OnceLock<Option<String>> = OnceLock::new();
    let program = || std::env::var("PUSHPOP_TEST_PGBOUNCER").ok().filter(|program| !program.is_empty());
    URL.get_or_init(|| program().map(|program| start(&program, Server::shared()))).as_deref()
}

fn start(program: &str, server: &Server) -> String {
    let dir = server.socket_dir();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    fs::write(dir.join("users"), "\"postgres\" \"\"\n").unwrap();
    let settings = format!(
        "[databases]
         * = host={} port={} connect_query='set lock_timeout = 2000; set statement_timeout = 30000'
         [pgbouncer]
         listen_addr = 127.0.0.1
         listen_port = {port}
         unix_socket_dir =
         auth_type = trust
         auth_file = {dir}/users
         pool_mode = transaction
         max_client_conn = 2000
         default_pool_size = 40
         logfile = {dir}/pooler.log\n",
        server.host(),
        server.port(),
        dir = dir.display(),
    );
    fs::write(dir.join("pooler.ini"), settings.replace("\n         ", "\n")).unwrap();
    let owner = fs::metadata(server.data_dir()).unwrap();
    // Ends with the tests: their end closes its standard input.
    let watched = Command::new("/bin/sh")
        .args(["-c", r#""$0" -q "$1" </dev/null & read -r end; kill $!"#, program])
        .arg(dir.join("pooler.ini"))
        .uid(owner.uid())
        .gid(owner.gid())
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::mem::forget(watched);
    until("the pooler takes connections", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    format!("postgres://postgres@127.0.0.1:{port}/postgres")
}

#[test]
fn what_a_pooler_never_takes_is_refused_for_good() {
    let Some(url) = url() else { return };
    let connect =
        |url: &str| [false, true].map(|yes| Queue::builder().pooler(yes).connect(url).map(drop).unwrap_err());
    for error in connect(&format!("{url}?options=-c%20work_mem%3D1MB")) {
        assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Invalid, Some("08P01")), "{error:?}");
        assert!(error.to_string().contains("a pooler takes no options: leave them out"), "{error}");
        assert!(!error.is_retryable() && !error.is_indeterminate(), "{error:?}");
    }
    for error in connect(&url.replace("postgres@", "nobody@")) {
        assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Denied, false), "{error:?}");
    }
}

/// Nobody said that there is a pooler: statements that one process has prepared are found by another.
#[test]
fn a_pooler_that_nobody_told_of_ends_no_worker() {
    const CHILD: &str = "PUSHPOP_TEST_WORKS_BEHIND_A_POOLER";
    const MESSAGES: usize = 300;
    let work = |url: &str, schema: &str| {
        let queue = Queue::builder().schema(schema).connect(url).unwrap();
        let handled = AtomicUsize::new(0);
        let worker = Worker::new(&queue).handle("t", 4, |_| {
            handled.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        thread::scope(|scope| {
            let ended = scope.spawn(|| worker.run());
            for i in 0..MESSAGES {
                queue.push("t", format!("{i}")).unwrap();
            }
            let find = || queue.topic("t").stats().is_ok_and(|s| s.settled() >= MESSAGES as u64 * 2);
            until("both have worked", find);
            assert!(!ended.is_finished(), "{:?}", ended.join());
            worker.stopper().stop();
            assert_eq!(ended.join().unwrap().unwrap().unfinished(), 0);
        });
        assert!(handled.load(Ordering::Relaxed) > 0);
    };
    if let Ok(schema) = std::env::var(CHILD) {
        return work(&std::env::var("PUSHPOP_TEST_POOLER_URL").unwrap(), &schema);
    }
    let Some(url) = url() else { return };
    let world = World::new();
    world.builder().pooler(true).connect(url).unwrap();
    let output = thread::scope(|scope| {
        let other = scope.spawn(|| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "pooler::a_pooler_that_nobody_told_of_ends_no_worker", "--nocapture"])
                .env(CHILD, &world.schema)
                .env("PUSHPOP_TEST_POOLER_URL", url)
                .output()
                .unwrap()
        });
        work(url, &world.schema);
        other.join().unwrap()
    });
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The same session is used by others who prepare statements by the names that the driver takes.
#[test]
fn a_session_that_others_use_is_used_without_named_statements() {
    let world = World::new();
    // Not through the pooler of the tests, if there is one.
    let queue = world.builder().pool_size(1).connect(&world.url).unwrap();
    queue.push("t", "m").unwrap();
    // The driver counts them, for all of this process.
    let prepare = "do $$ declare first int; begin
         select max(substring(name from 2)::int) + 1 into strict first from pg_prepared_statements;
         for i in first .. first + 10000 loop execute format('prepare s%s as select 1', i); end loop;
       end $$";
    queue.transaction(|tx| Ok(tx.batch_execute(prepare)?)).unwrap();
    let error = queue.transaction(|tx| Ok(tx.query("select 1", &[]).map(drop)?)).unwrap_err();
    assert_eq!((error.sqlstate(), error.is_retryable()), (Some("42P05"), true), "{error:?}");
    assert!(error.to_string().contains("set Builder::pooler, and use query_typed"), "{error}");
    let worker = Worker::new(&queue).handle("t", 1, |_| Ok(()));
    assert_eq!(worker.run_until_idle().unwrap(), 1);
    queue.push("t", "m").unwrap();
    assert_eq!(worker.run_until_idle().unwrap(), 1);
    // Statements that are gone are prepared once more.
    queue.transaction(|tx| Ok(tx.batch_execute("deallocate all")?)).unwrap();
    queue.push("t", "m").unwrap();
    assert!(queue.pop_timeout("t", SOON).unwrap().is_some());
}
