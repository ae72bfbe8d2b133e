-- The order of a topic, and the watermark before which nothing needs to be looked for.
--
-- Rows that were deleted stay in an index for as long as some snapshot may need them, so a pop begins its search at
-- the low watermark of its topic instead of at the beginning. One invariant makes that safe:
--
--   Every committed run is at or after the low watermark, or at or after a committed late entry in pushpop.behind.
--
-- Three functions keep it, and nothing else may insert into pushpop.runs or pushpop.behind, delete from the latter, or
-- raise pushpop.topics.low:
--
--   enqueue    A run that comes before the clock of its own transaction has a late entry of its own, committed with it.
--   split_run  The rest of a run that was cut keeps the place of the whole, which is visible until the cut is committed.
--   note_look  The watermark never passes sure_to, before which every transaction that reads its clock under the lock
--              of a write has ended, nor a run that is visible after these have ended and after the late entries
--              that it deletes were committed.
--
-- A late entry is never shared: a second one at the same place is a row of its own. An insert that relied on an entry
-- which another transaction had made would lose it to the next look, and its run would be hidden.

-- Puts messages into the order of their topic, all ready at the same time and pushed by the same statement, each at
-- the place that follows the one before.
--
-- moment  the clock of this transaction, read after it had locked pushpop.messages: until this transaction ends, the
--         watermark cannot pass it
-- low     the watermark, if the caller has read it: it may be later than the moment when the server's clock went back
-- place   of the first; fence: deliveries of each of them that are over
-- bytes   as pushpop.weigh has it: of each 0, or there is one
create function pushpop.enqueue(
  topic text, moment timestamptz, low timestamptz, ready_at timestamptz, pushed_at timestamptz, place integer, fence integer, ids uuid[],
  bytes integer default 0
) returns void
language plpgsql
as $body$
#variable_conflict use_column
declare
  n integer := cardinality(ids);
begin
  if n = 1 then
    insert into pushpop.runs (topic, ready_at, pushed_at, place, n, fence, bytes, id, ids)
    values (enqueue.topic, enqueue.ready_at, enqueue.pushed_at, enqueue.place, 1, enqueue.fence, enqueue.bytes, enqueue.ids[1],
            enqueue.ids);
  else
    insert into pushpop.runs (topic, ready_at, pushed_at, place, n, fence, id, ids)
    select enqueue.topic, enqueue.ready_at, enqueue.pushed_at, enqueue.place + first - 1, least(25, n - first + 1), enqueue.fence,
           enqueue.ids[first], enqueue.ids[first : first + 24]
    from generate_series(1, n, 25) first;
  end if;
  if ready_at >= moment then
    if low is null then
      select t.low into low from pushpop.topics t where t.topic = enqueue.topic;
    end if;
    if (ready_at < low) is not true then
      return;
    end if;
  end if;
  insert into pushpop.behind (topic, ready_at) values (enqueue.topic, enqueue.ready_at);
end
$body$;

-- How many bytes a message has that a pop hands out, if these are more than 16 KiB; otherwise 0.
create function pushpop.weigh(payload bytea, headers jsonb, failures jsonb) returns integer
language sql immutable parallel safe
as $body$
  select case when octet_length(payload) + coalesce(octet_length(headers::text), 0) + coalesce(octet_length(failures::text), 0) > 16384
         then octet_length(payload) + coalesce(octet_length(headers::text), 0) + coalesce(octet_length(failures::text), 0)
         else 0 end
$body$;

-- Takes the message of a slot out of a run that the caller has locked. What is behind it in the run becomes a run of
-- its own, as the places within one follow one another.
create function pushpop.split_run(topic text, tid tid, slot integer) returns void
language plpgsql
as $body$
#variable_conflict use_column
declare
  run pushpop.runs;
begin
  if slot > 1 then
    select q.* into run from pushpop.runs q where q.topic = split_run.topic and q.ctid = split_run.tid;
    update pushpop.runs q set n = slot - 1, ids = q.ids[: slot - 1] where q.topic = split_run.topic and q.ctid = split_run.tid;
    if slot < run.n then
      insert into pushpop.runs (topic, ready_at, pushed_at, place, n, fence, id, ids)
      values (run.topic, run.ready_at, run.pushed_at, run.place + slot, run.n - slot, run.fence, run.ids[slot + 1], run.ids[slot + 1 :]);
    end if;
  else
    update pushpop.runs q set n = q.n - 1, place = q.place + 1, id = q.ids[2], ids = q.ids[2 :]
    where q.topic = split_run.topic and q.ctid = split_run.tid and q.n > 1;
    if not found then
      delete from pushpop.runs q where q.topic = split_run.topic and q.ctid = split_run.tid;
    end if;
  end if;
end
$body$;

-- Where a search of the order of a topic begins: no committed run lies before.
create function pushpop.bottom(topic text) returns timestamptz
language plpgsql
as $body$
#variable_conflict use_column
declare
  start timestamptz;
  late  timestamptz;
begin
  select t.low into start from pushpop.topics t where t.topic = bottom.topic;
  select b.ready_at into late from pushpop.behind b where b.topic = bottom.topic order by b.ready_at, b.entry limit 1;
  return least(coalesce(start, '-infinity'), late);
end
$body$;

-- Whether each statement sees all that was committed before it. No mark moves where that is not so: it could pass what
-- was committed after the transaction's own snapshot.
create function pushpop.sees_all() returns boolean
language sql stable
as $body$
  select current_setting('transaction_isolation') not in ('repeatable read', 'serializable')
$body$;

-- The same within a query over many topics, of which it becomes a part.
create function pushpop.bottoms(topic text) returns table (start timestamptz)
language sql stable
as $body$
  select coalesce(least(
    (select t.low from pushpop.topics t where t.topic = bottoms.topic),
    (select b.ready_at from pushpop.behind b where b.topic = bottoms.topic order by b.ready_at, b.entry limit 1)
  ), '-infinity')
$body$;

-- Once a minute a pop that finds nothing looks at everything, and the next one moves the mark anew: nothing is lost
-- even if that was wrong.
create function pushpop.begin_sweep(topic text, moment timestamptz, swept_at timestamptz) returns boolean
language plpgsql
as $body$
#variable_conflict use_column
begin
  if begin_sweep.swept_at is null or begin_sweep.swept_at between moment - interval '1 minute' and moment then
    return false;
  end if;
  update pushpop.topics t set swept_at = moment, low = '-infinity', looked_at = '-infinity'
  where t.topic = (select s.topic from pushpop.topics s where s.topic = begin_sweep.topic for update skip locked);
  return true;
end
$body$;

-- The row of a topic, locked; null if another client has it. Made if it is not there yet.
create function pushpop.lock_topic(topic text) returns pushpop.topics
language plpgsql
as $body$
#variable_conflict use_column
declare
  known pushpop.topics;
begin
  select t.* into known from pushpop.topics t where t.topic = lock_topic.topic for update skip locked;
  if not found and pg_try_advisory_xact_lock(hashtextextended(lock_topic.topic, format('%I.topics', 'pushpop')::regclass::oid::bigint)) then
    perform from pushpop.topics t where t.topic = lock_topic.topic;
    if not found then
      insert into pushpop.topics (topic) values (lock_topic.topic) on conflict do nothing;
      select t.* into known from pushpop.topics t where t.topic = lock_topic.topic for update skip locked;
    end if;
  end if;
  return known;
end
$body$;

-- Moves the watermark of a topic forward to its first run.
--
-- A run that is not committed yet cannot be seen here, so the watermark stays before sure_to: every transaction that
-- may have read an earlier time held its lock on the table when checking_at was taken, and has ended since. What these
-- transactions committed is visible to the statements that follow, which is true only where each statement has a
-- snapshot of its own: a transaction of another isolation level moves no watermark.
create function pushpop.note_look(topic text, moment timestamptz) returns void
language plpgsql
as $body$
#variable_conflict use_column
declare
  known   pushpop.topics;
  running text[];
  renamed boolean;
  start   timestamptz;
  alive   timestamptz;
begin
  if pushpop.sees_all() then
    known := pushpop.lock_topic(note_look.topic);
  end if;
  if known.topic is null then
    return;
  end if;

  -- Every clock is read under the lock on the table, so none that is read now comes before sure_to or checking_at,
  -- unless the server's clock went back. No watermark holds then.
  if greatest(known.sure_to, known.checking_at) > moment then
    known.low := '-infinity';
    known.sure_to := '-infinity';
    known.checking_at := '-infinity';
    known.checking_for := '{}';
    known.reclaimed_to := '-infinity';
    known.deleted_to := '-infinity';
  end if;

  running := array(
    select l.virtualtransaction from pg_locks l
    where l.locktype = 'relation' and l.relation = format('%I.messages', 'pushpop')::regclass
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.mode = 'RowExclusiveLock');
  -- A prepared transaction has another name after a crash: -1/ and its transaction id. One of that kind which was not
  -- there at checking_at may be one of those that were.
  renamed := exists (select from unnest(running) r(name) where r.name like '-1/%' and r.name <> all (known.checking_for));
  if not known.checking_for && running and not (renamed and known.checking_at > '-infinity') then
    known.sure_to := greatest(known.sure_to, known.checking_at);
    known.checking_at := moment;
    known.checking_for := running;
  end if;

  -- A late entry that is deleted here was committed with its run, which the next statement sees.
  with late as (
    delete from pushpop.behind b where b.topic = note_look.topic returning b.ready_at
  )
  select least(known.low, min(l.ready_at)) into start from late l;

  select q.ready_at into alive from pushpop.runs q
  where q.topic = note_look.topic and q.ready_at >= start
  order by q.ready_at, q.pushed_at, q.place, q.id limit 1;

  update pushpop.topics t
  set low = least(alive, known.sure_to), looked_at = moment,
      sure_to = known.sure_to, checking_at = known.checking_at, checking_for = known.checking_for,
      reclaimed_to = known.reclaimed_to, deleted_to = known.deleted_to
  where t.topic = note_look.topic;
end
$body$;
