-- Dead letters: messages that are out of attempts.
--
-- Whoever changes one locks its row in pushpop.dead first, in the order of their deaths.

-- The dead of a topic, up to max of them, newest first. Fewer if they would have more than 16 MiB together, but one at
-- least.
--
-- before     only those that died before this time
-- before_id  and of those that died at this time, the ones with smaller ids: with done_at and id of
--            the last one that was shown, the answer goes on behind it
create function pushpop.dead_letters(
  topic     text,
  max       integer     default 100,
  before    timestamptz default 'infinity',
  before_id uuid        default null
) returns setof pushpop.message
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
begin
  perform pushpop.check_topic(dead_letters.topic);
  if max is null or max not between 1 and 1000 then
    perform pushpop.refuse(format('a look shows 1 to 1000 dead messages, not %s', coalesce(max::text, 'null')));
  elsif before is null then
    perform pushpop.refuse('the time before which messages died is not null');
  end if;
  -- Those that died by a lease which ended just now belong to them.
  if current_setting('transaction_read_only') = 'off' then
    perform pushpop.reclaim(dead_letters.topic, clock_timestamp(), 1000);
  end if;
  return query
    select m.id, m.payload, m.headers, 'dead', m.attempt, m.max_attempts::integer, m.fence::bigint, m.pushed_at, m.ready_at,
           null::timestamptz, m.done_at, m.delete_at, m.failures -> -1 ->> 'error', m.failures
    from (
      select m.*, row_number() over () as nth,
             sum(greatest(pushpop.weigh(m.payload, m.headers, m.failures), 16384)) over (rows unbounded preceding) as bytes
      from (
        select d.id from pushpop.dead d
        where d.topic = dead_letters.topic
          and (d.died_at, d.id) < (before, coalesce(before_id, '00000000-0000-0000-0000-000000000000'))
        order by d.died_at desc, d.id desc limit max
      ) d
      cross join lateral (
        select m.* from pushpop.messages m where m.topic = dead_letters.topic and m.id = d.id offset 0
      ) m
    ) m
    where m.bytes <= 16777216 or m.nth = 1;
end
$body$;

-- Makes those of the messages that are dead ready again, and returns how many that were. Their
-- attempts begin anew; their failures stay.
create function pushpop.redrive(topic text, ids uuid[]) returns bigint
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
  one    record;
  letter tid;
  locked tid[];
  dead_ids uuid[];
begin
  perform pushpop.check_topic(redrive.topic);
  perform pushpop.check_arrays(cardinality(ids), '{}');
  perform pushpop.reclaim(redrive.topic, clock_timestamp(), 1000);
  for one in
    select m.id, m.done_at from (select distinct u.id from unnest(ids) u(id)) u
    cross join lateral (
      select m.id, m.done_at from pushpop.messages m
      where m.topic = redrive.topic and m.id = u.id and m.state in ('z', 'y') offset 0
    ) m
    order by m.done_at, m.id
  loop
    select d.ctid into letter from pushpop.dead d
    where d.topic = redrive.topic and d.died_at = one.done_at and d.id = one.id for update;
    if found then
      locked := locked || letter;
      dead_ids := dead_ids || one.id;
    end if;
  end loop;
  return pushpop.revive(redrive.topic, dead_ids, locked);
end
$body$;

-- Makes up to max dead messages ready again, the oldest first, and returns how many that were.
-- Call it until there are none, with the time that the first call has returned: only those that
-- died until then are taken, so that messages which die again meanwhile do not make it endless.
-- Any number of clients may call it at the same time; each takes what no other has.
create function pushpop.redrive_all(
  topic        text,
  inout until  timestamptz default null,
  max          integer     default 1000,
  out redriven bigint
)
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
  ids    uuid[];
  locked tid[];
begin
  perform pushpop.check_topic(redrive_all.topic);
  if max is null or max not between 1 and 10000 then
    perform pushpop.refuse(format('1 to 10000 messages are redriven at a time, not %s', coalesce(max::text, 'null')));
  end if;
  perform pushpop.reclaim(redrive_all.topic, clock_timestamp(), 1000);
  until := coalesce(until, clock_timestamp());
  select array_agg(d.id), array_agg(d.tid) into ids, locked
  from (
    select d.id, d.ctid as tid from pushpop.dead d
    where d.topic = redrive_all.topic and d.died_at <= until
    order by d.died_at, d.id limit max for update skip locked
  ) d;
  redriven := pushpop.revive(redrive_all.topic, ids, locked);
end
$body$;

-- Makes dead messages ready, whose rows in pushpop.dead the caller has locked. The state tells how the
-- last delivery ended, as if there had been attempts left.
create function pushpop.revive(topic text, ids uuid[], locked tid[]) returns bigint
language plpgsql
as $body$
#variable_conflict use_column
declare
  stamped timestamptz;
  counted bigint;
begin
  if locked is null then
    return 0;
  end if;
  -- Stamped under the lock of a push, so that no mark can have passed it.
  lock table pushpop.messages in row exclusive mode;
  stamped := clock_timestamp();
  with revived as (
    update pushpop.messages m
    set state = case m.state when 'y' then 'e' else 'f' end::"char", attempt = 0, done_at = null, ready_at = stamped
    where m.topic = revive.topic and m.state in ('z', 'y') and m.ctid = any (array(
      select m.tid from unnest(ids) u(id)
      cross join lateral (
        select m.ctid as tid from pushpop.messages m where m.topic = revive.topic and m.id = u.id offset 0
      ) m))
    returning m.id, m.pushed_at, m.place, m.fence, pushpop.weigh(m.payload, m.headers, m.failures) as bytes
  )
  select count(pushpop.enqueue(revive.topic, stamped, null, stamped, r.pushed_at, r.place, r.fence, array[r.id], r.bytes)::text)
  into counted from revived r;
  delete from pushpop.dead d where d.topic = revive.topic and d.ctid = any (locked);
  perform pushpop.tell(revive.topic);
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
  return counted;
end
$body$;

-- Deletes up to max dead messages of a topic that died at least `age` seconds ago, the oldest first,
-- and returns how many.
create function pushpop.purge_dead(topic text, age double precision default 0, max integer default 10000) returns bigint
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
  moment  timestamptz := clock_timestamp();
  until   timestamptz;
  ids     uuid[];
  locked  tid[];
  counted bigint;
begin
  perform pushpop.check_topic(purge_dead.topic);
  if (age >= 0 and age <= 250000000000) is not true then
    perform pushpop.refuse(format('an age has 0 to 250000000000 seconds, not %s', coalesce(age::text, 'null')));
  elsif max is null or max not between 1 and 100000 then
    perform pushpop.refuse(format('a purge deletes 1 to 100000 messages at a time, not %s', coalesce(max::text, 'null')));
  end if;
  perform pushpop.reclaim(purge_dead.topic, moment, 1000);
  -- Nothing is older than a thousand years.
  until := case when age < 31557600000 then moment - age * interval '1 second' else '-infinity' end;
  select array_agg(d.id), array_agg(d.tid) into ids, locked
  from (
    select d.id, d.ctid as tid from pushpop.dead d
    where d.topic = purge_dead.topic and d.died_at <= until
    order by d.died_at, d.id limit max for update skip locked
  ) d;

  delete from pushpop.messages m
  where m.topic = purge_dead.topic and m.state in ('z', 'y') and m.ctid = any (array(
    select m.tid from unnest(ids) u(id)
    cross join lateral (
      select m.ctid as tid from pushpop.messages m where m.topic = purge_dead.topic and m.id = u.id offset 0
    ) m));
  get diagnostics counted = row_count;
  delete from pushpop.dead d where d.topic = purge_dead.topic and d.ctid = any (locked);
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
  return counted;
end
$body$;
