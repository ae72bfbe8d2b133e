//! pgmq, by the SQL functions that its crate installs.

use std::ops::Range;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use postgres::types::Json;
use postgres::{Client, NoTls, Row, Statement};
use pushpop_measure::{Result, Tally, together};
use sqlx08::PgPool;
use tokio::runtime::Builder;

use crate::message::Message;
use crate::system::{Peer, System};
use crate::work::{LOOKS, MOMENT, Work, starved};

/// More are slower.
const CONNECTIONS: usize = 32;

/// How long a message that was read stays invisible, in seconds.
const INVISIBLE: i32 = 300;

/// Up to 32 connections for all threads, with prepared statements.
pub(crate) struct Pgmq {
    /// One message a call, or as many as the work says.
    pub(crate) many: bool,
    /// Messages are archived, rather than deleted.
    pub(crate) archive: bool,
}

impl Peer for Pgmq {
    fn name(&self) -> &'static str {
        if self.archive { "pgmq, archived" } else { "pgmq, deleted" }
    }

    fn schema(&self) -> &'static str {
        "pgmq"
    }

    fn install(&self, url: &str) -> Result<()> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let pool = PgPool::connect(url).await?;
            pgmq::install::install_sql_from_embedded(&pool).await?;
            pool.close().await;
            Ok::<_, pushpop_measure::Error>(())
        })?;
        Client::connect(url, NoTls)?.execute("select pgmq.create('peers')", &[])?;
        Ok(())
    }

    fn open(&self, url: &str, threads: usize) -> Result<Box<dyn System>> {
        let connect = |_| Connection::open(url, self.archive).map(Mutex::new);
        let connections = (0..threads.clamp(2, CONNECTIONS)).map(connect).collect::<Result<_>>()?;
        Ok(Box::new(Open { connections, many: self.many }))
    }
}

struct Open {
    connections: Vec<Mutex<Connection>>,
    many: bool,
}

impl Open {
    /// The connection of a thread, for one call.
    fn connection(&self, thread: usize) -> MutexGuard<'_, Connection> {
        self.connections[thread % self.connections.len()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push_some(&self, thread: usize, numbers: Range<u64>, tally: &mut Tally<'_>) -> Result<()> {
        if self.many {
            self.connection(thread).send_many(numbers.clone().map(Message::new).collect())?;
        } else {
            for number in numbers.clone() {
                self.connection(thread).send(Message::new(number))?;
            }
        }
        numbers.for_each(|n| tally.pushed(n));
        Ok(())
    }

    fn work_some(&self, thread: usize, mut share: usize, tally: &mut Tally<'_>) -> Result<()> {
        while share > 0 {
            let (ids, messages) = self.read(thread, share)?;
            if self.many {
                self.connection(thread).settle_many(&ids)?;
            } else {
                ids.iter().try_for_each(|id| self.connection(thread).settle(*id))?;
            }
            share = share.saturating_sub(messages.len());
            messages.iter().for_each(|message| tally.done(message.number));
        }
        Ok(())
    }

    /// Reads up to so many messages, and looks again where there is none.
    fn read(&self, thread: usize, most: usize) -> Result<(Vec<i64>, Vec<Message>)> {
        for _ in 0..LOOKS {
            let read = self.connection(thread).read(most)?;
            if !read.0.is_empty() {
                return Ok(read);
            }
            thread::sleep(MOMENT);
        }
        Err(starved(most as u64))
    }
}

impl System for Open {
    fn push(&self, work: &Arc<Work>, threads: usize) -> Result<()> {
        together(threads, |thread| {
            let mut tally = work.tally();
            while let Some(numbers) = work.next_push() {
                self.push_some(thread, numbers, &mut tally)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    fn drain(&self, work: &Arc<Work>, threads: usize, up: Sender<()>) -> Result<Instant> {
        work.begin();
        let _ = up.send(());
        together(threads, |thread| {
            let mut tally = work.tally();
            while let Some(share) = work.next_share() {
                self.work_some(thread, share, &mut tally)?;
            }
            Ok(())
        })?;
        Ok(Instant::now())
    }

    fn in_turn(&self, work: &Arc<Work>, threads: usize) -> Result<bool> {
        together(threads, |thread| {
            let mut tally = work.tally();
            while let Some(numbers) = work.next_push() {
                let share = numbers.clone().count();
                self.push_some(thread, numbers, &mut tally)?;
                self.work_some(thread, share, &mut tally)?;
            }
            Ok(())
        })?;
        Ok(true)
    }

    fn unsettled(&mut self) -> Result<u64> {
        let length = "select queue_length from pgmq.metrics('peers')";
        let row = self.connection(0).client.query_one(length, &[])?;
        Ok(u64::try_from(row.get::<_, i64>(0))?)
    }
}

struct Connection {
    client: Client,
    send: Statement,
    send_many: Statement,
    read: Statement,
    settle: Statement,
    settle_many: Statement,
}

impl Connection {
    fn open(url: &str, archive: bool) -> Result<Connection> {
        let mut client = Client::connect(url, NoTls)?;
        let settle = if archive { "archive" } else { "delete" };
        Ok(Connection {
            send: client.prepare("select pgmq.send('peers', $1::jsonb)")?,
            send_many: client.prepare("select pgmq.send_batch('peers', $1::jsonb[])")?,
            read: client
                .prepare("select msg_id, message from pgmq.read('peers', $1::integer, $2::integer)")?,
            settle: client.prepare(&format!("select pgmq.{settle}('peers', $1::bigint)"))?,
            settle_many: client.prepare(&format!("select pgmq.{settle}('peers', $1::bigint[])"))?,
            client,
        })
    }

    fn send(&mut self, message: Message) -> Result<()> {
        self.client.query_one(&self.send, &[&Json(message)])?;
        Ok(())
    }

    fn send_many(&mut self, messages: Vec<Message>) -> Result<()> {
        let messages: Vec<_> = messages.into_iter().map(Json).collect();
        self.client.query(&self.send_many, &[&messages])?;
        Ok(())
    }

    /// Reads up to so many messages that are there.
    fn read(&mut self, most: usize) -> Result<(Vec<i64>, Vec<Message>)> {
        let rows = self.client.query(&self.read, &[&INVISIBLE, &i32::try_from(most)?])?;
        let message = |row: &Row| (row.get::<_, i64>(0), row.get::<_, Json<Message>>(1).0);
        Ok(rows.iter().map(message).unzip())
    }

    fn settle(&mut self, id: i64) -> Result<()> {
        let settled: bool = self.client.query_one(&self.settle, &[&id])?.get(0);
        if settled { Ok(()) } else { Err(format!("message {id} was gone").into()) }
    }

    fn settle_many(&mut self, ids: &[i64]) -> Result<()> {
        let settled = self.client.query(&self.settle_many, &[&ids])?.len();
        if settled == ids.len() {
            Ok(())
        } else {
            Err(format!("{settled} of {} were settled", ids.len()).into())
        }
    }
}
