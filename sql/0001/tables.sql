-- The tables of the queue. Every primary key begins with the topic, so that the
-- tables can be hash-distributed by it.

-- One row is one message for its whole life: waiting, leased, settled, dead. The primary key is its
-- only index, so that "pushed once" is a constraint, and every update stays on its page (HOT).
-- What is written while a message is leased stands in the lease: attempt and fence here count
-- what is over.
create table pushpop.messages (
  -- fixed-width columns first, by alignment: no padding in the row
  pushed_at    timestamptz not null,
  ready_at     timestamptz not null,         -- its place in the order; may be popped from then on
  done_at      timestamptz,                  -- when it left the queue: completed, discarded or dead
  delete_at    timestamptz,                  -- when a completed or discarded message is to be deleted
  fence        integer not null default 0,   -- deliveries that are over
  attempt      integer not null default 0,   -- attempts that are over; defer and release give theirs back
  place        integer not null,             -- among the messages pushed by the same statement
  max_attempts smallint,                     -- null: without end
  state        "char" not null default 'p',  -- pushed, deferred, released, failed, expired; completed, x discarded,
                                             -- k cancelled; dead: z by a failure, y by an expired lease
  id           uuid not null,
  topic        text collate "C" not null,
  failures     jsonb,                        -- the newest ten, oldest first; null: it never failed
  headers      jsonb,
  payload      bytea not null,

  primary key (topic, id)   -- and no check of the state: it would cost as much as the insert
) with (
  fillfactor = 46,
  autovacuum_vacuum_scale_factor = 0.05,
  autovacuum_vacuum_threshold = 10000,
  autovacuum_vacuum_cost_delay = 0
);

-- Payloads are often compressed or random already: store wide ones aside as they are.
alter table pushpop.messages alter column payload set storage external;

-- The order of the queue. A row stands for up to 25 messages that were pushed together and are
-- ready at the same time; a message that nobody holds is in one run, one that is leased in none. A large message
-- is a run of its own, so that a pop knows how many bytes it takes.
create table pushpop.runs (
  ready_at  timestamptz not null,
  pushed_at timestamptz not null,
  place     integer not null,   -- of the first message; those of the others follow it
  n         integer not null,
  fence     integer not null default 0,  -- deliveries of each of them that are over, as in its message
  bytes     integer not null default 0,  -- of a message that has more than 16 KiB; 0: each of them has no more
  id        uuid not null,      -- of the first message
  topic     text collate "C" not null,
  ids       uuid[] not null,
  primary key (topic, ready_at, pushed_at, place, id)
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

alter table pushpop.runs alter column ids set storage plain;

-- What was handed out. A row stands for up to 250 messages popped by one statement; a lease that was
-- extended has a row of its own, with the whole token as its key. Settles prove themselves here and
-- write to the message: a row whose messages are all settled is garbage.
create table pushpop.leases (
  lease_until timestamptz not null,
  open        integer not null,  -- how many are not settled yet, or more; never fewer
  topic       text collate "C" not null,
  key         bytea not null,    -- the first 16 bytes of the tokens: random
  ids         uuid[] not null,
  fences      bigint[] not null, -- the numbers of the deliveries
  primary key (topic, key)
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- Read slot by slot: as it is, without compression.
alter table pushpop.leases alter column ids set storage plain, alter column fences set storage plain;

-- Partial, though every row is in it, so that nothing but a look at the ends can use it: with
-- statistics of an empty table it costs as little as the primary key to find one key.
create index leases_until on pushpop.leases (topic, lease_until) where lease_until > '-infinity';

-- Completed and discarded messages, by the time at which they may go. A row stands for up to 250.
create table pushpop.history (
  delete_at timestamptz not null,
  n         integer not null,
  id        uuid not null,      -- of the first
  topic     text collate "C" not null,
  ids       uuid[] not null,
  primary key (topic, delete_at, id)
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

alter table pushpop.history alter column ids set storage plain;

-- Dead letters, newest last. A row is there as long as its message is dead.
create table pushpop.dead (
  topic   text collate "C" not null,
  died_at timestamptz not null,
  id      uuid not null,
  primary key (topic, died_at, id)
);

-- What is known of a topic beyond its messages. All of it but the settings is a hint that makes
-- things fast, or is there to be looked at: a topic without a row, or with one that nobody could
-- update, works as well.
create table pushpop.topics (
  topic        text collate "C" not null primary key,

  -- The low watermark: see order.sql.
  low          timestamptz not null default '-infinity',
  looked_at    timestamptz not null default '-infinity', -- when low was moved last
  swept_at     timestamptz not null default '-infinity', -- last look at everything, low ignored

  -- Every push, and every lease, stamped before sure_to has committed or never will. The next such time is
  -- checking_at, as soon as none of the transactions in checking_for is running any more.
  sure_to      timestamptz not null default '-infinity',
  checking_at  timestamptz not null default '-infinity',
  checking_for text[] not null default '{}',

  reclaimed_to timestamptz not null default '-infinity', -- leases that ended before it have been reclaimed
  deleted_to   timestamptz not null default '-infinity', -- history due before it has been deleted
  cleared_at   timestamptz not null default '-infinity', -- when these two, and low, were last begun anew

  wanted_until timestamptz not null default '-infinity', -- somebody waits for a message
  wanted_by    uuid,                                     -- who, if it is one client only

  -- What upkeep has cost.
  upkept_at    timestamptz,                              -- last time
  upkeep_time  interval not null default '0',            -- in all
  upkeep_rows  bigint not null default 0,                -- deleted and reclaimed, in all

  -- Settings. Null: nothing is said here.
  paused        boolean not null default false,
  lease         interval,
  max_attempts  smallint,         -- 0: without end
  backoff_first double precision, -- seconds
  backoff_most  double precision,

  -- Only looks and settings write here, so a check costs nothing that counts. The limits are those of set_topic.
  check (lease between '1 second' and '1 day' and max_attempts >= 0 and backoff_first >= 0 and backoff_most <= 250000000000
         and coalesce(backoff_first, 1) <= coalesce(backoff_most, 3600)
         and greatest(low, looked_at, swept_at, sure_to, checking_at, reclaimed_to, deleted_to, cleared_at) < 'infinity')
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.2, autovacuum_vacuum_threshold = 200);

create index topics_set on pushpop.topics (topic)
where paused or lease is not null or max_attempts is not null or backoff_first is not null or backoff_most is not null;

-- Late entries: runs that were put before the time of their own statement, such as a time in the past, a released or an
-- expired lease. See order.sql.
create table pushpop.behind (
  ready_at timestamptz not null,
  entry    uuid not null default gen_random_uuid(),
  topic    text collate "C" not null,
  primary key (topic, ready_at, entry)
);

-- Figures of topics that took long to take: shared by all who ask within two seconds.
create table pushpop.figures (
  at              timestamptz not null,
  ready           bigint not null,
  delayed         bigint not null,
  leased          bigint not null,
  settled         bigint not null,
  dead            bigint not null,
  oldest_ready_at timestamptz,
  topic           text collate "C" not null primary key
) with (fillfactor = 50);

-- The migrations that made this schema; the newest row counts.
create table pushpop.migrations (
  version      integer not null primary key,
  oldest_crate text not null,   -- the oldest release of pushpop-pg that this schema still serves
  applied_at   timestamptz not null default clock_timestamp()
);

-- The version of this schema, and the oldest crate that it serves.
create function pushpop.schema_version(out version integer, out oldest_crate text)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $body$
  select m.version, m.oldest_crate from pushpop.migrations m order by m.version desc limit 1
$body$;
