-- A leased message leaves the index of the ready ones. What becomes due later, the end of a lease
-- or of the history, stands in an agenda, a row for a batch.

create table messages (
  ready_at     timestamptz not null,
  pushed_at    timestamptz not null,
  lease_until  timestamptz,
  done_at      timestamptz,
  delete_at    timestamptz,
  fence        integer not null default 0,
  attempt      integer not null default 0,
  max_attempts smallint,
  state        "char" not null default 'p',
  waits        boolean not null default true,
  id           uuid not null,
  token        bytea,
  topic        text collate "C" not null,
  last_error   text,
  headers      jsonb,
  payload      bytea not null,
  primary key (topic, id)
) with (fillfactor = 70);
create index messages_ready on messages (topic, ready_at, pushed_at) where waits;

create table agenda (
  at    timestamptz not null,
  n     integer not null,
  what  "char" not null,  -- l: leases end, h: history ends
  topic text collate "C" not null,
  ids   uuid[] not null
);
create index agenda_order on agenda (topic, what, at);
alter table agenda alter column ids set storage plain;

-- No message that waits lies before low, no end of a lease before low_lease.
create table topics (
  topic     text collate "C" not null primary key,
  low       timestamptz not null default '-infinity',
  low_lease timestamptz not null default '-infinity'
);

create function push(topic text, ids uuid[], payloads bytea[], due timestamptz) returns void
language plpgsql as $$
#variable_conflict use_column
declare
  moment timestamptz := clock_timestamp();
begin
  if cardinality(ids) = 1 then
    insert into messages (topic, id, payload, pushed_at, ready_at)
    values (push.topic, ids[1], payloads[1], moment, coalesce(due, moment))
    on conflict (topic, id) do nothing;
    return;
  end if;
  begin
    insert into messages (topic, id, payload, pushed_at, ready_at)
    select push.topic, u.id, u.payload, moment + u.place * interval '1 microsecond',
           coalesce(due, moment + u.place * interval '1 microsecond')
    from unnest(ids, payloads) with ordinality u(id, payload, place)
    order by u.id;
  exception when unique_violation then
    insert into messages (topic, id, payload, pushed_at, ready_at)
    select push.topic, u.id, u.payload, moment + u.place * interval '1 microsecond',
           coalesce(due, moment + u.place * interval '1 microsecond')
    from unnest(ids, payloads) with ordinality u(id, payload, place)
    order by u.id
    on conflict (topic, id) do nothing;
  end;
end $$;

-- Makes the messages of up to 10 batches wait again, whose leases ended.
create function expire(topic text, moment timestamptz) returns bigint
language plpgsql
set random_page_cost = 0 set cpu_tuple_cost = 0 set cpu_operator_cost = 0 set cpu_index_tuple_cost = 1
set jit = off set enable_seqscan = off set enable_bitmapscan = off set enable_material = off
set enable_sort = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  batch record;
  low   timestamptz;
  first timestamptz;
  n     bigint := 0;
begin
  select t.low_lease into low from topics t where t.topic = expire.topic;
  for batch in
    select a.ctid as at, a.ids from agenda a
    where a.topic = expire.topic and a.what = 'l'
      and a.at >= coalesce(low, '-infinity') and a.at <= moment
    order by a.at limit 10 for update skip locked
  loop
    n := n + 1;
    delete from agenda a where a.ctid = batch.at;
    with back as (
      update messages m set state = 'p', waits = true, lease_until = null
      where m.state = 'l' and m.lease_until <= moment and m.ctid = any(array(
        select x.at from unnest(batch.ids) u(id) cross join lateral (
          select x.ctid as at from messages x
          where x.topic = expire.topic and x.id = u.id and x.state = 'l' offset 0) x))
      returning m.ready_at
    )
    select min(b.ready_at) into first from back b;
    update topics t set low = first where t.topic = expire.topic and t.low > first;
  end loop;
  return n;
end $$;

create function pop(topic text, most integer, lease double precision)
returns table (id uuid, payload bytea, token bytea, fence integer, attempt integer, ready_at timestamptz)
language plpgsql
set random_page_cost = 0 set cpu_tuple_cost = 0 set cpu_operator_cost = 0 set cpu_index_tuple_cost = 1
set jit = off set enable_seqscan = off set enable_bitmapscan = off set enable_material = off
set enable_sort = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  moment timestamptz := clock_timestamp();
  until  timestamptz := moment + lease * interval '1 second';
  proof  bytea := uuid_send(gen_random_uuid());
  mark   record;
begin
  select t.low, t.low_lease into mark from topics t where t.topic = pop.topic;
  perform from agenda a
  where a.topic = pop.topic and a.what = 'l'
    and a.at >= coalesce(mark.low_lease, '-infinity') and a.at <= moment limit 1;
  if found then
    perform expire(pop.topic, moment);
  end if;
  return query
  with free as materialized (
    select m.ctid as at, m.id from messages m
    where m.topic = pop.topic and m.waits
      and m.ready_at >= coalesce(mark.low, '-infinity') and m.ready_at <= moment
    order by m.ready_at, m.pushed_at limit most for update skip locked
  ),
  noted as (
    insert into agenda (topic, what, at, n, ids)
    select pop.topic, 'l', until, cardinality(b.ids), b.ids
    from (select array_agg(f.id) as ids from free f) a
    cross join lateral (
      select a.ids[p : p + 249] as ids from generate_series(1, cardinality(a.ids), 250) p) b
  ),
  taken as (
    update messages m
    set state = 'l', waits = false, lease_until = until, token = proof,
        attempt = m.attempt + 1, fence = m.fence + 1
    where m.ctid = any(array(select f.at from free f))
    returning m.id, m.payload, m.token, m.fence, m.attempt, m.ready_at, m.pushed_at
  )
  select t.id, t.payload, t.token, t.fence, t.attempt, t.ready_at from taken t
  order by t.ready_at, t.pushed_at;
end $$;

create function settle(topic text, ids uuid[], tokens bytea[], keep boolean) returns bigint
language plpgsql
set random_page_cost = 0 set cpu_tuple_cost = 0 set cpu_operator_cost = 0 set cpu_index_tuple_cost = 1
set jit = off set enable_seqscan = off set enable_bitmapscan = off set enable_material = off
set enable_sort = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  moment timestamptz := clock_timestamp();
  until  timestamptz := moment + interval '1 hour';
  n      bigint;
begin
  if keep then
    update messages m
    set state = 'c', lease_until = null, done_at = moment, delete_at = until
    from (
      select x.at, u.token from unnest(ids, tokens) u(id, token)
      cross join lateral (
        select x.ctid as at from messages x where x.topic = settle.topic and x.id = u.id offset 0
      ) x
      offset 0
    ) a
    where m.ctid = a.at and m.token = a.token and m.state = 'l';
    get diagnostics n = row_count;
    insert into agenda (topic, what, at, n, ids)
    select settle.topic, 'h', until, cardinality(b.ids), b.ids
    from (select ids[p : p + 249] as ids from generate_series(1, cardinality(ids), 250) p) b
    where n > 0;
  else
    delete from messages m
    using (
      select x.at, u.token from unnest(ids, tokens) u(id, token)
      cross join lateral (
        select x.ctid as at from messages x where x.topic = settle.topic and x.id = u.id offset 0
      ) x
      offset 0
    ) a
    where m.ctid = a.at and m.token = a.token and m.state = 'l';
    get diagnostics n = row_count;
  end if;
  return n;
end $$;

create function upkeep(topic text) returns void
language plpgsql
set random_page_cost = 0 set cpu_tuple_cost = 0 set cpu_operator_cost = 0 set cpu_index_tuple_cost = 1
set jit = off set enable_seqscan = off set enable_bitmapscan = off set enable_material = off
set enable_sort = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  known record;
  first timestamptz;
  ends  timestamptz;
begin
  insert into topics (topic) values (upkeep.topic) on conflict do nothing;
  select t.low, t.low_lease into known from topics t where t.topic = upkeep.topic for update;
  select m.ready_at into first from messages m
  where m.topic = upkeep.topic and m.waits and m.ready_at >= known.low
  order by m.ready_at, m.pushed_at limit 1;
  select a.at into ends from agenda a
  where a.topic = upkeep.topic and a.what = 'l' and a.at >= known.low_lease
  order by a.at limit 1;
  -- The queue itself must heed pushes that have not committed yet; a second is enough here.
  update topics t
  set low = coalesce(first, clock_timestamp() - interval '1 second'),
      low_lease = coalesce(ends, clock_timestamp() - interval '1 second')
  where t.topic = upkeep.topic;
end $$;

-- Does what is due before the given time, in steps: 0 says that nothing is left.
create function sweep(topic text, most integer, before timestamptz) returns bigint
language plpgsql
set random_page_cost = 0 set cpu_tuple_cost = 0 set cpu_operator_cost = 0 set cpu_index_tuple_cost = 1
set jit = off set enable_seqscan = off set enable_bitmapscan = off set enable_material = off
set enable_sort = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  batch record;
  left_ integer := most;
  rows  bigint := 0;
  n     bigint := expire(sweep.topic, before);
begin
  for batch in
    select a.n from agenda a
    where a.topic = sweep.topic and a.what = 'h' and a.at <= before order by a.at limit most
  loop
    rows := rows + 1;
    left_ := left_ - batch.n;
    exit when left_ <= 0;
  end loop;
  if rows = 0 then
    return n;
  end if;
  with due as (
    delete from agenda a where a.ctid = any(array(
      select d.ctid from agenda d
      where d.topic = sweep.topic and d.what = 'h' and d.at <= before order by d.at limit rows))
    returning a.ids
  )
  delete from messages m where m.delete_at <= before and m.ctid = any(array(
    select x.at from (select unnest(d.ids) as id from due d) u cross join lateral (
      select x.ctid as at from messages x where x.topic = sweep.topic and x.id = u.id offset 0) x));
  return n + rows;
end $$;
