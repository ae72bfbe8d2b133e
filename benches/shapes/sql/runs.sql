-- The chosen shape. A message is written once, in no order but its id's. Its place in the queue is
-- in a run, a row for up to 25 messages of one push. Its lease is in a row for up to 250 messages
-- of one pop. Nothing indexes a message's state: every update of it stays on its page (HOT).

create table messages (
  pushed_at    timestamptz not null,
  ready_at     timestamptz not null,
  done_at      timestamptz,
  delete_at    timestamptz,
  fence        integer not null default 0,  -- deliveries that are over
  attempt      integer not null default 0,
  place        integer not null,
  max_attempts smallint,
  state        "char" not null default 'p',
  id           uuid not null,
  topic        text collate "C" not null,
  last_error   text,
  headers      jsonb,
  payload      bytea not null,
  primary key (topic, id)
) with (fillfactor = 85);

create table runs (
  ready_at  timestamptz not null,
  pushed_at timestamptz not null,
  place     integer not null,
  n         integer not null,
  topic     text collate "C" not null,
  ids       uuid[] not null
) with (fillfactor = 70);
create index runs_order on runs (topic, ready_at, pushed_at, place);
alter table runs alter column ids set storage plain;

-- The token of a lease is the key of its row and its slot there, two bytes.
create table leases (
  lease_until timestamptz not null,
  n           integer not null,
  topic       text collate "C" not null,
  key         bytea not null,
  ids         uuid[] not null,
  fences      integer[] not null,
  primary key (topic, key)
);
-- For those alone who ask for an end after -infinity: with statistics of a small table the planner
-- takes this index for a look by key as well, and reads the topic's whole part of it.
create index leases_end on leases (topic, lease_until) where lease_until > '-infinity';
alter table leases alter column ids set storage plain;
alter table leases alter column fences set storage plain;

create table history (
  delete_at timestamptz not null,
  n         integer not null,
  topic     text collate "C" not null,
  ids       uuid[] not null
);
create index history_order on history (topic, delete_at);
alter table history alter column ids set storage plain;

-- No run lies before low, no end of a lease before low_lease.
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
  ready  timestamptz := coalesce(due, moment);
  n      integer := cardinality(ids);
begin
  if n = 1 then
    insert into messages (topic, id, payload, pushed_at, ready_at, place)
    values (push.topic, ids[1], payloads[1], moment, ready, 1)
    on conflict (topic, id) do nothing;
    if found then
      insert into runs (topic, ready_at, pushed_at, place, n, ids)
      values (push.topic, ready, moment, 1, 1, ids);
    end if;
    return;
  end if;
  begin
    insert into messages (topic, id, payload, pushed_at, ready_at, place)
    select push.topic, u.id, u.payload, moment, ready, u.place
    from unnest(ids, payloads) with ordinality u(id, payload, place)
    order by u.id;
    insert into runs (topic, ready_at, pushed_at, place, n, ids)
    select push.topic, ready, moment, p, least(25, n - p + 1), ids[p : p + 24]
    from generate_series(1, n, 25) p;
  exception when unique_violation then
    with stored as (
      insert into messages (topic, id, payload, pushed_at, ready_at, place)
      select push.topic, u.id, u.payload, moment, ready, u.place
      from unnest(ids, payloads) with ordinality u(id, payload, place)
      order by u.id
      on conflict (topic, id) do nothing
      returning id, place
    )
    insert into runs (topic, ready_at, pushed_at, place, n, ids)
    select push.topic, ready, moment, min(s.place), count(*), array_agg(s.id order by s.place)
    from (select id, place, (row_number() over (order by place) - 1) / 25 as run from stored) s
    group by s.run;
  end;
end $$;

-- Puts the messages of up to 10 lease rows that ended back to their old place.
create function expire(topic text, moment timestamptz) returns bigint
language plpgsql
set random_page_cost = 0 set cpu_tuple_cost = 0 set cpu_operator_cost = 0 set cpu_index_tuple_cost = 1
set jit = off set enable_seqscan = off set enable_bitmapscan = off set enable_material = off
set enable_sort = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  ended record;
  low   timestamptz;
  first timestamptz;
  n     bigint := 0;
begin
  select t.low_lease into low from topics t where t.topic = expire.topic;
  for ended in
    select l.ctid as at, l.ids, l.fences from leases l
    where l.topic = expire.topic and l.lease_until > '-infinity'
      and l.lease_until >= coalesce(low, '-infinity') and l.lease_until <= moment
    order by l.lease_until limit 10 for update skip locked
  loop
    n := n + 1;
    delete from leases l where l.ctid = ended.at;
    with back as (
      update messages m set fence = m.fence + 1, attempt = m.attempt + 1
      where m.state = 'p' and m.ctid = any(array(
        select x.at from unnest(ended.ids, ended.fences) u(id, fence) cross join lateral (
          select x.ctid as at from messages x
          where x.topic = expire.topic and x.id = u.id and x.fence = u.fence offset 0) x))
      returning m.id, m.ready_at, m.pushed_at, m.place
    ),
    put as (
      insert into runs (topic, ready_at, pushed_at, place, n, ids)
      select expire.topic, b.ready_at, b.pushed_at, b.place, 1, array[b.id] from back b
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
  mark   record;
  run    record;
  want   integer := most;
  used   tid[] := '{}';
  taken  uuid[] := '{}';
  keys   bytea[];
  front cursor (low timestamptz) for
    select q.ctid as at, q.n, q.ids from runs q
    where q.topic = pop.topic and q.ready_at >= low and q.ready_at <= moment
    order by q.ready_at, q.pushed_at, q.place for update skip locked;
begin
  select t.low, t.low_lease into mark from topics t where t.topic = pop.topic;
  perform from leases l
  where l.topic = pop.topic and l.lease_until > '-infinity'
    and l.lease_until >= coalesce(mark.low_lease, '-infinity') and l.lease_until <= moment
  order by l.lease_until limit 1;
  if found then
    perform expire(pop.topic, moment);
  end if;

  if most = 1 then
    select q.ctid as at, q.n, q.ids into run from runs q
    where q.topic = pop.topic and q.ready_at >= coalesce(mark.low, '-infinity') and q.ready_at <= moment
    order by q.ready_at, q.pushed_at, q.place limit 1 for update skip locked;
    if not found then
      return;
    elsif run.n = 1 then
      delete from runs q where q.ctid = run.at;
    else
      update runs q set n = q.n - 1, place = q.place + 1, ids = q.ids[2 :] where q.ctid = run.at;
    end if;
    token := uuid_send(gen_random_uuid());
    select m.id, m.payload, m.fence, m.attempt + 1, m.ready_at into id, payload, fence, attempt, ready_at
    from messages m where m.topic = pop.topic and m.id = run.ids[1];
    insert into leases (topic, key, lease_until, n, ids, fences)
    values (pop.topic, token, until, 1, array[id], array[fence]);
    token := token || '\x0000';
    fence := fence + 1;
    return next;
    return;
  end if;

  -- Such a loop reads a row at a time: no run is locked that is not used.
  for run in front (coalesce(mark.low, '-infinity')) loop
    if run.n <= want then
      used := used || run.at;
      taken := taken || run.ids;
      want := want - run.n;
    else
      update runs q set n = q.n - want, place = q.place + want, ids = q.ids[want + 1 :] where q.ctid = run.at;
      taken := taken || run.ids[: want];
      want := 0;
    end if;
    exit when want = 0;
  end loop;
  if taken = '{}' then
    return;
  end if;
  delete from runs q where q.ctid = any(used);
  keys := array[uuid_send(gen_random_uuid())];
  while cardinality(keys) * 250 < cardinality(taken) loop
    keys := keys || uuid_send(gen_random_uuid());
  end loop;
  return query
  with granted as materialized (
    select u.place - 1 as place, m.id, m.payload, m.fence, m.attempt, m.ready_at
    from unnest(taken) with ordinality u(id, place)
    cross join lateral (
      select x.id, x.payload, x.fence, x.attempt, x.ready_at from messages x
      where x.topic = pop.topic and x.id = u.id offset 0) m
  ),
  leased as (
    insert into leases (topic, key, lease_until, n, ids, fences)
    select pop.topic, k.key, until, cardinality(k.ids), k.ids, k.fences
    from (select array_agg(g.fence) as fences from granted g) a
    cross join lateral (
      select keys[c] as key, taken[c * 250 - 249 : c * 250] as ids, a.fences[c * 250 - 249 : c * 250] as fences
      from generate_series(1, cardinality(keys)) c) k
  )
  select g.id, g.payload, keys[g.place / 250 + 1] || int2send((g.place % 250)::smallint),
         g.fence + 1, g.attempt + 1, g.ready_at
  from granted g;
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
  moment  timestamptz := clock_timestamp();
  until   timestamptz := moment + interval '1 hour';
  one     uuid;
  given   bytea;
  slot    integer;
  granted integer;
  hits    tid[];
  whole   tid[];
  n       bigint;
begin
  if cardinality(ids) = 1 then
    one := ids[1];
    given := substring(tokens[1] from 1 for 16);
    slot := get_byte(tokens[1], 16) * 256 + get_byte(tokens[1], 17) + 1;
    delete from leases l
    where l.topic = settle.topic and l.key = given and l.n = 1 and l.ids[slot] = one
    returning l.fences[slot] into granted;
    if not found then
      select l.fences[slot] into granted from leases l
      where l.topic = settle.topic and l.key = given and l.ids[slot] = one for share;
    end if;
    if granted is null then
      return 0;
    elsif keep then
      update messages m
      set state = 'c', done_at = moment, delete_at = until, attempt = m.attempt + 1, fence = m.fence + 1
      where m.topic = settle.topic and m.id = one and m.fence = granted and m.state = 'p';
    else
      delete from messages m
      where m.topic = settle.topic and m.id = one and m.fence = granted and m.state = 'p';
    end if;
    get diagnostics n = row_count;
    if keep and n > 0 then
      insert into history (topic, delete_at, n, ids) values (settle.topic, until, 1, ids);
    end if;
    return n;
  end if;

  -- The lease rows are locked, so that their end cannot come between. Those that are settled wholly
  -- go; others stay until their end, when the fences tell what was settled.
  with asked as (
    select substring(u.token from 1 for 16) as key, array_agg(u.id) as ids,
           array_agg(get_byte(u.token, 16) * 256 + get_byte(u.token, 17) + 1) as slots
    from unnest(ids, tokens) u(id, token)
    group by 1
  ),
  held as materialized (
    select a.ids, a.slots, l.at, l.n, l.ids as leased, l.fences
    from asked a
    cross join lateral (
      select x.ctid as at, x.n, x.ids, x.fences from leases x
      where x.topic = settle.topic and x.key = a.key offset 0 for update) l
  )
  select array(
           select m.at from held h
           cross join lateral unnest(h.ids, h.slots) u(id, slot)
           cross join lateral (
             select x.ctid as at from messages x
             where x.topic = settle.topic and x.id = u.id and x.fence = h.fences[u.slot] offset 0) m
           where h.leased[u.slot] = u.id),
         array(select h.at from held h where h.n = cardinality(h.ids))
  into hits, whole;
  if keep then
    update messages m
    set state = 'c', done_at = moment, delete_at = until, attempt = m.attempt + 1, fence = m.fence + 1
    where m.state = 'p' and m.ctid = any(hits);
    get diagnostics n = row_count;
    insert into history (topic, delete_at, n, ids)
    select settle.topic, until, cardinality(b.ids), b.ids
    from (select ids[p : p + 249] as ids from generate_series(1, cardinality(ids), 250) p) b
    where n > 0;
  else
    delete from messages m where m.state = 'p' and m.ctid = any(hits);
    get diagnostics n = row_count;
  end if;
  if n = cardinality(ids) then
    delete from leases l where l.ctid = any(whole);
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
  select q.ready_at into first from runs q
  where q.topic = upkeep.topic and q.ready_at >= known.low
  order by q.ready_at, q.pushed_at, q.place limit 1;
  select l.lease_until into ends from leases l
  where l.topic = upkeep.topic and l.lease_until > '-infinity' and l.lease_until >= known.low_lease
  order by l.lease_until limit 1;
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
    select h.n from history h
    where h.topic = sweep.topic and h.delete_at <= before order by h.delete_at limit most
  loop
    rows := rows + 1;
    left_ := left_ - batch.n;
    exit when left_ <= 0;
  end loop;
  if rows = 0 then
    return n;
  end if;
  with due as (
    delete from history h where h.ctid = any(array(
      select d.ctid from history d
      where d.topic = sweep.topic and d.delete_at <= before order by d.delete_at limit rows))
    returning h.ids
  )
  delete from messages m where m.delete_at <= before and m.ctid = any(array(
    select x.at from (select unnest(d.ids) as id from due d) u cross join lateral (
      select x.ctid as at from messages x where x.topic = sweep.topic and x.id = u.id offset 0) x));
  return n + rows;
end $$;
