-- Settling: what the holder of a lease does with its message, each proved by the token.

-- Settles many leases of a topic in one statement, and returns those that were not settled:
-- `lost` when the message is stored, but its lease was handed on or settled otherwise; `gone`
-- when no such message is stored any more. Repeating a settle that succeeded succeeds again.
--
-- outcomes  one word a lease:
--           complete, discard   done; kept for `keep` seconds so that it can be found, then deleted
--           defer               again after its delay; burns no attempt
--           release             given back now, to its old place; burns no attempt
--           fail                again after its delay, or dead if that was the last attempt
--           extend              its lease ends `delay` seconds from now, never earlier than it did
-- delays    seconds; for fail null means 1 s, doubled with each attempt, up to 1 h, with jitter
-- errors    why a message failed
create function pushpop.settle_many(
  topic    text,
  ids      uuid[],
  tokens   uuid[],
  outcomes text[],
  delays   double precision[] default null,
  errors   text[]             default null,
  keep     double precision   default 3600
) returns table (id uuid, token uuid, result text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $body$
#variable_conflict use_column
declare
  moment  timestamptz := clock_timestamp();
  wanted  integer := cardinality(ids);
  settled bigint := 0;
  live    bigint := 0;  -- what becomes of the counts
  leased  bigint := 0;
  dead    bigint := 0;
begin
  perform pushpop.check_topic(settle_many.topic);
  perform pushpop.check_settle(ids, tokens, outcomes, delays, errors, keep);

  if outcomes && '{complete,discard}' then
    if keep > 0 then
      update pushpop.messages m
      set state       = case a.outcome when 'complete' then 'c'::"char" else 'x'::"char" end,
          lease_until = null,
          done_at     = moment,
          delete_at   = moment + keep * interval '1 second'
      from (select u.id, u.token, u.outcome from unnest(ids, tokens, outcomes) u(id, token, outcome)
            where u.outcome in ('complete', 'discard') order by u.id offset 0) a
      where m.topic = settle_many.topic and m.id = a.id and m.token = a.token and m.state = 'l';
    else
      delete from pushpop.messages m
      using (select u.id, u.token from unnest(ids, tokens, outcomes) u(id, token, outcome)
             where u.outcome in ('complete', 'discard') order by u.id offset 0) a
      where m.topic = settle_many.topic and m.id = a.id and m.token = a.token and m.state = 'l';
    end if;
    get diagnostics settled = row_count;
    live := -settled;
    leased := -settled;
  end if;

  if outcomes && '{defer,release,fail,extend}' then
    with given_back as (
      update pushpop.messages m
      set state       = case a.outcome when 'defer' then 'd'::"char" when 'release' then 'r'::"char"
                          when 'extend' then 'l'::"char"
                          else case when m.attempt >= m.max_attempts then 'z'::"char" else 'f'::"char" end end,
          lease_until = case a.outcome when 'extend'
                          then greatest(m.lease_until, moment + a.delay * interval '1 second') end,
          ready_at    = case a.outcome when 'defer' then moment + a.delay * interval '1 second'
                          when 'fail' then case when m.attempt >= m.max_attempts then m.ready_at
                            else moment + coalesce(a.delay, pushpop.backoff(m.attempt)) * interval '1 second' end
                          else m.ready_at end,
          attempt     = case when a.outcome in ('defer', 'release') then m.attempt - 1 else m.attempt end,
          done_at     = case when a.outcome = 'fail' and m.attempt >= m.max_attempts then moment end,
          last_error  = case a.outcome when 'fail' then left(a.error, 8192) else m.last_error end
      from (select u.id, u.token, u.outcome, u.delay, u.error
            from unnest(ids, tokens, outcomes, delays, errors) u(id, token, outcome, delay, error)
            where u.outcome in ('defer', 'release', 'fail', 'extend') order by u.id offset 0) a
      where m.topic = settle_many.topic and m.id = a.id and m.token = a.token and m.state = 'l'
      returning m.state
    )
    select settled + count(*), live - count(*) filter (where g.state = 'z'),
           leased - count(*) filter (where g.state <> 'l'), count(*) filter (where g.state = 'z')
    into settled, live, leased, dead
    from given_back g;
  end if;

  if leased <> 0 then
    insert into pushpop.counts (topic, at, pid, live, leased, settled, dead)
    values (settle_many.topic, clock_timestamp(), pg_backend_pid(), live, leased,
            case when keep > 0 then -live - dead else 0 end, dead)
    on conflict (topic, at, pid) do update
    set live = counts.live + excluded.live, leased = counts.leased + excluded.leased,
        settled = counts.settled + excluded.settled, dead = counts.dead + excluded.dead;
  end if;

  if settled < wanted then
    return query
      select a.id, a.token, case when m.id is null then 'gone' else 'lost' end
      from unnest(ids, tokens, outcomes) a(id, token, outcome)
      left join pushpop.messages m on m.topic = settle_many.topic and m.id = a.id
      where m.id is null or m.token is distinct from a.token or not (
        case a.outcome when 'complete' then m.state = 'c' when 'discard' then m.state = 'x'
          when 'defer' then m.state = 'd' when 'release' then m.state = 'r'
          when 'fail' then m.state in ('f', 'z') else m.state = 'l' end);
  end if;
end
$body$;

-- Seconds until the next attempt: 1, 2, 4 .. 3600, less up to a quarter, so that messages that
-- failed together do not come back together.
create function pushpop.backoff(attempt integer) returns double precision
language sql volatile
as $body$
  select least(3600, power(2, least(backoff.attempt - 1, 12))) * (1 - 0.25 * random())
$body$;

create function pushpop.check_settle(
  ids uuid[], tokens uuid[], outcomes text[], delays double precision[], errors text[], keep double precision
) returns void
language plpgsql immutable
as $body$
declare
  wanted integer := cardinality(ids);
begin
  if wanted is null or wanted is distinct from cardinality(tokens) or wanted is distinct from cardinality(outcomes)
     or wanted <> coalesce(cardinality(delays), wanted) or wanted <> coalesce(cardinality(errors), wanted) then
    perform pushpop.refuse('the arrays have one element a lease each');
  elsif not outcomes <@ '{complete,discard,defer,release,fail,extend}' then
    perform pushpop.refuse('an outcome is one of complete, discard, defer, release, fail, extend');
  elsif keep is null or not (keep >= 0 and keep <= 250000000000) then
    perform pushpop.refuse(format('history is kept for 0 to 250000000000 seconds, not %s', coalesce(keep::text, 'null')));
  elsif outcomes && '{defer,release,fail,extend}' then
    perform pushpop.refuse(format('a delay has 0 to 250000000000 seconds, not %s', coalesce(u.delay::text, 'null')))
    from unnest(outcomes, delays) u(outcome, delay)
    where u.outcome in ('defer', 'fail')
      and (u.delay is null and u.outcome = 'defer' or not (u.delay >= 0 and u.delay <= 250000000000));
    perform pushpop.lease_interval(u.delay) from unnest(outcomes, delays) u(outcome, delay) where u.outcome = 'extend';
  end if;
end
$body$;

-- The same for one lease; an error if it is lost, so that a transaction around it cannot commit
-- what was done without the lease.
create function pushpop.settle_one(
  topic text, id uuid, token uuid, outcome text, delay double precision, error text, keep double precision
) returns void
language plpgsql
as $body$
declare
  problem text;
begin
  select s.result into problem
  from pushpop.settle_many(settle_one.topic, array[settle_one.id], array[settle_one.token], array[outcome],
                           array[delay], array[error], keep) s;
  if found then
    raise exception 'the lease of message % of topic % is lost', settle_one.id, settle_one.topic
      using errcode = 'PP001',
            detail = case problem when 'gone' then 'the message is not stored any more'
                       else 'it expired and was handed on, or was settled before' end;
  end if;
end
$body$;

create function pushpop.complete(topic text, id uuid, token uuid, keep double precision default 3600) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'complete', null, null, keep) $body$;

create function pushpop.discard(topic text, id uuid, token uuid, keep double precision default 3600) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'discard', null, null, keep) $body$;

create function pushpop.defer(topic text, id uuid, token uuid, delay double precision) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'defer', delay, null, 0) $body$;

create function pushpop.release(topic text, id uuid, token uuid) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'release', null, null, 0) $body$;

create function pushpop.fail(topic text, id uuid, token uuid, error text, delay double precision default null) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'fail', delay, error, 0) $body$;

create function pushpop.extend(topic text, id uuid, token uuid, lease double precision) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'extend', lease, null, 0) $body$;
