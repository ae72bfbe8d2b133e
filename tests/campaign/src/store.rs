//! What the server knows in the end, and what a campaign adds to its database.

use std::collections::HashMap;

use pushpop_pg::BoxError;
use pushpop_pg::postgres::Client;
use pushpop_pg::postgres::fallible_iterator::FallibleIterator;
use pushpop_pg::time::OffsetDateTime;
use pushpop_pg::uuid::Uuid;

use crate::chance::hash;

/// A table of effects, without a constraint that would hide a second one; and a table of all leases that were
/// handed out, by a trigger, as their tokens are nobody's to see.
pub(crate) const SETUP: &str = "
    create schema campaign;
    create table campaign.effects (id uuid not null, fence bigint not null);
    create table campaign.beats (at timestamptz not null);
    create table campaign.grants (
        at timestamptz not null, key bytea not null, ids uuid[] not null, fences bigint[] not null
    );
    create function campaign.note_grants() returns trigger language plpgsql security definer
    set search_path = pg_catalog, pg_temp
    as $body$
    begin
        insert into campaign.grants (at, key, ids, fences)
        select clock_timestamp(), n.key, n.ids, array(
            select u.fence - pushpop.delivery(m.pushed_at, -1)
            from unnest(n.ids, n.fences) with ordinality u(id, fence, place)
            cross join lateral (
                select m.pushed_at from pushpop.messages m where m.topic = n.topic and m.id = u.id offset 0
            ) m order by u.place)
        from new_leases n where octet_length(n.key) = 16;
        return null;
    end
    $body$;
    create trigger note_grants after insert on pushpop.leases referencing new table as new_leases
    for each statement execute function campaign.note_grants();";

/// How many messages are neither settled nor dead, and how many are.
pub(crate) const LEFT: &str = "
    select count(*) filter (where m.state in ('p', 'd', 'r', 'f', 'e')),
           count(*) filter (where m.state not in ('p', 'd', 'r', 'f', 'e'))
    from pushpop.messages m";

#[derive(Debug, Default)]
pub(crate) struct Store {
    pub(crate) messages: HashMap<Uuid, Stored>,
    pub(crate) effects: HashMap<Uuid, u64>,
    /// Deliveries by message: number, and when.
    pub(crate) grants: HashMap<Uuid, Vec<Granted>>,
    /// The keys of tokens, and when they were given.
    pub(crate) keys: HashMap<String, i64>,
    pub(crate) tokens: u64,
    pub(crate) repeated_tokens: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) state: char,
    /// Deliveries and attempts that are over.
    pub(crate) fence: i64,
    pub(crate) attempt: i32,
    pub(crate) max_attempts: Option<i16>,
    pub(crate) hash: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Granted {
    pub(crate) fence: i64,
    pub(crate) at: i64,
}

impl Stored {
    pub(crate) fn is_settled(&self) -> bool {
        matches!(self.state, 'c' | 'x')
    }

    pub(crate) fn is_dead(&self) -> bool {
        matches!(self.state, 'z' | 'y')
    }
}

pub(crate) fn micros(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos() / 1000).unwrap_or(i64::MAX)
}

pub(crate) fn read(client: &mut Client) -> Result<Store, BoxError> {
    let mut store = Store::default();
    let none: [&str; 0] = [];
    let sql = "select m.id, m.state::text, m.fence::bigint, m.attempt, m.max_attempts, m.payload from pushpop.messages m";
    let mut rows = client.query_raw(sql, none)?;
    while let Some(row) = rows.next()? {
        let payload: &[u8] = row.get(5);
        let name = payload.split(|b| *b == b' ').next().unwrap_or_default();
        let stored = Stored {
            name: String::from_utf8_lossy(name).into_owned(),
            state: row.get::<_, &str>(1).chars().next().unwrap_or(' '),
            fence: row.get(2),
            attempt: row.get(3),
            max_attempts: row.get(4),
            hash: hash(payload),
        };
        store.messages.insert(row.get(0), stored);
    }
    drop(rows);
    let sql = "select g.at, g.ids, g.fences, encode(g.key, 'hex') from campaign.grants g";
    let mut rows = client.query_raw(sql, none)?;
    while let Some(row) = rows.next()? {
        let at = micros(row.get(0));
        store.keys.insert(row.get(3), at);
        let (ids, fences): (Vec<Uuid>, Vec<i64>) = (row.get(1), row.get(2));
        for (id, fence) in ids.into_iter().zip(fences) {
            store.grants.entry(id).or_default().push(Granted { fence, at });
        }
    }
    drop(rows);
    for row in client.query("select e.id, count(*) from campaign.effects e group by 1", &[])? {
        store.effects.insert(row.get(0), u64::try_from(row.get::<_, i64>(1))?);
    }
    let row = client.query_one("select count(*), count(distinct g.key) from campaign.grants g", &[])?;
    store.tokens = u64::try_from(row.get::<_, i64>(0))?;
    store.repeated_tokens = store.tokens - u64::try_from(row.get::<_, i64>(1))?;
    Ok(store)
}
