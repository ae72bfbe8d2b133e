-- Taking messages out: the oldest that are free, each with a lease.
--
-- The settings of these functions pin their plans, which must not depend on statistics: those of a
-- queue are always wrong. Rows are found through the primary key, one probe each, and written by
-- their ctid: see README.md beside this folder.

-- The number of the next delivery of a message, after so many. Counted from the time of the push in microseconds, so
-- that no number comes twice for an id, even when that is used again after its message was deleted.
create function pushpop.delivery(pushed_at timestamptz, fence integer) returns bigint
language sql stable parallel safe
as $body$
  select case when isfinite(delivery.pushed_at) then (date_part('epoch', delivery.pushed_at) * 1000000)::bigint else 0 end + delivery.fence + 1
$body$;

-- Pops up to max messages of a topic, oldest first, each leased for so many seconds: lease, else what
-- the topic says, else fallback. A topic that is paused hands out none. Payloads, headers and failures have up to
-- so many bytes together: fewer messages come than there are if they have more, but one at least.
--
-- The token proves the lease to every later call. A message whose lease expired is free again,
-- at its old place; one that has no attempt left is dead and is not handed out.
create function pushpop.pop(
  topic    text,
  max      integer          default 1,
  lease    double precision default null,
  fallback double precision default 300,
  bytes    bigint           default 16777216
) returns table (
  id           uuid,
  payload      bytea,
  headers      jsonb,
  token        bytea,
  lease_until  timestamptz,
  attempt      integer,
  max_attempts integer,
  fence        bigint,
  pushed_at    timestamptz,
  ready_at     timestamptz,
  last_error   text,
  failures     jsonb
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
  -- Whoever holds something already waits for nobody: two pops of the same topics would wait for each other.
  free   boolean := pg_current_xact_id_if_assigned() is null;
  moment timestamptz;
  until  timestamptz;
  known  record;
  start  timestamptz;
  taken  record;
  n      integer;
  sound  integer;  -- how many of these can be delivered as they are stored
  keys   bytea[];
begin
  if (octet_length(pop.topic) between 1 and 255 and coalesce(lease, 1) between 1 and 86400
      and fallback between 1 and 86400) is not true then
    perform pushpop.check_topic(pop.topic), pushpop.lease_interval(coalesce(lease, 1)), pushpop.lease_interval(fallback);
  end if;
  if max is null or max not between 1 and 1000 then
    perform pushpop.refuse(format('a pop takes 1 to 1000 messages, not %s', coalesce(max::text, 'null')));
  elsif (bytes > 0) is not true then
    perform pushpop.refuse(format('a pop takes at least 1 byte, not %s', coalesce(bytes::text, 'null')));
  end if;

  -- As in a push: a lease may end before this transaction does, and no mark may pass it meanwhile.
  lock table pushpop.messages in row exclusive mode;
  moment := clock_timestamp();
  select t.low, t.looked_at, t.swept_at, t.paused, t.lease into known from pushpop.topics t where t.topic = pop.topic;
  if known.paused then
    return;
  elsif not found or known.looked_at not between moment - interval '1 second' and moment then
    perform pushpop.reclaim(pop.topic, moment, 1000);
    -- To move the mark on costs more than a pop does. Where many are popped, upkeep does it every second.
    if known.looked_at is null or known.looked_at not between moment - interval '10 seconds' and moment
       or exists (select from pushpop.behind b where b.topic = pop.topic) then
      perform pushpop.note_look(pop.topic, moment);
      -- Another transaction may have the topic in its hands for long: what lies before the watermark comes first all the same.
      known.low := pushpop.bottom(pop.topic);
    end if;
  end if;
  start := coalesce(known.low, '-infinity');
  taken := pushpop.take_runs(pop.topic, start, moment, max, bytes);

  -- Nothing there: look at everything, first at what lies behind the mark.
  if taken.ids is null then
    if pushpop.reclaim(pop.topic, moment, 1000) > 0
       or exists (select from pushpop.behind b where b.topic = pop.topic)
       or pushpop.begin_sweep(pop.topic, moment, known.swept_at) then
      start := '-infinity';
      taken := pushpop.take_runs(pop.topic, start, moment, max, bytes);
    end if;
    if taken.ids is null and free then
      taken := pushpop.wait_for_runs(pop.topic, start, moment, max, bytes);
    end if;
    if taken.ids is null then
      return;
    end if;
  end if;

  until := clock_timestamp() + coalesce(lease * interval '1 second', known.lease, fallback * interval '1 second');
  loop
    n := cardinality(taken.ids);
    if n = 1 then
      token := uuid_send(gen_random_uuid());
      insert into pushpop.leases (topic, key, lease_until, open, ids, fences)
      values (pop.topic, token, until, 1, taken.ids, taken.fences);
      select m.id, m.payload, m.headers, token || int2send(1::int2) || int8send(taken.fences[1]), until, m.attempt + 1, m.max_attempts,
             m.fence + 1, m.pushed_at, m.ready_at, m.failures -> -1 ->> 'error', m.failures
      into id, payload, headers, token, lease_until, attempt, max_attempts, fence, pushed_at, ready_at, last_error, failures
      from pushpop.messages m
      where m.topic = pop.topic and m.id = taken.ids[1] and pushpop.delivery(m.pushed_at, m.fence) = taken.fences[1]
        and pushpop.is_sound(m.state, m.attempt, m.fence, m.pushed_at, m.ready_at, m.headers, m.failures);
      sound := 0;
      if found then
        sound := 1;
        return next;
      end if;
    else
      keys := null;
      for place in 1..n by 250 loop
        keys := keys || uuid_send(gen_random_uuid());
        insert into pushpop.leases (topic, key, lease_until, open, ids, fences)
        values (pop.topic, keys[cardinality(keys)], until, least(250, n - place + 1),
                taken.ids[place : place + 249], taken.fences[place : place + 249]);
      end loop;
      -- One probe for each id, in their order.
      return query
        select m.id, m.payload, m.headers,
               keys[(u.place + 249) / 250] || int2send(((u.place - 1) % 250 + 1)::int2) || int8send(u.fence),
               until, m.attempt + 1, m.max_attempts::integer, m.fence + 1::bigint, m.pushed_at, m.ready_at,
               m.failures -> -1 ->> 'error', m.failures
        from unnest(taken.ids, taken.fences) with ordinality u(id, fence, place)
        cross join lateral (
          select m.id, m.payload, m.headers, m.attempt, m.max_attempts, m.fence, m.pushed_at, m.ready_at, m.failures
          from pushpop.messages m
          where m.topic = pop.topic and m.id = u.id and pushpop.delivery(m.pushed_at, m.fence) = u.fence
            and pushpop.is_sound(m.state, m.attempt, m.fence, m.pushed_at, m.ready_at, m.headers, m.failures) offset 0
        ) m;
      get diagnostics sound = row_count;
    end if;
    exit when sound = n;
    perform pushpop.set_aside(pop.topic, taken.ids, taken.fences, moment);
    exit when sound > 0;
    taken := pushpop.take_runs(pop.topic, start, moment, max, bytes);
    exit when taken.ids is null;
  end loop;
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
end
$body$;

-- The same from several topics, one after the other: up to max messages together, from whichever have some, so that
-- the last ones may not be asked. With maxes, up to so many of each instead; with leases, each as long as its
-- topic's.
--
-- part  the place of its topic among them, from one on. A row that has nothing else is of the first topic that was not
--       asked, because the others had so many bytes.
create function pushpop.pop_any(
  topics   text[],
  max      integer            default 1,
  lease    double precision   default null,
  fallback double precision   default 300,
  maxes    integer[]          default null,
  leases   double precision[] default null
) returns table (
  part         bigint,
  id           uuid,
  payload      bytea,
  headers      jsonb,
  token        bytea,
  lease_until  timestamptz,
  attempt      integer,
  max_attempts integer,
  fence        bigint,
  pushed_at    timestamptz,
  ready_at     timestamptz,
  last_error   text,
  failures     jsonb
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set enable_material = off
set random_page_cost = 0
set cpu_tuple_cost = 0
set cpu_operator_cost = 0
set cpu_index_tuple_cost = 1
set plan_cache_mode = force_generic_plan
as $body$
#variable_conflict use_column
declare
  moment  timestamptz := clock_timestamp();
  want    integer := case when maxes is null then max end;
  room    bigint := 16777216;
  sweeps  integer := 20;
  parts   refcursor;
  asked   record;
  message record;
begin
  perform pushpop.check_topics(topics);
  perform pushpop.check_arrays(cardinality(topics), array[cardinality(maxes), cardinality(leases)]);
  if maxes is null and (max is null or max not between 1 and 1000) then
    perform pushpop.refuse(format('a pop takes 1 to 1000 messages, not %s', coalesce(max::text, 'null')));
  end if;
  if maxes is not null then
    open parts for
      select u.topic, u.part, u.max, coalesce(u.lease, pop_any.lease) as lease, false as is_stale, true as has_some
      from unnest(topics, maxes, leases) with ordinality u(topic, max, lease, part) where u.max > 0;
  else
    open parts for
      select u.topic, u.part, null::integer as max, coalesce(u.lease, pop_any.lease) as lease,
             (t.swept_at not between moment - interval '1 minute' and moment) is true as is_stale, f.has_run or f.has_ended as has_some
      from unnest(topics, leases) with ordinality u(topic, lease, part)
      left join lateral (
        select t.paused, t.reclaimed_to, t.swept_at from pushpop.topics t where t.topic = u.topic offset 0
      ) t on true
      cross join lateral pushpop.bottoms(u.topic) b
      cross join lateral (
        select coalesce((
                 select true from pushpop.runs q
                 where q.topic = u.topic and q.ready_at >= b.start and q.ready_at <= moment limit 1), false) as has_run,
               coalesce((
                 select true from pushpop.leases l
                 where l.topic = u.topic and l.lease_until >= coalesce(t.reclaimed_to, '-infinity')
                   and l.lease_until > '-infinity' and l.lease_until <= moment limit 1), false) as has_ended
        offset 0
      ) f
      where t.paused is not true;
  end if;
  loop
    fetch parts into asked;
    exit when not found;
    if not asked.has_some then
      -- Some are looked at from the beginning now, which costs most; the others next time.
      continue when not asked.is_stale or sweeps = 0;
      sweeps := sweeps - 1;
    end if;
    if room <= 0 then
      part := asked.part;
      id := null;
      payload := null;
      return next;
      return;
    end if;
    for message in
      select p.* from pushpop.pop(asked.topic, least(asked.max, want), asked.lease, fallback, room) p
    loop
      part := asked.part;
      id := message.id;
      payload := message.payload;
      headers := message.headers;
      token := message.token;
      lease_until := message.lease_until;
      attempt := message.attempt;
      max_attempts := message.max_attempts;
      fence := message.fence;
      pushed_at := message.pushed_at;
      ready_at := message.ready_at;
      last_error := message.last_error;
      failures := message.failures;
      return next;
      want := want - 1;
      room := room - greatest(pushpop.weigh(payload, headers, failures), 16384);
    end loop;
    exit when maxes is null and want = 0;
  end loop;
end
$body$;

-- Takes the first runs, up to max messages and about so many bytes, out of the order; returns their ids, or null, and
-- the numbers of their next deliveries. A run that is larger than what is still wanted is cut: its
-- rest stays at its place.
create function pushpop.take_runs(
  topic text, start timestamptz, moment timestamptz, max integer, bytes bigint, out ids uuid[], out fences bigint[]
)
language plpgsql
as $body$
#variable_conflict use_column
declare
  run   record;
  whole tid[];
  want  integer := max;
  room  bigint := bytes;
  -- One row at a time: what is fetched is locked, and is taken, unless it has too many bytes.
  front cursor for
    select q.ctid as tid, q.n, q.pushed_at, q.fence, q.bytes, q.ids from pushpop.runs q
    where q.topic = take_runs.topic and q.ready_at >= start and q.ready_at <= moment
    order by q.ready_at, q.pushed_at, q.place, q.id
    for update skip locked;
begin
  if max = 1 then
    select q.ctid as tid, q.n, q.pushed_at, q.fence, q.ids into run from pushpop.runs q
    where q.topic = take_runs.topic and q.ready_at >= start and q.ready_at <= moment
    order by q.ready_at, q.pushed_at, q.place, q.id
    limit 1 for update skip locked;
    if not found then
      return;
    elsif run.n = 1 then
      delete from pushpop.runs q where q.topic = take_runs.topic and q.ctid = run.tid;
    else
      update pushpop.runs q
      set n = q.n - 1, place = q.place + 1, id = q.ids[2], ids = q.ids[2 :]
      where q.topic = take_runs.topic and q.ctid = run.tid;
    end if;
    ids := run.ids[1 : 1];
    fences := array[pushpop.delivery(run.pushed_at, run.fence)];
    return;
  end if;

  open front;
  loop
    fetch front into run;
    exit when not found;
    -- Messages without a number of their own have 16 KiB at most.
    if run.bytes = 0 then
      want := least(want, greatest(room / 16384, (ids is null)::integer));
    elsif run.bytes > room and ids is not null then
      want := 0;
    end if;
    exit when want = 0;
    room := room - greatest(run.bytes, least(run.n, want) * 16384);
    if run.n <= want then
      whole := whole || run.tid;
      ids := ids || run.ids;
    else
      ids := ids || run.ids[1 : want];
      update pushpop.runs q
      set n = q.n - want, place = q.place + want, id = q.ids[want + 1], ids = q.ids[want + 1 :]
      where q.topic = take_runs.topic and q.ctid = run.tid;
    end if;
    fences := fences || array_fill(pushpop.delivery(run.pushed_at, run.fence), array[least(run.n, want)]);
    want := want - least(run.n, want);
    exit when want = 0;
  end loop;
  close front;
  if whole is not null then
    delete from pushpop.runs q where q.topic = take_runs.topic and q.ctid = any (whole);
  end if;
end
$body$;

-- Nothing was free, but a run may just be in the hands of another pop, which leaves a rest: waits
-- for it, up to a second.
create function pushpop.wait_for_runs(
  topic text, start timestamptz, moment timestamptz, max integer, bytes bigint, out ids uuid[], out fences bigint[]
)
language plpgsql
as $body$
#variable_conflict use_column
declare
  patience text := current_setting('lock_timeout');
  taken    record;
begin
  for i in 1..10 loop
    perform from pushpop.runs q
    where q.topic = wait_for_runs.topic and q.ready_at >= start and q.ready_at <= moment limit 1;
    exit when not found;
    begin
      perform set_config('lock_timeout', '1s', true);
      perform from pushpop.runs q
      where q.topic = wait_for_runs.topic and q.ready_at >= start and q.ready_at <= moment
      order by q.ready_at, q.pushed_at, q.place, q.id
      limit 1 for update;
      perform set_config('lock_timeout', patience, true);
    exception when lock_not_available then
      return;
    end;
    taken := pushpop.take_runs(wait_for_runs.topic, start, moment, max, bytes);
    ids := taken.ids;
    fences := taken.fences;
    exit when ids is not null;
  end loop;
end
$body$;

-- Whether a message can be delivered as it is stored. It always can, unless somebody has edited or restored it by hand:
-- a constraint of the table would say so at once, but costs a third of the CPU of a push of one message.
create function pushpop.is_sound(
  state "char", attempt integer, fence integer, pushed_at timestamptz, ready_at timestamptz, headers jsonb, failures jsonb
) returns boolean
language sql immutable parallel safe
as $body$
  select state in ('p', 'd', 'r', 'f', 'e') and attempt >= 0 and attempt < 2147483647 and fence >= 0 and fence < 2147483647
    and isfinite(pushed_at) and isfinite(ready_at)
    and (headers is null or jsonb_typeof(headers) = 'object' and not jsonb_path_exists(headers, '$.* ? (@.type() != "string")'))
    and (failures is null or jsonb_typeof(failures) = 'array')
$body$;

-- Makes those dead that were taken out of the order and cannot be delivered, so that they hold up nobody, and an
-- operator sees them. What is wrong with their headers stays as it is.
create function pushpop.set_aside(topic text, ids uuid[], fences bigint[], moment timestamptz) returns void
language plpgsql
as $body$
#variable_conflict use_column
begin
  with aside as (
    update pushpop.messages m
    set state = 'z', done_at = moment, delete_at = null,
        attempt = greatest(0, least(m.attempt, 2147483646)), fence = greatest(0, least(m.fence, 2147483646)),
        pushed_at = case when isfinite(m.pushed_at) then m.pushed_at else moment end,
        ready_at = case when isfinite(m.ready_at) then m.ready_at else moment end,
        failures = pushpop.add_failure(m.failures, greatest(0, least(m.attempt, 2147483646)), moment,
                                       'the stored message is damaged: it was edited or restored by hand')
    where m.topic = set_aside.topic and m.state in ('p', 'd', 'r', 'f', 'e') and m.ctid = any (array(
      select m.tid from unnest(ids, fences) u(id, fence)
      cross join lateral (
        select m.ctid as tid from pushpop.messages m
        where m.topic = set_aside.topic and m.id = u.id
          and (pushpop.delivery(m.pushed_at, m.fence) = u.fence
               and pushpop.is_sound(m.state, m.attempt, m.fence, m.pushed_at, m.ready_at, m.headers, m.failures)) is not true
        offset 0
      ) m))
    returning m.id
  )
  insert into pushpop.dead (topic, died_at, id) select set_aside.topic, moment, a.id from aside a;
end
$body$;

create function pushpop.lease_interval(lease double precision) returns interval
language plpgsql immutable
as $body$
begin
  if lease is null or not (lease between 1 and 86400) then
    perform pushpop.refuse(format('a lease has 1 to 86400 seconds, not %s', coalesce(lease::text, 'null')));
  end if;
  return lease * interval '1 second';
end
$body$;

-- Says that somebody waits for a message of the topic: for half a minute, and within, pushes and what is given back notify
-- (LISTEN to the channel named as this schema; the payload is the topic). Returns whether there
-- is one already, and in how many seconds the next one may become free: a delayed one is due, or a
-- lease expires; of a topic that is paused neither. noted: whether pushes notify now; if not, upkeep has
-- the topic in its hands: ask again soon.
--
-- waiter  who asks, and is not woken for its own pushes
-- within  in how many seconds the caller asks again anyway, up to an hour. Leases that end later are not looked for:
--         those that were deleted lie there, and under an old snapshot they would be stepped over.
create function pushpop.wait_for(
  topic  text,
  waiter uuid             default null,
  within double precision default 1,
  out ready boolean,
  out due_in double precision,
  out noted boolean
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $body$
begin
  select w.ready, w.due_in, w.noted into ready, due_in, noted
  from pushpop.wait_for_any(array[wait_for.topic], waiter, within) w;
  ready := coalesce(ready, false);
  noted := coalesce(noted, true);
end
$body$;

-- The same for a message of any of some topics. Returns a row for each place among them of which there is something to be
-- said: a message is ready, or will be, or pushes do not notify yet.
create function pushpop.wait_for_any(
  topics text[],
  waiter uuid             default null,
  within double precision default 1
) returns table (place integer, ready boolean, due_in double precision, noted boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set enable_material = off
set random_page_cost = 0
set cpu_tuple_cost = 0
set cpu_operator_cost = 0
set cpu_index_tuple_cost = 1
set plan_cache_mode = force_generic_plan
as $body$
#variable_conflict use_column
declare
  moment  timestamptz := clock_timestamp();
  again   timestamptz;
  longest timestamptz := moment + interval '3630 seconds';  -- the clock may have gone back since somebody said so
  asked   text;
  known   pushpop.topics;
begin
  perform pushpop.check_topics(topics);
  if (within between 0 and 3600) is not true then
    perform pushpop.refuse(format('whoever waits asks again within 0 to 3600 seconds, not %s', coalesce(within::text, 'null')));
  end if;
  again := moment + within * interval '1 second';

  -- A few hundred at a time, those first that are needed most: until the end, each row that is new has a lock of its own.
  for asked in
    select u.topic from unnest(topics) u(topic)
    left join lateral (
      select t.wanted_until, t.wanted_by from pushpop.topics t where t.topic = u.topic offset 0
    ) t on true
    where (t.wanted_until between again + interval '15 seconds' and longest) is not true
       or t.wanted_by is distinct from waiter and t.wanted_by is not null
    order by t.wanted_until nulls first limit 300
  loop
    known := pushpop.lock_topic(asked);
    if known.topic is not null then
      update pushpop.topics t
      set wanted_until = greatest(again + interval '30 seconds', case when known.wanted_until <= longest then known.wanted_until end),
          wanted_by = case when known.wanted_until < moment or known.wanted_by = waiter then waiter end
      where t.topic = asked;
      -- Whoever does nothing but wait looks at everything, too.
      perform pushpop.begin_sweep(asked, moment, known.swept_at);
    end if;
  end loop;

  return query
    select u.place::integer, coalesce(f.ready and not f.paused, false),
           case when not f.paused then extract(epoch from least(nullif(f.due, 'infinity'), nullif(f.ends, 'infinity')) - moment) end::double precision, f.noted
    from unnest(topics) with ordinality u(topic, place)
    left join lateral (
      select t.paused, t.reclaimed_to, t.wanted_until, t.wanted_by from pushpop.topics t where t.topic = u.topic offset 0
    ) t on true
    cross join lateral pushpop.bottoms(u.topic) b
    cross join lateral (
      select coalesce(t.paused, false) as paused,
             (t.wanted_until >= again and (t.wanted_by is null or t.wanted_by = waiter)) is true as noted,
             (select true from pushpop.runs q
              where q.topic = u.topic and q.ready_at >= b.start and q.ready_at <= moment limit 1) as ready,
             (select q.ready_at from pushpop.runs q
              where q.topic = u.topic and q.ready_at > moment
              order by q.ready_at, q.pushed_at, q.place, q.id limit 1) as due,
             (select l.lease_until from pushpop.leases l
              where l.topic = u.topic and l.lease_until >= coalesce(t.reclaimed_to, '-infinity')
                and l.lease_until > '-infinity' and l.lease_until <= again
              order by l.lease_until limit 1) as ends
      offset 0
    ) f
    where not f.noted or not f.paused and (f.ready or f.due is not null or f.ends is not null);
end
$body$;
