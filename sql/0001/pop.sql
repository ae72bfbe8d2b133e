-- Taking messages out: the oldest that are free, each with a lease.

-- Where a complete look at a topic begins: no message lies before.
create function pushpop.bottom(topic text, out ready_at timestamptz, out pushed_at timestamptz, out behind boolean)
language plpgsql stable
as $body$
#variable_conflict use_column
declare
  low record;
begin
  select t.low_ready_at, t.low_pushed_at into low from pushpop.topics t where t.topic = bottom.topic;
  ready_at  := coalesce(low.low_ready_at, '-infinity');
  pushed_at := coalesce(low.low_pushed_at, '-infinity');
  select b.ready_at, b.pushed_at into low from pushpop.behind b where b.topic = bottom.topic
  order by b.ready_at, b.pushed_at limit 1;
  behind := found;
  if (low.ready_at, low.pushed_at) < (ready_at, pushed_at) then
    ready_at  := low.ready_at;
    pushed_at := low.pushed_at;
  end if;
end
$body$;

-- Pops up to max messages of a topic, oldest first, each leased for so many seconds.
--
-- The token proves the lease to every later call. A message whose lease expired is free again,
-- at its old place; one that has no attempt left is dead and is not handed out.
--
-- after_ready_at, after_pushed_at: a hint, the place of the last message that the caller popped
-- less than a second ago. The look begins there, and goes on to everything if it finds nothing.
create function pushpop.pop(
  topic           text,
  max             integer          default 1,
  lease           double precision default 300,
  after_ready_at  timestamptz      default null,
  after_pushed_at timestamptz      default null
) returns table (
  id           uuid,
  payload      bytea,
  headers      jsonb,
  token        uuid,
  lease_until  timestamptz,
  attempt      integer,
  max_attempts integer,
  fence        bigint,
  pushed_at    timestamptz,
  ready_at     timestamptz,
  last_error   text
)
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
  moment   timestamptz := clock_timestamp();
  until    timestamptz;
  hinted   boolean := after_ready_at is not null and after_pushed_at is not null;
  known    record;
  bottom   record;
  start_ready_at  timestamptz;
  start_pushed_at timestamptz;
  step     integer;
  got      integer := 0;
begin
  perform pushpop.check_topic(pop.topic);
  if max is null or max not between 1 and 1000 then
    perform pushpop.refuse(format('a pop takes 1 to 1000 messages, not %s', coalesce(max::text, 'null')));
  end if;
  until := moment + pushpop.lease_interval(lease);

  if hinted then
    start_ready_at  := after_ready_at;
    start_pushed_at := after_pushed_at;
  else
    bottom := pushpop.bottom(pop.topic);
    select t.front_ready_at, t.front_pushed_at, t.looked_at into known
    from pushpop.topics t where t.topic = pop.topic;
    if known.looked_at between moment - interval '1 second' and moment and not bottom.behind then
      hinted := true;
      start_ready_at  := known.front_ready_at;
      start_pushed_at := known.front_pushed_at;
    else
      start_ready_at  := bottom.ready_at;
      start_pushed_at := bottom.pushed_at;
    end if;
  end if;

  loop
    return query
    with free as materialized (
      select m.id, m.state = 'l' as expired, m.state = 'l' and coalesce(m.attempt >= m.max_attempts, false) as exhausted
      from pushpop.messages m
      where m.topic = pop.topic
        and m.done_at is null
        and (m.ready_at, m.pushed_at) >= (start_ready_at, start_pushed_at)
        and m.ready_at <= moment
        and (m.lease_until is null or m.lease_until <= moment)
      order by m.ready_at, m.pushed_at
      limit max
      for update skip locked
    ),
    taken as (
      update pushpop.messages m
      set state       = case when f.exhausted then 'z'::"char" else 'l'::"char" end,
          lease_until = case when f.exhausted then null else until end,
          token       = case when f.exhausted then m.token else gen_random_uuid() end,
          attempt     = case when f.exhausted then m.attempt else m.attempt + 1 end,
          fence       = case when f.exhausted then m.fence else m.fence + 1 end,
          done_at     = case when f.exhausted then moment end,
          last_error  = case when f.exhausted then 'the lease of the last attempt expired' else m.last_error end
      from free f
      where m.topic = pop.topic and m.id = f.id
      returning m.id, m.payload, m.headers, m.token, m.lease_until, m.attempt, m.max_attempts,
                m.fence, m.pushed_at, m.ready_at, m.last_error
    ),
    counted as (
      insert into pushpop.counts (topic, at, pid, live, leased, dead)
      select pop.topic, clock_timestamp(), pg_backend_pid(), -count(*) filter (where f.exhausted),
             count(*) filter (where not f.expired) - count(*) filter (where f.exhausted),
             count(*) filter (where f.exhausted)
      from free f
      having count(*) > 0
      on conflict (topic, at, pid) do update
      set live = counts.live + excluded.live, leased = counts.leased + excluded.leased, dead = counts.dead + excluded.dead
    )
    select t.id, t.payload, t.headers, t.token, t.lease_until, t.attempt, t.max_attempts::integer,
           t.fence, t.pushed_at, t.ready_at, t.last_error
    from taken t
    where t.lease_until is not null
    order by t.ready_at, t.pushed_at;

    get diagnostics step = row_count;
    got := got + step;
    exit when got > 0 or start_ready_at = '-infinity';

    -- Nothing there: look at everything.
    if hinted then
      hinted := false;
      bottom := pushpop.bottom(pop.topic);
      start_ready_at  := bottom.ready_at;
      start_pushed_at := bottom.pushed_at;
    else
      exit when not pushpop.begin_sweep(pop.topic, moment);
      start_ready_at  := '-infinity';
      start_pushed_at := '-infinity';
    end if;
  end loop;

  -- A look that had to step over much moves the marks, so that the next need not.
  if not hinted and (bottom.behind
      or clock_timestamp() - moment > interval '1 millisecond' + got * interval '50 microseconds') then
    perform pushpop.note_look(pop.topic, moment);
  end if;
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

-- The marks hold as long as the server's clock does not run backwards. Once a minute a pop that
-- finds nothing ignores them: nothing is lost even if they were wrong.
create function pushpop.begin_sweep(topic text, moment timestamptz) returns boolean
language plpgsql
as $body$
#variable_conflict use_column
declare
  swept_at timestamptz;
begin
  select t.swept_at into swept_at from pushpop.topics t where t.topic = begin_sweep.topic;
  if not found or swept_at between moment - interval '1 minute' and moment then
    return false;
  end if;
  update pushpop.topics t set swept_at = moment
  where t.topic = (select s.topic from pushpop.topics s where s.topic = begin_sweep.topic for update skip locked);
  return true;
end
$body$;

-- Moves the marks of a topic forward: low to the first message, front to the first free one.
--
-- A message that is still uncommitted cannot be seen here, so low stays before sure_to: every
-- transaction that might have stamped a message earlier held its lock on the table when the
-- time was taken, and is over now.
create function pushpop.note_look(topic text, moment timestamptz) returns void
language plpgsql
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
set enable_sort = off
as $body$
#variable_conflict use_column
declare
  known   record;
  bottom  record;
  alive   record;
  free    record;
  running text[];
begin
  select t.* into known from pushpop.topics t where t.topic = note_look.topic for update skip locked;
  if not found then
    insert into pushpop.topics (topic) values (note_look.topic) on conflict do nothing;
    select t.* into known from pushpop.topics t where t.topic = note_look.topic for update skip locked;
    if not found then
      return;
    end if;
  end if;

  running := array(
    select l.virtualtransaction from pg_locks l
    where l.locktype = 'relation' and l.relation = format('%I.messages', 'pushpop')::regclass
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.mode = 'RowExclusiveLock');
  if not known.checking_for && running then
    known.sure_to := greatest(known.sure_to, known.checking_at);
    known.checking_at := moment;
    known.checking_for := running;
  end if;

  -- A row that is deleted here was committed with its message, which the next statement sees.
  with past as (
    delete from pushpop.behind b where b.topic = note_look.topic returning b.ready_at, b.pushed_at
  )
  select p.ready_at, p.pushed_at into bottom from past p order by p.ready_at, p.pushed_at limit 1;
  if not found or (bottom.ready_at, bottom.pushed_at) > (known.low_ready_at, known.low_pushed_at) then
    select known.low_ready_at as ready_at, known.low_pushed_at as pushed_at into bottom;
  end if;

  select m.ready_at, m.pushed_at into alive from pushpop.messages m
  where m.topic = note_look.topic and m.done_at is null
    and (m.ready_at, m.pushed_at) >= (bottom.ready_at, bottom.pushed_at)
  order by m.ready_at, m.pushed_at limit 1;
  if not found or alive.ready_at >= known.sure_to then
    select known.sure_to as ready_at, '-infinity'::timestamptz as pushed_at into alive;
  end if;

  select m.ready_at, m.pushed_at into free from pushpop.messages m
  where m.topic = note_look.topic and m.done_at is null
    and (m.ready_at, m.pushed_at) >= (alive.ready_at, alive.pushed_at)
    and (m.lease_until is null or m.lease_until <= moment)
  order by m.ready_at, m.pushed_at limit 1;

  update pushpop.topics t
  set low_ready_at    = alive.ready_at,
      low_pushed_at   = alive.pushed_at,
      front_ready_at  = coalesce(least(free.ready_at, moment), moment),
      front_pushed_at = coalesce(case when free.ready_at <= moment then free.pushed_at end, '-infinity'),
      looked_at       = moment,
      sure_to         = known.sure_to,
      checking_at     = known.checking_at,
      checking_for    = known.checking_for
  where t.topic = note_look.topic;
end
$body$;

-- Says that somebody waits for a message of the topic: for the next half minute pushes notify
-- (LISTEN to the channel named as this schema; the payload is the topic). Returns whether there
-- is one already, and in how many seconds the next delayed one is due. waiter: who asks, and is
-- not woken for its own pushes.
create function pushpop.wait_for(
  topic  text,
  waiter uuid default null,
  out ready boolean,
  out due_in double precision
)
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
  moment timestamptz := clock_timestamp();
  until  timestamptz := moment + interval '30 seconds';
  known  record;
  bottom record;
  due    timestamptz;
begin
  perform pushpop.check_topic(wait_for.topic);
  select t.wanted_until, t.wanted_by into known from pushpop.topics t where t.topic = wait_for.topic;
  if not found then
    insert into pushpop.topics (topic, wanted_until, wanted_by) values (wait_for.topic, until, waiter)
    on conflict do nothing;
  elsif known.wanted_until < moment or known.wanted_until > until then
    update pushpop.topics t set wanted_until = until, wanted_by = waiter
    where t.topic = (select s.topic from pushpop.topics s where s.topic = wait_for.topic for update skip locked);
  elsif known.wanted_until < moment + interval '15 seconds' or known.wanted_by <> waiter or waiter is null and known.wanted_by is not null then
    update pushpop.topics t
    set wanted_until = until, wanted_by = case when known.wanted_by = waiter then waiter end
    where t.topic = (select s.topic from pushpop.topics s where s.topic = wait_for.topic for update skip locked);
  end if;

  bottom := pushpop.bottom(wait_for.topic);
  select true into ready from pushpop.messages m
  where m.topic = wait_for.topic and m.done_at is null
    and (m.ready_at, m.pushed_at) >= (bottom.ready_at, bottom.pushed_at)
    and m.ready_at <= moment
    and (m.lease_until is null or m.lease_until <= moment)
  order by m.ready_at, m.pushed_at limit 1;
  ready := found;

  select m.ready_at into due from pushpop.messages m
  where m.topic = wait_for.topic and m.done_at is null and m.ready_at > moment
  order by m.ready_at, m.pushed_at limit 1;
  due_in := extract(epoch from due - moment);
end
$body$;
