//! A PostgreSQL-backed blocking message queue for threaded Rust programs.
//!
//! ```no_run
//! use pushpop_pg::Queue;
//!
//! let queue = Queue::connect("postgres://localhost/app")?;
//! queue.push("mail", "hello")?;
//!
//! let lease = queue.pop("mail")?;
//! println!("{} bytes", lease.payload().len());
//! lease.complete()?;
//! # Ok::<(), pushpop_pg::Error>(())
//! ```
//!
//! # What is it?
//!
//! A *message* is any bytes, with an id, and headers if need be. It is pushed to a *topic*, a string that
//! names one independent queue, and waits there until it is *ready*: at once, after a delay, or at a
//! time. Whoever pops it holds a [`Lease`]: until its deadline nobody else gets the message. The holder
//! settles it:
//!
//! | call | what becomes of the message | counts as an attempt |
//! |---|---|---|
//! | [`complete`](Lease::complete) | done; kept for a while, so that it can be found | |
//! | [`discard`](Lease::discard) | of no further value; otherwise the same | |
//! | [`defer`](Lease::defer) | popped again after a delay | no |
//! | [`release`](Lease::release) | popped again at once, at its old place | no |
//! | [`fail`](Lease::fail) | popped again after a backoff, or *dead* when out of attempts | yes |
//! | nothing | popped again when the lease has expired, or dead when out of attempts | yes |
//!
//! Delivery is *at least once*: a consumer that dies, or takes longer than its lease, is not the last
//! one to get the message. So make the work idempotent, or do it in the transaction that completes the
//! message ([`Lease::complete_in`]), or let the system downstream refuse an older
//! [`fence`](Message::fence). A lease that expired and was handed on cannot settle any more: the call says
//! [`LeaseLost`](ErrorKind::LeaseLost), and changes nothing.
//!
//! Messages of a topic are handed out by the time at which they become ready, ties in the order of
//! their pushes. One producer and one consumer see strict first in, first out.
//!
//! # How is a queue shared between threads?
//!
//! A [`Queue`] is `Clone`, `Send` and `Sync`. Borrow it within [`std::thread::scope`], or clone it: clones are
//! the same queue, with the same connections. Calls of many threads share statements and commits:
//! what piles up while one statement is under way travels in the next. So use one queue for all threads of a
//! program, not one for each.
//!
//! A process that forks keeps its queues. In the child every call on them, and on their leases and workers, fails at once
//! with [`Invalid`](ErrorKind::Invalid) and sends nothing: the connections are the parent's, and the threads that serve them
//! exist only there. Open another queue after the fork. Statements of your own on a connection of the parent, as in a
//! [`transaction`](Queue::transaction) within which you fork, are yours to avoid.
//!
//! # What blocks, and for how long?
//!
//! | call | waits for a message | returns within |
//! |---|---|---|
//! | [`push`](Queue::push), [`push_many`](Queue::push_many), settles, looks | | the operation time-out (30 s) |
//! | [`try_pop`](Queue::try_pop) | no | the operation time-out |
//! | [`pop_timeout`](Queue::pop_timeout), [`pop_many`](Queue::pop_many), [`pop_any`](Queue::pop_any) | yes | its own time-out |
//! | [`pop`](Queue::pop), [`iter`](Queue::iter) | yes | when there is one, or the queue is closed |
//! | [`push_in`](Queue::push_in), [`complete_in`](Lease::complete_in), [`discard_in`](Lease::discard_in) | | what the caller's connection allows |
//! | [`transaction`](Queue::transaction) | | the operation time-out for a connection, then as long as its closure |
//!
//! A caller never touches a socket: it waits for the queue's own threads, with a deadline. This holds even when
//! the network or the server is frozen. [`Error::is_indeterminate`] then says whether the call may have
//! taken effect. The last two rows are the exception: they run on the caller's thread.
//!
//! Waiting pops ride through restarts and failovers of the server: [`pop`](Queue::pop) and
//! [`iter`](Queue::iter) for as long as it takes, [`pop_timeout`](Queue::pop_timeout) and
//! [`pop_many`](Queue::pop_many) until their time-out, after which they return the error.
//!
//! A waiting pop is woken by a push of the same process at once, by one of another process through a
//! notification, and when a delayed message is due. Should a notification be lost, the poll interval (1 s) is
//! the longest that a message waits for a consumer that is there.
//!
//! # How many connections and threads does it use?
//!
//! | what | how many |
//! |---|---|
//! | connections that carry out calls | as many as calls need, up to [`pool_size`](Builder::pool_size) (4) |
//! | the connection that listens | 1, from the first pop that has to wait on; none behind a [pooler](Builder::pooler) |
//! | the connection of a [`Worker`] | 1, from the first lease that it has to extend |
//! | threads | one for each connection, one that keeps the time, and those of the pool; for a worker one more; others for a moment |
//!
//! Plan with the pool and two more. A waiting pop holds no connection and sends no queries, so
//! hundreds of waiting threads need no larger pool. [`Queue::transaction`] takes a connection of the pool for
//! as long as it runs. A connection that does not answer any more is left behind with its thread, and
//! another takes its place: after an outage there may be up to 16 more for a while.
//!
//! A session is told `statement_timeout` (the operation time-out), `lock_timeout` (a quarter of it, at most
//! 2 s), `default_transaction_isolation = 'read committed'`, `client_min_messages`, and the server's
//! keepalives, so that a client that vanished holds no locks for long. `idle_session_timeout` is off, as pooled
//! connections are idle by nature, and so is `jit`. Within [`Queue::transaction`] both
//! time-outs are off, and `jit` is as the role has it. Behind a pooler in transaction mode nothing of this is set.
//! No other setting of a role or a database changes what the queue does; but where transactions are read-only by
//! default nothing can be pushed, which is what such a setting is for.
//!
//! # How are messages handled by a worker?
//!
//! A [`Worker`] has a number of threads for each topic, and a handler, which says by its return value what becomes
//! of the message. An error or a panic is a failed attempt; the thread lives on.
//!
//! ```no_run
//! use pushpop_pg::{Outcome, Queue, Worker};
//!
//! fn send(mail: &[u8]) -> Result<(), std::io::Error> {
//!     println!("{} bytes", mail.len());
//!     Ok(())
//! }
//!
//! # fn main() -> Result<(), pushpop_pg::Error> {
//! let queue = Queue::connect("postgres://localhost/app")?;
//! let worker = Worker::new(&queue).handle("mail", 8, |job| {
//!     if job.payload().is_empty() {
//!         return Ok(Outcome::Discard);
//!     }
//!     send(job.payload())?;
//!     Ok(Outcome::Complete)
//! });
//! let ended = worker.run()?;
//! println!("{ended}");
//! # Ok(())
//! # }
//! ```
//!
//! The leases of all handlers that run are extended together, every third of their length, by a thread with a connection
//! of its own. So a lease need not outlast a handler: its length says how soon the messages of a program that died are
//! free again. [`Job::is_lost`] says whether that failed, [`Job::should_stop`] whether the worker is stopping too.
//!
//! [`Stopper::stop`], [`Queue::close`], or with `Worker::signals` SIGTERM or SIGINT, end it: no more messages are popped,
//! and handlers that run finish. What outlives the [grace period](Worker::grace) is given back without burning an attempt.
//!
//! # How is it shut down?
//!
//! [`Queue::close`] ends waiting pops with [`Closed`](ErrorKind::Closed), and iterators. Pushes, pops
//! and transactions are refused from then on; leases that are held can still be settled. A message that
//! was on its way to a pop that has ended is released at once, and loses no attempt.
//!
//! ```no_run
//! use std::io;
//! use std::thread;
//! use pushpop_pg::Queue;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let queue = Queue::connect("postgres://localhost/app")?;
//! thread::scope(|scope| {
//!     for _ in 0..4 {
//!         scope.spawn(|| {
//!             for lease in queue.iter("mail").flatten() {
//!                 println!("{} bytes", lease.payload().len());
//!                 if let Err(e) = lease.complete() {
//!                     eprintln!("{e}");
//!                 }
//!             }
//!         });
//!     }
//!     // Until somebody presses Enter.
//!     let pressed = io::stdin().read_line(&mut String::new());
//!     queue.close();
//!     pressed
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! When the last clone of a queue and its last lease are gone, its threads finish what they were given, and end
//! with their connections. Nothing has to run elsewhere: what is left to do, such as leases that
//! expire and history that is deleted, is done by whichever clients are there.
//!
//! # How is a topic looked after?
//!
//! By [`Queue::topic`], or the SQL functions of the same names. A topic is [paused](Topic::pause) and resumed
//! for all clients, and has [defaults](Topic::set) of its own. A message that waits is
//! [cancelled](Topic::cancel) or [rescheduled](Topic::reschedule). Messages that are out of attempts are
//! [listed](Topic::dead), [redriven](Topic::redrive_all) or [purged](Topic::purge_dead):
//!
//! ```no_run
//! use pushpop_pg::Queue;
//!
//! # fn main() -> Result<(), pushpop_pg::Error> {
//! let queue = Queue::connect("postgres://localhost/app")?;
//! let mail = queue.topic("mail");
//! for message in mail.dead(100)? {
//!     println!("{} failed {} times: {:?}", message.id(), message.attempt(), message.last_error());
//! }
//! println!("{} are tried again", mail.redrive_all()?);
//! # Ok(())
//! # }
//! ```
//!
//! # Is it encrypted?
//!
//! As `sslmode` in the URL says, and as other clients have it, if the crate's feature `rustls` is on:
//!
//! | `sslmode` | encrypted | who can read along or pose as the server |
//! |---|---|---|
//! | `disable` | no | whoever is on the way |
//! | `prefer`, the default | if the server agrees | whoever is on the way and interferes |
//! | `require` | yes, or it fails | whoever is on the way and interferes; with `sslrootcert` as with `verify-ca` |
//! | `verify-ca` | yes, or it fails | whoever has a certificate of the same authority, for whatever host |
//! | `verify-full` | yes, or it fails | nobody |
//!
//! ```text
//! postgres://app@db.example.com/app?sslmode=verify-full&sslrootcert=/etc/ssl/db-authority.pem
//! ```
//!
//! `sslrootcert` is a PEM file with the certificates of the authorities that are trusted. Without it
//! `~/.postgresql/root.crt` is taken, if there is one. `sslrootcert=system` are the authorities that the system trusts, and
//! means `verify-full`. `sslcert` and `sslkey` are a certificate and a key of the client's own, both PEM files. A file that is
//! asked for and cannot be read is [`Invalid`](ErrorKind::Invalid); all are read once, when the queue is opened. A certificate
//! that is refused is an error of kind [`Connection`](ErrorKind::Connection), and says why.
//! `channel_binding=require` binds the password to the connection, so that nobody in between can use it;
//! `sslnegotiation=direct` is for PostgreSQL 17 and newer. A socket file is never encrypted, whatever `sslmode` says.
//!
//! What rustls is strict about: a host is among the certificate's alternative names, its common name counts for nothing;
//! certificates are of version 3; and a server's certificate that is an authority's itself is refused where certificates are
//! checked.
//!
//! Without the feature nothing is encrypted, unless by a connector of your own ([`Builder::tls`]), which goes first in any
//! case: native-tls, OpenSSL, or rustls set up otherwise. A URL that asks for more is then [`Invalid`](ErrorKind::Invalid),
//! not ignored. With `prefer`, a connection to another host that ends up without encryption is warned of, once for each
//! queue.
//!
//! # Does it work with an async runtime?
//!
//! It is a blocking library. From async code call it with the runtime's `spawn_blocking`, and have
//! waiting pops on threads of their own. [`Queue::transaction`] is refused on all threads of a runtime, those
//! of `spawn_blocking` included: call it from a [`std::thread`].
//!
//! # What are the defaults?
//!
//! | setting | default | limit |
//! |---|---|---|
//! | [`with_lease`](Queue::with_lease), else that of the [topic](TopicSettings::with_lease), else [`lease`](Builder::lease) | 5 min | 1 s to 24 h |
//! | [`pool_size`](Builder::pool_size) | 4, plus one that listens | 1 to 1,000 |
//! | [`connect_timeout`](Builder::connect_timeout), for each host | 5 s | at least 100 ms |
//! | [`operation_timeout`](Builder::operation_timeout) | 30 s | at least 100 ms |
//! | [`poll_interval`](Builder::poll_interval) | 1 s | 10 ms to 1 h |
//! | [`keep_settled`](Builder::keep_settled) | 1 h | 0 (deleted when settled) to 7,900 years |
//! | [`Worker::grace`] | 30 s | |
//! | [`Worker::limit`] | none | |
//! | max attempts of the [message](NewMessage::max_attempts), else of the [topic](TopicSettings::with_max_attempts), else [`max_attempts`](Builder::max_attempts) | 25 | 1 to 32,767, or none |
//! | backoff after a [failure](Lease::fail), or that of the [topic](TopicSettings::with_backoff) | 1 s, doubling to 1 h, less up to a quarter | 0 to 7,900 years |
//! | [`schema`](Builder::schema) | `pushpop` | 1 to 63 bytes, not `pg_..`, no `$` |
//! | [`application_name`](Builder::application_name) | `pushpop` | |
//! | [`migrate`](Builder::migrate) | yes | |
//! | `sslmode` of the URL | `prefer` | |
//! | [`tls`](Builder::tls) | none, or what the feature `rustls` does | |
//! | [`pooler`](Builder::pooler) | no | |
//!
//! # Limits
//!
//! What is outside is refused before anything is sent or written, with an error that names the limit.
//! The SQL functions check the same.
//!
//! | what | limit |
//! |---|---|
//! | topic | 1 to 255 bytes of UTF-8, no NUL |
//! | payload | 16 MiB; up to 256 MiB by [`max_payload`](Builder::max_payload); may be empty |
//! | headers of a message | 64, of 16 KiB together, no NUL |
//! | messages and bytes in one [`push_many`](Queue::push_many) | 10,000 and 256 MiB |
//! | messages in one [`pop_many`](Queue::pop_many), [`peek`](Topic::peek) or [`dead`](Topic::dead) | 1 to 1,000 |
//! | topics of one [`pop_any`](Queue::pop_any) | 1 to 1,000 |
//! | threads of one handler of a [`Worker`] | 1 to 10,000 |
//! | ids in one [`redrive`](Topic::redrive) | 10,000 |
//! | delay, backoff, age | 250,000,000,000 s, about 7,900 years |
//! | [`ready_at`](NewMessage::ready_at) | years 2 to 9998 |
//! | [`failures`](Message::failures) of a message | the newest 10, of 8,192 characters each; longer ones are cut |
//! | messages and bytes in one statement | 1,000 and 16 MiB, unless one call alone has more |
//!
//! In a database of another encoding than UTF-8, a topic or header with a character that it does not have is
//! [`Invalid`](ErrorKind::Invalid); in the reason of a failure such a character is replaced, as in `\u{2192}`. A
//! database of the encoding SQL_ASCII does not check text, and is warned of at [`connect`](Queue::connect).
//!
//! # Which rights does it need?
//!
//! PostgreSQL 13 or newer; no extension, no superuser. To install or migrate: `connect`, and `create` on the
//! database; afterwards the schema is owned by the role that did so. A role that only uses the queue:
//!
//! ```sql
//! grant connect on database app to worker;
//! grant usage on schema pushpop to worker;
//! grant execute on all functions in schema pushpop to worker;
//! ```
//!
//! A role that only watches it, by `select * from pushpop.overview \watch` in psql, or the views `in_flight`
//! and `dead_messages`:
//!
//! ```sql
//! grant connect on database app to watcher;
//! grant usage on schema pushpop to watcher;
//! grant select on pushpop.overview, pushpop.in_flight, pushpop.dead_messages to watcher;
//! grant execute on function pushpop.topic_names(), pushpop.stats(text) to watcher;
//! ```
//!
//! Neither has rights on the tables: functions and views read them with those of their owner. Grant again after a
//! migration, which may bring new functions.
//!
//! The least rights for producers, consumers and monitors stand in `docs/operations.md`.
//!
//! # How is it operated?
//!
//! `docs/operations.md`, in the repository and in the package of this crate, is a checklist for production: connections,
//! leases, long transactions, poolers, rights, shutdown, backups, capacity, alerts. And it lists symptoms, most of them
//! texts of errors and log lines, with what they come from and what to do.
//!
//! # Which errors are there, and which are worth a retry?
//!
//! Empty is no error. [`Error::kind`] tells apart what a program may want to tell apart;
//! [`Error::is_retryable`] says whether the same call may succeed later, and
//! [`Error::is_indeterminate`] whether it may have taken effect already. Both a push of the same
//! [`NewMessage`] and a settle of the same lease can be repeated: if the first one had succeeded, the second
//! changes nothing. A settle that failed gives the lease back:
//!
//! ```no_run
//! use pushpop_pg::{Error, Lease};
//!
//! fn complete(mut lease: Lease) -> Result<(), Error> {
//!     loop {
//!         match lease.complete().map_err(|failed| failed.into_parts()) {
//!             Ok(()) => return Ok(()),
//!             Err((again, e)) if e.is_retryable() && !again.remaining().is_zero() => lease = again,
//!             Err((_, e)) => return Err(e),
//!         }
//!     }
//! }
//! ```
//!
//! After an error of [`push_in`](Queue::push_in) or [`complete_in`](Lease::complete_in) the caller's
//! transaction is aborted. The driver's `commit()` then returns `Ok` although the server has rolled back;
//! [`Queue::transaction`] tells the truth. An error of your own, made by [`Error::other`], rolls it back.
//! When [it is not known](Error::is_indeterminate) whether it was committed, repeat it with the same lease: if it
//! was, `complete_in` says [`LeaseLost`](ErrorKind::LeaseLost), and the effect is there once.
//!
//! # What does it log?
//!
//! Events of the `tracing` crate, which go to `log` where no subscriber
//! is set:
//!
//! | level | what |
//! |---|---|
//! | error | an [`Observer`] or a worker's handler panicked; a message ran out of attempts; a handler outlived its limit or the grace period; a worker could not settle a message |
//! | warn | a worker's handler failed, or runs on and on; leases were not extended in time; the server is lost, once for each outage; a call that was never answered is written off; no thread could be started; the server is on another host, and nothing encrypts the connection; `sslrootcert` is of no use with `prefer` |
//! | info | the schema was installed or migrated; the server is back; a worker was signalled, or has ended |
//! | debug | upkeep that was put off, the listener's troubles, connections that broke and were replaced, releases |
//!
//! And spans, on the thread of the caller, each around its whole call and what that waits for
//! ([`complete_many`](Queue::complete_many) has one for each topic):
//!
//! | span | level | fields |
//! |---|---|---|
//! | `pushpop.push` | debug | `topic`, `count`; `id`, `traceparent` |
//! | `pushpop.pop` | debug | `topic`, `count`; `id`, `attempt`, `traceparent` |
//! | `pushpop.settle` | debug | `topic`, `count`, `outcome`; `id`, `traceparent` |
//! | `pushpop.handle`, around a worker's handler | info | `topic`, `id`, `attempt`, `traceparent` |
//!
//! What stands after the semicolon is there if the call was on one message. `traceparent` is the header of
//! this name, if the message has it. Push a message with that of the present trace, and its consumer
//! finds it in the spans and by [`Message::header`]: `examples/tracing.rs` shows it. Spans that nobody wants
//! cost next to nothing. Where they go to `log`, a call is a line of target `pushpop_pg::span`.
//!
//! No payload, token, password or other header stands in any of them. For figures see
//! [`Queue::topics`], [`Topic::stats`], [`Observer`], and the feature `metrics`.
//!
//! # How are schema and crate versions kept together?
//!
//! [`Queue::connect`] installs the schema or brings it up to date, under a lock, so that any number of
//! processes may start at once. Those who migrate by other means run [`Builder::install_sql`], for each release
//! again, and say [`migrate(false)`](Builder::migrate).
//!
//! A migration waits for transactions that use the tables, without holding up those that push and pop meanwhile.
//! [`Queue::connect`] warns of what it waits for; if it takes too long, the error names it by pid and application.
//!
//! The schema records its version and the oldest release of this crate that it still serves. So in a
//! rolling upgrade the first new process migrates, and the old ones go on. A crate accepts a newer schema
//! that still serves it, and refuses any other with [`ErrorKind::Schema`]. A migration that ends the service
//! for older releases is a breaking change, and named in the changelog.
//!
//! # Can other languages take part?
//!
//! Yes. The engine is a set of SQL functions, and this crate calls the same ones:
//! `select * from pushpop.pop('mail')`. The README has their arguments, and examples for psql, Python and Node.js.
//!
//! **Strings are text, bytes are `bytea`.** `push` and `push_many` take payloads of type `text`, `jsonb` and `bytea`. A string to
//! which a driver gives no type is text, and arrives as it was sent. Cast bytes where the driver does not name their type
//! (`$1::bytea`), and name the type of an array (`$2::text[]`); one of unknown type is refused. Payloads come out as `bytea`;
//! `pushpop.as_text(payload)` and `pushpop.as_json(payload)` are null where the payload is no text or no JSON.
//!
//! # Features
//!
//! * `json`: `NewMessage::json` and `Message::json`, by serde.
//! * `metrics`: `Metrics`, an [`Observer`] that counts by the `metrics` crate, whose exporters serve
//!   Prometheus and others.
//! * `rustls`: encryption as `sslmode` and `sslrootcert` of the URL ask for it, by rustls and ring; a C compiler
//!   builds the latter. See "Is it encrypted?".
//! * `signals`: `Worker::signals`, by the `signal-hook` crate.

mod backoff;
mod builder;
mod calls;
mod control;
mod crew;
mod dead;
mod engine;
mod error;
mod flight;
mod home;
mod job;
mod keeper;
mod lane;
mod lease;
mod limits;
mod link;
mod listener;
mod message;
#[cfg(feature = "metrics")]
mod metrics;
mod observer;
mod outside;
mod queue;
mod schema;
#[cfg(feature = "signals")]
mod signals;
mod slot;
mod span;
mod stopping;
mod task;
mod text;
mod times;
#[cfg(feature = "rustls")]
mod tls;
mod topic;
mod transaction;
mod upkeep;
mod url;
mod watch;
mod worker;

pub use backoff::Backoff;
pub use builder::Builder;
pub use control::TopicSettings;
pub use error::{Error, ErrorKind, Result, SettleError};
pub use job::{BoxError, Job, Outcome};
pub use lease::Lease;
pub use message::{Failure, Message, NewMessage, State};
pub use observer::{Abandoned, Flight, Handled, LeaseLost, Observer, Popped, Pushed, Settled, Stuck};
pub use queue::{Iter, Queue};
pub use stopping::{Ended, Stopper};
pub use topic::{Stats, Topic};
pub use worker::Worker;

#[cfg(feature = "metrics")]
pub use self::metrics::Metrics;

pub use {postgres, time, uuid};
