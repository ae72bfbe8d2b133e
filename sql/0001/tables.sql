-- The tables of the queue. Every primary key begins with the topic, so that the
-- tables can be hash-distributed by it.

-- One row is one message for its whole life: waiting, leased, settled, dead.
-- A single table makes "pushed once" a primary key, and a settle an update in place.
--
-- Who pops, settles and extends changes only columns that stand in no index, except
-- when a message leaves the queue or moves to another time: those updates stay on
-- their page (HOT) and cost no index write.
create table pushpop.messages (
  -- fixed-width columns first, by alignment: no padding in the row
  ready_at     timestamptz not null,            -- its place in the order; may be popped from then on
  pushed_at    timestamptz not null,            -- ties of ready_at; one microsecond apart within a batch
  lease_until  timestamptz,                     -- the deadline of the lease, null when nobody holds it
  done_at      timestamptz,                     -- when it left the queue: completed, discarded or dead
  delete_at    timestamptz,                     -- when a completed or discarded message is to be deleted
  fence        bigint not null default 0,       -- number of deliveries; never given back
  attempt      integer not null default 0,      -- number of attempts; defer and release give theirs back
  max_attempts smallint,                        -- null: without end
  state        "char" not null default 'p',     -- pushed, leased, deferred, released, failed, completed, x discarded, z dead
  id           uuid not null,
  token        uuid,                            -- proves the newest delivery; kept after the settle, so that it can be repeated
  topic        text collate "C" not null,
  last_error   text,
  headers      jsonb,
  payload      bytea not null,

  primary key (topic, id),
  constraint state_is_known check (state in ('p', 'l', 'd', 'r', 'f', 'c', 'x', 'z')),
  constraint leased_has_deadline check ((state = 'l') = (lease_until is not null)),
  constraint done_has_time check ((state in ('c', 'x', 'z')) = (done_at is not null)),
  constraint only_settled_are_deleted check (delete_at is null or state in ('c', 'x'))
) with (
  fillfactor = 70,
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_threshold = 10000,
  autovacuum_analyze_scale_factor = 0.2,
  autovacuum_vacuum_cost_delay = 0
);

-- Payloads are often compressed or random already: store wide ones aside as they are.
alter table pushpop.messages alter column payload set storage external;

-- The order of the queue. Leased messages stay in it, at their place.
create index messages_order on pushpop.messages (topic, ready_at, pushed_at) where done_at is null;

-- History, by the time at which it may go.
create index messages_history on pushpop.messages (topic, delete_at) where delete_at is not null;

-- Dead letters, newest last.
create index messages_dead on pushpop.messages (topic, done_at) where done_at is not null and delete_at is null;

-- What is known of a topic beyond its messages. All of it is a hint that makes things
-- fast: a topic without a row, or with one that nobody could update, works as well.
create table pushpop.topics (
  topic        text collate "C" not null primary key,

  -- No message lies before low, none will appear there without a row in pushpop.behind.
  low_ready_at    timestamptz not null default '-infinity',
  low_pushed_at   timestamptz not null default '-infinity',
  -- At looked_at nothing free lay before front.
  front_ready_at  timestamptz not null default '-infinity',
  front_pushed_at timestamptz not null default '-infinity',
  looked_at       timestamptz not null default '-infinity',
  swept_at        timestamptz not null default '-infinity', -- last look at everything, low ignored

  -- Every push stamped before sure_to has committed or never will. The next such time is
  -- checking_at, as soon as none of the transactions in checking_for is running any more.
  sure_to         timestamptz not null default '-infinity',
  checking_at     timestamptz not null default '-infinity',
  checking_for    text[] not null default '{}',

  deleted_to      timestamptz not null default '-infinity', -- history due before it has been deleted
  cleared_at      timestamptz not null default '-infinity', -- last look at the whole history
  counted_to      timestamptz not null default '-infinity', -- counts before it are summed up

  wanted_until    timestamptz not null default '-infinity', -- somebody waits for a message
  wanted_by       uuid                                      -- who, if it is one client only
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.2, autovacuum_vacuum_threshold = 200);

-- Messages that were pushed behind the front of their topic, with a time in the past.
-- A row commits with its message, so nothing can pass it unseen.
create table pushpop.behind (
  topic     text collate "C" not null,
  ready_at  timestamptz not null,
  pushed_at timestamptz not null,
  primary key (topic, ready_at, pushed_at)
);

-- How many messages a topic has, as changes to be added up: a statement adds a row and waits for
-- no other. Upkeep sums up what has become certain; the sum stands at -infinity.
create table pushpop.counts (
  topic   text collate "C" not null,
  at      timestamptz not null,
  pid     integer not null,            -- of the server process: two may count at the same time
  live    bigint not null default 0,   -- waiting or leased
  leased  bigint not null default 0,   -- in state leased, expired or not
  settled bigint not null default 0,   -- completed or discarded, and still stored
  dead    bigint not null default 0,
  primary key (topic, at, pid)
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000);

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
