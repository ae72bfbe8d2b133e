//! A pooler in transaction mode between the queues and the shared server, where the tests are told to have one.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use pushpop_server::Server;

use crate::world::until;

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
