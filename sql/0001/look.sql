-- Looking at messages without taking them.

-- A message as it is shown: ready, delayed, leased, completed, discarded or dead.
create type pushpop.message as (
  id           uuid,
  payload      bytea,
  headers      jsonb,
  state        text,
  attempt      integer,
  max_attempts integer,
  fence        bigint,
  pushed_at    timestamptz,
  ready_at     timestamptz,
  lease_until  timestamptz,
  done_at      timestamptz,
  delete_at    timestamptz,
  last_error   text,   -- that of the last of its failures
  failures     jsonb   -- the newest ten, oldest first, each with attempt, at and error; null: it never failed
);

-- Headers as an array of names and values in turn, for clients that do not read JSON; null if there are none, or if the
-- stored value is no object.
create function pushpop.header_pairs(headers jsonb) returns text[]
language plpgsql immutable parallel safe
as $body$
begin
  if pg_catalog.jsonb_typeof(headers) operator(pg_catalog.=) 'object' then
    return array(
      select pg_catalog.unnest(array[h.key, coalesce(h.value, '')]) from pg_catalog.jsonb_each_text(headers) h);
  end if;
  return null;
end
$body$;

-- Failures likewise: attempt, microseconds since 1970, and error in turn; null if the stored value is not a list of them.
create function pushpop.failure_list(failures jsonb) returns text[]
language plpgsql stable parallel safe
as $body$
begin
  return array(
    select pg_catalog.unnest(array[f.attempt, pg_catalog.int8(pg_catalog.float8mul(pg_catalog.date_part('epoch', f.at), 1000000))::pg_catalog.text,
                                   coalesce(f.error, '')])
    from pg_catalog.jsonb_to_recordset(failures) f(attempt pg_catalog.text, at pg_catalog.timestamptz, error pg_catalog.text)
    where f.attempt is not null and pg_catalog.isfinite(f.at));
exception when others then
  return null;
end
$body$;

-- A message by its id, if it is stored.
create function pushpop.find(topic text, id uuid) returns setof pushpop.message
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan
as $body$
#variable_conflict use_column
declare
  moment timestamptz := clock_timestamp();
begin
  perform pushpop.check_topic(find.topic);
  -- A live message that is in no run is leased, and the leases say until when. One that is in
  -- neither has a lease that ended, and waits to be reclaimed.
  return query
    select m.id, m.payload, m.headers,
           case when m.state = 'c' then 'completed' when m.state in ('x', 'k') then 'discarded'
             when m.state in ('z', 'y') then 'dead'
             when l.lease_until > moment then 'leased'
             when l.ended and m.attempt >= m.max_attempts - 1 then 'dead'
             when m.ready_at > moment then 'delayed' else 'ready' end,
           case when l.leased then pushpop.one_more(m.attempt) else m.attempt end, m.max_attempts::integer,
           m.fence + case when l.leased then 1 else 0 end::bigint, m.pushed_at, m.ready_at,
           case when l.lease_until > moment then l.lease_until end,
           coalesce(m.done_at, case when l.ended and m.attempt >= m.max_attempts - 1 then l.lease_until end),
           m.delete_at, m.failures -> -1 ->> 'error', m.failures
    from pushpop.messages m
    left join lateral (
      select true as waiting from pushpop.runs q
      where q.topic = find.topic and q.ready_at = m.ready_at and q.pushed_at = m.pushed_at
        and q.place <= m.place and find.id = any (q.ids) and m.state in ('p', 'd', 'r', 'f', 'e')
      limit 1
    ) q on true
    left join lateral (
      select true as leased, max(l.lease_until) as lease_until, max(l.lease_until) <= moment as ended
      from pushpop.leases l
      where l.topic = find.topic and find.id = any (l.ids)
        and l.fences[array_position(l.ids, find.id)] = pushpop.delivery(m.pushed_at, m.fence)
        and q.waiting is null and m.state in ('p', 'd', 'r', 'f', 'e')
      having count(*) > 0
    ) l on true
    where m.topic = find.topic and m.id = find.id;
end
$body$;

-- The first messages of a topic that wait, in the order in which they will be popped: ready, then
-- delayed. Fewer than max if they would have more than 16 MiB together, but one at least.
create function pushpop.peek(topic text, max integer default 10) returns setof pushpop.message
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $body$
#variable_conflict use_column
declare
  moment timestamptz := clock_timestamp();
  start  timestamptz := pushpop.bottom(topic);
begin
  perform pushpop.check_topic(peek.topic);
  if max is null or max not between 1 and 1000 then
    perform pushpop.refuse(format('a peek shows 1 to 1000 messages, not %s', coalesce(max::text, 'null')));
  end if;
  return query
    select m.id, m.payload, m.headers, case when m.ready_at > moment then 'delayed' else 'ready' end,
           m.attempt, m.max_attempts::integer, m.fence::bigint, m.pushed_at, m.ready_at, null::timestamptz,
           m.done_at, m.delete_at, m.failures -> -1 ->> 'error', m.failures
    from (
      select m.*, row_number() over () as nth,
             sum(greatest(pushpop.weigh(m.payload, m.headers, m.failures), 16384)) over (rows unbounded preceding) as bytes
      from (
        select q.ids from pushpop.runs q where q.topic = peek.topic and q.ready_at >= start
        order by q.ready_at, q.pushed_at, q.place, q.id limit max
      ) q
      cross join lateral unnest(q.ids) u(id)
      cross join lateral (
        select m.* from pushpop.messages m where m.topic = peek.topic and m.id = u.id offset 0
      ) m
      limit max
    ) m
    where m.bytes <= 16777216 or m.nth = 1;
end
$body$;
