-- Settling: what the holder of a lease does with its message, each proved by the token.
--
-- A token is 16 random bytes, the key of a row of pushpop.leases; two bytes, the slot of the message
-- in it; eight bytes, the number of the delivery. The lease proves that this delivery was made; the
-- fence of the message, that none has followed it.

-- Settles many leases of a topic in one statement. Returns the places of those that were not
-- settled: `lost` when the message is stored, but its lease was handed on or settled otherwise;
-- `gone` when no such message is stored any more; `again` when it was settled like this, with this
-- lease, before, which is as good; and of those that were extended, `extended` with their new deadline.
--
-- outcomes  one word a lease:
--           complete, discard   done; kept for `keep` seconds so that it can be found, then deleted
--           defer               again after its delay; burns no attempt
--           release             given back now, to its old place; burns no attempt
--           fail                again after its delay, or dead if that was the last attempt
--           extend              its lease ends `delay` seconds from now, never earlier than it did
-- delays    seconds; for fail null means 1 s, doubled with each attempt, up to 1 h, or as the topic
--           says, with jitter
-- errors    why a message failed
-- tidy      whether leases that are used up are cleared away at once. They are locked for that, so
--           not within a longer transaction.
create function pushpop.settle_many(
  topic    text,
  ids      uuid[],
  tokens   bytea[],
  outcomes text[],
  delays   double precision[] default null,
  errors   text[]             default null,
  keep     double precision   default 3600,
  tidy     boolean            default false
) returns table (place integer, result text, lease_until timestamptz)
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
  moment  timestamptz;
  wanted  integer := cardinality(ids);
  settled integer[];  -- places
  ended   bytea[];    -- tokens of deliveries that ended, but for those that settle_done saw to
  one     record;
  fence   bigint;
begin
  if (octet_length(settle_many.topic) between 1 and 255 and wanted between 1 and 10000 and cardinality(tokens) = wanted
      and cardinality(outcomes) = wanted and outcomes <@ '{complete,discard}' and keep between 0 and 250000000000
      and delays is null and errors is null) is not true then
    perform pushpop.check_topic(settle_many.topic);
    perform pushpop.check_settle(ids, tokens, outcomes, delays, errors, keep);
  end if;
  -- As in a pop: a lease that is extended may end before this transaction does.
  lock table pushpop.messages in row exclusive mode;
  moment := clock_timestamp();

  if wanted = 1 and outcomes <@ '{complete,discard}' then
    if pushpop.settle_single(settle_many.topic, ids[1], tokens[1], outcomes[1], moment, keep, tidy) then
      settled := '{1}';
    end if;
  elsif outcomes <@ '{complete}' or outcomes <@ '{discard}' then
    settled := pushpop.settle_done(settle_many.topic, ids, tokens, outcomes[1], moment, keep, tidy);
  else
    for one in
      select u.outcome, array_agg(u.place order by u.place)::integer[] as places,
             array_agg(u.id order by u.place) as ids, array_agg(u.token order by u.place) as tokens
      from unnest(ids, tokens, outcomes) with ordinality u(id, token, outcome, place)
      where u.outcome in ('complete', 'discard') group by u.outcome
    loop
      settled := settled || array(
        select one.places[p]
        from unnest(pushpop.settle_done(settle_many.topic, one.ids, one.tokens, one.outcome, moment, keep, tidy)) p);
    end loop;
    -- In the order of the ids, so that two batches with the same ones cannot deadlock.
    for one in
      select u.place::integer, u.id, u.token, u.outcome
      from unnest(ids, tokens, outcomes) with ordinality u(id, token, outcome, place)
      where u.outcome not in ('complete', 'discard') order by u.id, u.place
    loop
      fence := pushpop.prove(settle_many.topic, one.id, one.token);
      if fence is null then
        continue;
      elsif one.outcome = 'extend' then
        lease_until := pushpop.extend_lease(settle_many.topic, one.id, fence, one.token,
                                            moment + delays[one.place] * interval '1 second');
        if lease_until is not null then
          place := one.place;
          result := 'extended';
          return next;
          settled := settled || one.place;
        end if;
      elsif pushpop.give_back(settle_many.topic, one.id, fence, one.outcome, moment,
                              delays[one.place], errors[one.place]) then
        settled := settled || one.place;
        ended := ended || one.token;
      end if;
    end loop;
    if tidy then
      perform pushpop.tidy_leases(settle_many.topic, ended);
    end if;
    -- What is given back wakes those that wait, as a push does.
    if ended is not null then
      perform pushpop.tell(t.topic) from pushpop.topics t
      where t.topic = settle_many.topic and t.wanted_until > moment;
    end if;
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;

  -- What was not settled now may have been settled by the same lease before.
  if coalesce(cardinality(settled), 0) < wanted then
    return query
      select a.place::integer,
             case
               when m.id is null then 'gone'
               when int8send(pushpop.delivery(m.pushed_at, m.fence - 1)) = substring(a.token from 19)
                 and case a.outcome when 'complete' then m.state = 'c' when 'discard' then m.state = 'x'
                       when 'defer' then m.state = 'd' when 'release' then m.state = 'r'
                       when 'fail' then m.state in ('f', 'z') end then 'again'
               else 'lost'
             end, null::timestamptz
      from unnest(ids, tokens, outcomes) with ordinality a(id, token, outcome, place)
      left join lateral (
        select m.id, m.pushed_at, m.fence, m.state from pushpop.messages m
        where m.topic = settle_many.topic and m.id = a.id offset 0
      ) m on true
      where settled is null or a.place <> all (settled);
  end if;
end
$body$;

-- The number of the delivery that a token proves; null if its lease is not known. A lease that was
-- extended has a row of its own, which may outlive the one it shared.
create function pushpop.prove(topic text, id uuid, token bytea) returns bigint
language plpgsql
as $body$
#variable_conflict use_column
declare
  lease_key bytea   := substring(token from 1 for 16);
  slot      integer;
  delivery  bigint;
begin
  if octet_length(token) is distinct from 26 then
    return null;
  end if;
  slot := get_byte(token, 16) * 256 + get_byte(token, 17);
  select l.fences[slot] into delivery from pushpop.leases l
  where l.topic = prove.topic and l.key = lease_key and l.ids[slot] = prove.id;
  if not found then
    select l.fences[1] into delivery from pushpop.leases l
    where l.topic = prove.topic and l.key = prove.token and l.ids[1] = prove.id;
  end if;
  return case when int8send(delivery) = substring(token from 19) then delivery end;
end
$body$;

-- A counter of a message, and one more. Edited by hand it may be all that its type holds: an error here would fail
-- every settle, and every pop that returns an expired lease.
create function pushpop.one_more(n integer) returns integer
language sql immutable parallel safe
as $body$
  select least(n, 2147483646) + 1
$body$;

-- Completes or discards one message, if its lease is proved.
create function pushpop.settle_single(
  topic text, id uuid, token bytea, outcome text, moment timestamptz, keep double precision, tidy boolean
) returns boolean
language plpgsql
as $body$
#variable_conflict use_column
declare
  delivery bigint := pushpop.prove(topic, id, token);
begin
  if delivery is null then
    return false;
  elsif keep > 0 then
    update pushpop.messages m
    set state = case outcome when 'complete' then 'c' else 'x' end::"char", attempt = pushpop.one_more(m.attempt), fence = pushpop.one_more(m.fence),
        done_at = moment, delete_at = moment + keep * interval '1 second'
    where m.topic = settle_single.topic and m.id = settle_single.id and pushpop.delivery(m.pushed_at, m.fence) = delivery
      and m.state in ('p', 'd', 'r', 'f', 'e');
    if found then
      insert into pushpop.history (topic, delete_at, id, n, ids)
      values (settle_single.topic, moment + keep * interval '1 second', settle_single.id, 1, array[settle_single.id]);
    end if;
  else
    delete from pushpop.messages m
    where m.topic = settle_single.topic and m.id = settle_single.id and pushpop.delivery(m.pushed_at, m.fence) = delivery
      and m.state in ('p', 'd', 'r', 'f', 'e');
  end if;
  if not found then
    return false;
  elsif tidy then
    perform pushpop.tidy_lease(settle_single.topic, substring(token from 1 for 16), 1);
  end if;
  return true;
end
$body$;

-- Completes or discards the messages of those leases that are proved; returns their places.
create function pushpop.settle_done(
  topic text, ids uuid[], tokens bytea[], outcome text, moment timestamptz, keep double precision, tidy boolean
) returns integer[]
language plpgsql
as $body$
#variable_conflict use_column
declare
  wanted   integer := cardinality(ids);
  first    bytea   := substring(tokens[1] from 1 for 16);
  known    record;
  target   tid[];
  fences   integer[];  -- of the messages as they were found
  ended    uuid[];
  places   integer[];
  alike    boolean;  -- whether all of them are of the first one's lease
  done     integer;
begin
  -- Mostly they were popped together: one look at the lease proves them all.
  select l.ids, l.fences into known from pushpop.leases l where l.topic = settle_done.topic and l.key = first;
  select array_agg(m.tid), array_agg(m.fence), array_agg(u.id), array_agg(u.place::integer)
  into target, fences, ended, places
  from unnest(ids, tokens) with ordinality u(id, token, place)
  cross join lateral (
    select m.ctid as tid, m.fence from pushpop.messages m
    where m.topic = settle_done.topic and m.id = u.id and int8send(pushpop.delivery(m.pushed_at, m.fence)) = substring(u.token from 19)
      and m.state in ('p', 'd', 'r', 'f', 'e') offset 0
  ) m
  where octet_length(u.token) = 26 and substring(u.token from 1 for 16) = first
    and known.ids[get_byte(u.token, 16) * 256 + get_byte(u.token, 17)] = u.id
    and int8send(known.fences[get_byte(u.token, 16) * 256 + get_byte(u.token, 17)]) = substring(u.token from 19);

  alike := cardinality(places) = wanted;
  if alike is not true then
    select target || array_agg(m.tid), fences || array_agg(m.fence), ended || array_agg(u.id),
           places || array_agg(u.place::integer)
    into target, fences, ended, places
    from unnest(ids, tokens) with ordinality u(id, token, place)
    cross join lateral (
      select get_byte(u.token, 16) * 256 + get_byte(u.token, 17) as slot
    ) s
    cross join lateral (
      -- Its own row if it was extended. A key at a time: for an array of both the plan may be to look at all leases.
      select 1 from pushpop.leases l
      where l.topic = settle_done.topic and l.key = substring(u.token from 1 for 16)
        and l.ids[s.slot] = u.id and int8send(l.fences[s.slot]) = substring(u.token from 19)
      union all
      select 1 from pushpop.leases l
      where l.topic = settle_done.topic and l.key = u.token
        and l.ids[1] = u.id and int8send(l.fences[1]) = substring(u.token from 19)
      limit 1
    ) l
    cross join lateral (
      select m.ctid as tid, m.fence from pushpop.messages m
      where m.topic = settle_done.topic and m.id = u.id and int8send(pushpop.delivery(m.pushed_at, m.fence)) = substring(u.token from 19)
        and m.state in ('p', 'd', 'r', 'f', 'e') offset 0
    ) m
    where octet_length(u.token) = 26 and (known.ids is null or substring(u.token from 1 for 16) <> first);
  end if;

  if target is null then
    return null;
  elsif fences[1] = all (fences) then
    done := pushpop.finish(topic, target, fences[1], outcome, moment, keep);
  else
    done := (
      select sum(pushpop.finish(topic, f.target, f.fence, outcome, moment, keep))
      from (select u.fence, array_agg(u.tid) as target from unnest(target, fences) u(tid, fence) group by u.fence) f);
  end if;

  -- Some were reclaimed, or settled by a twin of this call, while this one waited for them.
  if done < cardinality(target) then
    select array_agg(u.id), array_agg(u.place) into ended, places
    from unnest(ended, places) u(id, place)
    left join lateral (
      select m.id, m.done_at from pushpop.messages m where m.topic = settle_done.topic and m.id = u.id offset 0
    ) m on true
    where case when keep > 0 then m.done_at = moment else m.id is null end;
    if done = 0 or cardinality(ended) > done then
      return null;
    end if;
    alike := false;
  end if;

  if keep > 0 then
    insert into pushpop.history (topic, delete_at, id, n, ids)
    select settle_done.topic, moment + keep * interval '1 second', ended[p], least(250, done - p + 1), ended[p : p + 249]
    from generate_series(1, done, 250) p;
  end if;
  if tidy and alike then
    perform pushpop.tidy_lease(settle_done.topic, first, done);
  elsif tidy then
    perform pushpop.tidy_leases(settle_done.topic, array(select tokens[p] from unnest(places) p));
  end if;
  return places;
end
$body$;

-- Completes or discards messages that were found with a certain fence, and returns how many. One that was handed on
-- while this waited for it has another by now: servers before November 2025 (15.15 and its like) do not look again
-- whether the ctid is still that of the row.
create function pushpop.finish(
  topic text, target tid[], fence integer, outcome text, moment timestamptz, keep double precision
) returns integer
language plpgsql
as $body$
#variable_conflict use_column
declare
  done integer;
begin
  if keep > 0 then
    update pushpop.messages m
    set state = case outcome when 'complete' then 'c' else 'x' end::"char", attempt = pushpop.one_more(m.attempt), fence = pushpop.one_more(m.fence),
        done_at = moment, delete_at = moment + keep * interval '1 second'
    where m.topic = finish.topic and m.ctid = any (target) and m.fence = finish.fence and m.state in ('p', 'd', 'r', 'f', 'e');
  else
    delete from pushpop.messages m
    where m.topic = finish.topic and m.ctid = any (target) and m.fence = finish.fence and m.state in ('p', 'd', 'r', 'f', 'e');
  end if;
  get diagnostics done = row_count;
  return done;
end
$body$;

-- Ends a delivery without an end of the message: it waits again, or is dead.
create function pushpop.give_back(
  topic text, id uuid, fence bigint, outcome text, moment timestamptz, delay double precision, error text
) returns boolean
language plpgsql
as $body$
#variable_conflict use_column
declare
  message record;
begin
  update pushpop.messages m
  set state      = case outcome when 'defer' then 'd' when 'release' then 'r' when 'expire' then 'e' else 'f' end::"char",
      fence      = pushpop.one_more(m.fence),
      attempt    = case when outcome in ('fail', 'expire') then pushpop.one_more(m.attempt) else m.attempt end,
      ready_at   = case outcome
                     when 'defer' then moment + delay * interval '1 second'
                     when 'fail' then moment + coalesce(delay, pushpop.backoff(give_back.topic, pushpop.one_more(m.attempt))) * interval '1 second'
                     else m.ready_at end,
      failures   = case when outcome in ('fail', 'expire') then pushpop.add_failure(m.failures, pushpop.one_more(m.attempt), moment, error)
                     else m.failures end
  where m.topic = give_back.topic and m.id = give_back.id and pushpop.delivery(m.pushed_at, m.fence) = give_back.fence
    and m.state in ('p', 'd', 'r', 'f', 'e')
  returning m.id, m.ready_at, m.pushed_at, m.place, m.fence, m.attempt >= m.max_attempts and outcome in ('fail', 'expire') as dead,
            pushpop.weigh(m.payload, m.headers, m.failures) as bytes
  into message;
  if not found then
    return false;
  end if;

  if message.dead then
    update pushpop.messages m
    set state = case outcome when 'expire' then 'y' else 'z' end::"char", done_at = moment
    where m.topic = give_back.topic and m.id = give_back.id;
    insert into pushpop.dead (topic, died_at, id) values (give_back.topic, moment, give_back.id);
  else
    perform pushpop.enqueue(give_back.topic, moment, null, message.ready_at, message.pushed_at, message.place, message.fence,
                            array[message.id], message.bytes);
  end if;
  return true;
end
$body$;

-- A history of failures with one more, which keeps the newest ten.
create function pushpop.add_failure(failures jsonb, attempt integer, moment timestamptz, error text) returns jsonb
language sql stable
as $body$
  select case when failures is null or jsonb_typeof(failures) <> 'array' then '[]'
              when jsonb_array_length(failures) < 10 then failures else failures - 0 end
         || jsonb_build_array(jsonb_build_object(
              'attempt', attempt,
              'at', to_char(moment at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
              'error', coalesce(left(error, 8192), '')))
$body$;

-- Gives a lease a row of its own with a later end; returns that, or null if the lease is over. Locks the
-- message, so that it cannot be reclaimed at the same time.
create function pushpop.extend_lease(topic text, id uuid, fence bigint, token bytea, until timestamptz) returns timestamptz
language plpgsql
as $body$
#variable_conflict use_column
begin
  perform from pushpop.messages m
  where m.topic = extend_lease.topic and m.id = extend_lease.id and pushpop.delivery(m.pushed_at, m.fence) = extend_lease.fence
    and m.state in ('p', 'd', 'r', 'f', 'e')
  for no key update;
  return case when found then pushpop.move_deadline(topic, id, fence, token, until) end;
end
$body$;

-- The same once the message is locked.
create function pushpop.move_deadline(topic text, id uuid, fence bigint, token bytea, until timestamptz) returns timestamptz
language plpgsql
as $body$
#variable_conflict use_column
declare
  ends timestamptz;
begin
  -- Never earlier than it was: the row that it shared so far may end later.
  select greatest(until, l.lease_until) into ends from pushpop.leases l
  where l.topic = move_deadline.topic and l.key = substring(token from 1 for 16);
  insert into pushpop.leases as l (topic, key, lease_until, open, ids, fences)
  values (move_deadline.topic, token, coalesce(ends, until), 0, array[move_deadline.id], array[move_deadline.fence])
  on conflict (topic, key) do update set lease_until = greatest(l.lease_until, excluded.lease_until)
  returning lease_until into ends;
  return ends;
end
$body$;

-- Moves the deadlines of many leases, of any topics, to `lease` seconds from now each, and waits for no
-- row: for consumers that are still at work. Returns for each place `extended` with the new deadline, `lost`,
-- or `busy` when another transaction has the message, such as that of its holder: nobody else gets it
-- then, and it stays as it is.
create function pushpop.heartbeat(topics text[], ids uuid[], tokens bytea[], leases double precision[])
returns table (place integer, result text, lease_until timestamptz)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan
as $body$
#variable_conflict use_column
declare
  moment   timestamptz;
  beat     record;
  delivery bigint;
begin
  perform pushpop.check_arrays(cardinality(ids), array[coalesce(cardinality(topics), 0), coalesce(cardinality(tokens), 0),
                                                       coalesce(cardinality(leases), 0)]);
  perform pushpop.check_topic(u.topic), pushpop.lease_interval(u.lease) from unnest(topics, leases) u(topic, lease);
  lock table pushpop.messages in row exclusive mode;
  moment := clock_timestamp();
  for beat in
    select u.topic, u.id, u.token, u.place::integer, u.lease * interval '1 second' as lease
    from unnest(topics, ids, tokens, leases) with ordinality u(topic, id, token, lease, place) order by u.topic, u.id
  loop
    place := beat.place;
    result := 'lost';
    lease_until := null;
    delivery := pushpop.prove(beat.topic, beat.id, beat.token);
    if delivery is not null then
      perform from pushpop.messages m
      where m.topic = beat.topic and m.id = beat.id and pushpop.delivery(m.pushed_at, m.fence) = delivery
        and m.state in ('p', 'd', 'r', 'f', 'e')
      for no key update skip locked;
      if found then
        perform from pushpop.leases l where l.topic = beat.topic and l.key = beat.token for update skip locked;
        if found or not exists (select from pushpop.leases l where l.topic = beat.topic and l.key = beat.token) then
          result := 'extended';
          lease_until := pushpop.move_deadline(beat.topic, beat.id, delivery, beat.token, moment + beat.lease);
        else
          result := 'busy';
        end if;
      elsif exists (
        select from pushpop.messages m
        where m.topic = beat.topic and m.id = beat.id and pushpop.delivery(m.pushed_at, m.fence) = delivery
          and m.state in ('p', 'd', 'r', 'f', 'e'))
      then
        result := 'busy';
      end if;
    end if;
    return next;
  end loop;
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
end
$body$;

-- Notes that the deliveries of these tokens have ended.
create function pushpop.tidy_leases(topic text, tokens bytea[]) returns void
language plpgsql
as $body$
begin
  perform pushpop.tidy_lease(tidy_leases.topic, k.key, k.used)
  from (
    select substring(u.token from 1 for 16) as key, count(*)::integer as used
    from unnest(tokens) u(token) group by 1 order by 1
  ) k;
end
$body$;

-- Notes that some messages of a lease are settled, and clears it away with the last. A message that
-- is in no run is found again only through its lease: open must never be less than the number of
-- those that are not settled, so each delivery may be counted once, by the statement that ended it.
create function pushpop.tidy_lease(topic text, key bytea, used integer) returns void
language plpgsql
as $body$
#variable_conflict use_column
begin
  delete from pushpop.leases l
  where l.topic = tidy_lease.topic and l.ctid = (
    select l.ctid from pushpop.leases l
    where l.topic = tidy_lease.topic and l.key = tidy_lease.key and l.open <= used for update skip locked);
  if not found then
    update pushpop.leases l set open = l.open - used
    where l.topic = tidy_lease.topic and l.ctid = (
      select l.ctid from pushpop.leases l
      where l.topic = tidy_lease.topic and l.key = tidy_lease.key and l.open > used for update skip locked);
  end if;
end
$body$;

-- Seconds until the next attempt: 1, 2, 4 .. 3600, or as the topic says, less up to a quarter, so that
-- messages that failed together do not come back together.
create function pushpop.backoff(topic text, attempt integer) returns double precision
language sql volatile
as $body$
  select least(coalesce(t.backoff_most, 3600), coalesce(t.backoff_first, 1) * power(2, least(backoff.attempt - 1, 100)))
         * (1 - 0.25 * random())
  from (select) one left join pushpop.topics t on t.topic = backoff.topic
$body$;

create function pushpop.check_keep(keep double precision) returns void
language plpgsql immutable
as $body$
begin
  if (keep >= 0 and keep <= 250000000000) is not true then
    perform pushpop.refuse(format('history is kept for 0 to 250000000000 seconds, not %s', coalesce(keep::text, 'null')));
  end if;
end
$body$;

create function pushpop.check_settle(
  ids uuid[], tokens bytea[], outcomes text[], delays double precision[], errors text[], keep double precision
) returns void
language plpgsql immutable
as $body$
begin
  perform pushpop.check_arrays(cardinality(ids), array[coalesce(cardinality(tokens), 0), coalesce(cardinality(outcomes), 0),
                                                       cardinality(delays), cardinality(errors)]);
  perform pushpop.check_keep(keep);
  if not outcomes <@ '{complete,discard,defer,release,fail,extend}' then
    perform pushpop.refuse('an outcome is one of complete, discard, defer, release, fail, extend');
  elsif outcomes && '{defer,fail,extend}' then
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
--
-- once  an error, too, if it was settled so before: a transaction that is repeated, because nobody knows
--       whether it was committed, cannot then do twice what it does beside this
create function pushpop.settle_one(
  topic text, id uuid, token bytea, outcome text, delay double precision, error text, keep double precision,
  once boolean default false
) returns void
language plpgsql
as $body$
declare
  problem text;
begin
  select s.result into problem
  from pushpop.settle_many(settle_one.topic, array[settle_one.id], array[settle_one.token], array[outcome],
                           array[delay], array[error], keep) s
  where s.result <> 'extended' and (once or s.result <> 'again');
  if found then
    raise exception 'the lease of message % of topic % is lost', settle_one.id, settle_one.topic
      using errcode = 'PP001',
            detail = case problem when 'gone' then 'the message is not stored any more'
                       when 'again' then 'it was settled with this lease before'
                       else 'it expired and was handed on, or was settled before' end;
  end if;
end
$body$;

create function pushpop.complete(
  topic text, id uuid, token bytea, keep double precision default 3600, once boolean default false
) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'complete', null, null, keep, once) $body$;

create function pushpop.discard(
  topic text, id uuid, token bytea, keep double precision default 3600, once boolean default false
) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'discard', null, null, keep, once) $body$;

create function pushpop.defer(topic text, id uuid, token bytea, delay double precision) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'defer', delay, null, 0) $body$;

create function pushpop.release(topic text, id uuid, token bytea) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'release', null, null, 0) $body$;

create function pushpop.fail(topic text, id uuid, token bytea, error text, delay double precision default null) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'fail', delay, error, 0) $body$;

create function pushpop.extend(topic text, id uuid, token bytea, lease double precision) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $body$ select pushpop.settle_one(topic, id, token, 'extend', lease, null, 0) $body$;
