-- Upkeep: done in bounded steps, by whichever client comes by.

-- Deletes up to max messages of a topic whose time in the history is over, and tidies up its
-- counts and marks. Returns how many it deleted: as many as max, and there may be more. Does
-- nothing while another client is at it.
create function pushpop.upkeep(topic text, max integer default 1000) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
set enable_sort = off
set plan_cache_mode = force_generic_plan
as $body$
#variable_conflict use_column
declare
  moment  timestamptz := clock_timestamp();
  known   record;
  deleted bigint;
  latest  timestamptz;
begin
  perform pushpop.check_topic(upkeep.topic);
  if max is null or max not between 1 and 100000 then
    perform pushpop.refuse(format('upkeep deletes 1 to 100000 messages at a time, not %s', coalesce(max::text, 'null')));
  elsif not pg_try_advisory_xact_lock(
      hashtextextended(upkeep.topic, format('%I.messages', 'pushpop')::regclass::oid::bigint)) then
    return 0;
  end if;

  perform pushpop.note_look(upkeep.topic, moment);
  perform pushpop.sum_counts(upkeep.topic);

  -- Once a minute from the beginning: a settle may have committed late.
  select t.deleted_to, t.cleared_at into known from pushpop.topics t where t.topic = upkeep.topic;
  if known.cleared_at between moment - interval '1 minute' and moment then
    known.cleared_at := null;
  else
    known.cleared_at := moment;
    known.deleted_to := '-infinity';
  end if;

  with due as materialized (
    select m.id from pushpop.messages m
    where m.topic = upkeep.topic and m.delete_at >= known.deleted_to and m.delete_at <= moment
    order by m.delete_at
    limit max
    for update skip locked
  ),
  gone as (
    delete from pushpop.messages m using due d where m.topic = upkeep.topic and m.id = d.id
    returning m.delete_at
  )
  select count(*), max(g.delete_at) into deleted, latest from gone g;

  if deleted > 0 then
    insert into pushpop.counts (topic, at, pid, settled)
    values (upkeep.topic, clock_timestamp(), pg_backend_pid(), -deleted)
    on conflict (topic, at, pid) do update set settled = counts.settled + excluded.settled;
  end if;
  if deleted > 0 or known.cleared_at is not null then
    update pushpop.topics t
    set deleted_to = coalesce(latest, t.deleted_to),
        cleared_at = case when deleted < max then coalesce(known.cleared_at, t.cleared_at) else t.cleared_at end
    where t.topic = upkeep.topic;
  end if;
  return deleted;
end
$body$;

-- Adds the counts that are certain, with no earlier one to come, to their sum.
create function pushpop.sum_counts(topic text) returns void
language plpgsql
as $body$
#variable_conflict use_column
declare
  known record;
begin
  select t.counted_to, t.sure_to into known from pushpop.topics t where t.topic = sum_counts.topic;
  if not known.counted_to < known.sure_to then
    return;
  end if;

  with certain as (
    delete from pushpop.counts c
    where c.topic = sum_counts.topic and c.at > '-infinity' and c.at >= known.counted_to and c.at < known.sure_to
    returning c.live, c.leased, c.settled, c.dead
  )
  insert into pushpop.counts (topic, at, pid, live, leased, settled, dead)
  select sum_counts.topic, '-infinity', 0, sum(c.live), sum(c.leased), sum(c.settled), sum(c.dead)
  from certain c having count(*) > 0
  on conflict (topic, at, pid) do update
  set live = counts.live + excluded.live, leased = counts.leased + excluded.leased,
      settled = counts.settled + excluded.settled, dead = counts.dead + excluded.dead;

  update pushpop.topics t set counted_to = known.sure_to where t.topic = sum_counts.topic;
end
$body$;

-- Deletes up to max messages of a topic that wait, ready or delayed, and returns how many.
-- Leased ones stay, to be settled; so do the dead and the history.
create function pushpop.purge(topic text, max integer default 10000) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
set enable_sort = off
as $body$
#variable_conflict use_column
declare
  moment  timestamptz := clock_timestamp();
  deleted bigint;
  leased  bigint;
begin
  perform pushpop.check_topic(purge.topic);
  if max is null or max not between 1 and 100000 then
    perform pushpop.refuse(format('a purge deletes 1 to 100000 messages at a time, not %s', coalesce(max::text, 'null')));
  end if;

  with waiting as materialized (
    select m.id, m.state from pushpop.messages m
    where m.topic = purge.topic and m.done_at is null and (m.lease_until is null or m.lease_until <= moment)
    order by m.ready_at, m.pushed_at
    limit max
    for update skip locked
  ),
  gone as (
    delete from pushpop.messages m using waiting w where m.topic = purge.topic and m.id = w.id
    returning w.state
  )
  select count(*), count(*) filter (where g.state = 'l') into deleted, leased from gone g;

  if deleted > 0 then
    insert into pushpop.counts (topic, at, pid, live, leased)
    values (purge.topic, clock_timestamp(), pg_backend_pid(), -deleted, -leased)
    on conflict (topic, at, pid) do update
    set live = counts.live + excluded.live, leased = counts.leased + excluded.leased;
  end if;
  return deleted;
end
$body$;
