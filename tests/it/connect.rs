//! Opening a queue: what is wrong is known at once.

use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use postgres::tls::{MakeTlsConnect, NoTlsError, NoTlsStream};
use postgres::{Client, NoTls, Socket};
use pushpop_pg::{Error, ErrorKind, Queue};
use pushpop_server::Server;
use tracing_subscriber::filter::LevelFilter;

use crate::spans::Notes;
use crate::world::{World, guarded, guarded_role, guarded_url, stats, text, until};

/// Far less than the time-outs of a queue that goes on trying.
const AT_ONCE: Duration = Duration::from_secs(15);

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "hello").unwrap();
    let lease = queue.try_pop("t").unwrap().unwrap();
    assert_eq!(lease.payload(), b"hello");
    lease.complete().unwrap();
    assert!(queue.try_pop("t").unwrap().is_none());
}

fn refused(url: &str) -> Error {
    let started = Instant::now();
    let error = Queue::connect(url).map(drop).unwrap_err();
    assert!(started.elapsed() < AT_ONCE, "{error} after {:?}", started.elapsed());
    assert!(std::error::Error::source(&error).is_some(), "no cause: {error:?}");
    assert!(error.to_string().starts_with("connect: "), "{error}");
    error
}

#[test]
fn a_wrong_password_fails_at_once() {
    let error = refused(&guarded_url("postgres", "hunter2-wrong", "postgres"));
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert_eq!(error.sqlstate(), Some("28P01"));
    assert!(!error.is_retryable());
    assert!(error.to_string().contains("password authentication failed"), "{error}");
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
}

#[test]
fn a_missing_password_fails_at_once() {
    guarded();
    let url = guarded_url("postgres", "x", "postgres").replace(":x@", "@");
    let started = Instant::now();
    let error = Queue::connect(&url).map(drop).unwrap_err();
    assert!(started.elapsed() < AT_ONCE);
    assert!(!error.is_retryable(), "no waiting brings a password: {error:?}");
    assert!(error.to_string().contains("password"), "{error}");
}

#[test]
fn a_wrong_port_fails_at_once() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = refused(&format!("postgres://postgres@127.0.0.1:{port}/postgres"));
    assert_eq!(error.kind(), ErrorKind::Connection);
    assert!(error.is_retryable());
    assert!(error.to_string().to_lowercase().contains("refused"), "{error}");
}

#[test]
fn a_wrong_database_fails_at_once() {
    let error = refused(&guarded_url("postgres", "correct", "nosuchdatabase"));
    assert_eq!(error.sqlstate(), Some("3D000"));
    assert!(!error.is_retryable());
    assert!(error.to_string().contains("nosuchdatabase"), "{error}");
}

/// What a server has answered is not called out of reach.
#[test]
fn a_server_without_room_fails_at_once() {
    let mut admin = Client::connect(&guarded_url("postgres", "correct", "postgres"), NoTls).unwrap();
    let (role, url) = guarded_role(&mut admin);
    admin.batch_execute(&format!("alter role {role} connection limit 0")).unwrap();
    let error = refused(&url);
    assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Connection, Some("53300")));
    assert!(error.is_retryable());
    assert!(error.to_string().starts_with("connect: too many connections for role"), "{error}");
}

#[test]
fn a_host_without_a_name_fails_at_once() {
    let error = refused("postgres://postgres@no-such-host.invalid/postgres");
    assert_eq!(error.kind(), ErrorKind::Connection);
}

#[test]
fn a_url_that_is_none_is_refused_without_quoting_it() {
    for url in ["postgres://u:hunter2@h:port/d", "nonsense=hunter2", "host='hunter2"] {
        let error = Queue::connect(url).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            assert!(!format!("{cause} {cause:?}").contains("hunter2"), "{cause:?}");
            source = cause.source();
        }
    }
}

#[test]
fn a_url_is_read_as_it_stands_in_a_file() {
    let world = World::new();
    for url in [format!("{}\n", world.url), format!("\t{}\r\n", world.url)] {
        let queue = world.builder().connect(&url).unwrap();
        let database: String =
            queue.transaction(|tx| Ok(tx.query_one("select current_database()", &[])?.get(0))).unwrap();
        assert_eq!(Some(&*database), world.config().get_dbname());
    }
}

#[test]
fn what_a_url_of_another_clients_says_is_refused_by_name() {
    let url = "postgres://u:hunter2@127.0.0.1:1/d";
    for (text, words) in [
        (
            format!("{url}?pgbouncer=true"),
            "unknown key pgbouncer in the connection string; use Builder::pooler",
        ),
        (format!("{url}?schema=hunter2"), "unknown key schema in the connection string; use Builder::schema"),
        (
            format!("{url}?target_session_attrs=primary"),
            "target_session_attrs in the connection string must be any, read-",
        ),
        (
            format!("{url}?connect_timeout=hunter2"),
            "connect_timeout in the connection string must be a number of seconds",
        ),
        ("mysql://u:hunter2@h/d".to_owned(), "begins with postgres:// or postgresql://, not mysql://"),
        (" \n".to_owned(), "the connection string is empty"),
    ] {
        let error = Queue::connect(&text).map(drop).unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Invalid, false), "{error}");
        assert!(error.to_string().starts_with("connect: ") && error.to_string().contains(words), "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }
}

#[test]
fn a_dead_first_host_does_not_hide_the_second() {
    let world = World::new();
    let live = world.config();
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut config = with_hosts(&live, dead);
    config.application_name(&world.schema);
    let queue = world.builder().connect_with(config).unwrap();
    queue.push("t", "m").unwrap();
    assert!(world.queue().try_pop("t").unwrap().is_some());
}

/// The driver's time-out ends with the TCP connection: a host that accepts it and says nothing would
/// hold the connect for ever.
#[test]
fn a_silent_first_host_does_not_hide_the_second() {
    let world = World::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = with_hosts(&world.config(), silent.local_addr().unwrap().port());
    let started = Instant::now();
    let queue = world
        .builder()
        .pool_size(1)
        .connect_timeout(Duration::from_millis(300))
        .connect_with(config)
        .unwrap();
    queue.push("t", "m").unwrap();
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
}

/// The configuration with another host before its own.
fn with_hosts(live: &postgres::Config, port: u16) -> postgres::Config {
    let mut config = postgres::Config::new();
    config.user(live.get_user().unwrap()).dbname(live.get_dbname().unwrap_or("postgres"));
    if let Some(password) = live.get_password() {
        config.password(password);
    }
    config.host("127.0.0.1").port(port);
    match &live.get_hosts()[0] {
        postgres::config::Host::Tcp(name) => config.host(name),
        postgres::config::Host::Unix(path) => config.host_path(path),
    };
    config.port(live.get_ports().first().copied().unwrap_or(5432));
    config
}

#[test]
fn target_session_attrs_chooses_the_host() {
    let reader = Server::with(&[("default_transaction_read_only", "on"), ("fsync", "off")]).unwrap();
    let writer = guarded();
    let url = |attrs: &str| {
        format!(
            "host=127.0.0.1,127.0.0.1 port={},{} user=postgres password=correct dbname=postgres target_session_attrs={attrs}",
            reader.port(),
            writer.port()
        )
    };
    let world = World::on(&guarded_url("postgres", "correct", "postgres"));
    let queue = world.builder().connect(&url("read-write")).unwrap();
    queue.push("t", "written").unwrap();
    assert_eq!(text(world.queue().try_pop("t").unwrap().unwrap().payload()), "written");

    let error = world.builder().connect(&url("read-only")).map(drop).unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");

    let only = format!(
        "host=127.0.0.1 port={} user=postgres dbname=postgres target_session_attrs=read-write",
        reader.port()
    );
    let started = Instant::now();
    let error = world.builder().connect(&only).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connection, "{error}");
    assert!(started.elapsed() < AT_ONCE);
}

#[test]
fn hosts_are_tried_in_their_order_or_at_random() {
    let world = World::on(&guarded_url("postgres", "correct", "postgres"));
    // It accepts, and hangs up.
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    thread::spawn(move || {
        for _ in other.incoming() {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let first = |balance: &str| {
        let url = format!(
            "host=127.0.0.1,127.0.0.1 port={port},{} user=postgres password=correct dbname=postgres{balance}",
            guarded().port()
        );
        let before = asked.load(Ordering::SeqCst);
        let queue = world.builder().pool_size(1).connect(&url).unwrap();
        queue.push("t", "m").unwrap();
        asked.load(Ordering::SeqCst) > before
    };
    assert!((0..3).all(|_| first("")));
    assert!((0..3).all(|_| first(" load_balance_hosts=disable")));
    // All alike is as likely as twenty tosses of a coin that are.
    let asked_first = (0..20).filter(|_| first(" load_balance_hosts=random")).count();
    assert!((1..20).contains(&asked_first), "{asked_first}");
}

/// How often opening a queue warns that it is not encrypted.
pub(crate) fn warnings(builder: pushpop_pg::Builder, url: &str) -> usize {
    let notes = Notes::default();
    let queue = notes.of(LevelFilter::WARN, || builder.connect(url)).unwrap();
    queue.push("t", "m").unwrap();
    notes.logged().matches("connections to another host are not encrypted").count()
}

#[test]
fn another_host_without_encryption_is_warned_of() {
    let local = guarded_url("postgres", "correct", "postgres");
    let world = World::on(&local);
    assert_eq!(warnings(world.builder(), &local), 0);
    // An address of this machine, of which that is not to be seen.
    let other = local.replace("127.0.0.1", "0.0.0.0");
    assert_eq!(warnings(world.builder(), &other), 1);
    assert_eq!(warnings(world.builder(), &format!("{other}?hostaddr=127.0.0.1")), 0);
    assert_eq!(warnings(world.builder(), &format!("{local}?hostaddr=0.0.0.0")), 1);
    assert_eq!(warnings(world.builder(), &format!("{other}?sslmode=disable")), 0);
    // What is behind a pooler cannot be asked.
    let unknown = usize::from(!cfg!(feature = "rustls"));
    assert_eq!(warnings(world.builder().pooler(true), &other), unknown);
}

#[test]
fn a_socket_file_is_served_whatever_sslmode_says() {
    let server = Server::shared();
    let world = World::on(&server.url());
    for mode in ["prefer", "require", "verify-full"] {
        let url = format!(
            "host={} port={} user=postgres dbname=postgres sslmode={mode}",
            server.socket_dir().display(),
            server.port()
        );
        world.builder().connect(&url).unwrap().push("t", "m").unwrap();
    }
}

#[test]
#[cfg(not(feature = "rustls"))]
fn encryption_that_takes_the_feature_is_refused() {
    for (params, named) in [
        ("sslmode=require", "sslmode=require"),
        ("sslmode=verify-ca", "sslmode=verify-ca"),
        ("sslmode=verify-full&sslrootcert=root.crt", "sslmode=verify-full"),
        ("sslrootcert=root.crt", "sslrootcert"),
        ("sslrootcert=system", "sslmode=verify-full"),
        ("sslcert=own.crt&sslkey=own.key", "a certificate of the client"),
    ] {
        // Nothing listens there: it is refused before anything is sent.
        let url = format!("postgres://u:hunter2@127.0.0.1:1/d?{params}");
        let error = Queue::connect(&url).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(&format!("{named} needs the feature `rustls`")), "{error}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}

#[test]
fn a_configuration_of_the_callers_is_taken_whole() {
    let world = World::on(&guarded_url("postgres", "correct", "postgres"));
    let mut admin = world.client();
    let name = crate::world::unique("app");
    let mut config = postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(guarded().port())
        .user("postgres")
        .password("correct")
        .dbname("postgres")
        .application_name(&name)
        .options("-c work_mem=12345kB");
    let queue = world.builder().connect_with(config).unwrap();
    queue.push("t", "m").unwrap();
    let sql = "select count(*) from pg_stat_activity where application_name = $1";
    assert!(admin.query_one(sql, &[&name]).unwrap().get::<_, i64>(0) >= 1, "application_name");
    let memory: String = queue.transaction(|tx| Ok(tx.query_one("show work_mem", &[])?.get(0))).unwrap();
    assert_eq!(memory, "12345kB");
}

#[test]
fn the_builders_application_name_is_seen_by_the_server() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let mut client = world.client();
    let sql = "select count(*) from pg_stat_activity where application_name = $1";
    assert_eq!(client.query_one(sql, &[&world.schema]).unwrap().get::<_, i64>(0), 1);
}

#[test]
fn any_number_may_start_at_once_on_an_empty_database() {
    let world = World::new();
    let barrier = Barrier::new(12);
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                barrier.wait();
                let queue = world.open(world.builder().pool_size(1));
                queue.push("t", "m").unwrap();
            });
        }
    });
    let mut client = world.client();
    let versions = client.query_one(&world.sql("select count(*) from pushpop.migrations"), &[]).unwrap();
    assert_eq!(versions.get::<_, i64>(0), 1);
    assert_eq!(crate::world::drain(&world.queue(), "t").len(), 12);
}

#[test]
fn settings_outside_their_limits_are_refused() {
    let millis = Duration::from_millis;
    let b = Queue::builder;
    let cases: Vec<(&str, pushpop_pg::Builder)> = vec![
        ("1 to 1000", b().pool_size(0)),
        ("1 to 1000", b().pool_size(1001)),
        ("100ms", b().connect_timeout(millis(99))),
        ("100ms", b().operation_timeout(millis(99))),
        ("10ms", b().poll_interval(millis(9))),
        ("1 s to 24 h", b().lease(millis(999))),
        ("1 s to 24 h", b().lease(Duration::from_secs(86_401))),
        ("1 to 32767", b().max_attempts(0)),
        ("1 to 32767", b().max_attempts(32_768)),
        ("268435456", b().max_payload((256 << 20) + 1)),
        ("behind a pooler", b().pooler(true).max_payload((16 << 20) + 1)),
        ("at most", b().keep_settled(Duration::MAX)),
        ("1 to 63", b().schema("")),
        ("1 to 63", b().schema("x".repeat(64))),
        ("pg_", b().schema("pg_queue")),
        ("NUL", b().schema("a\0b")),
    ];
    for (words, builder) in cases {
        // Nothing listens there: it is refused before anything is sent.
        let error = builder.connect("postgres://postgres@127.0.0.1:1/postgres").map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(words), "{error} does not name {words}");
    }
    let world = World::new();
    world.builder().pooler(true).max_payload(1 << 20).connect(&world.url).unwrap().push("t", "m").unwrap();
}

#[test]
fn the_longest_settings_are_taken() {
    let world = World::new();
    let builder = world
        .builder()
        .operation_timeout(Duration::MAX)
        .connect_timeout(Duration::MAX)
        .poll_interval(Duration::MAX)
        .lease(Duration::from_secs(86_400))
        .keep_settled(Duration::from_secs(250_000_000_000))
        .max_attempts(None);
    let queue = world.open(builder);
    queue.push("t", "m").unwrap();
    queue.try_pop("t").unwrap().unwrap().complete().unwrap();
}

#[test]
fn a_user_whose_default_isolation_is_serializable_is_served() {
    let mut admin = Client::connect(&guarded_url("postgres", "correct", "postgres"), NoTls).unwrap();
    let (role, url) = guarded_role(&mut admin);
    admin
        .batch_execute(&format!(
            "alter role {role} set default_transaction_isolation = serializable;
             grant create on database postgres to {role}"
        ))
        .unwrap();
    let world = World::on(&url);
    let queue = world.queue();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                // A queue each, so that they meet in the server.
                let queue = world.open(world.builder().pool_size(1));
                for _ in 0..20 {
                    queue.push("t", "m").unwrap();
                    queue.pop_timeout("t", crate::world::SOON).unwrap().unwrap().complete().unwrap();
                }
            });
        }
    });
    assert_eq!(stats(&queue, "t").settled(), 160);

    // A transaction of the user's own is serializable, and the calls work in it.
    let mut client = Client::connect(&url, NoTls).unwrap();
    let mut tx = client.transaction().unwrap();
    queue.push_in(&mut tx, "t", "own").unwrap();
    tx.commit().unwrap();
    assert_eq!(text(queue.try_pop("t").unwrap().unwrap().payload()), "own");
}

/// Behind a pooler no session is told otherwise.
#[test]
fn the_settings_of_a_role_do_no_harm_behind_a_pooler() {
    let mut admin = Client::connect(&guarded_url("postgres", "correct", "postgres"), NoTls).unwrap();
    let (role, url) = guarded_role(&mut admin);
    admin
        .batch_execute(&format!(
            "alter role {role} set default_transaction_isolation = serializable;
             alter role {role} set lock_timeout = 1;
             grant create on database postgres to {role}"
        ))
        .unwrap();
    let world = World::on(&url);
    let open = || {
        let builder = world.builder().pooler(true).pool_size(1).poll_interval(Duration::from_millis(50));
        builder.connect(&url).unwrap()
    };
    // They find the schema that another has installed meanwhile.
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                let queue = open();
                for _ in 0..20 {
                    queue.push("t", "m").unwrap();
                    queue.pop_timeout("t", crate::world::SOON).unwrap().unwrap().complete().unwrap();
                }
            });
        }
    });
    let queue = open();
    assert_eq!(stats(&queue, "t").settled(), 160);

    // A lock that is held for longer than that.
    queue.push("t", "m").unwrap();
    let lease = queue.try_pop("t").unwrap().unwrap();
    let mut holder = world.client();
    let mut tx = holder.transaction().unwrap();
    tx.batch_execute("set local lock_timeout = 0").unwrap();
    tx.execute(&world.sql("select from pushpop.messages for update"), &[]).unwrap();
    let timeouts = || guarded().log().matches("canceling statement due to lock timeout").count();
    let before = timeouts();
    thread::scope(|scope| {
        let completed = scope.spawn(|| lease.complete().map_err(Error::from));
        until("the lock was waited for twice", || timeouts() > before + 1);
        tx.rollback().unwrap();
        completed.join().unwrap().unwrap();
    });
}

#[test]
fn connections_end_with_the_last_handle() {
    let world = World::new();
    let mut client = world.client();
    let queue = world.queue();
    queue.push("t", "m").unwrap();
    let lease = queue.try_pop("t").unwrap().unwrap();
    assert!(queue.pop_timeout("t", Duration::from_millis(50)).unwrap().is_none());
    let mut connections = || {
        let sql = "select count(*) from pg_stat_activity where application_name = $1";
        client.query_one(sql, &[&world.schema]).unwrap().get::<_, i64>(0)
    };
    assert!(connections() >= 1);
    let clone = queue.clone();
    drop(queue);
    clone.push("t", "the clone is the same queue").unwrap();
    drop(clone);
    lease.complete().unwrap();
    until("all connections have ended", || connections() == 0);
}

/// A connector whose thread dies with it.
#[derive(Clone)]
struct Explodes;

impl MakeTlsConnect<Socket> for Explodes {
    type Stream = NoTlsStream;
    type TlsConnect = NoTls;
    type Error = NoTlsError;

    fn make_tls_connect(&mut self, _: &str) -> Result<NoTls, NoTlsError> {
        panic!("a connector panics on purpose")
    }
}

#[test]
fn a_thread_that_died_is_not_told_as_a_time_out() {
    let builder = Queue::builder().tls(Explodes);
    let error = builder.connect(&format!("{}?sslmode=require", crate::world::url())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Database, "{error:?}");
    assert_eq!(
        error.to_string(),
        "connect: thread pushpop-connect of the queue panicked; this is a defect; the call may have taken effect"
    );
    assert!(!error.is_retryable());
}
