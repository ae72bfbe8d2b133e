//! A connection of the queue's: opened with a deadline, its statements prepared once, and
//! closed without anybody waiting for it.

use std::collections::HashMap;
use std::fmt;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use postgres::config::{Host, SslMode, TargetSessionAttrs};
use postgres::tls::{MakeTlsConnect, TlsConnect};
use postgres::types::{IsNull, ToSql, Type};
use postgres::{Client, Config, Row, SimpleQueryMessage, Socket, Statement, Transaction};
use r2d2::ManageConnection;
use r2d2_postgres::PostgresConnectionManager;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::home::Home;
use crate::outside::outside;
use crate::slot::lock;

/// How long a call rests before it is repeated because of a conflict, at first and at last.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LAST_PAUSE: Duration = Duration::from_millis(100);

/// Opens a client; the TLS connector's type ends here.
pub(crate) type Open = dyn Fn(&Config) -> Result<Client, postgres::Error> + Send + Sync;

/// How to reach the server.
pub(crate) struct Route {
    /// One for each host, so that a host that hangs does not hide the next.
    hosts: Vec<Config>,
    open: Arc<Open>,
    connect_timeout: Duration,
    /// What a server has to be, and for how long one that was so is taken to be so still.
    attrs: TargetSessionAttrs,
    pub(crate) trust: Duration,
    /// What a new session is told first; nothing behind a transaction pooler.
    greeting: Option<String>,
    /// When the last call was sent that was not answered in time.
    doubted: Mutex<Option<Instant>>,
    /// Whose connections these are.
    home: Home,
}

/// Erases the type of a TLS connector.
pub(crate) fn open_with<T>(tls: T) -> Arc<Open>
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::TlsConnect: Send,
    T::Stream: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    Arc::new(move |config| PostgresConnectionManager::new(config.clone(), tls.clone()).connect())
}

impl Route {
    pub(crate) fn new(
        config: &Config,
        open: Arc<Open>,
        connect_timeout: Duration,
        trust: Duration,
        greeting: Option<String>,
    ) -> Self {
        Route {
            hosts: split(config, connect_timeout),
            open,
            connect_timeout,
            attrs: config.get_target_session_attrs(),
            trust,
            greeting,
            doubted: Mutex::default(),
            home: Home::here(),
        }
    }

    /// A call that was sent at a certain time was not answered. Other connections may have died with that one, without
    /// a word; each would cost a time-out. So those that were not heard of since are not used any more.
    pub(crate) fn doubt(&self, sent: Instant) {
        let mut doubted = lock(&self.doubted);
        *doubted = (*doubted).max(Some(sent));
    }

    fn is_doubtful(&self, heard: Instant) -> bool {
        lock(&self.doubted).is_some_and(|sent| heard < sent)
    }

    /// Connects to the first host that answers within the time-out and is what the configuration
    /// asks for.
    ///
    /// The driver's own time-out ends with the TCP connection; a server that accepts it and says
    /// nothing would hang us. So a thread of its own does the work, and is left behind if need be.
    pub(crate) fn connect(self: &Arc<Self>, deadline: Instant) -> Result<Client> {
        let mut failed: Option<Error> = None;
        for host in 0..self.hosts.len() {
            let patience = self.connect_timeout.min(deadline.saturating_duration_since(Instant::now()));
            match self.connect_to(host, patience) {
                Ok(client) => return Ok(client),
                Err(e) => failed = Some(e),
            }
        }
        Err(failed.unwrap_or_else(|| Error::invalid("the configuration names no host")))
    }

    /// Makes sure that a server answers, and is still what the configuration asks for: roles change without closing
    /// connections.
    pub(crate) fn prove(&self, client: &mut Client) -> Result<()> {
        let (only_reads, wanted) = match self.attrs {
            TargetSessionAttrs::ReadWrite => ("off", "read-write"),
            TargetSessionAttrs::ReadOnly => ("on", "read-only"),
            _ => return Ok(client.batch_execute("")?),
        };
        let answer = client.simple_query("show transaction_read_only")?;
        let is_so = |message: &SimpleQueryMessage| match message {
            SimpleQueryMessage::Row(row) => row.get(0) == Some(only_reads),
            _ => false,
        };
        if answer.iter().any(is_so) {
            Ok(())
        } else {
            Err(Error::connection(format!("the server is not {wanted} any more")))
        }
    }

    /// Whether a connection that was proved at a certain time has to be proved again before it is used.
    fn is_outdated(&self, proved: Instant) -> bool {
        self.attrs != TargetSessionAttrs::Any && proved.elapsed() > self.trust
    }

    fn connect_to(self: &Arc<Self>, host: usize, patience: Duration) -> Result<Client> {
        let route = Arc::clone(self);
        within(Instant::now() + patience, "pushpop-connect", move || route.greet(host))
            .map_err(|e| e.at(&address(&self.hosts[host])))
    }

    /// Closes a connection. That sends a farewell, and may wait for ever for an earlier reply: a thread of its own does
    /// it. In a child of its process a connection is not closed: it is the parent's.
    pub(crate) fn bury(&self, client: Client) {
        if !self.home.is_here() {
            std::mem::forget(client);
        } else if let Err(e) = spawn("pushpop-close", move || drop(client)) {
            outside(|| tracing::debug!("a connection is closed on this thread: {e}"));
        }
    }

    fn greet(&self, host: usize) -> Result<Client> {
        let mut client = (self.open)(&self.hosts[host])?;
        if let Some(greeting) = &self.greeting {
            client.batch_execute(greeting)?;
        }
        Ok(client)
    }
}

/// The host and port of a configuration that has one of each.
fn address(config: &Config) -> String {
    let port = config.get_ports().first().copied().unwrap_or(5432);
    match (config.get_hosts().first(), config.get_hostaddrs().first()) {
        (Some(Host::Tcp(name)), _) => format!("{name}:{port}"),
        #[cfg(unix)]
        (Some(Host::Unix(path)), _) => path.join(format!(".s.PGSQL.{port}")).display().to_string(),
        (None, Some(address)) => format!("{address}:{port}"),
        (None, None) => format!("port {port}"),
    }
}

/// Starts a thread that nobody waits for.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    match thread::Builder::new().name(name.into()).spawn(work) {
        Ok(_) => Ok(()),
        Err(e) => Err(Error::connection(format!("cannot start a thread: {e}"))),
    }
}

/// Does something that may hang on a thread of its own, and leaves it behind when it does.
pub(crate) fn within<T: Send + 'static>(
    deadline: Instant,
    name: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (reply, answer) = mpsc::sync_channel(1);
    // When nobody waits any more, the result ends here, however long that takes.
    spawn(name, move || drop(reply.send(work())))?;
    let begun = Instant::now();
    let patience = deadline.saturating_duration_since(begun);
    answer.recv_timeout(patience).unwrap_or_else(|e| match e {
        RecvTimeoutError::Timeout => {
            Err(Error::connection(format!("the server did not answer within {patience:.1?}")))
        }
        RecvTimeoutError::Disconnected => Err(Error::died(name)),
    })
}

/// The same configuration once for each of its hosts.
fn split(config: &Config, connect_timeout: Duration) -> Vec<Config> {
    let count = config.get_hosts().len().max(config.get_hostaddrs().len());
    let mut hosts: Vec<Config> = (0..count)
        .map(|i| {
            let mut one = Config::new();
            match config.get_hosts().get(i) {
                Some(Host::Tcp(name)) => {
                    one.host(name);
                }
                #[cfg(unix)]
                Some(Host::Unix(path)) => {
                    one.host_path(path);
                }
                None => {}
            }
            if let Some(address) = config.get_hostaddrs().get(i) {
                one.hostaddr(*address);
            }
            if let Some(port) = config.get_ports().get(i).or_else(|| config.get_ports().first()) {
                one.port(*port);
            }
            copy(config, &mut one, connect_timeout);
            match (config.get_hosts().get(i), config.get_hostaddrs().get(i)) {
                // The name that a certificate is checked for, and without which the driver does not encrypt.
                (None, Some(address)) => {
                    one.host(&address.to_string());
                }
                // A socket file is never encrypted, whatever sslmode says: as libpq has it.
                #[cfg(unix)]
                (Some(Host::Unix(_)), None) => {
                    one.ssl_mode(SslMode::Disable);
                }
                _ => {}
            }
            one
        })
        .collect();
    if config.get_load_balance_hosts() == postgres::config::LoadBalanceHosts::Random {
        // A random number is at hand in an id.
        let seed = uuid::Uuid::new_v4().as_u128() as usize;
        if !hosts.is_empty() {
            let by = seed % hosts.len();
            hosts.rotate_left(by);
        }
    }
    hosts
}

fn copy(from: &Config, to: &mut Config, connect_timeout: Duration) {
    if let Some(user) = from.get_user() {
        to.user(user);
    }
    if let Some(password) = from.get_password() {
        to.password(password);
    }
    if let Some(name) = from.get_dbname() {
        to.dbname(name);
    }
    if let Some(options) = from.get_options() {
        to.options(options);
    }
    if let Some(name) = from.get_application_name() {
        to.application_name(name);
    }
    to.ssl_mode(from.get_ssl_mode());
    to.ssl_negotiation(from.get_ssl_negotiation());
    to.channel_binding(from.get_channel_binding());
    to.target_session_attrs(from.get_target_session_attrs());
    to.connect_timeout(from.get_connect_timeout().copied().unwrap_or(connect_timeout));
    to.keepalives(from.get_keepalives());
    to.keepalives_idle(from.get_keepalives_idle());
    if let Some(interval) = from.get_keepalives_interval() {
        to.keepalives_interval(interval);
    }
    if let Some(retries) = from.get_keepalives_retries() {
        to.keepalives_retries(retries);
    }
    if let Some(timeout) = from.get_tcp_user_timeout() {
        to.tcp_user_timeout(*timeout);
    }
}

/// A statement of the queue's, with the types of its parameters.
pub(crate) struct Call {
    pub(crate) name: &'static str,
    pub(crate) sql: String,
    pub(crate) types: &'static [Type],
}

/// A parameter that the driver must not write into its log: it may be a payload or a token.
struct Veiled<'a>(&'a (dyn ToSql + Sync));

impl fmt::Debug for Veiled<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

impl ToSql for Veiled<'_> {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.to_sql_checked(ty, out)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn to_sql_checked(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.to_sql_checked(ty, out)
    }
}

fn veil<'a>(params: &[&'a (dyn ToSql + Sync)]) -> Vec<Veiled<'a>> {
    params.iter().map(|param| Veiled(*param)).collect()
}

fn typed<'a>(params: &'a [Veiled<'_>], types: &[Type]) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    params.iter().zip(types).map(|(param, ty)| (param as _, ty.clone())).collect()
}

impl Call {
    /// Runs the call in a caller's transaction, on its thread.
    pub(crate) fn run_in(
        &self,
        tx: &mut Transaction<'_>,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>> {
        Ok(tx.query_typed(&self.sql, &typed(&veil(params), self.types))?)
    }
}

/// A place for a connection, as the pool hands them out. It is opened when it is first used, and
/// again when it broke: the pool itself never waits for a server.
pub(crate) struct Link {
    route: Arc<Route>,
    client: Option<Client>,
    /// When the server answered last.
    heard: Instant,
    /// When it was last what the configuration asks for.
    proved: Instant,
    broke: bool,
    renewed: bool,
    /// By the name of the call; `None` behind a transaction pooler, whether we were told of it or have found out.
    statements: Option<HashMap<&'static str, Statement>>,
    named_statements: bool,
}

impl Link {
    /// The client, connected. Whatever is sent on a connection of the pool begins here: in a child of its process
    /// nothing is.
    pub(crate) fn client(&mut self, deadline: Instant) -> Result<&mut Client> {
        self.route.home.check()?;
        if self.client.as_ref().is_some_and(Client::is_closed)
            || self.client.is_some() && self.route.is_doubtful(self.heard)
        {
            self.discard();
        }
        if let Some(client) = self.client.as_mut().filter(|_| self.route.is_outdated(self.proved)) {
            match self.route.prove(client) {
                Ok(()) => self.proved = Instant::now(),
                Err(e) => {
                    outside(|| tracing::debug!("leaving a connection: {e}"));
                    self.discard();
                }
            }
        }
        if self.client.is_none() {
            self.statements = self.named_statements.then(HashMap::new);
            self.client = Some(self.route.connect(deadline)?);
            self.heard = Instant::now();
            self.proved = self.heard;
            self.renewed |= std::mem::take(&mut self.broke);
        }
        self.client.as_mut().ok_or_else(|| Error::connection("not connected"))
    }

    /// Whether a connection was opened in place of one that broke, since this was asked last.
    pub(crate) fn was_renewed(&mut self) -> bool {
        std::mem::take(&mut self.renewed)
    }

    /// Runs a call, and returns its rows. It is repeated where that may help, since every call of the queue's may be: on a
    /// new connection if this one turns out to be broken, and for a while after a conflict with another transaction.
    pub(crate) fn run(
        &mut self,
        deadline: Instant,
        call: &Call,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>> {
        let begun = Instant::now();
        let (mut fresh, mut unknown, mut pause) = (self.client.is_none(), false, FIRST_PAUSE);
        let patient_until = begun + lock_patience(deadline.saturating_duration_since(begun));
        loop {
            let error = match self.run_once(deadline, call, params) {
                Ok(rows) => return Ok(rows),
                Err(e) => e.indeterminate(unknown),
            };
            if error.breaks_connection() && !fresh && Instant::now() < deadline {
                outside(|| tracing::debug!("the connection broke, trying a new one: {error}"));
                (fresh, unknown) = (true, error.is_indeterminate());
            } else if error.is_conflict() && Instant::now() + pause < patient_until {
                outside(|| tracing::debug!("repeating what was undone: {error}"));
                // Those who have met do not meet again.
                thread::sleep(pause.mul_f64(0.5 + f64::from(Uuid::new_v4().as_bytes()[0]) / 512.0));
                pause = (pause * 2).min(LAST_PAUSE);
            } else {
                return Err(error);
            }
        }
    }

    fn run_once(
        &mut self,
        deadline: Instant,
        call: &Call,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>> {
        let result = match self.try_run(deadline, call, params) {
            // The function was replaced meanwhile, or the caller has let go of all statements.
            Err(e) if matches!(e.sqlstate(), Some("0A000" | "26000")) && self.statements.is_some() => {
                self.forget_statements();
                self.try_run(deadline, call, params)
            }
            other => other,
        };
        let result = match result {
            Err(e) if e.is_mixed_up() && self.statements.is_some() => {
                outside(|| tracing::warn!("going on without named statements on this connection: {e}"));
                self.statements = None;
                self.try_run(deadline, call, params)
            }
            Err(e) if e.is_of_notifying() => {
                outside(|| tracing::warn!("going on without the notification: {e}"));
                self.run_quietly(call, params)
            }
            other => other,
        };
        if result.as_ref().is_err_and(Error::breaks_connection) {
            self.discard();
        } else {
            self.heard = Instant::now();
        }
        result
    }

    fn try_run(
        &mut self,
        deadline: Instant,
        call: &Call,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>> {
        self.client(deadline)?;
        let Some(client) = &mut self.client else {
            return Err(Error::connection("not connected"));
        };
        let veiled = veil(params);
        let Some(statements) = &mut self.statements else {
            return client.query_typed(&call.sql, &typed(&veiled, call.types)).map_err(unanswered);
        };
        let statement = match statements.get(call.name) {
            Some(statement) => statement,
            None => {
                let prepared = client.prepare_typed(&call.sql, call.types)?;
                statements.entry(call.name).or_insert(prepared)
            }
        };
        let params: Vec<&(dyn ToSql + Sync)> = veiled.iter().map(|param| param as _).collect();
        client.query(statement, &params).map_err(unanswered)
    }

    /// Runs a call that nobody is notified of: those that wait will look for themselves.
    fn run_quietly(&mut self, call: &Call, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        let Some(client) = &mut self.client else {
            return Err(Error::connection("not connected"));
        };
        let mut tx = client.transaction().map_err(unanswered)?;
        tx.batch_execute("set local pushpop_pg.notify = off")?;
        let rows = call.run_in(&mut tx, params)?;
        tx.commit().map_err(unanswered)?;
        Ok(rows)
    }

    fn forget_statements(&mut self) {
        if let Some(statements) = &mut self.statements {
            statements.clear();
        }
    }

    /// Takes the client away, connected.
    pub(crate) fn take_client(&mut self, deadline: Instant) -> Result<Client> {
        self.client(deadline)?;
        self.client.take().ok_or_else(|| Error::connection("not connected"))
    }

    /// Returns a client that was taken away; its statements are known still.
    pub(crate) fn put_back(&mut self, client: Client) {
        self.client = Some(client);
        self.heard = Instant::now();
    }

    /// Lets go of the client, if there is one.
    pub(crate) fn discard(&mut self) {
        self.forget_statements();
        if let Some(client) = self.client.take() {
            self.broke = true;
            self.route.bury(client);
        }
    }
}

/// How long a lock may be waited for, and a conflict repeated, in a call with so much time.
pub(crate) fn lock_patience(time: Duration) -> Duration {
    (time / 4).min(Duration::from_secs(2))
}

/// Once a call was sent, a connection that breaks leaves it open whether it took effect. An error that the server
/// answers, and goes on, says so itself.
pub(crate) fn unanswered(error: postgres::Error) -> Error {
    let error = Error::from(error);
    let ended = error.ends_session();
    error.indeterminate(ended)
}

impl Drop for Link {
    fn drop(&mut self) {
        self.discard();
    }
}

/// Gives the pool its links.
pub(crate) struct Links {
    pub(crate) route: Arc<Route>,
    pub(crate) named_statements: bool,
}

impl ManageConnection for Links {
    type Connection = Link;
    type Error = Error;

    fn connect(&self) -> Result<Link> {
        Ok(Link {
            route: Arc::clone(&self.route),
            client: None,
            heard: Instant::now(),
            proved: Instant::now(),
            broke: false,
            renewed: false,
            statements: None,
            named_statements: self.named_statements,
        })
    }

    fn is_valid(&self, _: &mut Link) -> Result<()> {
        Ok(())
    }

    fn has_broken(&self, _: &mut Link) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_logged_shows_no_parameter() {
        assert_eq!(format!("{:?}", [Veiled(&"hunter2"), Veiled(&7_i64)]), "[.., ..]");
    }

    #[test]
    fn what_answered_since_is_not_doubted() {
        let second = Duration::from_secs(1);
        let route = Route::new(&Config::new(), open_with(postgres::NoTls), second, second, None);
        let (earlier, sent) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        assert!(!route.is_doubtful(earlier));
        route.doubt(sent);
        route.doubt(earlier);
        assert!(route.is_doubtful(earlier) && !route.is_doubtful(sent));
    }
}
