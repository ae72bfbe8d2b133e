//! How a queue is opened.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use postgres::config::{Host, SslMode};
use postgres::tls::{MakeTlsConnect, TlsConnect};
use postgres::{Client, Config, NoTls, Socket};

use crate::calls::Calls;
use crate::engine::{Engine, Settings};
use crate::error::{Error, Result};
use crate::limits;
use crate::link::{Links, Open, Route, lock_patience, open_with};
use crate::observer::{Observer, Silent};
use crate::outside::outside;
use crate::queue::{Handle, Queue};
use crate::schema::Schema;
use crate::url::Asked;
#[cfg(not(feature = "rustls"))]
use crate::url::Check;

/// The settings of a [`Queue`], each with a default.
///
/// ```no_run
/// use std::time::Duration;
/// use pushpop_pg::Queue;
///
/// # fn main() -> Result<(), pushpop_pg::Error> {
/// let queue = Queue::builder()
///     .pool_size(8)
///     .lease(Duration::from_secs(60))
///     .connect("postgres://localhost/app")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct Builder {
    pool_size: usize,
    schema: String,
    application_name: String,
    connect_timeout: Duration,
    operation_timeout: Duration,
    poll_interval: Duration,
    lease: Duration,
    keep_settled: Duration,
    max_attempts: Option<u16>,
    max_payload: usize,
    migrate: bool,
    pooler: bool,
    /// By the user's own connector.
    open: Option<Arc<Open>>,
    observer: Arc<dyn Observer>,
}

impl Default for Builder {
    fn default() -> Self {
        Builder {
            pool_size: 4,
            schema: "pushpop".into(),
            application_name: "pushpop".into(),
            connect_timeout: Duration::from_secs(5),
            operation_timeout: Duration::from_secs(30),
            poll_interval: Duration::from_secs(1),
            lease: Duration::from_secs(300),
            keep_settled: Duration::from_secs(3600),
            max_attempts: Some(25),
            max_payload: limits::PAYLOAD,
            migrate: true,
            pooler: false,
            open: None,
            observer: Arc::new(Silent),
        }
    }
}

impl Builder {
    /// How many connections the queue has at most, beside the one that listens: 1 to 1,000.
    /// Default: 4.
    pub fn pool_size(mut self, connections: usize) -> Self {
        self.pool_size = connections;
        self
    }

    /// The schema in which everything lives: 1 to 63 bytes. Default: `pushpop`.
    pub fn schema(mut self, name: impl Into<String>) -> Self {
        self.schema = name.into();
        self
    }

    /// The name by which the server knows the connections, unless the URL has one. Default:
    /// `pushpop`.
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        self.application_name = name.into();
        self
    }

    /// How long a connection may take to be opened, for each host: at least 100 ms. Default: 5 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout.min(limits::FOREVER);
        self
    }

    /// How long a call may take, whatever happens to the server or the network: at least 100 ms.
    /// Default: 30 s.
    pub fn operation_timeout(mut self, timeout: Duration) -> Self {
        self.operation_timeout = timeout.min(limits::FOREVER);
        self
    }

    /// How often a waiting pop looks for itself, should a notification have been lost: at least
    /// 10 ms; what is longer than an hour counts as an hour. Default: 1 s.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.poll_interval = interval.min(limits::POLL);
        self
    }

    /// How long a popped message is its consumer's, if neither the pop ([`Queue::with_lease`]) nor the
    /// topic ([`Topic::set`](crate::Topic::set)) says: 1 s to 24 h. Default: 5 min.
    #[doc(alias = "visibility")]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long completed and discarded messages are kept, to be found; zero deletes them when they
    /// are settled. Default: 1 h.
    #[doc(alias = "retention")]
    pub fn keep_settled(mut self, time: Duration) -> Self {
        self.keep_settled = time;
        self
    }

    /// How often a message is tried, if neither [it](crate::NewMessage::max_attempts) nor its
    /// [topic](crate::Topic::set) says: 1 to 32,767, or `None` for no limit. Default: 25.
    pub fn max_attempts(mut self, most: impl Into<Option<u16>>) -> Self {
        self.max_attempts = most.into();
        self
    }

    /// How many bytes a payload may have, up to 256 MiB. Default: 16 MiB. Behind a
    /// [pooler](Self::pooler) it cannot be more than that.
    pub fn max_payload(mut self, bytes: usize) -> Self {
        self.max_payload = bytes;
        self
    }

    /// Whether to install or migrate the schema. Default: `true`. See
    /// [`install_sql`](Self::install_sql).
    pub fn migrate(mut self, yes: bool) -> Self {
        self.migrate = yes;
        self
    }

    /// How connections are encrypted: any connector for the `postgres` crate, instead of what the feature
    /// `rustls` would do. Default: none.
    ///
    /// Whether and how it checks the server's certificate is up to the connector: `verify-ca` and
    /// `verify-full` in a URL then mean `require`, and `sslrootcert`, `sslcert` and `sslkey` are not read.
    ///
    /// ```no_run
    /// # #[cfg(feature = "rustls")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::sync::Arc;
    /// use pushpop_pg::Queue;
    /// use rustls::{ClientConfig, RootCertStore, crypto::ring::default_provider};
    /// use tokio_postgres_rustls::MakeRustlsConnect;
    ///
    /// let roots = RootCertStore::empty(); // and in it the authorities that are trusted
    /// let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
    ///     .with_safe_default_protocol_versions()?
    ///     .with_root_certificates(roots)
    ///     .with_no_client_auth();
    /// let queue = Queue::builder()
    ///     .tls(MakeRustlsConnect::new(config))
    ///     .connect("postgres://db.example.com/app?sslmode=require")?;
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "rustls"))]
    /// # fn main() {}
    /// ```
    pub fn tls<T>(mut self, connector: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::TlsConnect: Send,
        T::Stream: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        self.open = Some(open_with(connector));
        self
    }

    /// Whether the URL leads to a pooler in transaction mode, such as pgbouncer. The queue then uses
    /// no named statements, no session settings and no notifications: waiting pops poll. Without it, a session that
    /// another client has used is noticed, warned of, and worked with as well as can be. Default: `false`.
    ///
    /// Statements of your own within [`Queue::transaction`] should have no names either: take the driver's `query_typed`,
    /// as `query` and `execute` name theirs, and another client of the pooler may have left the same name behind.
    pub fn pooler(mut self, yes: bool) -> Self {
        self.pooler = yes;
        self
    }

    /// Who is told what the queue does. Default: nobody.
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observer = Arc::new(observer);
        self
    }

    /// Returns the SQL that installs the schema or brings it up to date, for those who migrate by other means. Run it
    /// as the role that is to own the schema, with each release. What is there already is left alone, but for
    /// the rights: everyone loses what a restore without privileges may have given them.
    ///
    /// Default: none; [`connect`](Self::connect) does the same. It waits up to 2 s for transactions that use the tables.
    ///
    /// ```
    /// let sql = pushpop_pg::Queue::builder().schema("jobs").install_sql();
    /// assert!(sql.contains("create schema \"jobs\""));
    /// ```
    pub fn install_sql(&self) -> String {
        Schema::new(&self.schema).install_sql()
    }

    /// Opens the queue at a URL, or with a connection string of keys and values.
    ///
    /// White space around it is ignored. `sslmode` and its like are those of other clients: see "Is it encrypted?"
    /// in the [crate's documentation](crate). Files that they name are read here, once.
    ///
    /// Blocks for as long as the connection, and the migration if there is one, take.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) for a URL that is none or has an unknown key or value, a setting
    /// outside its limits, a certificate that cannot be read, or encryption that takes the feature `rustls`.
    /// [`Connection`](crate::ErrorKind::Connection), [`Denied`](crate::ErrorKind::Denied),
    /// [`Schema`](crate::ErrorKind::Schema): with the cause.
    pub fn connect(self, url: &str) -> Result<Queue> {
        crate::url::read(url)
            .and_then(|(config, asked)| self.open_queue(config, &asked))
            .map_err(|e| e.during("connect", None))
    }

    /// Opens the queue with a configuration of the driver's: several hosts, `target_session_attrs`,
    /// a password that stands in no URL. It has no word for checks of the server's certificate: for those take
    /// [`connect`](Self::connect), or a connector of your own with [`tls`](Self::tls).
    ///
    /// # Errors
    ///
    /// Those of [`connect`](Self::connect).
    pub fn connect_with(self, config: Config) -> Result<Queue> {
        self.open_queue(config, &Asked::default()).map_err(|e| e.during("connect", None))
    }

    fn open_queue(self, mut config: Config, asked: &Asked) -> Result<Queue> {
        self.check()?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            config.host("localhost");
        }
        if config.get_user().is_none() {
            config.user(
                &std::env::var("PGUSER")
                    .or_else(|_| std::env::var("USER"))
                    .unwrap_or_else(|_| "postgres".into()),
            );
        }
        if config.get_application_name().is_none() && !self.pooler {
            config.application_name(&self.application_name);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(self.operation_timeout.min(Duration::from_secs(86_400)));
        }
        let encrypts = self.open.is_some() || cfg!(feature = "rustls");
        let open = self.opener(&config, asked)?;
        let schema = Schema::new(&self.schema);
        let greeting = (!self.pooler).then(|| self.greeting());
        let route = Arc::new(Route::new(&config, open, self.connect_timeout, self.trust(), greeting));
        // `prefer`, the default, goes on without encryption where there is none.
        let is_doubtful = config.get_ssl_mode() == SslMode::Prefer && is_remote(&config);
        // A pooler's session says how the pooler reaches the server, not how we reach the pooler.
        let asks = is_doubtful && encrypts && !self.pooler;
        let is_plain = self.prepare(&route, &schema, asks)?;
        if is_plain {
            outside(|| {
                tracing::warn!(
                    "connections to another host are not encrypted: the server did not agree to it"
                )
            });
        } else if is_doubtful && !encrypts {
            outside(|| {
                tracing::warn!(
                    "connections to another host are not encrypted: there is neither the feature `rustls` nor a Builder::tls"
                );
            });
        }

        let settings = Settings {
            pool_size: self.pool_size,
            operation_timeout: self.operation_timeout,
            poll_interval: self.poll_interval,
            lease: self.lease,
            keep_settled: self.keep_settled,
            max_attempts: self.max_attempts.map_or(0, i32::from),
            max_payload: self.max_payload,
            listens: !self.pooler,
        };
        let links = Links { route, named_statements: !self.pooler };
        let engine = Engine::new(settings, Calls::new(&schema), links, self.observer)?;
        let keeper = Arc::clone(&engine);
        let handle = Arc::new(Handle { engine });
        thread::Builder::new()
            .name("pushpop-keep".into())
            .spawn(move || keeper.keep())
            .map_err(|e| Error::connection(format!("cannot start a thread: {e}")))?;
        Ok(Queue { handle, lease: None })
    }

    fn check(&self) -> Result<()> {
        let tenth = Duration::from_millis(100);
        limits::pool_size(self.pool_size)?;
        limits::schema(&self.schema)?;
        limits::at_least("the connect time-out", tenth, self.connect_timeout)?;
        limits::at_least("the operation time-out", tenth, self.operation_timeout)?;
        limits::at_least("the poll interval", Duration::from_millis(10), self.poll_interval)?;
        limits::lease(self.lease)?;
        limits::keep(self.keep_settled)?;
        limits::max_payload(self.max_payload)?;
        if self.pooler && self.max_payload > limits::PAYLOAD {
            return Err(Error::invalid(
                "behind a pooler payloads have at most 16 MiB: no session can be told otherwise",
            ));
        }
        self.max_attempts.map_or(Ok(()), limits::max_attempts)
    }

    /// How long a connection is taken to be what it was when it was opened.
    fn trust(&self) -> Duration {
        self.operation_timeout.clamp(Duration::from_secs(1), Duration::from_secs(30))
    }

    /// What every new session is told: nothing that a role or a database sets may end an idle connection, make a call
    /// fail, or take the time of just-in-time compilation. A database without an encoding sends its text as it is.
    fn greeting(&self) -> String {
        let millis = |time: Duration| time.as_millis().clamp(1, 2_000_000_000);
        // The time-outs first: those of the role may be shorter than this takes.
        format!(
            "set statement_timeout = {};
             set lock_timeout = {};
             set default_transaction_isolation = 'read committed';
             set jit = off;
             set client_min_messages = warning;
             set tcp_keepalives_idle = 30;
             set tcp_keepalives_interval = 10;
             set tcp_keepalives_count = 3;
             set tcp_user_timeout = {};
             set pushpop_pg.max_payload = {};
             select pg_catalog.set_config(s.name, v.value, false)
             from pg_catalog.pg_settings s,
                  (values ('client_connection_check_interval', '10s'), ('idle_session_timeout', '0'), ('client_encoding',
                    case when pg_catalog.getdatabaseencoding() operator(pg_catalog.=) 'SQL_ASCII' then 'SQL_ASCII' end)
                  ) v(name, value)
             where s.name operator(pg_catalog.=) v.name and v.value is not null",
            millis(self.operation_timeout),
            millis(lock_patience(self.operation_timeout)),
            // As on our side. It ends a session whose client was stopped, and with it what that holds back.
            millis(self.operation_timeout),
            self.max_payload,
        )
    }

    /// By the user's connector, else as the URL asks.
    fn opener(&self, config: &Config, asked: &Asked) -> Result<Arc<Open>> {
        if let Some(own) = &self.open {
            return Ok(Arc::clone(own));
        }
        let by_tcp = !config.get_hostaddrs().is_empty()
            || config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(_)));
        match config.get_ssl_mode() {
            SslMode::Disable => Ok(open_with(NoTls)),
            _ if !by_tcp => Ok(open_with(NoTls)),
            mode => by_feature(mode, asked),
        }
    }

    /// Connects once, before anything else: so that what is wrong is known at once. Returns whether it is known
    /// that nothing encrypts the connection; that costs a question.
    fn prepare(&self, route: &Arc<Route>, schema: &Schema, asks: bool) -> Result<bool> {
        let deadline = Instant::now() + self.connect_timeout * 4 + self.operation_timeout;
        let mut client = route.connect(deadline)?;
        let (route, schema, migrate) = (Arc::clone(route), schema.clone(), self.migrate);
        // What it warns of reaches those who listen on this thread, too.
        let listens = tracing::dispatcher::get_default(Clone::clone);
        crate::link::within(deadline, "pushpop-migrate", move || {
            tracing::dispatcher::with_default(&listens, || {
                let prepared = schema.prepare(&mut client, migrate, deadline);
                let prepared = prepared.map(|()| asks && is_plain(&mut client));
                route.bury(client);
                prepared
            })
        })
    }
}

/// By rustls, as the URL asks.
#[cfg(feature = "rustls")]
fn by_feature(mode: SslMode, asked: &Asked) -> Result<Arc<Open>> {
    crate::tls::open(mode, asked)
}

#[cfg(not(feature = "rustls"))]
fn by_feature(mode: SslMode, asked: &Asked) -> Result<Arc<Open>> {
    let wants = match asked {
        Asked { check: Check::Chain, .. } => "sslmode=verify-ca",
        Asked { check: Check::Host, .. } => "sslmode=verify-full",
        _ if mode == SslMode::Require => "sslmode=require",
        Asked { root: Some(_), .. } => "sslrootcert",
        Asked { identity: (None, None), .. } => return Ok(open_with(NoTls)),
        _ => "a certificate of the client",
    };
    Err(Error::invalid(format!(
        "{wants} needs the feature `rustls` of pushpop-pg, or a connector by Builder::tls"
    )))
}

/// Whether one of the hosts is another machine, as far as one can tell.
fn is_remote(config: &Config) -> bool {
    let (hosts, addresses) = (config.get_hosts(), config.get_hostaddrs());
    (0..hosts.len().max(addresses.len())).any(|i| match (addresses.get(i), hosts.get(i)) {
        (Some(address), _) => !address.is_loopback(),
        (None, Some(Host::Tcp(name))) => {
            name != "localhost" && !name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
        }
        _ => false,
    })
}

fn is_plain(client: &mut Client) -> bool {
    let sql = "select ssl from pg_catalog.pg_stat_ssl where pid = pg_catalog.pg_backend_pid()";
    let row = client.query_typed(sql, &[]);
    row.is_ok_and(|rows| rows.first().is_some_and(|row| row.try_get(0).is_ok_and(|ssl: bool| !ssl)))
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("pool_size", &self.pool_size)
            .field("schema", &self.schema)
            .field("connect_timeout", &self.connect_timeout)
            .field("operation_timeout", &self.operation_timeout)
            .field("poll_interval", &self.poll_interval)
            .field("lease", &self.lease)
            .field("keep_settled", &self.keep_settled)
            .field("max_attempts", &self.max_attempts)
            .finish_non_exhaustive()
    }
}
