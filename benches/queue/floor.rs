//! The floor: what PostgreSQL takes for an insert, a select and a delete by primary key alone,
//! through the same driver, each statement a transaction of its own.

use std::sync::{Mutex, PoisonError};

use pushpop_measure::{Bed, Result, Tally, number, payload};
use pushpop_pg::postgres::{Client, Statement};
use pushpop_pg::uuid::Uuid;

use crate::life::System;

pub(crate) const SCHEMA: &str = "pushpop_floor";

/// As many as the queue has for its calls by default.
const CONNECTIONS: usize = 4;

/// The table, and connections to it.
pub(crate) struct Floor {
    connections: Vec<Mutex<Connection>>,
    batch: usize,
}

/// A connection with its prepared statements.
pub(crate) struct Connection {
    client: Client,
    insert: Statement,
    select: Statement,
    delete: Statement,
    insert_many: Statement,
    select_many: Statement,
    delete_many: Statement,
}

impl Floor {
    /// Makes the table anew.
    pub(crate) fn open(bed: &mut Bed, threads: usize, batch: usize) -> Result<Floor> {
        bed.reset(SCHEMA)?;
        bed.client()?.batch_execute(&format!(
            "create schema {SCHEMA}; \
             create table {SCHEMA}.messages (id uuid not null primary key, payload bytea not null)"
        ))?;
        let connections = (0..threads.min(CONNECTIONS)).map(|_| Ok(Mutex::new(Connection::open(bed)?)));
        Ok(Floor { connections: connections.collect::<Result<_>>()?, batch })
    }

    /// Lets one thread use its connection.
    pub(crate) fn with<T>(
        &self,
        thread: usize,
        work: impl FnOnce(&mut Connection) -> Result<T>,
    ) -> Result<T> {
        work(&mut self.connections[thread].lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl System for Floor {
    fn threads(&self, _: usize) -> usize {
        self.connections.len()
    }

    fn live(&self, thread: usize, _: usize, tally: &mut Tally<'_>) -> Result<u64> {
        self.with(thread, |connection| {
            if self.batch == 1 {
                let id = connection.push(tally)?;
                connection.take(id, tally)?;
            } else {
                let ids = connection.push_many(self.batch, tally)?;
                connection.take_many(&ids, tally)?;
            }
            Ok(self.batch as u64)
        })
    }
}

impl Connection {
    fn open(bed: &Bed) -> Result<Connection> {
        let mut client = bed.client()?;
        client.batch_execute(&format!("set search_path = {SCHEMA}"))?;
        Ok(Connection {
            insert: client.prepare("insert into messages (id, payload) values ($1, $2)")?,
            select: client.prepare("select payload from messages where id = $1")?,
            delete: client.prepare("delete from messages where id = $1")?,
            insert_many: client.prepare(
                "insert into messages (id, payload) select * from unnest($1::uuid[], $2::bytea[])",
            )?,
            select_many: client.prepare("select payload from messages where id = any ($1)")?,
            delete_many: client.prepare("delete from messages where id = any ($1)")?,
            client,
        })
    }

    /// Inserts one.
    pub(crate) fn push(&mut self, tally: &mut Tally<'_>) -> Result<Uuid> {
        let (id, number) = (Uuid::now_v7(), tally.next());
        self.client.execute(&self.insert, &[&id, &payload(number)])?;
        tally.pushed(number);
        Ok(id)
    }

    /// Selects and deletes one.
    pub(crate) fn take(&mut self, id: Uuid, tally: &mut Tally<'_>) -> Result<()> {
        let row = self.client.query_one(&self.select, &[&id])?;
        let number = number(row.get(0))?;
        if self.client.execute(&self.delete, &[&id])? == 1 {
            tally.done(number);
        }
        Ok(())
    }

    /// Inserts many by one statement.
    pub(crate) fn push_many(&mut self, count: usize, tally: &mut Tally<'_>) -> Result<Vec<Uuid>> {
        let ids: Vec<Uuid> = (0..count).map(|_| Uuid::now_v7()).collect();
        let numbers = tally.next_many(count);
        let payloads: Vec<Vec<u8>> = numbers.clone().map(payload).collect();
        self.client.execute(&self.insert_many, &[&ids, &payloads])?;
        numbers.for_each(|number| tally.pushed(number));
        Ok(ids)
    }

    /// Selects and deletes many, by one statement each.
    pub(crate) fn take_many(&mut self, ids: &[Uuid], tally: &mut Tally<'_>) -> Result<()> {
        let rows = self.client.query(&self.select_many, &[&ids])?;
        let numbers = rows.iter().map(|row| number(row.get(0))).collect::<Result<Vec<_>>>()?;
        let deleted = self.client.execute(&self.delete_many, &[&ids])?;
        if deleted != ids.len() as u64 {
            return Err(format!("{deleted} of {} rows were deleted", ids.len()).into());
        }
        numbers.into_iter().for_each(|number| tally.done(number));
        Ok(())
    }
}
