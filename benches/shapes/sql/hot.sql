-- The lease is written on the message's row, which stays on its page (HOT). Leased messages stay
-- in the order index, and a pop steps over them.

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
  id           uuid not null,
  token        bytea,
  topic        text collate "C" not null,
  last_error   text,
  headers      jsonb,
  payload      bytea not null,
  primary key (topic, id)
) with (fillfactor = 50);
create index messages_order on messages (topic, ready_at, pushed_at) where done_at is null;
create index messages_history on messages (topic, delete_at) where delete_at is not null;

-- No message in the order lies before low.
create table topics (
  topic text collate "C" not null primary key,
  low   timestamptz not null default '-infinity'
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
  low    timestamptz;
begin
  select t.low into low from topics t where t.topic = pop.topic;
  return query
  with free as materialized (
    select m.ctid as at from messages m
    where m.topic = pop.topic and m.done_at is null
      and m.ready_at >= coalesce(low, '-infinity') and m.ready_at <= moment
      and (m.lease_until is null or m.lease_until <= moment)
    order by m.ready_at, m.pushed_at limit most for update skip locked
  ),
  taken as (
    update messages m
    set state = 'l', lease_until = until, token = proof, attempt = m.attempt + 1, fence = m.fence + 1
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
  n      bigint;
begin
  if keep then
    update messages m
    set state = 'c', lease_until = null, done_at = moment, delete_at = moment + interval '1 hour'
    from (
      select x.at, u.token from unnest(ids, tokens) u(id, token)
      cross join lateral (
        select x.ctid as at from messages x where x.topic = settle.topic and x.id = u.id offset 0
      ) x
      offset 0
    ) a
    where m.ctid = a.at and m.token = a.token and m.state = 'l';
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
  end if;
  get diagnostics n = row_count;
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
  known timestamptz;
  first timestamptz;
begin
  insert into topics (topic) values (upkeep.topic) on conflict do nothing;
  select t.low into known from topics t where t.topic = upkeep.topic for update;
  select m.ready_at into first from messages m
  where m.topic = upkeep.topic and m.done_at is null and m.ready_at >= known
  order by m.ready_at, m.pushed_at limit 1;
  -- The queue itself must heed pushes that have not committed yet; a second is enough here.
  update topics t set low = coalesce(first, clock_timestamp() - interval '1 second')
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
  n bigint;
begin
  delete from messages m where m.ctid = any(array(
    select h.ctid from messages h
    where h.topic = sweep.topic and h.delete_at <= before
    order by h.delete_at limit most for update skip locked));
  get diagnostics n = row_count;
  return n;
end $$;
