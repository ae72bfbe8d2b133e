-- Upkeep: done in bounded steps, by whichever client comes by.

-- Returns the messages of leases that ended, from up to max leases: to their old place, or to the
-- dead when that was the last attempt. Returns how many. Waits for no row: what another
-- transaction holds is looked at again a second later.
create function pushpop.reclaim(topic text, moment timestamptz, max integer) returns bigint
language plpgsql
as $body$
#variable_conflict use_column
declare
  known timestamptz;
  lease record;
  slot  record;
  stuck boolean;
  count bigint := 0;
begin
  -- The clock is read again under the lock, as enqueue asks: not every caller holds it.
  lock table pushpop.messages in row exclusive mode;
  moment := clock_timestamp();
  select t.reclaimed_to into known from pushpop.topics t where t.topic = reclaim.topic;
  for lease in
    select l.ctid as tid, l.key, l.ids, l.fences from pushpop.leases l
    where l.topic = reclaim.topic and l.lease_until >= coalesce(known, '-infinity') and l.lease_until <= moment
      and l.lease_until > '-infinity'
    order by l.lease_until limit max for update skip locked
  loop
    stuck := false;
    for slot in
      select u.id, u.fence, u.slot
      from unnest(lease.ids, lease.fences) with ordinality u(id, fence, slot)
      cross join lateral (
        select from pushpop.messages m
        where m.topic = reclaim.topic and m.id = u.id and pushpop.delivery(m.pushed_at, m.fence) = u.fence
          and m.state in ('p', 'd', 'r', 'f', 'e') offset 0
      ) m
      where octet_length(lease.key) > 16 or not exists (
        select from pushpop.leases l
        where l.topic = reclaim.topic and l.key = lease.key || int2send(u.slot::int2) || int8send(u.fence))
      order by u.id
    loop
      perform from pushpop.messages m where m.topic = reclaim.topic and m.id = slot.id for update skip locked;
      if not found then
        stuck := true;
      elsif octet_length(lease.key) = 16 and exists (
        select from pushpop.leases l
        where l.topic = reclaim.topic and l.key = lease.key || int2send(slot.slot::int2) || int8send(slot.fence))
      then
        null;  -- It was extended before it was locked here.
      elsif pushpop.give_back(reclaim.topic, slot.id, slot.fence, 'expire', moment, null, 'the lease expired') then
        count := count + 1;
      end if;
    end loop;
    if stuck then
      update pushpop.leases l set lease_until = moment + interval '1 second'
      where l.topic = reclaim.topic and l.ctid = lease.tid;
    else
      delete from pushpop.leases l where l.topic = reclaim.topic and l.ctid = lease.tid;
    end if;
  end loop;
  return count;
end
$body$;

-- Deletes up to max messages of a topic whose time in the history is over, reclaims leases that
-- ended, and moves the marks of the topic. Returns how many it deleted: as many as max, and there
-- may be more. One client at a time does it; others return 0 at once. What it has cost is in stats.
create function pushpop.upkeep(topic text, max integer default 1000) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_material = off
set random_page_cost = 0
set cpu_tuple_cost = 0
set cpu_operator_cost = 0
set cpu_index_tuple_cost = 1
set plan_cache_mode = force_generic_plan
as $body$
#variable_conflict use_column
declare
  moment timestamptz;
  known  pushpop.topics;
  due cursor for
    select h.ctid as tid, h.n, h.ids from pushpop.history h
    where h.topic = upkeep.topic and h.delete_at >= known.deleted_to and h.delete_at <= moment
    order by h.delete_at, h.id
    for update skip locked;
  batch    record;
  batches  tid[];
  ids      uuid[];
  want     integer := max;
  counted  bigint;
  returned bigint;
begin
  perform pushpop.check_topic(upkeep.topic);
  if max is null or max not between 1 and 100000 then
    perform pushpop.refuse(format('upkeep deletes 1 to 100000 messages at a time, not %s', coalesce(max::text, 'null')));
  end if;

  lock table pushpop.messages in row exclusive mode;
  moment := clock_timestamp();
  -- Held until the end, so that there is one at a time, and the death of its session frees it.
  if (pushpop.lock_topic(upkeep.topic)).topic is null then
    return 0;
  end if;
  returned := pushpop.reclaim(upkeep.topic, moment, max);
  -- Once a minute from the beginning: a settle, or a pop, may have committed late, and no mark may hide anything for good.
  update pushpop.topics t
  set low = '-infinity', deleted_to = '-infinity', reclaimed_to = '-infinity', cleared_at = moment
  where t.topic = upkeep.topic and t.cleared_at not between moment - interval '1 minute' and moment;
  perform pushpop.note_look(upkeep.topic, moment);
  known := pushpop.lock_topic(upkeep.topic);

  open due;
  loop
    fetch due into batch;
    exit when not found;
    batches := batches || batch.tid;
    ids := ids || batch.ids;
    want := want - batch.n;
    exit when want <= 0;
  end loop;
  close due;

  delete from pushpop.messages m
  where m.topic = upkeep.topic and m.delete_at <= moment and m.ctid = any (array(
    select m.tid from unnest(ids) u(id)
    cross join lateral (
      select m.ctid as tid from pushpop.messages m where m.topic = upkeep.topic and m.id = u.id offset 0
    ) m));
  get diagnostics counted = row_count;
  delete from pushpop.history h where h.topic = upkeep.topic and h.ctid = any (batches);

  update pushpop.topics t
  set upkept_at = moment, upkeep_time = t.upkeep_time + (clock_timestamp() - moment),
      upkeep_rows = t.upkeep_rows + counted + returned,
      cleared_at = known.cleared_at,
      -- A second of grace: what is due now may still be uncommitted.
      deleted_to = case when want > 0 and pushpop.sees_all() then moment - interval '1 second' else known.deleted_to end,
      reclaimed_to = greatest(known.reclaimed_to, case when pushpop.sees_all() then least(moment - interval '1 second', known.sure_to, (
        select l.lease_until from pushpop.leases l
        -- Only so far: what was deleted lies ahead for as long as a lease, and under an old snapshot it would be stepped over.
        where l.topic = upkeep.topic and l.lease_until >= known.reclaimed_to and l.lease_until > '-infinity'
          and l.lease_until <= moment
        order by l.lease_until limit 1)) end)
  where t.topic = upkeep.topic;
  return counted;
end
$body$;

-- The topics in which upkeep has something to delete or to reclaim, up to max of them, in the order of their names;
-- with `after`, only those whose names come after that one.
create function pushpop.upkeep_due(max integer default 100, after text default '') returns setof text
language sql volatile security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
as $body$
  select n.topic from pushpop.topic_names(after) n(topic)
  where exists (
      select from pushpop.history h
      where h.topic = n.topic and h.delete_at <= statement_timestamp() offset 0)
    or exists (
      select from pushpop.leases l
      where l.topic = n.topic and l.lease_until <= statement_timestamp() and l.lease_until > '-infinity' offset 0)
  limit max
$body$;

-- Deletes up to max messages of a topic that wait, ready or delayed, and returns how many; a
-- run is deleted as a whole, so a few more. Leased ones stay, to be settled; so do the dead and
-- the history.
create function pushpop.purge(topic text, max integer default 10000) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_material = off
set random_page_cost = 0
set cpu_tuple_cost = 0
set cpu_operator_cost = 0
set cpu_index_tuple_cost = 1
as $body$
#variable_conflict use_column
declare
  waiting cursor for
    select q.ctid as tid, q.n, q.ids from pushpop.runs q
    where q.topic = purge.topic
    order by q.ready_at, q.pushed_at, q.place, q.id
    for update skip locked;
  run     record;
  whole   tid[];
  ids     uuid[];
  want    integer := max;
  counted bigint;
begin
  perform pushpop.check_topic(purge.topic);
  if max is null or max not between 1 and 100000 then
    perform pushpop.refuse(format('a purge deletes 1 to 100000 messages at a time, not %s', coalesce(max::text, 'null')));
  end if;

  open waiting;
  loop
    fetch waiting into run;
    exit when not found;
    whole := whole || run.tid;
    ids := ids || run.ids;
    want := want - run.n;
    exit when want <= 0;
  end loop;
  close waiting;

  delete from pushpop.messages m
  where m.topic = purge.topic and m.ctid = any (array(
    select m.tid from unnest(ids) u(id)
    cross join lateral (
      select m.ctid as tid from pushpop.messages m where m.topic = purge.topic and m.id = u.id offset 0
    ) m));
  get diagnostics counted = row_count;
  delete from pushpop.runs q where q.topic = purge.topic and q.ctid = any (whole);
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
  return counted;
end
$body$;
