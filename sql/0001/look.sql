-- Looking at messages without taking them.

create function pushpop.state_of(
  state "char", ready_at timestamptz, lease_until timestamptz, attempt integer, max_attempts smallint, moment timestamptz
) returns text
language sql immutable parallel safe
as $body$
  select case
    when state = 'c' then 'completed'
    when state = 'x' then 'discarded'
    when state = 'z' then 'dead'
    when lease_until > moment then 'leased'
    when state = 'l' and attempt >= max_attempts then 'dead'
    when ready_at > moment then 'delayed'
    else 'ready'
  end
$body$;

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
  last_error   text
);

-- A message by its id, if it is stored.
create function pushpop.find(topic text, id uuid) returns setof pushpop.message
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $body$
declare
  moment timestamptz := clock_timestamp();
begin
  perform pushpop.check_topic(find.topic);
  return query
    select m.id, m.payload, m.headers,
           pushpop.state_of(m.state, m.ready_at, m.lease_until, m.attempt, m.max_attempts, moment),
           m.attempt, m.max_attempts::integer, m.fence, m.pushed_at, m.ready_at, m.lease_until,
           m.done_at, m.delete_at, m.last_error
    from pushpop.messages m
    where m.topic = find.topic and m.id = find.id;
end
$body$;

-- The first messages of a topic that are not done, in the order of the queue: ready, delayed
-- and leased ones.
create function pushpop.peek(topic text, max integer default 10) returns setof pushpop.message
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
set enable_sort = off
as $body$
declare
  moment timestamptz := clock_timestamp();
  bottom record := pushpop.bottom(peek.topic);
begin
  perform pushpop.check_topic(peek.topic);
  if max is null or max not between 1 and 1000 then
    perform pushpop.refuse(format('a peek shows 1 to 1000 messages, not %s', coalesce(max::text, 'null')));
  end if;
  return query
    select m.id, m.payload, m.headers,
           pushpop.state_of(m.state, m.ready_at, m.lease_until, m.attempt, m.max_attempts, moment),
           m.attempt, m.max_attempts::integer, m.fence, m.pushed_at, m.ready_at, m.lease_until,
           m.done_at, m.delete_at, m.last_error
    from pushpop.messages m
    where m.topic = peek.topic and m.done_at is null
      and (m.ready_at, m.pushed_at) >= (bottom.ready_at, bottom.pushed_at)
    order by m.ready_at, m.pushed_at
    limit max;
end
$body$;
