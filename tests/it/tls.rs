//! Encryption by the feature `rustls`: what is asked of a server, and what of its certificate.

use std::fmt::Write as _;
use std::io::Read as _;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fs, thread};

use postgres::{Client, NoTls};
use pushpop_pg::{Error, ErrorKind, Queue};
use pushpop_server::Server;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing_subscriber::filter::LevelFilter;

use crate::connect::warnings;
use crate::spans::Notes;
use crate::world::{SOON, World, guarded_url, pop, text, until, until_listening, until_wanted};

/// What nobody may see. The servers here trust everybody, but for two roles.
const SECRET: &str = "hunter2";

/// Certificates are made by the command that every Debian with a PostgreSQL has.
const OPENSSL: &str = "
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:true
[ca]
default_ca = ours
[ours]
new_certs_dir = .
database = index.txt
rand_serial = yes
default_md = sha256
policy = policy
copy_extensions = copy
unique_subject = no
[policy]
commonName = supplied
";

/// A server with certificates: two authorities, and what the first has signed.
struct Encrypted {
    server: Server,
    dir: PathBuf,
}

impl Encrypted {
    fn start(certificate: &str) -> Encrypted {
        // Which is not what PostgreSQL 13 prefers.
        let server = Server::with(&[("fsync", "off"), ("password_encryption", "scram-sha-256")]).unwrap();
        let dir = server.data_dir().join("tls");
        fs::create_dir(&dir).unwrap();
        let it = Encrypted { server, dir };
        it.hand_over("");
        fs::write(it.dir.join("openssl.cnf"), OPENSSL).unwrap();
        fs::write(it.dir.join("index.txt"), "").unwrap();
        fs::write(it.dir.join("garbage.crt"), "no certificate").unwrap();
        for authority in ["authority", "stranger"] {
            it.request(authority, &["-x509", "-extensions", "authority", "-days", "30"]);
        }
        it.certificate("localhost", "20200101000000Z", "20991231235959Z");
        it.certificate("expired", "20200101000000Z", "20200201000000Z");
        it.certificate("certified", "20200101000000Z", "20991231235959Z");

        let rules = "hostssl all bound 127.0.0.1/32 scram-sha-256
                     hostssl all certified 127.0.0.1/32 cert
                     hostssl all plain 127.0.0.1/32 reject
                     host all all 127.0.0.1/32 trust\n";
        fs::write(it.server.data_dir().join("pg_hba.conf"), rules).unwrap();
        let mut admin = Client::connect(&it.server.url(), NoTls).unwrap();
        for role in ["bound", "certified", "plain"] {
            let sql = format!("create role {role} superuser login password '{SECRET}'");
            admin.batch_execute(&sql).unwrap();
        }
        for (name, value) in [
            ("ssl", "on".to_owned()),
            ("ssl_ca_file", "tls/authority.crt".to_owned()),
            ("ssl_cert_file", format!("tls/{certificate}.crt")),
            ("ssl_key_file", format!("tls/{certificate}.key")),
        ] {
            admin.batch_execute(&format!("alter system set {name} = '{value}'")).unwrap();
        }
        admin.batch_execute("select pg_reload_conf()").unwrap();
        until("the server encrypts", || {
            let mut client = Client::connect(&it.server.url(), NoTls).unwrap();
            client.query_one("show ssl", &[]).unwrap().get::<_, &str>(0) == "on"
        });
        it
    }

    fn openssl(&self, args: &[&str]) {
        let output = Command::new("openssl").args(args).current_dir(&self.dir).output();
        let output = output.expect("these tests need the command openssl");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Makes a key, and a request for a certificate, or the certificate itself.
    fn request(&self, name: &str, more: &[&str]) {
        let (key, out) = (format!("{name}.key"), format!("{name}.crt"));
        let subject = format!("/CN={name}");
        let mut args = vec!["req", "-new", "-config", "openssl.cnf", "-subj", &subject];
        args.extend(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
        args.extend(["-keyout", &key, "-out", &out]);
        args.extend(more);
        self.openssl(&args);
        // The server reads only what nobody else can.
        self.hand_over(&key);
    }

    /// Gives a file to the server's account, which has to read the keys, and to remove all of it in the end.
    fn hand_over(&self, path: &str) {
        let owner = fs::metadata(self.server.data_dir()).unwrap();
        chown(self.dir.join(path), Some(owner.uid()), Some(owner.gid())).unwrap();
    }

    fn certificate(&self, name: &str, from: &str, to: &str) {
        let alternative = format!("subjectAltName=DNS:{}", name.replace("expired", "localhost"));
        self.request(name, &["-addext", &alternative]);
        let (request, out) = (format!("{name}.csr"), format!("{name}.crt"));
        fs::rename(self.dir.join(&out), self.dir.join(&request)).unwrap();
        let mut args = vec!["ca", "-batch", "-notext", "-config", "openssl.cnf"];
        args.extend(["-cert", "authority.crt", "-keyfile", "authority.key"]);
        args.extend(["-startdate", from, "-enddate", to, "-in", &request, "-out", &out]);
        self.openssl(&args);
    }

    fn file(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    /// A schema on this server; connections beside the queue are not encrypted.
    fn world(&self) -> World {
        World::on(&self.server.url())
    }

    /// A URL by a host, with parameters. A certificate's file is named by `{name}`.
    fn url_as(&self, user: &str, host: &str, params: &str) -> String {
        let files = format!("{}/", self.dir.display()).replace('/', "%2F");
        let params = params.replace('{', &files).replace('}', ".crt");
        format!("postgres://{user}:{SECRET}@{host}:{}/postgres?{params}", self.server.port())
    }

    fn url(&self, host: &str, params: &str) -> String {
        self.url_as("postgres", host, params)
    }
}

/// Its certificate is for `localhost`.
fn encrypted() -> &'static Encrypted {
    static ENCRYPTED: OnceLock<Encrypted> = OnceLock::new();
    ENCRYPTED.get_or_init(|| Encrypted::start("localhost"))
}

#[track_caller]
fn connect(world: &World, url: &str) -> Queue {
    world.builder().connect(url).unwrap_or_else(|e| panic!("{e}"))
}

#[track_caller]
fn refused(url: &str) -> Error {
    let error = Queue::connect(url).map(drop).unwrap_err();
    assert!(error.to_string().starts_with("connect: "), "{error}");
    let mut all = format!("{error} {error:?}");
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        write!(all, " {cause} {cause:?}").unwrap();
        source = cause.source();
    }
    assert!(!all.contains(SECRET), "{all}");
    error
}

/// Which of the queue's connections are encrypted.
fn encryption(world: &World) -> Vec<bool> {
    let sql = "select ssl from pg_stat_ssl join pg_stat_activity using (pid) where application_name = $1";
    let rows = world.client().query(sql, &[&world.schema]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[track_caller]
fn assert_encrypted(world: &World, queue: &Queue, yes: bool) {
    queue.push("t", "m").unwrap();
    pop(queue, "t").complete().unwrap();
    let all = encryption(world);
    assert!(!all.is_empty() && all.iter().all(|ssl| *ssl == yes), "{all:?}");
}

#[test]
fn smoke() {
    let world = encrypted().world();
    let url = encrypted().url("localhost", "sslmode=verify-full&sslrootcert={authority}");
    assert_encrypted(&world, &connect(&world, &url), true);
}

#[test]
fn every_connection_is_encrypted() {
    let world = encrypted().world();
    let builder = || world.builder().poll_interval(Duration::from_secs(60));
    let url = encrypted().url("127.0.0.1", "sslmode=require");
    let (queue, other) = (builder().connect(&url).unwrap(), builder().connect(&url).unwrap());
    let mut client = world.client();
    thread::scope(|scope| {
        let popped = scope.spawn(|| queue.pop_timeout("t", SOON * 3).unwrap().expect("a message"));
        until_listening(&world, &mut client);
        until_wanted(&world, &mut client, "t");
        other.push("t", "woken").unwrap();
        let lease = popped.join().unwrap();
        assert_eq!(text(lease.payload()), "woken");
        queue
            .transaction(|tx| {
                let sql = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
                assert!(tx.query_one(sql, &[])?.get::<_, bool>(0));
                queue.push_in(tx, "done", "m")?;
                lease.complete_in(tx)
            })
            .unwrap();
    });
    assert!(other.try_pop("done").unwrap().is_some());
    // Two that carry out calls, and the one that listens.
    let all = encryption(&world);
    assert!(all.len() >= 3 && all.iter().all(|ssl| *ssl), "{all:?}");
    let large = vec![b'x'; 3 << 20];
    queue.push("large", large.clone()).unwrap();
    assert!(pop(&other, "large").payload() == large);
}

#[test]
fn the_right_host_is_asked_for_by_verify_full_only() {
    let world = encrypted().world();
    for mode in ["verify-ca", "require"] {
        let url = encrypted().url("127.0.0.1", &format!("sslmode={mode}&sslrootcert={{authority}}"));
        assert_encrypted(&world, &connect(&world, &url), true);
    }
    let full = "sslmode=verify-full&sslrootcert={authority}";
    let error = refused(&encrypted().url("127.0.0.1", full));
    assert_eq!(error.kind(), ErrorKind::Connection);
    assert!(error.to_string().contains("certificate not valid for name \"127.0.0.1\""), "{error}");

    // A name that leads to another server's address.
    let error = refused(&encrypted().url("db.example.com", &format!("{full}&hostaddr=127.0.0.1")));
    assert!(error.to_string().contains("certificate not valid for name \"db.example.com\""), "{error}");
    connect(&world, &encrypted().url("localhost", &format!("{full}&hostaddr=127.0.0.1")));
}

#[test]
fn an_unknown_authority_is_refused() {
    for mode in ["require", "verify-ca", "verify-full"] {
        let error =
            refused(&encrypted().url("localhost", &format!("sslmode={mode}&sslrootcert={{stranger}}")));
        assert_eq!(error.kind(), ErrorKind::Connection);
        assert!(error.to_string().contains("invalid peer certificate: UnknownIssuer"), "{error}");
    }
    // Nor does a public authority know it.
    let error = refused(&encrypted().url("localhost", "sslrootcert=system"));
    let known = ["UnknownIssuer", "this system has no certificates"];
    assert!(known.iter().any(|words| error.to_string().contains(words)), "{error}");
}

#[test]
fn an_expired_certificate_is_refused() {
    let expired = Encrypted::start("expired");
    for mode in ["require", "verify-ca", "verify-full"] {
        let error = refused(&expired.url("localhost", &format!("sslmode={mode}&sslrootcert={{authority}}")));
        assert_eq!(error.kind(), ErrorKind::Connection);
        assert!(error.to_string().contains("certificate expired"), "{error}");
    }
    // Where nothing is checked, that is not either.
    let world = expired.world();
    assert_encrypted(&world, &connect(&world, &expired.url("localhost", "sslmode=require")), true);
}

#[test]
fn a_root_file_that_is_none_is_refused() {
    for mode in ["require", "verify-ca", "verify-full"] {
        for (file, why) in [("missing", "No such file"), ("garbage", "no items found")] {
            let error =
                refused(&encrypted().url("localhost", &format!("sslmode={mode}&sslrootcert={{{file}}}")));
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            let text = error.to_string();
            assert!(text.contains("sslrootcert ") && text.contains(&encrypted().file(file)), "{error}");
            assert!(text.contains(why), "{error}");
            assert!(std::error::Error::source(&error).is_some());
        }
    }
    // Where there is nothing to check, the file is not read.
    let world = encrypted().world();
    let url = encrypted().url("localhost", "sslmode=disable&sslrootcert={missing}");
    assert_encrypted(&world, &connect(&world, &url), false);
}

/// In processes of their own, each with a home that has the file or has not, and a system that trusts our authority or
/// not.
#[test]
fn authorities_are_found_at_home_and_in_the_system() {
    const CHILD: &str = "PUSHPOP_TEST_FINDS_AUTHORITIES";
    if let Ok(url) = std::env::var(CHILD) {
        match Queue::builder().migrate(false).schema("no_such_schema").connect(&url) {
            Ok(_) => unreachable!("there is no schema"),
            Err(e) => println!("said: {e}"),
        }
        return;
    }
    let with = encrypted().dir.join("with");
    fs::create_dir_all(with.join(".postgresql")).unwrap();
    encrypted().hand_over("with");
    encrypted().hand_over("with/.postgresql");
    let say = |home: &Path, system: &str, params: &str| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tls::authorities_are_found_at_home_and_in_the_system", "--nocapture"])
            .env(CHILD, encrypted().url("localhost", params))
            .env("HOME", home)
            .env("SSL_CERT_FILE", encrypted().file(system))
            .env_remove("SSL_CERT_DIR")
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let connected = "has not been installed";
    for (root, mode, words) in [
        ("authority", "verify-full", connected),
        ("authority", "require", connected),
        ("stranger", "verify-ca", "UnknownIssuer"),
        // As libpq has it: with the file there, `require` is `verify-ca`.
        ("stranger", "require", "UnknownIssuer"),
        ("stranger", "prefer", connected),
    ] {
        fs::copy(encrypted().dir.join(format!("{root}.crt")), with.join(".postgresql/root.crt")).unwrap();
        let said = say(&with, "authority.crt", &format!("sslmode={mode}"));
        assert!(said.contains(words), "{root} {mode}: {said}");
    }
    for (mode, words) in
        [("verify-full", "~/.postgresql/root.crt"), ("verify-ca", "sslrootcert=FILE"), ("require", connected)]
    {
        let said = say(&encrypted().dir, "authority.crt", &format!("sslmode={mode}"));
        assert!(said.contains(words), "{mode}: {said}");
    }
    for (system, words) in [
        ("authority.crt", connected),
        ("stranger.crt", "UnknownIssuer"),
        ("garbage.crt", "has no certificates"),
    ] {
        for params in ["sslrootcert=system", "sslrootcert=system&sslmode=verify-full"] {
            let said = say(&with, system, params);
            assert!(said.contains(words), "{system}: {said}");
        }
    }
}

#[test]
fn a_server_without_encryption_is_refused_unless_that_is_preferred_only() {
    let url = |params: &str| format!("{}?{params}", guarded_url("postgres", "correct", "postgres"));
    for mode in ["require", "verify-ca", "verify-full"] {
        let root = encrypted().file("authority.crt");
        let error = refused(&url(&format!("sslmode={mode}&sslrootcert={root}")));
        assert_eq!(error.kind(), ErrorKind::Connection);
        assert!(error.to_string().contains("server does not support TLS"), "{error}");
    }
    let world = World::on(&url(""));
    for params in ["", "sslmode=prefer", "sslmode=disable"] {
        assert_encrypted(&world, &connect(&world, &url(params)), false);
    }
}

#[test]
fn encryption_is_preferred_to_none() {
    let world = encrypted().world();
    for params in ["", "sslmode=prefer", "sslmode=prefer&sslrootcert={stranger}"] {
        assert_encrypted(&world, &connect(&world, &encrypted().url("localhost", params)), true);
    }
    let config = encrypted().url("localhost", "").parse().unwrap();
    assert_encrypted(&world, &world.builder().connect_with(config).unwrap(), true);
    // An address without a name is as good.
    let address =
        format!("hostaddr=127.0.0.1 port={} user=postgres dbname=postgres", encrypted().server.port());
    assert_encrypted(&world, &connect(&world, &address), true);
    assert_encrypted(&world, &connect(&world, &encrypted().url("localhost", "sslmode=disable")), false);
}

#[test]
fn who_may_not_encrypt_is_served_without_unless_encryption_is_required() {
    let world = encrypted().world();
    let url = |params| encrypted().url_as("plain", "localhost", params);
    assert_encrypted(&world, &connect(&world, &url("")), false);
    let error = refused(&url("sslmode=require"));
    assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Denied, Some("28000")));
    // Another way is tried for that reason only, and the first error is told.
    let error = refused(&encrypted().url_as("bound", "localhost", "").replace(SECRET, "wrong"));
    assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Denied, Some("28P01")));
}

#[test]
fn a_password_is_bound_to_the_channel() {
    let world = encrypted().world();
    let url =
        |params: &str| encrypted().url_as("bound", "localhost", &format!("{params}&channel_binding=require"));
    for params in ["sslmode=require", "sslmode=verify-full&sslrootcert={authority}"] {
        assert_encrypted(&world, &connect(&world, &url(params)), true);
    }
    let error = refused(&url("sslmode=require").replace(SECRET, "wrong"));
    assert_eq!((error.kind(), error.sqlstate()), (ErrorKind::Denied, Some("28P01")));
    // Nothing to bind it to.
    let error = refused(&url("sslmode=disable").replace("bound", "postgres"));
    assert!(error.to_string().contains("channel binding"), "{error}");
}

#[test]
fn a_client_may_prove_who_it_is() {
    let world = encrypted().world();
    let url = |params: &str| {
        let key = encrypted().file("certified.key");
        let params = params.replace("KEY", &format!("sslkey={key}"));
        encrypted().url_as("certified", "localhost", &format!("sslmode=require&{params}"))
    };
    assert_encrypted(&world, &connect(&world, &url("sslcert={certified}&KEY")), true);
    let error = refused(&url(""));
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    for (params, words) in [
        ("sslcert={certified}", "sslcert and sslkey go together"),
        ("KEY", "sslcert and sslkey go together"),
        ("sslcert={missing}&KEY", "missing.crt cannot be used: "),
        ("sslcert={certified}&sslkey={garbage}", "sslkey "),
        ("sslcert={authority}&KEY", "authority.crt cannot be used: "),
    ] {
        let error = refused(&url(params));
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(words), "{params}: {error}");
    }
}

#[test]
fn a_connector_of_the_users_own_goes_first() {
    let connector = |root: &str| {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(encrypted().file(root)).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        MakeRustlsConnect::new(config)
    };
    let world = encrypted().world();
    let open = |root, url: String| world.builder().tls(connector(root)).connect(&url);
    // What the URL says of certificates is not looked at, but that there has to be encryption.
    for params in ["", "sslmode=require", "sslmode=verify-full", "sslmode=verify-ca&sslrootcert={missing}"] {
        let queue = open("authority.crt", encrypted().url("localhost", params)).unwrap();
        assert_encrypted(&world, &queue, true);
        let error = open("stranger.crt", encrypted().url("localhost", params)).map(drop).unwrap_err();
        assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    }
    let url = format!("{}?sslmode=verify-full", guarded_url("postgres", "correct", "postgres"));
    let error = open("authority.crt", url).map(drop).unwrap_err();
    assert!(error.to_string().contains("server does not support TLS"), "{error}");
    let queue = open("authority.crt", encrypted().url("localhost", "sslmode=disable")).unwrap();
    assert_encrypted(&world, &queue, false);
}

#[test]
fn another_host_is_warned_of_where_nothing_encrypts() {
    let world = encrypted().world();
    assert_eq!(warnings(world.builder(), &encrypted().url("0.0.0.0", "")), 0);
    assert_eq!(warnings(world.builder(), &encrypted().url_as("plain", "0.0.0.0", "")), 1);
    let useless = encrypted().url("localhost", "sslrootcert={missing}");
    let notes = Notes::default();
    notes.of(LevelFilter::WARN, || connect(&world, &useless));
    assert!(notes.logged().contains("no certificate is checked with sslmode=prefer"), "{}", notes.logged());
}

/// Servers since 17 take it; they expect the name of the protocol within.
#[test]
fn a_direct_negotiation_begins_with_tls() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::scope(|scope| {
        let hello = scope.spawn(|| {
            let mut hello = vec![0; 4096];
            let length = listener.accept().unwrap().0.read(&mut hello).unwrap();
            hello.truncate(length);
            hello
        });
        let url = format!("postgres://u:{SECRET}@127.0.0.1:{port}/d?sslmode=require&sslnegotiation=direct");
        assert_eq!(refused(&url).kind(), ErrorKind::Connection);
        let hello = hello.join().unwrap();
        assert_eq!(hello[0], 0x16, "no handshake: {hello:?}");
        assert!(hello.windows(10).any(|w| w == b"postgresql"), "no protocol: {hello:?}");
    });
}

#[test]
fn keys_and_values_say_the_same() {
    let world = encrypted().world();
    let root = encrypted().file("authority.crt").replace('e', "\\e");
    let text = |host: &str| {
        format!(
            "sslmode = 'verify-full' sslrootcert='{root}' host={host} hostaddr=127.0.0.1 port={} \
             user=postgres password='a \\' sslmode=disable' dbname=postgres",
            encrypted().server.port()
        )
    };
    assert_encrypted(&world, &connect(&world, &text("localhost")), true);
    let error = refused(&text("db.example.com"));
    assert!(error.to_string().contains("not valid for name"), "{error}");
}
