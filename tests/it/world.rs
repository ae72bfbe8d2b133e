//! Where a test lives: a schema of its own on a server that all share.

use std::io::Write as _;
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, Config, NoTls};
use pushpop_pg::{Builder, Lease, Queue, Stats, uuid::Uuid};
use pushpop_server::Server;

use crate::{hostile, pooler, spans};

/// Whether this process is one that [`apart`] has started, for one test.
pub(crate) fn is_apart() -> bool {
    std::env::var_os("PUSHPOP_TEST_APART").is_some()
}

/// A command that runs a test of this program once more, in a process of its own, in a given schema.
pub(crate) fn apart(test: &str, world: &World) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture"])
        .env("PUSHPOP_TEST_APART", &world.schema)
        .env("PUSHPOP_TEST_DATABASE_URL", &world.url);
    command
}

/// A builder for the schema that this process was given.
pub(crate) fn builder_apart() -> Builder {
    let schema = std::env::var("PUSHPOP_TEST_APART").unwrap();
    Queue::builder().application_name(&schema).schema(schema)
}

/// Has it run, and shows what it said if it fails.
#[track_caller]
pub(crate) fn succeeds(mut command: Command) -> String {
    let output = command.output().unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    said
}

/// How long something may take that takes a moment on a machine that is not busy.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// The URL of the shared server.
pub(crate) fn url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    URL.get_or_init(|| match std::env::var("PUSHPOP_TEST_DATABASE_URL") {
        Ok(url) if !url.is_empty() => url,
        _ => hostile::url().unwrap_or_else(|| Server::shared().url()),
    })
}

/// A name that no other test has.
pub(crate) fn unique(prefix: &str) -> String {
    format!("{prefix}_{}", Uuid::new_v4().simple())
}

/// A schema name as SQL takes it.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A schema of a test's own, with the queue installed; gone with it.
pub(crate) struct World {
    pub(crate) url: String,
    /// Which a test may change.
    pub(crate) schema: String,
    born_as: String,
}

/// Worlds that are in use: by their first names, the test and since when.
static OPEN: Mutex<Vec<(String, String, Instant)>> = Mutex::new(Vec::new());

/// A test that hangs is named, and fails: a thread that panics within a scope waits for its siblings for ever.
fn watch() {
    static WATCHING: OnceLock<()> = OnceLock::new();
    WATCHING.get_or_init(|| {
        thread::spawn(|| {
            loop {
                thread::sleep(SOON / 10);
                for (schema, test, since) in OPEN.lock().unwrap().iter() {
                    if since.elapsed() > SOON * 6 {
                        // Not eprintln: what a test prints is shown when it ends.
                        let _ = writeln!(std::io::stderr(), "test {test} hangs (schema {schema})");
                        std::process::abort();
                    }
                }
            }
        });
    });
}

impl World {
    pub(crate) fn new() -> World {
        World::on(url())
    }

    pub(crate) fn on(url: &str) -> World {
        watch();
        spans::ask_each_time();
        let schema = unique("it");
        let test = thread::current().name().unwrap_or_default().to_owned();
        OPEN.lock().unwrap().push((schema.clone(), test, Instant::now()));
        World { url: url.to_owned(), born_as: schema.clone(), schema }
    }

    /// A builder for this schema, whose connections go by its name.
    pub(crate) fn builder(&self) -> Builder {
        Queue::builder().schema(&self.schema).application_name(&self.schema)
    }

    pub(crate) fn open(&self, builder: Builder) -> Queue {
        match pooler::url().filter(|_| self.url == url()) {
            Some(url) => {
                let url = format!("{url}?application_name={}", self.schema);
                builder.pooler(true).poll_interval(SOON / 100).connect(&url)
            }
            None => builder.connect(&self.url),
        }
        .unwrap()
    }

    pub(crate) fn queue(&self) -> Queue {
        self.open(self.builder())
    }

    pub(crate) fn config(&self) -> Config {
        self.url.parse().unwrap()
    }

    /// A connection beside the queue.
    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.url, NoTls).unwrap()
    }

    /// Drops the schema while a queue uses it, which may have to begin anew: the two lock tables in different orders.
    pub(crate) fn drop_schema(&self, client: &mut Client) {
        let sql = format!("drop schema {} cascade", quoted(&self.schema));
        until("the schema is dropped", || client.batch_execute(&sql).is_ok());
    }

    /// SQL written for schema `pushpop`, for this one.
    pub(crate) fn sql(&self, sql: &str) -> String {
        sql.replace("pushpop.", &format!("{}.", quoted(&self.schema)))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        OPEN.lock().unwrap().retain(|(name, ..)| *name != self.born_as);
        let dropped = Client::connect(&self.url, NoTls).and_then(|mut client| {
            client.batch_execute(&format!(
                "set client_min_messages = warning; set lock_timeout = '2s'; drop schema if exists {} cascade",
                quoted(&self.schema)
            ))
        });
        if let Err(e) = dropped {
            eprintln!("schema {} is left behind: {e}", self.schema);
        }
    }
}

/// Waits until something is true.
#[track_caller]
pub(crate) fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !is_true() {
        if Instant::now() >= deadline {
            // Said at once, too: siblings in a scope may go on for ever, and then the panic is never shown.
            let _ = writeln!(std::io::stderr(), "{:?} waits in vain: {what}", thread::current().name());
            panic!("not within {SOON:?}: {what}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Pops until there is something.
#[track_caller]
pub(crate) fn pop(queue: &Queue, topic: &str) -> Lease {
    queue.pop_timeout(topic, SOON).unwrap().expect("a message")
}

#[track_caller]
pub(crate) fn pop_many(queue: &Queue, topic: &str, max: usize) -> Vec<Lease> {
    queue.pop_many(topic, max, SOON).unwrap()
}

/// The payload as text.
pub(crate) fn text(payload: &[u8]) -> String {
    String::from_utf8(payload.to_vec()).unwrap()
}

/// All payloads that are ready, in order; each is completed.
#[track_caller]
pub(crate) fn drain(queue: &Queue, topic: &str) -> Vec<String> {
    let mut payloads = Vec::new();
    loop {
        let leases = queue.pop_many(topic, 1000, Duration::ZERO).unwrap();
        if leases.is_empty() {
            return payloads;
        }
        payloads.extend(leases.iter().map(|lease| text(lease.payload())));
        assert!(queue.complete_many(leases).unwrap().is_empty());
    }
}

/// The figures of a topic as of now: those that took long to take are shared for two seconds.
#[track_caller]
pub(crate) fn stats(queue: &Queue, topic: &str) -> Stats {
    let first = queue.topic(topic).stats().unwrap();
    let mut stats = first.clone();
    until("figures are taken anew", || {
        stats = queue.topic(topic).stats().unwrap();
        stats.at() != first.at()
    });
    stats
}

/// Waits until somebody waits for a message of the topic, as the server knows it.
#[track_caller]
pub(crate) fn until_wanted(world: &World, client: &mut Client, topic: &str) {
    let sql = world.sql("select from pushpop.topics where topic = $1 and wanted_until > clock_timestamp()");
    until("somebody waits", || client.query_opt(&sql, &[&topic]).unwrap().is_some());
}

/// Whether the queue of this world has a connection of which that is true.
pub(crate) fn has_connection(world: &World, client: &mut Client, condition: &str) -> bool {
    let sql = format!("select from pg_stat_activity where application_name = $1 and ({condition}) limit 1");
    client.query_opt(&sql, &[&world.schema]).unwrap().is_some()
}

/// Waits until a connection of the queue waits for a lock.
#[track_caller]
pub(crate) fn until_locked(world: &World, client: &mut Client) {
    until("a call waits for a lock", || has_connection(world, client, "wait_event_type = 'Lock'"));
}

/// Waits until the queue listens.
#[track_caller]
pub(crate) fn until_listening(world: &World, client: &mut Client) {
    until("it listens", || has_connection(world, client, "query ilike 'listen%' and state = 'idle'"));
}

/// A server of one test's own, or of a few, that asks for passwords.
pub(crate) fn guarded() -> &'static Server {
    static GUARDED: OnceLock<Server> = OnceLock::new();
    GUARDED.get_or_init(|| {
        let server = Server::with(&[("fsync", "off"), ("password_encryption", "scram-sha-256")]).unwrap();
        let mut client = Client::connect(&server.url(), NoTls).unwrap();
        client.batch_execute("alter role postgres password 'correct'").unwrap();
        let rules = "host all all 127.0.0.1/32 scram-sha-256\n";
        std::fs::write(server.data_dir().join("pg_hba.conf"), rules).unwrap();
        client.batch_execute("select pg_reload_conf()").unwrap();
        until("the server asks for a password", || {
            Client::connect(&server.url().replace("postgres@", "postgres:no@"), NoTls).is_err()
        });
        server
    })
}

/// A URL of the server that asks for passwords.
pub(crate) fn guarded_url(user: &str, password: &str, database: &str) -> String {
    format!("postgres://{user}:{password}@127.0.0.1:{}/{database}", guarded().port())
}

/// A role of that server, with a password and no rights.
pub(crate) fn guarded_role(admin: &mut Client) -> (String, String) {
    let role = unique("role");
    admin.batch_execute(&format!("create role {role} login password 'pw'")).unwrap();
    let url = guarded_url(&role, "pw", "postgres");
    (role, url)
}
