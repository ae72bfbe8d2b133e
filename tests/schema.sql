CREATE SCHEMA pushpop;
CREATE TYPE pushpop.message AS (
	id uuid,
	payload bytea,
	headers jsonb,
	state text,
	attempt integer,
	max_attempts integer,
	fence bigint,
	pushed_at timestamp with time zone,
	ready_at timestamp with time zone,
	lease_until timestamp with time zone,
	done_at timestamp with time zone,
	delete_at timestamp with time zone,
	last_error text,
	failures jsonb
);
CREATE FUNCTION pushpop.add_failure(failures jsonb, attempt integer, moment timestamp with time zone, error text) RETURNS jsonb
    LANGUAGE sql STABLE
    AS $$
  select case when failures is null or jsonb_typeof(failures) <> 'array' then '[]'
              when jsonb_array_length(failures) < 10 then failures else failures - 0 end
         || jsonb_build_array(jsonb_build_object(
              'attempt', attempt,
              'at', to_char(moment at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
              'error', coalesce(left(error, 8192), '')))
$$;
CREATE FUNCTION pushpop.all_stats(after text DEFAULT ''::text, seconds double precision DEFAULT NULL::double precision) RETURNS TABLE(topic text, at timestamp with time zone, ready bigint, delayed bigint, leased bigint, settled bigint, dead bigint, oldest_ready_at timestamp with time zone, paused boolean, upkept_at timestamp with time zone, upkeep_seconds double precision, upkeep_rows bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
declare
  begun constant timestamptz := clock_timestamp();
  since timestamptz;
  last  text := coalesce(all_stats.after, '');
  names text[];
  many  integer := 1;
begin
  loop
    since := clock_timestamp();
    names := array(select "pushpop".topic_names(last, many));
    exit when cardinality(names) = 0;
    return query select f.* from "pushpop".take_figures(names) f;
    last := names[cardinality(names)];
    exit when clock_timestamp() > begun + seconds * interval '1 second';
    -- Few at a time where they take long, so that it stops when it should.
    many := case when clock_timestamp() > since + interval '20 milliseconds' then 1 else least(many * 2, 100) end;
  end loop;
end
$$;
CREATE FUNCTION pushpop.as_json(payload bytea) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE STRICT
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return convert_from(as_json.payload, 'UTF8')::jsonb;
exception when others then
  return null;
end
$$;
CREATE FUNCTION pushpop.as_text(payload bytea) RETURNS text
    LANGUAGE plpgsql IMMUTABLE STRICT
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return convert_from(as_text.payload, 'UTF8');
exception when character_not_in_repertoire or untranslatable_character then
  return null;
end
$$;
CREATE FUNCTION pushpop.backoff(topic text, attempt integer) RETURNS double precision
    LANGUAGE sql
    AS $$
  select least(coalesce(t.backoff_most, 3600), coalesce(t.backoff_first, 1) * power(2, least(backoff.attempt - 1, 100)))
         * (1 - 0.25 * random())
  from (select) one left join "pushpop".topics t on t.topic = backoff.topic
$$;
CREATE FUNCTION pushpop.begin_sweep(topic text, moment timestamp with time zone, swept_at timestamp with time zone) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
begin
  if begin_sweep.swept_at is null or begin_sweep.swept_at between moment - interval '1 minute' and moment then
    return false;
  end if;
  update "pushpop".topics t set swept_at = moment, low = '-infinity', looked_at = '-infinity'
  where t.topic = (select s.topic from "pushpop".topics s where s.topic = begin_sweep.topic for update skip locked);
  return true;
end
$$;
CREATE FUNCTION pushpop.bottom(topic text) RETURNS timestamp with time zone
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  start timestamptz;
  late  timestamptz;
begin
  select t.low into start from "pushpop".topics t where t.topic = bottom.topic;
  select b.ready_at into late from "pushpop".behind b where b.topic = bottom.topic order by b.ready_at, b.entry limit 1;
  return least(coalesce(start, '-infinity'), late);
end
$$;
CREATE FUNCTION pushpop.bottoms(topic text) RETURNS TABLE(start timestamp with time zone)
    LANGUAGE sql STABLE
    AS $$
  select coalesce(least(
    (select t.low from "pushpop".topics t where t.topic = bottoms.topic),
    (select b.ready_at from "pushpop".behind b where b.topic = bottoms.topic order by b.ready_at, b.entry limit 1)
  ), '-infinity')
$$;
CREATE FUNCTION pushpop.cancel(topic text, id uuid, keep double precision DEFAULT 3600) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_sort TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
declare
  moment timestamptz;
begin
  perform "pushpop".check_topic(cancel.topic), "pushpop".check_keep(keep);
  if ("pushpop".take_waiting(cancel.topic, cancel.id)).fence is null then
    perform from "pushpop".messages m where m.topic = cancel.topic and m.id = cancel.id and m.state = 'k';
    return found;
  end if;
  moment := clock_timestamp();
  if keep > 0 then
    update "pushpop".messages m
    set state = 'k', done_at = moment, delete_at = moment + keep * interval '1 second'
    where m.topic = cancel.topic and m.id = cancel.id;
    insert into "pushpop".history (topic, delete_at, id, n, ids)
    values (cancel.topic, moment + keep * interval '1 second', cancel.id, 1, array[cancel.id]);
  else
    delete from "pushpop".messages m where m.topic = cancel.topic and m.id = cancel.id;
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
  return true;
end
$$;
CREATE FUNCTION pushpop.check_arrays(wanted integer, others integer[]) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    AS $$
begin
  if wanted is null or wanted not between 1 and 10000 then
    perform "pushpop".refuse(format('a batch has 1 to 10000 elements, not %s', coalesce(wanted, 0)));
  elsif not (wanted = all (array_remove(others, null))) then
    perform "pushpop".refuse('the arrays of a batch have the same length');
  end if;
end
$$;
CREATE FUNCTION pushpop.check_attempts(attempts integer) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    AS $$
begin
  if attempts not between 0 and 32767 then
    perform "pushpop".refuse(format('a message has 1 to 32767 attempts, or 0 for no limit, not %s', attempts));
  end if;
end
$$;
CREATE FUNCTION pushpop.check_headers(headers jsonb) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    AS $$
declare
  entries bigint;
  bytes   bigint;
begin
  if jsonb_typeof(check_headers.headers) <> 'object'
     or exists (select from jsonb_each(check_headers.headers) h where jsonb_typeof(h.value) <> 'string') then
    perform "pushpop".refuse('headers are an object of text to text');
  end if;
  select count(*), sum(octet_length(h.key) + octet_length(h.value)) into entries, bytes
  from jsonb_each_text(check_headers.headers) h;
  if entries > 64 then
    perform "pushpop".refuse(format('a message has at most 64 headers, not %s', entries));
  elsif bytes > 16384 then
    perform "pushpop".refuse(format('the headers of a message have at most 16384 bytes, not %s', bytes));
  end if;
end
$$;
CREATE FUNCTION pushpop.check_keep(keep double precision) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    AS $$
begin
  if (keep >= 0 and keep <= 250000000000) is not true then
    perform "pushpop".refuse(format('history is kept for 0 to 250000000000 seconds, not %s', coalesce(keep::text, 'null')));
  end if;
end
$$;
CREATE FUNCTION pushpop.check_payload(payload bytea) RETURNS void
    LANGUAGE plpgsql STABLE
    AS $$
declare
  most bigint;
begin
  if check_payload.payload is null then
    perform "pushpop".refuse('a payload is not null; it may be empty');
  elsif octet_length(check_payload.payload) > 16777216 then
    most := least(coalesce(nullif(current_setting('pushpop_pg.max_payload', true), '')::bigint, 16777216), 268435456);
    if octet_length(check_payload.payload) > most then
      perform "pushpop".refuse(format('a payload has at most %s bytes, not %s', most, octet_length(check_payload.payload)));
    end if;
  end if;
end
$$;
CREATE FUNCTION pushpop.check_push(delay double precision, ready_at timestamp with time zone, headers jsonb, max_attempts integer) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    AS $$
begin
  if not (delay >= 0 and delay <= 250000000000) then
    perform "pushpop".refuse(format('a delay has 0 to 250000000000 seconds, not %s', delay));
  elsif not (ready_at >= '0002-01-01 00:00:00+00' and ready_at < '9999-01-01 00:00:00+00') then
    perform "pushpop".refuse(format('a message is ready between the years 2 and 9998, not at %s', ready_at));
  elsif delay is not null and ready_at is not null then
    perform "pushpop".refuse('a message has a delay or a time, not both');
  end if;
  perform "pushpop".check_attempts(max_attempts);
  if headers is not null then
    perform "pushpop".check_headers(headers);
  end if;
end
$$;
CREATE FUNCTION pushpop.check_settle(ids uuid[], tokens bytea[], outcomes text[], delays double precision[], errors text[], keep double precision) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    AS $$
begin
  perform "pushpop".check_arrays(cardinality(ids), array[coalesce(cardinality(tokens), 0), coalesce(cardinality(outcomes), 0),
                                                       cardinality(delays), cardinality(errors)]);
  perform "pushpop".check_keep(keep);
  if not outcomes <@ '{complete,discard,defer,release,fail,extend}' then
    perform "pushpop".refuse('an outcome is one of complete, discard, defer, release, fail, extend');
  elsif outcomes && '{defer,fail,extend}' then
    perform "pushpop".refuse(format('a delay has 0 to 250000000000 seconds, not %s', coalesce(u.delay::text, 'null')))
    from unnest(outcomes, delays) u(outcome, delay)
    where u.outcome in ('defer', 'fail')
      and (u.delay is null and u.outcome = 'defer' or not (u.delay >= 0 and u.delay <= 250000000000));
    perform "pushpop".lease_interval(u.delay) from unnest(outcomes, delays) u(outcome, delay) where u.outcome = 'extend';
  end if;
end
$$;
CREATE FUNCTION pushpop.check_topic(topic text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    AS $$
begin
  if check_topic.topic is null or octet_length(check_topic.topic) not between 1 and 255 then
    perform "pushpop".refuse(format('a topic has 1 to 255 bytes, not %s',
                                  coalesce(octet_length(check_topic.topic)::text, 'null')));
  end if;
end
$$;
CREATE FUNCTION pushpop.check_topics(topics text[]) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    AS $$
begin
  if cardinality(topics) is null or cardinality(topics) not between 1 and 10000 then
    perform "pushpop".refuse(format('1 to 10000 topics are asked together, not %s', coalesce(cardinality(topics), 0)));
  end if;
  perform "pushpop".check_topic(u.topic) from unnest(topics) u(topic)
  where (octet_length(u.topic) between 1 and 255) is not true;
end
$$;
CREATE FUNCTION pushpop.complete(topic text, id uuid, token bytea, keep double precision DEFAULT 3600, once boolean DEFAULT false) RETURNS void
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$ select "pushpop".settle_one(topic, id, token, 'complete', null, null, keep, once) $$;
CREATE FUNCTION pushpop.dead_letters(topic text, max integer DEFAULT 100, before timestamp with time zone DEFAULT 'infinity'::timestamp with time zone, before_id uuid DEFAULT NULL::uuid) RETURNS SETOF pushpop.message
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
begin
  perform "pushpop".check_topic(dead_letters.topic);
  if max is null or max not between 1 and 1000 then
    perform "pushpop".refuse(format('a look shows 1 to 1000 dead messages, not %s', coalesce(max::text, 'null')));
  elsif before is null then
    perform "pushpop".refuse('the time before which messages died is not null');
  end if;
  -- Those that died by a lease which ended just now belong to them.
  if current_setting('transaction_read_only') = 'off' then
    perform "pushpop".reclaim(dead_letters.topic, clock_timestamp(), 1000);
  end if;
  return query
    select m.id, m.payload, m.headers, 'dead', m.attempt, m.max_attempts::integer, m.fence::bigint, m.pushed_at, m.ready_at,
           null::timestamptz, m.done_at, m.delete_at, m.failures -> -1 ->> 'error', m.failures
    from (
      select m.*, row_number() over () as nth,
             sum(greatest("pushpop".weigh(m.payload, m.headers, m.failures), 16384)) over (rows unbounded preceding) as bytes
      from (
        select d.id from "pushpop".dead d
        where d.topic = dead_letters.topic
          and (d.died_at, d.id) < (before, coalesce(before_id, '00000000-0000-0000-0000-000000000000'))
        order by d.died_at desc, d.id desc limit max
      ) d
      cross join lateral (
        select m.* from "pushpop".messages m where m.topic = dead_letters.topic and m.id = d.id offset 0
      ) m
    ) m
    where m.bytes <= 16777216 or m.nth = 1;
end
$$;
CREATE FUNCTION pushpop.defer(topic text, id uuid, token bytea, delay double precision) RETURNS void
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$ select "pushpop".settle_one(topic, id, token, 'defer', delay, null, 0) $$;
CREATE FUNCTION pushpop.delivery(pushed_at timestamp with time zone, fence integer) RETURNS bigint
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
  select case when isfinite(delivery.pushed_at) then (date_part('epoch', delivery.pushed_at) * 1000000)::bigint else 0 end + delivery.fence + 1
$$;
CREATE FUNCTION pushpop.discard(topic text, id uuid, token bytea, keep double precision DEFAULT 3600, once boolean DEFAULT false) RETURNS void
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$ select "pushpop".settle_one(topic, id, token, 'discard', null, null, keep, once) $$;
CREATE FUNCTION pushpop.enqueue(topic text, moment timestamp with time zone, low timestamp with time zone, ready_at timestamp with time zone, pushed_at timestamp with time zone, place integer, fence integer, ids uuid[], bytes integer DEFAULT 0) RETURNS void
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  n integer := cardinality(ids);
begin
  if n = 1 then
    insert into "pushpop".runs (topic, ready_at, pushed_at, place, n, fence, bytes, id, ids)
    values (enqueue.topic, enqueue.ready_at, enqueue.pushed_at, enqueue.place, 1, enqueue.fence, enqueue.bytes, enqueue.ids[1],
            enqueue.ids);
  else
    insert into "pushpop".runs (topic, ready_at, pushed_at, place, n, fence, id, ids)
    select enqueue.topic, enqueue.ready_at, enqueue.pushed_at, enqueue.place + first - 1, least(25, n - first + 1), enqueue.fence,
           enqueue.ids[first], enqueue.ids[first : first + 24]
    from generate_series(1, n, 25) first;
  end if;
  if ready_at >= moment then
    if low is null then
      select t.low into low from "pushpop".topics t where t.topic = enqueue.topic;
    end if;
    if (ready_at < low) is not true then
      return;
    end if;
  end if;
  insert into "pushpop".behind (topic, ready_at) values (enqueue.topic, enqueue.ready_at);
end
$$;
CREATE FUNCTION pushpop.extend(topic text, id uuid, token bytea, lease double precision) RETURNS void
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$ select "pushpop".settle_one(topic, id, token, 'extend', lease, null, 0) $$;
CREATE FUNCTION pushpop.extend_lease(topic text, id uuid, fence bigint, token bytea, until timestamp with time zone) RETURNS timestamp with time zone
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
begin
  perform from "pushpop".messages m
  where m.topic = extend_lease.topic and m.id = extend_lease.id and "pushpop".delivery(m.pushed_at, m.fence) = extend_lease.fence
    and m.state in ('p', 'd', 'r', 'f', 'e')
  for no key update;
  return case when found then "pushpop".move_deadline(topic, id, fence, token, until) end;
end
$$;
CREATE FUNCTION pushpop.fail(topic text, id uuid, token bytea, error text, delay double precision DEFAULT NULL::double precision) RETURNS void
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$ select "pushpop".settle_one(topic, id, token, 'fail', delay, error, 0) $$;
CREATE FUNCTION pushpop.failure_list(failures jsonb) RETURNS text[]
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    AS $$
begin
  return array(
    select pg_catalog.unnest(array[f.attempt, pg_catalog.int8(pg_catalog.float8mul(pg_catalog.date_part('epoch', f.at), 1000000))::pg_catalog.text,
                                   coalesce(f.error, '')])
    from pg_catalog.jsonb_to_recordset(failures) f(attempt pg_catalog.text, at pg_catalog.timestamptz, error pg_catalog.text)
    where f.attempt is not null and pg_catalog.isfinite(f.at));
exception when others then
  return null;
end
$$;
CREATE FUNCTION pushpop.find(topic text, id uuid) RETURNS SETOF pushpop.message
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
declare
  moment timestamptz := clock_timestamp();
begin
  perform "pushpop".check_topic(find.topic);
  -- A live message that is in no run is leased, and the leases say until when. One that is in
  -- neither has a lease that ended, and waits to be reclaimed.
  return query
    select m.id, m.payload, m.headers,
           case when m.state = 'c' then 'completed' when m.state in ('x', 'k') then 'discarded'
             when m.state in ('z', 'y') then 'dead'
             when l.lease_until > moment then 'leased'
             when l.ended and m.attempt >= m.max_attempts - 1 then 'dead'
             when m.ready_at > moment then 'delayed' else 'ready' end,
           case when l.leased then "pushpop".one_more(m.attempt) else m.attempt end, m.max_attempts::integer,
           m.fence + case when l.leased then 1 else 0 end::bigint, m.pushed_at, m.ready_at,
           case when l.lease_until > moment then l.lease_until end,
           coalesce(m.done_at, case when l.ended and m.attempt >= m.max_attempts - 1 then l.lease_until end),
           m.delete_at, m.failures -> -1 ->> 'error', m.failures
    from "pushpop".messages m
    left join lateral (
      select true as waiting from "pushpop".runs q
      where q.topic = find.topic and q.ready_at = m.ready_at and q.pushed_at = m.pushed_at
        and q.place <= m.place and find.id = any (q.ids) and m.state in ('p', 'd', 'r', 'f', 'e')
      limit 1
    ) q on true
    left join lateral (
      select true as leased, max(l.lease_until) as lease_until, max(l.lease_until) <= moment as ended
      from "pushpop".leases l
      where l.topic = find.topic and find.id = any (l.ids)
        and l.fences[array_position(l.ids, find.id)] = "pushpop".delivery(m.pushed_at, m.fence)
        and q.waiting is null and m.state in ('p', 'd', 'r', 'f', 'e')
      having count(*) > 0
    ) l on true
    where m.topic = find.topic and m.id = find.id;
end
$$;
CREATE FUNCTION pushpop.finish(topic text, target tid[], fence integer, outcome text, moment timestamp with time zone, keep double precision) RETURNS integer
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  done integer;
begin
  if keep > 0 then
    update "pushpop".messages m
    set state = case outcome when 'complete' then 'c' else 'x' end::"char", attempt = "pushpop".one_more(m.attempt), fence = "pushpop".one_more(m.fence),
        done_at = moment, delete_at = moment + keep * interval '1 second'
    where m.topic = finish.topic and m.ctid = any (target) and m.fence = finish.fence and m.state in ('p', 'd', 'r', 'f', 'e');
  else
    delete from "pushpop".messages m
    where m.topic = finish.topic and m.ctid = any (target) and m.fence = finish.fence and m.state in ('p', 'd', 'r', 'f', 'e');
  end if;
  get diagnostics done = row_count;
  return done;
end
$$;
CREATE FUNCTION pushpop.give_back(topic text, id uuid, fence bigint, outcome text, moment timestamp with time zone, delay double precision, error text) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  message record;
begin
  update "pushpop".messages m
  set state      = case outcome when 'defer' then 'd' when 'release' then 'r' when 'expire' then 'e' else 'f' end::"char",
      fence      = "pushpop".one_more(m.fence),
      attempt    = case when outcome in ('fail', 'expire') then "pushpop".one_more(m.attempt) else m.attempt end,
      ready_at   = case outcome
                     when 'defer' then moment + delay * interval '1 second'
                     when 'fail' then moment + coalesce(delay, "pushpop".backoff(give_back.topic, "pushpop".one_more(m.attempt))) * interval '1 second'
                     else m.ready_at end,
      failures   = case when outcome in ('fail', 'expire') then "pushpop".add_failure(m.failures, "pushpop".one_more(m.attempt), moment, error)
                     else m.failures end
  where m.topic = give_back.topic and m.id = give_back.id and "pushpop".delivery(m.pushed_at, m.fence) = give_back.fence
    and m.state in ('p', 'd', 'r', 'f', 'e')
  returning m.id, m.ready_at, m.pushed_at, m.place, m.fence, m.attempt >= m.max_attempts and outcome in ('fail', 'expire') as dead,
            "pushpop".weigh(m.payload, m.headers, m.failures) as bytes
  into message;
  if not found then
    return false;
  end if;
  if message.dead then
    update "pushpop".messages m
    set state = case outcome when 'expire' then 'y' else 'z' end::"char", done_at = moment
    where m.topic = give_back.topic and m.id = give_back.id;
    insert into "pushpop".dead (topic, died_at, id) values (give_back.topic, moment, give_back.id);
  else
    perform "pushpop".enqueue(give_back.topic, moment, null, message.ready_at, message.pushed_at, message.place, message.fence,
                            array[message.id], message.bytes);
  end if;
  return true;
end
$$;
CREATE FUNCTION pushpop.header_pairs(headers jsonb) RETURNS text[]
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    AS $$
begin
  if pg_catalog.jsonb_typeof(headers) operator(pg_catalog.=) 'object' then
    return array(
      select pg_catalog.unnest(array[h.key, coalesce(h.value, '')]) from pg_catalog.jsonb_each_text(headers) h);
  end if;
  return null;
end
$$;
CREATE FUNCTION pushpop.heartbeat(topics text[], ids uuid[], tokens bytea[], leases double precision[]) RETURNS TABLE(place integer, result text, lease_until timestamp with time zone)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
declare
  moment   timestamptz;
  beat     record;
  delivery bigint;
begin
  perform "pushpop".check_arrays(cardinality(ids), array[coalesce(cardinality(topics), 0), coalesce(cardinality(tokens), 0),
                                                       coalesce(cardinality(leases), 0)]);
  perform "pushpop".check_topic(u.topic), "pushpop".lease_interval(u.lease) from unnest(topics, leases) u(topic, lease);
  lock table "pushpop".messages in row exclusive mode;
  moment := clock_timestamp();
  for beat in
    select u.topic, u.id, u.token, u.place::integer, u.lease * interval '1 second' as lease
    from unnest(topics, ids, tokens, leases) with ordinality u(topic, id, token, lease, place) order by u.topic, u.id
  loop
    place := beat.place;
    result := 'lost';
    lease_until := null;
    delivery := "pushpop".prove(beat.topic, beat.id, beat.token);
    if delivery is not null then
      perform from "pushpop".messages m
      where m.topic = beat.topic and m.id = beat.id and "pushpop".delivery(m.pushed_at, m.fence) = delivery
        and m.state in ('p', 'd', 'r', 'f', 'e')
      for no key update skip locked;
      if found then
        perform from "pushpop".leases l where l.topic = beat.topic and l.key = beat.token for update skip locked;
        if found or not exists (select from "pushpop".leases l where l.topic = beat.topic and l.key = beat.token) then
          result := 'extended';
          lease_until := "pushpop".move_deadline(beat.topic, beat.id, delivery, beat.token, moment + beat.lease);
        else
          result := 'busy';
        end if;
      elsif exists (
        select from "pushpop".messages m
        where m.topic = beat.topic and m.id = beat.id and "pushpop".delivery(m.pushed_at, m.fence) = delivery
          and m.state in ('p', 'd', 'r', 'f', 'e'))
      then
        result := 'busy';
      end if;
    end if;
    return next;
  end loop;
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
end
$$;
CREATE FUNCTION pushpop.is_sound(state "char", attempt integer, fence integer, pushed_at timestamp with time zone, ready_at timestamp with time zone, headers jsonb, failures jsonb) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $_$
  select state in ('p', 'd', 'r', 'f', 'e') and attempt >= 0 and attempt < 2147483647 and fence >= 0 and fence < 2147483647
    and isfinite(pushed_at) and isfinite(ready_at)
    and (headers is null or jsonb_typeof(headers) = 'object' and not jsonb_path_exists(headers, '$.* ? (@.type() != "string")'))
    and (failures is null or jsonb_typeof(failures) = 'array')
$_$;
CREATE FUNCTION pushpop.lease_interval(lease double precision) RETURNS interval
    LANGUAGE plpgsql IMMUTABLE
    AS $$
begin
  if lease is null or not (lease between 1 and 86400) then
    perform "pushpop".refuse(format('a lease has 1 to 86400 seconds, not %s', coalesce(lease::text, 'null')));
  end if;
  return lease * interval '1 second';
end
$$;
CREATE TABLE pushpop.topics (
    topic text NOT NULL COLLATE pg_catalog."C",
    low timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    looked_at timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    swept_at timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    sure_to timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    checking_at timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    checking_for text[] DEFAULT '{}'::text[] NOT NULL,
    reclaimed_to timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    deleted_to timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    cleared_at timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    wanted_until timestamp with time zone DEFAULT '-infinity'::timestamp with time zone NOT NULL,
    wanted_by uuid,
    upkept_at timestamp with time zone,
    upkeep_time interval DEFAULT '00:00:00'::interval NOT NULL,
    upkeep_rows bigint DEFAULT 0 NOT NULL,
    paused boolean DEFAULT false NOT NULL,
    lease interval,
    max_attempts smallint,
    backoff_first double precision,
    backoff_most double precision,
    CONSTRAINT topics_check CHECK ((((lease >= '00:00:01'::interval) AND (lease <= '1 day'::interval)) AND (max_attempts >= 0) AND (backoff_first >= (0)::double precision) AND (backoff_most <= ('250000000000'::bigint)::double precision) AND (COALESCE(backoff_first, (1)::double precision) <= COALESCE(backoff_most, (3600)::double precision)) AND (GREATEST(low, looked_at, swept_at, sure_to, checking_at, reclaimed_to, deleted_to, cleared_at) < 'infinity'::timestamp with time zone)))
)
WITH (fillfactor='50', autovacuum_vacuum_scale_factor='0.2', autovacuum_vacuum_threshold='200');
CREATE FUNCTION pushpop.lock_topic(topic text) RETURNS pushpop.topics
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  known "pushpop".topics;
begin
  select t.* into known from "pushpop".topics t where t.topic = lock_topic.topic for update skip locked;
  if not found and pg_try_advisory_xact_lock(hashtextextended(lock_topic.topic, format('%I.topics', 'pushpop')::regclass::oid::bigint)) then
    perform from "pushpop".topics t where t.topic = lock_topic.topic;
    if not found then
      insert into "pushpop".topics (topic) values (lock_topic.topic) on conflict do nothing;
      select t.* into known from "pushpop".topics t where t.topic = lock_topic.topic for update skip locked;
    end if;
  end if;
  return known;
end
$$;
CREATE FUNCTION pushpop.make_durable() RETURNS void
    LANGUAGE plpgsql
    AS $$
begin
  perform set_config('synchronous_commit', 'on', true);
end
$$;
CREATE FUNCTION pushpop.move_deadline(topic text, id uuid, fence bigint, token bytea, until timestamp with time zone) RETURNS timestamp with time zone
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  ends timestamptz;
begin
  -- Never earlier than it was: the row that it shared so far may end later.
  select greatest(until, l.lease_until) into ends from "pushpop".leases l
  where l.topic = move_deadline.topic and l.key = substring(token from 1 for 16);
  insert into "pushpop".leases as l (topic, key, lease_until, open, ids, fences)
  values (move_deadline.topic, token, coalesce(ends, until), 0, array[move_deadline.id], array[move_deadline.fence])
  on conflict (topic, key) do update set lease_until = greatest(l.lease_until, excluded.lease_until)
  returning lease_until into ends;
  return ends;
end
$$;
CREATE FUNCTION pushpop.new_id() RETURNS uuid
    LANGUAGE sql PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
  select encode(
    set_bit(set_bit(
      overlay(uuid_send(gen_random_uuid())
        placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
        from 1 for 6),
      52, 1), 53, 1),
    'hex')::uuid
$$;
CREATE FUNCTION pushpop.note_look(topic text, moment timestamp with time zone) RETURNS void
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  known   "pushpop".topics;
  running text[];
  renamed boolean;
  start   timestamptz;
  alive   timestamptz;
begin
  if "pushpop".sees_all() then
    known := "pushpop".lock_topic(note_look.topic);
  end if;
  if known.topic is null then
    return;
  end if;
  -- Every clock is read under the lock on the table, so none that is read now comes before sure_to or checking_at,
  -- unless the server's clock went back. No watermark holds then.
  if greatest(known.sure_to, known.checking_at) > moment then
    known.low := '-infinity';
    known.sure_to := '-infinity';
    known.checking_at := '-infinity';
    known.checking_for := '{}';
    known.reclaimed_to := '-infinity';
    known.deleted_to := '-infinity';
  end if;
  running := array(
    select l.virtualtransaction from pg_locks l
    where l.locktype = 'relation' and l.relation = format('%I.messages', 'pushpop')::regclass
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.mode = 'RowExclusiveLock');
  -- A prepared transaction has another name after a crash: -1/ and its transaction id. One of that kind which was not
  -- there at checking_at may be one of those that were.
  renamed := exists (select from unnest(running) r(name) where r.name like '-1/%' and r.name <> all (known.checking_for));
  if not known.checking_for && running and not (renamed and known.checking_at > '-infinity') then
    known.sure_to := greatest(known.sure_to, known.checking_at);
    known.checking_at := moment;
    known.checking_for := running;
  end if;
  -- A late entry that is deleted here was committed with its run, which the next statement sees.
  with late as (
    delete from "pushpop".behind b where b.topic = note_look.topic returning b.ready_at
  )
  select least(known.low, min(l.ready_at)) into start from late l;
  select q.ready_at into alive from "pushpop".runs q
  where q.topic = note_look.topic and q.ready_at >= start
  order by q.ready_at, q.pushed_at, q.place, q.id limit 1;
  update "pushpop".topics t
  set low = least(alive, known.sure_to), looked_at = moment,
      sure_to = known.sure_to, checking_at = known.checking_at, checking_for = known.checking_for,
      reclaimed_to = known.reclaimed_to, deleted_to = known.deleted_to
  where t.topic = note_look.topic;
end
$$;
CREATE FUNCTION pushpop.one_more(n integer) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
  select least(n, 2147483646) + 1
$$;
CREATE FUNCTION pushpop.pause(topic text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    AS $$
#variable_conflict use_column
begin
  perform "pushpop".check_topic(pause.topic);
  perform "pushpop".lock_topic(pause.topic);
  insert into "pushpop".topics as t (topic, paused) values (pause.topic, true)
  on conflict (topic) do update set paused = true;
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
end
$$;
CREATE FUNCTION pushpop.peek(topic text, max integer DEFAULT 10) RETURNS SETOF pushpop.message
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_sort TO 'off'
    AS $$
#variable_conflict use_column
declare
  moment timestamptz := clock_timestamp();
  start  timestamptz := "pushpop".bottom(topic);
begin
  perform "pushpop".check_topic(peek.topic);
  if max is null or max not between 1 and 1000 then
    perform "pushpop".refuse(format('a peek shows 1 to 1000 messages, not %s', coalesce(max::text, 'null')));
  end if;
  return query
    select m.id, m.payload, m.headers, case when m.ready_at > moment then 'delayed' else 'ready' end,
           m.attempt, m.max_attempts::integer, m.fence::bigint, m.pushed_at, m.ready_at, null::timestamptz,
           m.done_at, m.delete_at, m.failures -> -1 ->> 'error', m.failures
    from (
      select m.*, row_number() over () as nth,
             sum(greatest("pushpop".weigh(m.payload, m.headers, m.failures), 16384)) over (rows unbounded preceding) as bytes
      from (
        select q.ids from "pushpop".runs q where q.topic = peek.topic and q.ready_at >= start
        order by q.ready_at, q.pushed_at, q.place, q.id limit max
      ) q
      cross join lateral unnest(q.ids) u(id)
      cross join lateral (
        select m.* from "pushpop".messages m where m.topic = peek.topic and m.id = u.id offset 0
      ) m
      limit max
    ) m
    where m.bytes <= 16777216 or m.nth = 1;
end
$$;
CREATE FUNCTION pushpop.pop(topic text, max integer DEFAULT 1, lease double precision DEFAULT NULL::double precision, fallback double precision DEFAULT 300, bytes bigint DEFAULT 16777216) RETURNS TABLE(id uuid, payload bytea, headers jsonb, token bytea, lease_until timestamp with time zone, attempt integer, max_attempts integer, fence bigint, pushed_at timestamp with time zone, ready_at timestamp with time zone, last_error text, failures jsonb)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
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
    perform "pushpop".check_topic(pop.topic), "pushpop".lease_interval(coalesce(lease, 1)), "pushpop".lease_interval(fallback);
  end if;
  if max is null or max not between 1 and 1000 then
    perform "pushpop".refuse(format('a pop takes 1 to 1000 messages, not %s', coalesce(max::text, 'null')));
  elsif (bytes > 0) is not true then
    perform "pushpop".refuse(format('a pop takes at least 1 byte, not %s', coalesce(bytes::text, 'null')));
  end if;
  -- As in a push: a lease may end before this transaction does, and no mark may pass it meanwhile.
  lock table "pushpop".messages in row exclusive mode;
  moment := clock_timestamp();
  select t.low, t.looked_at, t.swept_at, t.paused, t.lease into known from "pushpop".topics t where t.topic = pop.topic;
  if known.paused then
    return;
  elsif not found or known.looked_at not between moment - interval '1 second' and moment then
    perform "pushpop".reclaim(pop.topic, moment, 1000);
    -- To move the mark on costs more than a pop does. Where many are popped, upkeep does it every second.
    if known.looked_at is null or known.looked_at not between moment - interval '10 seconds' and moment
       or exists (select from "pushpop".behind b where b.topic = pop.topic) then
      perform "pushpop".note_look(pop.topic, moment);
      -- Another transaction may have the topic in its hands for long: what lies before the watermark comes first all the same.
      known.low := "pushpop".bottom(pop.topic);
    end if;
  end if;
  start := coalesce(known.low, '-infinity');
  taken := "pushpop".take_runs(pop.topic, start, moment, max, bytes);
  -- Nothing there: look at everything, first at what lies behind the mark.
  if taken.ids is null then
    if "pushpop".reclaim(pop.topic, moment, 1000) > 0
       or exists (select from "pushpop".behind b where b.topic = pop.topic)
       or "pushpop".begin_sweep(pop.topic, moment, known.swept_at) then
      start := '-infinity';
      taken := "pushpop".take_runs(pop.topic, start, moment, max, bytes);
    end if;
    if taken.ids is null and free then
      taken := "pushpop".wait_for_runs(pop.topic, start, moment, max, bytes);
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
      insert into "pushpop".leases (topic, key, lease_until, open, ids, fences)
      values (pop.topic, token, until, 1, taken.ids, taken.fences);
      select m.id, m.payload, m.headers, token || int2send(1::int2) || int8send(taken.fences[1]), until, m.attempt + 1, m.max_attempts,
             m.fence + 1, m.pushed_at, m.ready_at, m.failures -> -1 ->> 'error', m.failures
      into id, payload, headers, token, lease_until, attempt, max_attempts, fence, pushed_at, ready_at, last_error, failures
      from "pushpop".messages m
      where m.topic = pop.topic and m.id = taken.ids[1] and "pushpop".delivery(m.pushed_at, m.fence) = taken.fences[1]
        and "pushpop".is_sound(m.state, m.attempt, m.fence, m.pushed_at, m.ready_at, m.headers, m.failures);
      sound := 0;
      if found then
        sound := 1;
        return next;
      end if;
    else
      keys := null;
      for place in 1..n by 250 loop
        keys := keys || uuid_send(gen_random_uuid());
        insert into "pushpop".leases (topic, key, lease_until, open, ids, fences)
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
          from "pushpop".messages m
          where m.topic = pop.topic and m.id = u.id and "pushpop".delivery(m.pushed_at, m.fence) = u.fence
            and "pushpop".is_sound(m.state, m.attempt, m.fence, m.pushed_at, m.ready_at, m.headers, m.failures) offset 0
        ) m;
      get diagnostics sound = row_count;
    end if;
    exit when sound = n;
    perform "pushpop".set_aside(pop.topic, taken.ids, taken.fences, moment);
    exit when sound > 0;
    taken := "pushpop".take_runs(pop.topic, start, moment, max, bytes);
    exit when taken.ids is null;
  end loop;
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
end
$$;
CREATE FUNCTION pushpop.pop_any(topics text[], max integer DEFAULT 1, lease double precision DEFAULT NULL::double precision, fallback double precision DEFAULT 300, maxes integer[] DEFAULT NULL::integer[], leases double precision[] DEFAULT NULL::double precision[]) RETURNS TABLE(part bigint, id uuid, payload bytea, headers jsonb, token bytea, lease_until timestamp with time zone, attempt integer, max_attempts integer, fence bigint, pushed_at timestamp with time zone, ready_at timestamp with time zone, last_error text, failures jsonb)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_sort TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
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
  perform "pushpop".check_topics(topics);
  perform "pushpop".check_arrays(cardinality(topics), array[cardinality(maxes), cardinality(leases)]);
  if maxes is null and (max is null or max not between 1 and 1000) then
    perform "pushpop".refuse(format('a pop takes 1 to 1000 messages, not %s', coalesce(max::text, 'null')));
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
        select t.paused, t.reclaimed_to, t.swept_at from "pushpop".topics t where t.topic = u.topic offset 0
      ) t on true
      cross join lateral "pushpop".bottoms(u.topic) b
      cross join lateral (
        select coalesce((
                 select true from "pushpop".runs q
                 where q.topic = u.topic and q.ready_at >= b.start and q.ready_at <= moment limit 1), false) as has_run,
               coalesce((
                 select true from "pushpop".leases l
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
      select p.* from "pushpop".pop(asked.topic, least(asked.max, want), asked.lease, fallback, room) p
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
      room := room - greatest("pushpop".weigh(payload, headers, failures), 16384);
    end loop;
    exit when maxes is null and want = 0;
  end loop;
end
$$;
CREATE FUNCTION pushpop.prove(topic text, id uuid, token bytea) RETURNS bigint
    LANGUAGE plpgsql
    AS $$
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
  select l.fences[slot] into delivery from "pushpop".leases l
  where l.topic = prove.topic and l.key = lease_key and l.ids[slot] = prove.id;
  if not found then
    select l.fences[1] into delivery from "pushpop".leases l
    where l.topic = prove.topic and l.key = prove.token and l.ids[1] = prove.id;
  end if;
  return case when int8send(delivery) = substring(token from 19) then delivery end;
end
$$;
CREATE FUNCTION pushpop.purge(topic text, max integer DEFAULT 10000) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    AS $$
#variable_conflict use_column
declare
  waiting cursor for
    select q.ctid as tid, q.n, q.ids from "pushpop".runs q
    where q.topic = purge.topic
    order by q.ready_at, q.pushed_at, q.place, q.id
    for update skip locked;
  run     record;
  whole   tid[];
  ids     uuid[];
  want    integer := max;
  counted bigint;
begin
  perform "pushpop".check_topic(purge.topic);
  if max is null or max not between 1 and 100000 then
    perform "pushpop".refuse(format('a purge deletes 1 to 100000 messages at a time, not %s', coalesce(max::text, 'null')));
  end if;
  open waiting;
  loop
    fetch waiting into run;
    exit when not found;
    whole := whole || run.tid;
    ids := ids || run.ids;
    want := want - run.n;
    exit when want <= 0;
  end loop;
  close waiting;
  delete from "pushpop".messages m
  where m.topic = purge.topic and m.ctid = any (array(
    select m.tid from unnest(ids) u(id)
    cross join lateral (
      select m.ctid as tid from "pushpop".messages m where m.topic = purge.topic and m.id = u.id offset 0
    ) m));
  get diagnostics counted = row_count;
  delete from "pushpop".runs q where q.topic = purge.topic and q.ctid = any (whole);
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
  return counted;
end
$$;
CREATE FUNCTION pushpop.purge_dead(topic text, age double precision DEFAULT 0, max integer DEFAULT 10000) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    AS $$
#variable_conflict use_column
declare
  moment  timestamptz := clock_timestamp();
  until   timestamptz;
  ids     uuid[];
  locked  tid[];
  counted bigint;
begin
  perform "pushpop".check_topic(purge_dead.topic);
  if (age >= 0 and age <= 250000000000) is not true then
    perform "pushpop".refuse(format('an age has 0 to 250000000000 seconds, not %s', coalesce(age::text, 'null')));
  elsif max is null or max not between 1 and 100000 then
    perform "pushpop".refuse(format('a purge deletes 1 to 100000 messages at a time, not %s', coalesce(max::text, 'null')));
  end if;
  perform "pushpop".reclaim(purge_dead.topic, moment, 1000);
  -- Nothing is older than a thousand years.
  until := case when age < 31557600000 then moment - age * interval '1 second' else '-infinity' end;
  select array_agg(d.id), array_agg(d.tid) into ids, locked
  from (
    select d.id, d.ctid as tid from "pushpop".dead d
    where d.topic = purge_dead.topic and d.died_at <= until
    order by d.died_at, d.id limit max for update skip locked
  ) d;
  delete from "pushpop".messages m
  where m.topic = purge_dead.topic and m.state in ('z', 'y') and m.ctid = any (array(
    select m.tid from unnest(ids) u(id)
    cross join lateral (
      select m.ctid as tid from "pushpop".messages m where m.topic = purge_dead.topic and m.id = u.id offset 0
    ) m));
  get diagnostics counted = row_count;
  delete from "pushpop".dead d where d.topic = purge_dead.topic and d.ctid = any (locked);
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
  return counted;
end
$$;
CREATE FUNCTION pushpop.push(topic text, payload bytea, id uuid DEFAULT NULL::uuid, delay double precision DEFAULT NULL::double precision, ready_at timestamp with time zone DEFAULT NULL::timestamp with time zone, headers jsonb DEFAULT NULL::jsonb, max_attempts integer DEFAULT NULL::integer, sender uuid DEFAULT NULL::uuid, fallback integer DEFAULT 25, OUT pushed uuid, OUT duplicate boolean) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    AS $$
#variable_conflict use_column
declare
  stamped timestamptz;
  due     timestamptz;
  known   record;
begin
  if (octet_length(push.topic) between 1 and 255 and octet_length(push.payload) <= 16777216) is not true then
    perform "pushpop".check_topic(push.topic), "pushpop".check_payload(push.payload);
  end if;
  if delay is not null or ready_at is not null or headers is not null or max_attempts is not null or fallback is distinct from 25 then
    perform "pushpop".check_push(delay, ready_at, headers, max_attempts), "pushpop".check_attempts(fallback);
  end if;
  pushed := coalesce(push.id, "pushpop".new_id());
  select t.wanted_until, t.wanted_by, t.max_attempts, t.low into known from "pushpop".topics t where t.topic = push.topic;
  lock table "pushpop".messages in row exclusive mode;
  stamped := clock_timestamp();
  due := coalesce(push.ready_at, stamped + coalesce(push.delay, 0) * interval '1 second');
  insert into "pushpop".messages (topic, id, payload, headers, max_attempts, place, pushed_at, ready_at)
  values (push.topic, pushed, push.payload, push.headers,
          nullif(coalesce(push.max_attempts, known.max_attempts, push.fallback), 0), 1, stamped, due)
  on conflict (topic, id) do nothing;
  duplicate := not found;
  if duplicate then
    perform "pushpop".wait_for_duplicate();
  else
    perform "pushpop".enqueue(push.topic, stamped, coalesce(known.low, '-infinity'), due, stamped, 1, 0, array[pushed],
                            "pushpop".weigh(push.payload, push.headers, null));
    if sender is null or (known.wanted_until > stamped and known.wanted_by is distinct from sender) then
      perform "pushpop".tell(push.topic);
    end if;
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
end
$$;
CREATE FUNCTION pushpop.push(topic text, payload jsonb, id uuid DEFAULT NULL::uuid, delay double precision DEFAULT NULL::double precision, ready_at timestamp with time zone DEFAULT NULL::timestamp with time zone, headers jsonb DEFAULT NULL::jsonb, max_attempts integer DEFAULT NULL::integer, sender uuid DEFAULT NULL::uuid, fallback integer DEFAULT 25, OUT pushed uuid, OUT duplicate boolean) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  select p.pushed, p.duplicate into pushed, duplicate
  from "pushpop".push(push.topic, convert_to(push.payload::text, 'UTF8'), push.id, push.delay, push.ready_at, push.headers,
                    push.max_attempts, push.sender, push.fallback) p;
end
$$;
CREATE FUNCTION pushpop.push(topic text, payload text, id uuid DEFAULT NULL::uuid, delay double precision DEFAULT NULL::double precision, ready_at timestamp with time zone DEFAULT NULL::timestamp with time zone, headers jsonb DEFAULT NULL::jsonb, max_attempts integer DEFAULT NULL::integer, sender uuid DEFAULT NULL::uuid, fallback integer DEFAULT 25, OUT pushed uuid, OUT duplicate boolean) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  select p.pushed, p.duplicate into pushed, duplicate
  from "pushpop".push(push.topic, convert_to(push.payload, 'UTF8'), push.id, push.delay, push.ready_at, push.headers,
                    push.max_attempts, push.sender, push.fallback) p;
end
$$;
CREATE FUNCTION pushpop.push_many(topic text, ids uuid[], payloads bytea[], delays double precision[] DEFAULT NULL::double precision[], ready_ats timestamp with time zone[] DEFAULT NULL::timestamp with time zone[], headers jsonb[] DEFAULT NULL::jsonb[], max_attempts integer[] DEFAULT NULL::integer[], sender uuid DEFAULT NULL::uuid, fallback integer DEFAULT 25) RETURNS SETOF integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
declare
  wanted  integer := cardinality(ids);
  simple  boolean := delays is null and ready_ats is null and headers is null and max_attempts is null;
  places  integer[];  -- of those that were stored; null: all
  stamped timestamptz;
  known   record;
  most    integer;    -- attempts of a message that does not say
  widest  integer;
begin
  perform "pushpop".check_topic(push_many.topic), "pushpop".check_attempts(fallback);
  perform "pushpop".check_arrays(wanted, array[coalesce(cardinality(payloads), 0), cardinality(delays), cardinality(ready_ats),
                                             cardinality(headers), cardinality(max_attempts)]);
  if array_position(ids, null) is not null then
    perform "pushpop".refuse('an id is not null');
  end if;
  if wanted = 1 then
    return query
      select 1 from "pushpop".push(push_many.topic, payloads[1], ids[1], delays[1], ready_ats[1], headers[1],
                                 push_many.max_attempts[1], sender, fallback) p
      where p.duplicate;
    return;
  end if;
  select max(coalesce(octet_length(u.payload), 2147483647)) into widest from unnest(payloads) u(payload);
  if widest > 16777216 then
    perform "pushpop".check_payload(u.payload) from unnest(payloads) u(payload);
  end if;
  if not simple then
    perform "pushpop".check_push(u.delay, u.ready_at, u.headers, u.max_attempts)
    from unnest(delays, ready_ats, headers, max_attempts) u(delay, ready_at, headers, max_attempts);
  end if;
  select t.wanted_until, t.wanted_by, t.max_attempts, t.low into known from "pushpop".topics t where t.topic = push_many.topic;
  most := coalesce(known.max_attempts, fallback);
  lock table "pushpop".messages in row exclusive mode;
  stamped := clock_timestamp();
  -- In the order of the ids, so that two batches with the same ones cannot deadlock. Looking for
  -- conflicts costs as much as the insert itself, so that is done only if there are any.
  begin
    if simple then
      insert into "pushpop".messages (topic, id, payload, max_attempts, place, pushed_at, ready_at)
      select push_many.topic, u.id, u.payload, nullif(most, 0), u.place, stamped, stamped
      from unnest(ids, payloads) with ordinality u(id, payload, place) order by u.id;
    else
      insert into "pushpop".messages (topic, id, payload, headers, max_attempts, place, pushed_at, ready_at)
      select push_many.topic, u.id, u.payload, u.headers,
             nullif(coalesce(u.max_attempts, most), 0), u.place, stamped,
             coalesce(u.ready_at, stamped + coalesce(u.delay, 0) * interval '1 second')
      from unnest(ids, payloads, delays, ready_ats, headers, max_attempts)
             with ordinality u(id, payload, delay, ready_at, headers, max_attempts, place) order by u.id;
    end if;
  exception when unique_violation then
    with stored as (
      insert into "pushpop".messages (topic, id, payload, headers, max_attempts, place, pushed_at, ready_at)
      select push_many.topic, u.id, u.payload, u.headers,
             nullif(coalesce(u.max_attempts, most), 0), u.place, stamped,
             coalesce(u.ready_at, stamped + coalesce(u.delay, 0) * interval '1 second')
      from unnest(ids, payloads, delays, ready_ats, headers, max_attempts)
             with ordinality u(id, payload, delay, ready_at, headers, max_attempts, place) order by u.id, u.place
      on conflict (topic, id) do nothing
      returning place
    )
    select coalesce(array_agg(s.place), '{}') into places from stored s;
  end;
  if simple and places is null and widest <= 16384 then
    perform "pushpop".enqueue(push_many.topic, stamped, coalesce(known.low, '-infinity'), stamped, stamped, 1, 0, ids);
  else
    -- The places within a run follow one another: what is left of it when it is cut is known by that.
    perform "pushpop".enqueue(push_many.topic, stamped, coalesce(known.low, '-infinity'), r.ready_at, stamped, r.place, 0, r.ids, r.bytes)
    from (
      select s.ready_at, min(s.place) as place, array_agg(s.id order by s.place) as ids, max(s.bytes) as bytes
      from (
        select s.id, s.place, s.ready_at, s.bytes,
               s.place - row_number() over (partition by s.ready_at, s.bytes > 0 order by s.place) as island
        from (
          select u.id, u.place::integer, "pushpop".weigh(u.payload, u.headers, null) as bytes,
                 coalesce(u.ready_at, stamped + coalesce(u.delay, 0) * interval '1 second') as ready_at
          from unnest(ids, payloads, headers, delays, ready_ats) with ordinality u(id, payload, headers, delay, ready_at, place)
          where places is null or u.place = any(places)
        ) s
      ) s
      group by s.ready_at, s.island, case when s.bytes > 0 then s.place end
    ) r;
  end if;
  if places is null or cardinality(places) > 0 then
    if sender is null or (known.wanted_until > stamped and known.wanted_by is distinct from sender) then
      perform "pushpop".tell(push_many.topic);
    end if;
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
  if places is not null then
    perform "pushpop".wait_for_duplicate();
    return query select p from generate_series(1, wanted) p where p <> all (places);
  end if;
end
$$;
CREATE FUNCTION pushpop.push_many(topic text, ids uuid[], payloads jsonb[], delays double precision[] DEFAULT NULL::double precision[], ready_ats timestamp with time zone[] DEFAULT NULL::timestamp with time zone[], headers jsonb[] DEFAULT NULL::jsonb[], max_attempts integer[] DEFAULT NULL::integer[], sender uuid DEFAULT NULL::uuid, fallback integer DEFAULT 25) RETURNS SETOF integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return query
    select "pushpop".push_many(
      push_many.topic, push_many.ids, push_many.payloads::text[], push_many.delays, push_many.ready_ats, push_many.headers,
      push_many.max_attempts, push_many.sender, push_many.fallback);
end
$$;
CREATE FUNCTION pushpop.push_many(topic text, ids uuid[], payloads text[], delays double precision[] DEFAULT NULL::double precision[], ready_ats timestamp with time zone[] DEFAULT NULL::timestamp with time zone[], headers jsonb[] DEFAULT NULL::jsonb[], max_attempts integer[] DEFAULT NULL::integer[], sender uuid DEFAULT NULL::uuid, fallback integer DEFAULT 25) RETURNS SETOF integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return query
    select "pushpop".push_many(
      push_many.topic, push_many.ids,
      (select array_agg(convert_to(u.payload, 'UTF8') order by u.place)
       from unnest(push_many.payloads) with ordinality u(payload, place)),
      push_many.delays, push_many.ready_ats, push_many.headers, push_many.max_attempts, push_many.sender,
      push_many.fallback);
end
$$;
CREATE FUNCTION pushpop.reclaim(topic text, moment timestamp with time zone, max integer) RETURNS bigint
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  known timestamptz;
  lease record;
  slot  record;
  stuck boolean;
  count bigint := 0;
begin
  -- The clock is read again under the lock, as enqueue asks: not every caller holds it.
  lock table "pushpop".messages in row exclusive mode;
  moment := clock_timestamp();
  select t.reclaimed_to into known from "pushpop".topics t where t.topic = reclaim.topic;
  for lease in
    select l.ctid as tid, l.key, l.ids, l.fences from "pushpop".leases l
    where l.topic = reclaim.topic and l.lease_until >= coalesce(known, '-infinity') and l.lease_until <= moment
      and l.lease_until > '-infinity'
    order by l.lease_until limit max for update skip locked
  loop
    stuck := false;
    for slot in
      select u.id, u.fence, u.slot
      from unnest(lease.ids, lease.fences) with ordinality u(id, fence, slot)
      cross join lateral (
        select from "pushpop".messages m
        where m.topic = reclaim.topic and m.id = u.id and "pushpop".delivery(m.pushed_at, m.fence) = u.fence
          and m.state in ('p', 'd', 'r', 'f', 'e') offset 0
      ) m
      where octet_length(lease.key) > 16 or not exists (
        select from "pushpop".leases l
        where l.topic = reclaim.topic and l.key = lease.key || int2send(u.slot::int2) || int8send(u.fence))
      order by u.id
    loop
      perform from "pushpop".messages m where m.topic = reclaim.topic and m.id = slot.id for update skip locked;
      if not found then
        stuck := true;
      elsif octet_length(lease.key) = 16 and exists (
        select from "pushpop".leases l
        where l.topic = reclaim.topic and l.key = lease.key || int2send(slot.slot::int2) || int8send(slot.fence))
      then
        null;  -- It was extended before it was locked here.
      elsif "pushpop".give_back(reclaim.topic, slot.id, slot.fence, 'expire', moment, null, 'the lease expired') then
        count := count + 1;
      end if;
    end loop;
    if stuck then
      update "pushpop".leases l set lease_until = moment + interval '1 second'
      where l.topic = reclaim.topic and l.ctid = lease.tid;
    else
      delete from "pushpop".leases l where l.topic = reclaim.topic and l.ctid = lease.tid;
    end if;
  end loop;
  return count;
end
$$;
CREATE FUNCTION pushpop.redrive(topic text, ids uuid[]) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
declare
  one    record;
  letter tid;
  locked tid[];
  dead_ids uuid[];
begin
  perform "pushpop".check_topic(redrive.topic);
  perform "pushpop".check_arrays(cardinality(ids), '{}');
  perform "pushpop".reclaim(redrive.topic, clock_timestamp(), 1000);
  for one in
    select m.id, m.done_at from (select distinct u.id from unnest(ids) u(id)) u
    cross join lateral (
      select m.id, m.done_at from "pushpop".messages m
      where m.topic = redrive.topic and m.id = u.id and m.state in ('z', 'y') offset 0
    ) m
    order by m.done_at, m.id
  loop
    select d.ctid into letter from "pushpop".dead d
    where d.topic = redrive.topic and d.died_at = one.done_at and d.id = one.id for update;
    if found then
      locked := locked || letter;
      dead_ids := dead_ids || one.id;
    end if;
  end loop;
  return "pushpop".revive(redrive.topic, dead_ids, locked);
end
$$;
CREATE FUNCTION pushpop.redrive_all(topic text, INOUT until timestamp with time zone DEFAULT NULL::timestamp with time zone, max integer DEFAULT 1000, OUT redriven bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
declare
  ids    uuid[];
  locked tid[];
begin
  perform "pushpop".check_topic(redrive_all.topic);
  if max is null or max not between 1 and 10000 then
    perform "pushpop".refuse(format('1 to 10000 messages are redriven at a time, not %s', coalesce(max::text, 'null')));
  end if;
  perform "pushpop".reclaim(redrive_all.topic, clock_timestamp(), 1000);
  until := coalesce(until, clock_timestamp());
  select array_agg(d.id), array_agg(d.tid) into ids, locked
  from (
    select d.id, d.ctid as tid from "pushpop".dead d
    where d.topic = redrive_all.topic and d.died_at <= until
    order by d.died_at, d.id limit max for update skip locked
  ) d;
  redriven := "pushpop".revive(redrive_all.topic, ids, locked);
end
$$;
CREATE FUNCTION pushpop.refuse(what text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    AS $$
begin
  raise exception '%', what using errcode = 'invalid_parameter_value';
end
$$;
CREATE FUNCTION pushpop.release(topic text, id uuid, token bytea) RETURNS void
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$ select "pushpop".settle_one(topic, id, token, 'release', null, null, 0) $$;
CREATE FUNCTION pushpop.reschedule(topic text, id uuid, delay double precision DEFAULT NULL::double precision, ready_at timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_sort TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
declare
  message record;
  stamped timestamptz;
  due     timestamptz;
  bytes   integer;
begin
  perform "pushpop".check_topic(reschedule.topic), "pushpop".check_push(delay, ready_at, null, null);
  message := "pushpop".take_waiting(reschedule.topic, reschedule.id);
  if message.fence is null then
    return false;
  end if;
  -- As a push does, with its lock.
  lock table "pushpop".messages in row exclusive mode;
  stamped := clock_timestamp();
  due := coalesce(reschedule.ready_at, stamped + coalesce(delay, 0) * interval '1 second');
  update "pushpop".messages m set ready_at = due where m.topic = reschedule.topic and m.id = reschedule.id
  returning "pushpop".weigh(m.payload, m.headers, m.failures) into bytes;
  perform "pushpop".enqueue(reschedule.topic, stamped, null, due, message.pushed_at, message.place, message.fence, array[reschedule.id],
                          bytes);
  perform "pushpop".tell(reschedule.topic);
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
  return true;
end
$$;
CREATE FUNCTION pushpop.resume(topic text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    AS $$
#variable_conflict use_column
begin
  perform "pushpop".check_topic(resume.topic);
  update "pushpop".topics t set paused = false where t.topic = resume.topic and t.paused;
  if found then
    perform "pushpop".tell(resume.topic);
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
end
$$;
CREATE FUNCTION pushpop.revive(topic text, ids uuid[], locked tid[]) RETURNS bigint
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  stamped timestamptz;
  counted bigint;
begin
  if locked is null then
    return 0;
  end if;
  -- Stamped under the lock of a push, so that no mark can have passed it.
  lock table "pushpop".messages in row exclusive mode;
  stamped := clock_timestamp();
  with revived as (
    update "pushpop".messages m
    set state = case m.state when 'y' then 'e' else 'f' end::"char", attempt = 0, done_at = null, ready_at = stamped
    where m.topic = revive.topic and m.state in ('z', 'y') and m.ctid = any (array(
      select m.tid from unnest(ids) u(id)
      cross join lateral (
        select m.ctid as tid from "pushpop".messages m where m.topic = revive.topic and m.id = u.id offset 0
      ) m))
    returning m.id, m.pushed_at, m.place, m.fence, "pushpop".weigh(m.payload, m.headers, m.failures) as bytes
  )
  select count("pushpop".enqueue(revive.topic, stamped, null, stamped, r.pushed_at, r.place, r.fence, array[r.id], r.bytes)::text)
  into counted from revived r;
  delete from "pushpop".dead d where d.topic = revive.topic and d.ctid = any (locked);
  perform "pushpop".tell(revive.topic);
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
  return counted;
end
$$;
CREATE FUNCTION pushpop.schema_version(OUT version integer, OUT oldest_crate text) RETURNS record
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
  select m.version, m.oldest_crate from "pushpop".migrations m order by m.version desc limit 1
$$;
CREATE FUNCTION pushpop.sees_all() RETURNS boolean
    LANGUAGE sql STABLE
    AS $$
  select current_setting('transaction_isolation') not in ('repeatable read', 'serializable')
$$;
CREATE FUNCTION pushpop.set_aside(topic text, ids uuid[], fences bigint[], moment timestamp with time zone) RETURNS void
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
begin
  with aside as (
    update "pushpop".messages m
    set state = 'z', done_at = moment, delete_at = null,
        attempt = greatest(0, least(m.attempt, 2147483646)), fence = greatest(0, least(m.fence, 2147483646)),
        pushed_at = case when isfinite(m.pushed_at) then m.pushed_at else moment end,
        ready_at = case when isfinite(m.ready_at) then m.ready_at else moment end,
        failures = "pushpop".add_failure(m.failures, greatest(0, least(m.attempt, 2147483646)), moment,
                                       'the stored message is damaged: it was edited or restored by hand')
    where m.topic = set_aside.topic and m.state in ('p', 'd', 'r', 'f', 'e') and m.ctid = any (array(
      select m.tid from unnest(ids, fences) u(id, fence)
      cross join lateral (
        select m.ctid as tid from "pushpop".messages m
        where m.topic = set_aside.topic and m.id = u.id
          and ("pushpop".delivery(m.pushed_at, m.fence) = u.fence
               and "pushpop".is_sound(m.state, m.attempt, m.fence, m.pushed_at, m.ready_at, m.headers, m.failures)) is not true
        offset 0
      ) m))
    returning m.id
  )
  insert into "pushpop".dead (topic, died_at, id) select set_aside.topic, moment, a.id from aside a;
end
$$;
CREATE FUNCTION pushpop.set_topic(topic text, lease double precision, max_attempts integer, backoff_first double precision, backoff_most double precision) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    AS $$
#variable_conflict use_column
declare
  first double precision := coalesce(set_topic.backoff_first, 1);
  most  double precision := coalesce(set_topic.backoff_most, 3600);
begin
  perform "pushpop".check_topic(set_topic.topic), "pushpop".lease_interval(coalesce(set_topic.lease, 1)),
          "pushpop".check_attempts(set_topic.max_attempts);
  if not (first >= 0 and first <= most and most <= 250000000000) then
    perform "pushpop".refuse(format('a backoff has 0 to 250000000000 seconds, first no more than most, not %s to %s', first, most));
  end if;
  perform "pushpop".lock_topic(set_topic.topic);
  insert into "pushpop".topics as t (topic, lease, max_attempts, backoff_first, backoff_most)
  values (set_topic.topic, set_topic.lease * interval '1 second', set_topic.max_attempts,
          set_topic.backoff_first, set_topic.backoff_most)
  on conflict (topic) do update
  set lease = excluded.lease, max_attempts = excluded.max_attempts,
      backoff_first = excluded.backoff_first, backoff_most = excluded.backoff_most;
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
end
$$;
CREATE FUNCTION pushpop.settle_done(topic text, ids uuid[], tokens bytea[], outcome text, moment timestamp with time zone, keep double precision, tidy boolean) RETURNS integer[]
    LANGUAGE plpgsql
    AS $$
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
  select l.ids, l.fences into known from "pushpop".leases l where l.topic = settle_done.topic and l.key = first;
  select array_agg(m.tid), array_agg(m.fence), array_agg(u.id), array_agg(u.place::integer)
  into target, fences, ended, places
  from unnest(ids, tokens) with ordinality u(id, token, place)
  cross join lateral (
    select m.ctid as tid, m.fence from "pushpop".messages m
    where m.topic = settle_done.topic and m.id = u.id and int8send("pushpop".delivery(m.pushed_at, m.fence)) = substring(u.token from 19)
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
      select 1 from "pushpop".leases l
      where l.topic = settle_done.topic and l.key = substring(u.token from 1 for 16)
        and l.ids[s.slot] = u.id and int8send(l.fences[s.slot]) = substring(u.token from 19)
      union all
      select 1 from "pushpop".leases l
      where l.topic = settle_done.topic and l.key = u.token
        and l.ids[1] = u.id and int8send(l.fences[1]) = substring(u.token from 19)
      limit 1
    ) l
    cross join lateral (
      select m.ctid as tid, m.fence from "pushpop".messages m
      where m.topic = settle_done.topic and m.id = u.id and int8send("pushpop".delivery(m.pushed_at, m.fence)) = substring(u.token from 19)
        and m.state in ('p', 'd', 'r', 'f', 'e') offset 0
    ) m
    where octet_length(u.token) = 26 and (known.ids is null or substring(u.token from 1 for 16) <> first);
  end if;
  if target is null then
    return null;
  elsif fences[1] = all (fences) then
    done := "pushpop".finish(topic, target, fences[1], outcome, moment, keep);
  else
    done := (
      select sum("pushpop".finish(topic, f.target, f.fence, outcome, moment, keep))
      from (select u.fence, array_agg(u.tid) as target from unnest(target, fences) u(tid, fence) group by u.fence) f);
  end if;
  -- Some were reclaimed, or settled by a twin of this call, while this one waited for them.
  if done < cardinality(target) then
    select array_agg(u.id), array_agg(u.place) into ended, places
    from unnest(ended, places) u(id, place)
    left join lateral (
      select m.id, m.done_at from "pushpop".messages m where m.topic = settle_done.topic and m.id = u.id offset 0
    ) m on true
    where case when keep > 0 then m.done_at = moment else m.id is null end;
    if done = 0 or cardinality(ended) > done then
      return null;
    end if;
    alike := false;
  end if;
  if keep > 0 then
    insert into "pushpop".history (topic, delete_at, id, n, ids)
    select settle_done.topic, moment + keep * interval '1 second', ended[p], least(250, done - p + 1), ended[p : p + 249]
    from generate_series(1, done, 250) p;
  end if;
  if tidy and alike then
    perform "pushpop".tidy_lease(settle_done.topic, first, done);
  elsif tidy then
    perform "pushpop".tidy_leases(settle_done.topic, array(select tokens[p] from unnest(places) p));
  end if;
  return places;
end
$$;
CREATE FUNCTION pushpop.settle_many(topic text, ids uuid[], tokens bytea[], outcomes text[], delays double precision[] DEFAULT NULL::double precision[], errors text[] DEFAULT NULL::text[], keep double precision DEFAULT 3600, tidy boolean DEFAULT false) RETURNS TABLE(place integer, result text, lease_until timestamp with time zone)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
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
    perform "pushpop".check_topic(settle_many.topic);
    perform "pushpop".check_settle(ids, tokens, outcomes, delays, errors, keep);
  end if;
  -- As in a pop: a lease that is extended may end before this transaction does.
  lock table "pushpop".messages in row exclusive mode;
  moment := clock_timestamp();
  if wanted = 1 and outcomes <@ '{complete,discard}' then
    if "pushpop".settle_single(settle_many.topic, ids[1], tokens[1], outcomes[1], moment, keep, tidy) then
      settled := '{1}';
    end if;
  elsif outcomes <@ '{complete}' or outcomes <@ '{discard}' then
    settled := "pushpop".settle_done(settle_many.topic, ids, tokens, outcomes[1], moment, keep, tidy);
  else
    for one in
      select u.outcome, array_agg(u.place order by u.place)::integer[] as places,
             array_agg(u.id order by u.place) as ids, array_agg(u.token order by u.place) as tokens
      from unnest(ids, tokens, outcomes) with ordinality u(id, token, outcome, place)
      where u.outcome in ('complete', 'discard') group by u.outcome
    loop
      settled := settled || array(
        select one.places[p]
        from unnest("pushpop".settle_done(settle_many.topic, one.ids, one.tokens, one.outcome, moment, keep, tidy)) p);
    end loop;
    -- In the order of the ids, so that two batches with the same ones cannot deadlock.
    for one in
      select u.place::integer, u.id, u.token, u.outcome
      from unnest(ids, tokens, outcomes) with ordinality u(id, token, outcome, place)
      where u.outcome not in ('complete', 'discard') order by u.id, u.place
    loop
      fence := "pushpop".prove(settle_many.topic, one.id, one.token);
      if fence is null then
        continue;
      elsif one.outcome = 'extend' then
        lease_until := "pushpop".extend_lease(settle_many.topic, one.id, fence, one.token,
                                            moment + delays[one.place] * interval '1 second');
        if lease_until is not null then
          place := one.place;
          result := 'extended';
          return next;
          settled := settled || one.place;
        end if;
      elsif "pushpop".give_back(settle_many.topic, one.id, fence, one.outcome, moment,
                              delays[one.place], errors[one.place]) then
        settled := settled || one.place;
        ended := ended || one.token;
      end if;
    end loop;
    if tidy then
      perform "pushpop".tidy_leases(settle_many.topic, ended);
    end if;
    -- What is given back wakes those that wait, as a push does.
    if ended is not null then
      perform "pushpop".tell(t.topic) from "pushpop".topics t
      where t.topic = settle_many.topic and t.wanted_until > moment;
    end if;
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform "pushpop".make_durable();
  end if;
  -- What was not settled now may have been settled by the same lease before.
  if coalesce(cardinality(settled), 0) < wanted then
    return query
      select a.place::integer,
             case
               when m.id is null then 'gone'
               when int8send("pushpop".delivery(m.pushed_at, m.fence - 1)) = substring(a.token from 19)
                 and case a.outcome when 'complete' then m.state = 'c' when 'discard' then m.state = 'x'
                       when 'defer' then m.state = 'd' when 'release' then m.state = 'r'
                       when 'fail' then m.state in ('f', 'z') end then 'again'
               else 'lost'
             end, null::timestamptz
      from unnest(ids, tokens, outcomes) with ordinality a(id, token, outcome, place)
      left join lateral (
        select m.id, m.pushed_at, m.fence, m.state from "pushpop".messages m
        where m.topic = settle_many.topic and m.id = a.id offset 0
      ) m on true
      where settled is null or a.place <> all (settled);
  end if;
end
$$;
CREATE FUNCTION pushpop.settle_one(topic text, id uuid, token bytea, outcome text, delay double precision, error text, keep double precision, once boolean DEFAULT false) RETURNS void
    LANGUAGE plpgsql
    AS $$
declare
  problem text;
begin
  select s.result into problem
  from "pushpop".settle_many(settle_one.topic, array[settle_one.id], array[settle_one.token], array[outcome],
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
$$;
CREATE FUNCTION pushpop.settle_single(topic text, id uuid, token bytea, outcome text, moment timestamp with time zone, keep double precision, tidy boolean) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  delivery bigint := "pushpop".prove(topic, id, token);
begin
  if delivery is null then
    return false;
  elsif keep > 0 then
    update "pushpop".messages m
    set state = case outcome when 'complete' then 'c' else 'x' end::"char", attempt = "pushpop".one_more(m.attempt), fence = "pushpop".one_more(m.fence),
        done_at = moment, delete_at = moment + keep * interval '1 second'
    where m.topic = settle_single.topic and m.id = settle_single.id and "pushpop".delivery(m.pushed_at, m.fence) = delivery
      and m.state in ('p', 'd', 'r', 'f', 'e');
    if found then
      insert into "pushpop".history (topic, delete_at, id, n, ids)
      values (settle_single.topic, moment + keep * interval '1 second', settle_single.id, 1, array[settle_single.id]);
    end if;
  else
    delete from "pushpop".messages m
    where m.topic = settle_single.topic and m.id = settle_single.id and "pushpop".delivery(m.pushed_at, m.fence) = delivery
      and m.state in ('p', 'd', 'r', 'f', 'e');
  end if;
  if not found then
    return false;
  elsif tidy then
    perform "pushpop".tidy_lease(settle_single.topic, substring(token from 1 for 16), 1);
  end if;
  return true;
end
$$;
CREATE FUNCTION pushpop.split_run(topic text, tid tid, slot integer) RETURNS void
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  run "pushpop".runs;
begin
  if slot > 1 then
    select q.* into run from "pushpop".runs q where q.topic = split_run.topic and q.ctid = split_run.tid;
    update "pushpop".runs q set n = slot - 1, ids = q.ids[: slot - 1] where q.topic = split_run.topic and q.ctid = split_run.tid;
    if slot < run.n then
      insert into "pushpop".runs (topic, ready_at, pushed_at, place, n, fence, id, ids)
      values (run.topic, run.ready_at, run.pushed_at, run.place + slot, run.n - slot, run.fence, run.ids[slot + 1], run.ids[slot + 1 :]);
    end if;
  else
    update "pushpop".runs q set n = q.n - 1, place = q.place + 1, id = q.ids[2], ids = q.ids[2 :]
    where q.topic = split_run.topic and q.ctid = split_run.tid and q.n > 1;
    if not found then
      delete from "pushpop".runs q where q.topic = split_run.topic and q.ctid = split_run.tid;
    end if;
  end if;
end
$$;
CREATE FUNCTION pushpop.stats(topic text, OUT at timestamp with time zone, OUT ready bigint, OUT delayed bigint, OUT leased bigint, OUT settled bigint, OUT dead bigint, OUT oldest_ready_at timestamp with time zone, OUT paused boolean, OUT upkept_at timestamp with time zone, OUT upkeep_seconds double precision, OUT upkeep_rows bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
begin
  perform "pushpop".check_topic(stats.topic);
  select f.at, f.ready, f.delayed, f.leased, f.settled, f.dead, f.oldest_ready_at, f.paused,
         f.upkept_at, f.upkeep_seconds, f.upkeep_rows
  into at, ready, delayed, leased, settled, dead, oldest_ready_at, paused, upkept_at, upkeep_seconds, upkeep_rows
  from "pushpop".take_figures(array[stats.topic]) f;
end
$$;
CREATE FUNCTION pushpop.take_figures(topics text[]) RETURNS TABLE(topic text, at timestamp with time zone, ready bigint, delayed bigint, leased bigint, settled bigint, dead bigint, oldest_ready_at timestamp with time zone, paused boolean, upkept_at timestamp with time zone, upkeep_seconds double precision, upkeep_rows bigint)
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  -- Leases may hold messages that were settled in their holder's transaction. While a topic has no more than these, look
  -- at each.
  exact  constant bigint := 10000;
  -- So many rows take about ten milliseconds.
  costly constant bigint := 20000;
  now    constant timestamptz := clock_timestamp();
  writes constant boolean := current_setting('transaction_read_only') = 'off';
  taken  record;
begin
  for taken in
    select n.topic, coalesce(f.at, now) as at,
           coalesce(f.ready, q.ready + coalesce(x.expired, 0)) as ready, coalesce(f.delayed, q.delayed) as delayed,
           coalesce(f.leased, x.leased, held.leased) as leased, coalesce(f.settled, h.settled) as settled,
           coalesce(f.dead, d.dead + coalesce(x.doomed, 0)) as dead,
           case when f.at is null then least(q.oldest, x.oldest) else f.oldest_ready_at end as oldest_ready_at,
           coalesce(t.paused, false) as paused, t.upkept_at,
           coalesce(extract(epoch from t.upkeep_time), 0)::double precision as upkeep_seconds,
           coalesce(t.upkeep_rows, 0) as upkeep_rows, q.read + held.n + h.read + d.dead as read
    from unnest(topics) n(topic)
    left join lateral (
      select f.* from "pushpop".figures f
      where f.topic = n.topic and f.at between now - interval '2 seconds' and now offset 0
    ) f on true
    left join lateral (select t.* from "pushpop".topics t where t.topic = n.topic offset 0) t on true
    cross join lateral "pushpop".bottoms(n.topic) s
    cross join lateral (
      select count(*) as read, coalesce(sum(q.n) filter (where q.ready_at <= now), 0) as ready,
             coalesce(sum(q.n) filter (where q.ready_at > now), 0) as delayed,
             min(q.ready_at) filter (where q.ready_at <= now) as oldest
      from "pushpop".runs q where q.topic = n.topic and f.at is null and q.ready_at >= s.start
    ) q
    cross join lateral (
      select coalesce(sum(cardinality(l.ids)), 0) as n,
             coalesce(sum(l.open) filter (where l.lease_until > now), 0) as leased
      from "pushpop".leases l where l.topic = n.topic and f.at is null
    ) held
    left join lateral (
      select count(distinct m.id) filter (where l.lease_until > now) as leased,
             count(distinct m.id) filter (where l.lease_until <= now and not m.doomed) as expired,
             count(distinct m.id) filter (where l.lease_until <= now and m.doomed) as doomed,
             min(m.ready_at) filter (where l.lease_until <= now and not m.doomed) as oldest
      from (
        select u.id, u.fence, max(l.lease_until) as lease_until
        from (
          select l.ids, l.fences, l.lease_until from "pushpop".leases l
          where l.topic = n.topic and held.n between 1 and exact offset 0
        ) l
        cross join lateral unnest(l.ids, l.fences) u(id, fence)
        group by u.id, u.fence
      ) l
      cross join lateral (
        select m.id, m.ready_at, coalesce(m.attempt >= m.max_attempts - 1, false) as doomed from "pushpop".messages m
        where m.topic = n.topic and m.id = l.id and "pushpop".delivery(m.pushed_at, m.fence) = l.fence
          and m.state in ('p', 'd', 'r', 'f', 'e') offset 0
      ) m
      having held.n between 1 and exact
    ) x on true
    cross join lateral (
      select count(*) as read, coalesce(sum(h.n), 0) as settled
      from "pushpop".history h where h.topic = n.topic and f.at is null
    ) h
    cross join lateral (
      select count(*) as dead from "pushpop".dead d where d.topic = n.topic and f.at is null
    ) d
  loop
    topic := taken.topic;
    at := taken.at;
    ready := taken.ready;
    delayed := taken.delayed;
    leased := taken.leased;
    settled := taken.settled;
    dead := taken.dead;
    oldest_ready_at := taken.oldest_ready_at;
    paused := taken.paused;
    upkept_at := taken.upkept_at;
    upkeep_seconds := taken.upkeep_seconds;
    upkeep_rows := taken.upkeep_rows;
    return next;
    if taken.read > costly and writes then
      update "pushpop".figures f
      set at = taken.at, ready = taken.ready, delayed = taken.delayed, leased = taken.leased, settled = taken.settled,
          dead = taken.dead, oldest_ready_at = taken.oldest_ready_at
      where f.topic = (select g.topic from "pushpop".figures g where g.topic = taken.topic for update skip locked);
      if not found then
        insert into "pushpop".figures (topic, at, ready, delayed, leased, settled, dead, oldest_ready_at)
        values (taken.topic, taken.at, taken.ready, taken.delayed, taken.leased, taken.settled, taken.dead,
                taken.oldest_ready_at)
        on conflict do nothing;
      end if;
    end if;
  end loop;
end
$$;
CREATE FUNCTION pushpop.take_runs(topic text, start timestamp with time zone, moment timestamp with time zone, max integer, bytes bigint, OUT ids uuid[], OUT fences bigint[]) RETURNS record
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  run   record;
  whole tid[];
  want  integer := max;
  room  bigint := bytes;
  -- One row at a time: what is fetched is locked, and is taken, unless it has too many bytes.
  front cursor for
    select q.ctid as tid, q.n, q.pushed_at, q.fence, q.bytes, q.ids from "pushpop".runs q
    where q.topic = take_runs.topic and q.ready_at >= start and q.ready_at <= moment
    order by q.ready_at, q.pushed_at, q.place, q.id
    for update skip locked;
begin
  if max = 1 then
    select q.ctid as tid, q.n, q.pushed_at, q.fence, q.ids into run from "pushpop".runs q
    where q.topic = take_runs.topic and q.ready_at >= start and q.ready_at <= moment
    order by q.ready_at, q.pushed_at, q.place, q.id
    limit 1 for update skip locked;
    if not found then
      return;
    elsif run.n = 1 then
      delete from "pushpop".runs q where q.topic = take_runs.topic and q.ctid = run.tid;
    else
      update "pushpop".runs q
      set n = q.n - 1, place = q.place + 1, id = q.ids[2], ids = q.ids[2 :]
      where q.topic = take_runs.topic and q.ctid = run.tid;
    end if;
    ids := run.ids[1 : 1];
    fences := array["pushpop".delivery(run.pushed_at, run.fence)];
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
      update "pushpop".runs q
      set n = q.n - want, place = q.place + want, id = q.ids[want + 1], ids = q.ids[want + 1 :]
      where q.topic = take_runs.topic and q.ctid = run.tid;
    end if;
    fences := fences || array_fill("pushpop".delivery(run.pushed_at, run.fence), array[least(run.n, want)]);
    want := want - least(run.n, want);
    exit when want = 0;
  end loop;
  close front;
  if whole is not null then
    delete from "pushpop".runs q where q.topic = take_runs.topic and q.ctid = any (whole);
  end if;
end
$$;
CREATE FUNCTION pushpop.take_waiting(topic text, id uuid, OUT pushed_at timestamp with time zone, OUT place integer, OUT fence integer) RETURNS record
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  message record;
  before  record;
  run     record;
begin
  loop
    select m.ready_at, m.pushed_at, m.place, m.fence into message from "pushpop".messages m
    where m.topic = take_waiting.topic and m.id = take_waiting.id and m.state in ('p', 'd', 'r', 'f', 'e');
    if not found then
      return;
    end if;
    select q.ctid as tid, q.ids into run from "pushpop".runs q
    where q.topic = take_waiting.topic and q.ready_at = message.ready_at and q.pushed_at = message.pushed_at
      and q.place <= message.place and take_waiting.id = any (q.ids)
    order by q.ready_at desc, q.pushed_at desc, q.place desc, q.id desc
    limit 1 for update;
    exit when found;
    -- While this waited for the run another operator may have taken it in two.
    continue when exists (
      select from "pushpop".runs q
      where q.topic = take_waiting.topic and q.ready_at = message.ready_at and q.pushed_at = message.pushed_at
        and q.place <= message.place and take_waiting.id = any (q.ids));
    -- It is leased, or was moved meanwhile. A lease may have ended.
    if message is not distinct from before then
      return;
    end if;
    before := message;
    perform "pushpop".reclaim(take_waiting.topic, clock_timestamp(), 1000);
  end loop;
  perform "pushpop".split_run(take_waiting.topic, run.tid, array_position(run.ids, take_waiting.id));
  pushed_at := message.pushed_at;
  place := message.place;
  fence := message.fence;
end
$$;
CREATE FUNCTION pushpop.tell(topic text) RETURNS void
    LANGUAGE sql
    AS $$
  select case
    when coalesce(pg_catalog.current_setting('pushpop_pg.notify', true), '') <> 'off'
      and pg_catalog.pg_notification_queue_usage() < 0.9
    then pg_catalog.pg_notify('pushpop',
      case when pg_catalog.getdatabaseencoding() = 'SQL_ASCII' and topic ~ '[^ -~]' then '' else topic end)
  end
$$;
CREATE FUNCTION pushpop.tidy_lease(topic text, key bytea, used integer) RETURNS void
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
begin
  delete from "pushpop".leases l
  where l.topic = tidy_lease.topic and l.ctid = (
    select l.ctid from "pushpop".leases l
    where l.topic = tidy_lease.topic and l.key = tidy_lease.key and l.open <= used for update skip locked);
  if not found then
    update "pushpop".leases l set open = l.open - used
    where l.topic = tidy_lease.topic and l.ctid = (
      select l.ctid from "pushpop".leases l
      where l.topic = tidy_lease.topic and l.key = tidy_lease.key and l.open > used for update skip locked);
  end if;
end
$$;
CREATE FUNCTION pushpop.tidy_leases(topic text, tokens bytea[]) RETURNS void
    LANGUAGE plpgsql
    AS $$
begin
  perform "pushpop".tidy_lease(tidy_leases.topic, k.key, k.used)
  from (
    select substring(u.token from 1 for 16) as key, count(*)::integer as used
    from unnest(tokens) u(token) group by 1 order by 1
  ) k;
end
$$;
CREATE FUNCTION pushpop.topic_names(after text DEFAULT ''::text, max bigint DEFAULT NULL::bigint) RETURNS SETOF text
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
  with recursive names as (
    select coalesce(after, '') collate "C" as topic
    union all
    select least(
      (select m.topic from "pushpop".messages m where m.topic > n.topic order by m.topic limit 1),
      (select t.topic from "pushpop".topics t
       where t.topic > n.topic
         and (paused or lease is not null or max_attempts is not null or backoff_first is not null
              or backoff_most is not null)
       order by t.topic limit 1))
    from names n where n.topic is not null
  )
  select n.topic from names n where n.topic is not null offset 1 limit max
$$;
CREATE FUNCTION pushpop.topic_settings(topic text, OUT paused boolean, OUT lease double precision, OUT max_attempts integer, OUT backoff_first double precision, OUT backoff_most double precision) RETURNS record
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    AS $$
#variable_conflict use_column
begin
  perform "pushpop".check_topic(topic_settings.topic);
  select t.paused, extract(epoch from t.lease), t.max_attempts, t.backoff_first, t.backoff_most
  into paused, lease, max_attempts, backoff_first, backoff_most
  from "pushpop".topics t where t.topic = topic_settings.topic;
  paused := coalesce(paused, false);
end
$$;
CREATE FUNCTION pushpop.upkeep(topic text, max integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
declare
  moment timestamptz;
  known  "pushpop".topics;
  due cursor for
    select h.ctid as tid, h.n, h.ids from "pushpop".history h
    where h.topic = upkeep.topic and h.delete_at >= known.deleted_to and h.delete_at <= moment
    order by h.delete_at, h.id
    for update skip locked;
  batch    record;
  batches  tid[];
  ids      uuid[];
  want     integer := max;
  counted  bigint;
  returned bigint;
begin
  perform "pushpop".check_topic(upkeep.topic);
  if max is null or max not between 1 and 100000 then
    perform "pushpop".refuse(format('upkeep deletes 1 to 100000 messages at a time, not %s', coalesce(max::text, 'null')));
  end if;
  lock table "pushpop".messages in row exclusive mode;
  moment := clock_timestamp();
  -- Held until the end, so that there is one at a time, and the death of its session frees it.
  if ("pushpop".lock_topic(upkeep.topic)).topic is null then
    return 0;
  end if;
  returned := "pushpop".reclaim(upkeep.topic, moment, max);
  -- Once a minute from the beginning: a settle, or a pop, may have committed late, and no mark may hide anything for good.
  update "pushpop".topics t
  set low = '-infinity', deleted_to = '-infinity', reclaimed_to = '-infinity', cleared_at = moment
  where t.topic = upkeep.topic and t.cleared_at not between moment - interval '1 minute' and moment;
  perform "pushpop".note_look(upkeep.topic, moment);
  known := "pushpop".lock_topic(upkeep.topic);
  open due;
  loop
    fetch due into batch;
    exit when not found;
    batches := batches || batch.tid;
    ids := ids || batch.ids;
    want := want - batch.n;
    exit when want <= 0;
  end loop;
  close due;
  delete from "pushpop".messages m
  where m.topic = upkeep.topic and m.delete_at <= moment and m.ctid = any (array(
    select m.tid from unnest(ids) u(id)
    cross join lateral (
      select m.ctid as tid from "pushpop".messages m where m.topic = upkeep.topic and m.id = u.id offset 0
    ) m));
  get diagnostics counted = row_count;
  delete from "pushpop".history h where h.topic = upkeep.topic and h.ctid = any (batches);
  update "pushpop".topics t
  set upkept_at = moment, upkeep_time = t.upkeep_time + (clock_timestamp() - moment),
      upkeep_rows = t.upkeep_rows + counted + returned,
      cleared_at = known.cleared_at,
      -- A second of grace: what is due now may still be uncommitted.
      deleted_to = case when want > 0 and "pushpop".sees_all() then moment - interval '1 second' else known.deleted_to end,
      reclaimed_to = greatest(known.reclaimed_to, case when "pushpop".sees_all() then least(moment - interval '1 second', known.sure_to, (
        select l.lease_until from "pushpop".leases l
        -- Only so far: what was deleted lies ahead for as long as a lease, and under an old snapshot it would be stepped over.
        where l.topic = upkeep.topic and l.lease_until >= known.reclaimed_to and l.lease_until > '-infinity'
          and l.lease_until <= moment
        order by l.lease_until limit 1)) end)
  where t.topic = upkeep.topic;
  return counted;
end
$$;
CREATE FUNCTION pushpop.upkeep_due(max integer DEFAULT 100, after text DEFAULT ''::text) RETURNS SETOF text
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    AS $$
  select n.topic from "pushpop".topic_names(after) n(topic)
  where exists (
      select from "pushpop".history h
      where h.topic = n.topic and h.delete_at <= statement_timestamp() offset 0)
    or exists (
      select from "pushpop".leases l
      where l.topic = n.topic and l.lease_until <= statement_timestamp() and l.lease_until > '-infinity' offset 0)
  limit max
$$;
CREATE FUNCTION pushpop.wait_for(topic text, waiter uuid DEFAULT NULL::uuid, within double precision DEFAULT 1, OUT ready boolean, OUT due_in double precision, OUT noted boolean) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  select w.ready, w.due_in, w.noted into ready, due_in, noted
  from "pushpop".wait_for_any(array[wait_for.topic], waiter, within) w;
  ready := coalesce(ready, false);
  noted := coalesce(noted, true);
end
$$;
CREATE FUNCTION pushpop.wait_for_any(topics text[], waiter uuid DEFAULT NULL::uuid, within double precision DEFAULT 1) RETURNS TABLE(place integer, ready boolean, due_in double precision, noted boolean)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_sort TO 'off'
    SET enable_material TO 'off'
    SET random_page_cost TO '0'
    SET cpu_tuple_cost TO '0'
    SET cpu_operator_cost TO '0'
    SET cpu_index_tuple_cost TO '1'
    SET plan_cache_mode TO 'force_generic_plan'
    AS $$
#variable_conflict use_column
declare
  moment  timestamptz := clock_timestamp();
  again   timestamptz;
  longest timestamptz := moment + interval '3630 seconds';  -- the clock may have gone back since somebody said so
  asked   text;
  known   "pushpop".topics;
begin
  perform "pushpop".check_topics(topics);
  if (within between 0 and 3600) is not true then
    perform "pushpop".refuse(format('whoever waits asks again within 0 to 3600 seconds, not %s', coalesce(within::text, 'null')));
  end if;
  again := moment + within * interval '1 second';
  -- A few hundred at a time, those first that are needed most: until the end, each row that is new has a lock of its own.
  for asked in
    select u.topic from unnest(topics) u(topic)
    left join lateral (
      select t.wanted_until, t.wanted_by from "pushpop".topics t where t.topic = u.topic offset 0
    ) t on true
    where (t.wanted_until between again + interval '15 seconds' and longest) is not true
       or t.wanted_by is distinct from waiter and t.wanted_by is not null
    order by t.wanted_until nulls first limit 300
  loop
    known := "pushpop".lock_topic(asked);
    if known.topic is not null then
      update "pushpop".topics t
      set wanted_until = greatest(again + interval '30 seconds', case when known.wanted_until <= longest then known.wanted_until end),
          wanted_by = case when known.wanted_until < moment or known.wanted_by = waiter then waiter end
      where t.topic = asked;
      -- Whoever does nothing but wait looks at everything, too.
      perform "pushpop".begin_sweep(asked, moment, known.swept_at);
    end if;
  end loop;
  return query
    select u.place::integer, coalesce(f.ready and not f.paused, false),
           case when not f.paused then extract(epoch from least(nullif(f.due, 'infinity'), nullif(f.ends, 'infinity')) - moment) end::double precision, f.noted
    from unnest(topics) with ordinality u(topic, place)
    left join lateral (
      select t.paused, t.reclaimed_to, t.wanted_until, t.wanted_by from "pushpop".topics t where t.topic = u.topic offset 0
    ) t on true
    cross join lateral "pushpop".bottoms(u.topic) b
    cross join lateral (
      select coalesce(t.paused, false) as paused,
             (t.wanted_until >= again and (t.wanted_by is null or t.wanted_by = waiter)) is true as noted,
             (select true from "pushpop".runs q
              where q.topic = u.topic and q.ready_at >= b.start and q.ready_at <= moment limit 1) as ready,
             (select q.ready_at from "pushpop".runs q
              where q.topic = u.topic and q.ready_at > moment
              order by q.ready_at, q.pushed_at, q.place, q.id limit 1) as due,
             (select l.lease_until from "pushpop".leases l
              where l.topic = u.topic and l.lease_until >= coalesce(t.reclaimed_to, '-infinity')
                and l.lease_until > '-infinity' and l.lease_until <= again
              order by l.lease_until limit 1) as ends
      offset 0
    ) f
    where not f.noted or not f.paused and (f.ready or f.due is not null or f.ends is not null);
end
$$;
CREATE FUNCTION pushpop.wait_for_duplicate() RETURNS void
    LANGUAGE plpgsql
    AS $$
begin
  perform pg_logical_emit_message(true, 'pushpop', 'duplicate');
end
$$;
CREATE FUNCTION pushpop.wait_for_runs(topic text, start timestamp with time zone, moment timestamp with time zone, max integer, bytes bigint, OUT ids uuid[], OUT fences bigint[]) RETURNS record
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
declare
  patience text := current_setting('lock_timeout');
  taken    record;
begin
  for i in 1..10 loop
    perform from "pushpop".runs q
    where q.topic = wait_for_runs.topic and q.ready_at >= start and q.ready_at <= moment limit 1;
    exit when not found;
    begin
      perform set_config('lock_timeout', '1s', true);
      perform from "pushpop".runs q
      where q.topic = wait_for_runs.topic and q.ready_at >= start and q.ready_at <= moment
      order by q.ready_at, q.pushed_at, q.place, q.id
      limit 1 for update;
      perform set_config('lock_timeout', patience, true);
    exception when lock_not_available then
      return;
    end;
    taken := "pushpop".take_runs(wait_for_runs.topic, start, moment, max, bytes);
    ids := taken.ids;
    fences := taken.fences;
    exit when ids is not null;
  end loop;
end
$$;
CREATE FUNCTION pushpop.weigh(payload bytea, headers jsonb, failures jsonb) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
  select case when octet_length(payload) + coalesce(octet_length(headers::text), 0) + coalesce(octet_length(failures::text), 0) > 16384
         then octet_length(payload) + coalesce(octet_length(headers::text), 0) + coalesce(octet_length(failures::text), 0)
         else 0 end
$$;
CREATE TABLE pushpop.behind (
    ready_at timestamp with time zone NOT NULL,
    entry uuid DEFAULT gen_random_uuid() NOT NULL,
    topic text NOT NULL COLLATE pg_catalog."C"
);
CREATE TABLE pushpop.dead (
    topic text NOT NULL COLLATE pg_catalog."C",
    died_at timestamp with time zone NOT NULL,
    id uuid NOT NULL
);
CREATE TABLE pushpop.messages (
    pushed_at timestamp with time zone NOT NULL,
    ready_at timestamp with time zone NOT NULL,
    done_at timestamp with time zone,
    delete_at timestamp with time zone,
    fence integer DEFAULT 0 NOT NULL,
    attempt integer DEFAULT 0 NOT NULL,
    place integer NOT NULL,
    max_attempts smallint,
    state "char" DEFAULT 'p'::"char" NOT NULL,
    id uuid NOT NULL,
    topic text NOT NULL COLLATE pg_catalog."C",
    failures jsonb,
    headers jsonb,
    payload bytea NOT NULL
)
WITH (fillfactor='46', autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='10000', autovacuum_vacuum_cost_delay='0');
ALTER TABLE ONLY pushpop.messages ALTER COLUMN payload SET STORAGE EXTERNAL;
CREATE VIEW pushpop.dead_messages AS
 SELECT d.topic,
    d.id,
    d.died_at,
    m.attempt,
    "left"(((m.failures -> '-1'::integer) ->> 'error'::text), 200) AS error
   FROM (pushpop.dead d
     CROSS JOIN LATERAL ( SELECT m_1.attempt,
            m_1.failures
           FROM pushpop.messages m_1
          WHERE ((m_1.topic = d.topic) AND (m_1.id = d.id))
         OFFSET 0) m)
  ORDER BY d.died_at DESC, d.topic, d.id;
CREATE TABLE pushpop.figures (
    at timestamp with time zone NOT NULL,
    ready bigint NOT NULL,
    delayed bigint NOT NULL,
    leased bigint NOT NULL,
    settled bigint NOT NULL,
    dead bigint NOT NULL,
    oldest_ready_at timestamp with time zone,
    topic text NOT NULL COLLATE pg_catalog."C"
)
WITH (fillfactor='50');
CREATE TABLE pushpop.history (
    delete_at timestamp with time zone NOT NULL,
    n integer NOT NULL,
    id uuid NOT NULL,
    topic text NOT NULL COLLATE pg_catalog."C",
    ids uuid[] NOT NULL
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='2000', autovacuum_vacuum_cost_delay='0');
ALTER TABLE ONLY pushpop.history ALTER COLUMN ids SET STORAGE PLAIN;
CREATE TABLE pushpop.leases (
    lease_until timestamp with time zone NOT NULL,
    open integer NOT NULL,
    topic text NOT NULL COLLATE pg_catalog."C",
    key bytea NOT NULL,
    ids uuid[] NOT NULL,
    fences bigint[] NOT NULL
)
WITH (fillfactor='80', autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='2000', autovacuum_vacuum_cost_delay='0');
ALTER TABLE ONLY pushpop.leases ALTER COLUMN ids SET STORAGE PLAIN;
ALTER TABLE ONLY pushpop.leases ALTER COLUMN fences SET STORAGE PLAIN;
CREATE VIEW pushpop.in_flight AS
 SELECT l.topic,
    l.id,
    l.lease_until,
        CASE
            WHEN isfinite(l.lease_until) THEN date_trunc('second'::text, (l.lease_until - statement_timestamp()))
            ELSE NULL::interval
        END AS time_left,
    m.attempt
   FROM (( SELECT l_1.topic,
            u.id,
            u.fence,
            max(l_1.lease_until) AS lease_until
           FROM (pushpop.leases l_1
             CROSS JOIN LATERAL UNNEST(l_1.ids, l_1.fences) u(id, fence))
          WHERE (l_1.lease_until > statement_timestamp())
          GROUP BY l_1.topic, u.id, u.fence) l
     CROSS JOIN LATERAL ( SELECT (LEAST(m_1.attempt, 2147483646) + 1) AS attempt
           FROM pushpop.messages m_1
          WHERE ((m_1.topic = l.topic) AND (m_1.id = l.id) AND (((
                CASE
                    WHEN isfinite(m_1.pushed_at) THEN ((date_part('epoch'::text, m_1.pushed_at) * (1000000)::double precision))::bigint
                    ELSE NULL::bigint
                END + m_1.fence) + 1) = l.fence) AND (m_1.state = ANY (ARRAY['p'::"char", 'd'::"char", 'r'::"char", 'f'::"char", 'e'::"char"])))
         OFFSET 0) m)
  ORDER BY l.lease_until, l.topic, l.id;
CREATE TABLE pushpop.migrations (
    version integer NOT NULL,
    oldest_crate text NOT NULL,
    applied_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE VIEW pushpop.overview AS
 SELECT s.topic,
    s.ready,
    s.delayed,
    s.leased,
    s.dead,
    s.settled,
        CASE
            WHEN isfinite(s.oldest_ready_at) THEN date_trunc('second'::text, (s.at - s.oldest_ready_at))
            ELSE NULL::interval
        END AS oldest_ready_age,
    s.paused,
    s.upkept_at
   FROM pushpop.all_stats() s(topic, at, ready, delayed, leased, settled, dead, oldest_ready_at, paused, upkept_at, upkeep_seconds, upkeep_rows);
CREATE TABLE pushpop.runs (
    ready_at timestamp with time zone NOT NULL,
    pushed_at timestamp with time zone NOT NULL,
    place integer NOT NULL,
    n integer NOT NULL,
    fence integer DEFAULT 0 NOT NULL,
    bytes integer DEFAULT 0 NOT NULL,
    id uuid NOT NULL,
    topic text NOT NULL COLLATE pg_catalog."C",
    ids uuid[] NOT NULL
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='2000', autovacuum_vacuum_cost_delay='0');
ALTER TABLE ONLY pushpop.runs ALTER COLUMN ids SET STORAGE PLAIN;
ALTER TABLE ONLY pushpop.behind
    ADD CONSTRAINT behind_pkey PRIMARY KEY (topic, ready_at, entry);
ALTER TABLE ONLY pushpop.dead
    ADD CONSTRAINT dead_pkey PRIMARY KEY (topic, died_at, id);
ALTER TABLE ONLY pushpop.figures
    ADD CONSTRAINT figures_pkey PRIMARY KEY (topic);
ALTER TABLE ONLY pushpop.history
    ADD CONSTRAINT history_pkey PRIMARY KEY (topic, delete_at, id);
ALTER TABLE ONLY pushpop.leases
    ADD CONSTRAINT leases_pkey PRIMARY KEY (topic, key);
ALTER TABLE ONLY pushpop.messages
    ADD CONSTRAINT messages_pkey PRIMARY KEY (topic, id);
ALTER TABLE ONLY pushpop.migrations
    ADD CONSTRAINT migrations_pkey PRIMARY KEY (version);
ALTER TABLE ONLY pushpop.runs
    ADD CONSTRAINT runs_pkey PRIMARY KEY (topic, ready_at, pushed_at, place, id);
ALTER TABLE ONLY pushpop.topics
    ADD CONSTRAINT topics_pkey PRIMARY KEY (topic);
CREATE INDEX leases_until ON pushpop.leases USING btree (topic, lease_until) WHERE (lease_until > '-infinity'::timestamp with time zone);
CREATE INDEX topics_set ON pushpop.topics USING btree (topic) WHERE (paused OR (lease IS NOT NULL) OR (max_attempts IS NOT NULL) OR (backoff_first IS NOT NULL) OR (backoff_most IS NOT NULL));
REVOKE ALL ON FUNCTION pushpop.add_failure(failures jsonb, attempt integer, moment timestamp with time zone, error text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.all_stats(after text, seconds double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.as_json(payload bytea) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.as_text(payload bytea) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.backoff(topic text, attempt integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.begin_sweep(topic text, moment timestamp with time zone, swept_at timestamp with time zone) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.bottom(topic text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.bottoms(topic text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.cancel(topic text, id uuid, keep double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.check_arrays(wanted integer, others integer[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.check_attempts(attempts integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.check_headers(headers jsonb) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.check_keep(keep double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.check_payload(payload bytea) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.check_push(delay double precision, ready_at timestamp with time zone, headers jsonb, max_attempts integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.check_settle(ids uuid[], tokens bytea[], outcomes text[], delays double precision[], errors text[], keep double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.check_topic(topic text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.check_topics(topics text[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.complete(topic text, id uuid, token bytea, keep double precision, once boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.dead_letters(topic text, max integer, before timestamp with time zone, before_id uuid) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.defer(topic text, id uuid, token bytea, delay double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.delivery(pushed_at timestamp with time zone, fence integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.discard(topic text, id uuid, token bytea, keep double precision, once boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.enqueue(topic text, moment timestamp with time zone, low timestamp with time zone, ready_at timestamp with time zone, pushed_at timestamp with time zone, place integer, fence integer, ids uuid[], bytes integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.extend(topic text, id uuid, token bytea, lease double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.extend_lease(topic text, id uuid, fence bigint, token bytea, until timestamp with time zone) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.fail(topic text, id uuid, token bytea, error text, delay double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.failure_list(failures jsonb) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.find(topic text, id uuid) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.finish(topic text, target tid[], fence integer, outcome text, moment timestamp with time zone, keep double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.give_back(topic text, id uuid, fence bigint, outcome text, moment timestamp with time zone, delay double precision, error text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.header_pairs(headers jsonb) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.heartbeat(topics text[], ids uuid[], tokens bytea[], leases double precision[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.is_sound(state "char", attempt integer, fence integer, pushed_at timestamp with time zone, ready_at timestamp with time zone, headers jsonb, failures jsonb) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.lease_interval(lease double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.lock_topic(topic text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.make_durable() FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.move_deadline(topic text, id uuid, fence bigint, token bytea, until timestamp with time zone) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.new_id() FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.note_look(topic text, moment timestamp with time zone) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.one_more(n integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.pause(topic text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.peek(topic text, max integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.pop(topic text, max integer, lease double precision, fallback double precision, bytes bigint) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.pop_any(topics text[], max integer, lease double precision, fallback double precision, maxes integer[], leases double precision[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.prove(topic text, id uuid, token bytea) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.purge(topic text, max integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.purge_dead(topic text, age double precision, max integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.push(topic text, payload bytea, id uuid, delay double precision, ready_at timestamp with time zone, headers jsonb, max_attempts integer, sender uuid, fallback integer, OUT pushed uuid, OUT duplicate boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.push(topic text, payload jsonb, id uuid, delay double precision, ready_at timestamp with time zone, headers jsonb, max_attempts integer, sender uuid, fallback integer, OUT pushed uuid, OUT duplicate boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.push(topic text, payload text, id uuid, delay double precision, ready_at timestamp with time zone, headers jsonb, max_attempts integer, sender uuid, fallback integer, OUT pushed uuid, OUT duplicate boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.push_many(topic text, ids uuid[], payloads bytea[], delays double precision[], ready_ats timestamp with time zone[], headers jsonb[], max_attempts integer[], sender uuid, fallback integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.push_many(topic text, ids uuid[], payloads jsonb[], delays double precision[], ready_ats timestamp with time zone[], headers jsonb[], max_attempts integer[], sender uuid, fallback integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.push_many(topic text, ids uuid[], payloads text[], delays double precision[], ready_ats timestamp with time zone[], headers jsonb[], max_attempts integer[], sender uuid, fallback integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.reclaim(topic text, moment timestamp with time zone, max integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.redrive(topic text, ids uuid[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.redrive_all(topic text, INOUT until timestamp with time zone, max integer, OUT redriven bigint) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.refuse(what text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.release(topic text, id uuid, token bytea) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.reschedule(topic text, id uuid, delay double precision, ready_at timestamp with time zone) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.resume(topic text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.revive(topic text, ids uuid[], locked tid[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.schema_version(OUT version integer, OUT oldest_crate text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.sees_all() FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.set_aside(topic text, ids uuid[], fences bigint[], moment timestamp with time zone) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.set_topic(topic text, lease double precision, max_attempts integer, backoff_first double precision, backoff_most double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.settle_done(topic text, ids uuid[], tokens bytea[], outcome text, moment timestamp with time zone, keep double precision, tidy boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.settle_many(topic text, ids uuid[], tokens bytea[], outcomes text[], delays double precision[], errors text[], keep double precision, tidy boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.settle_one(topic text, id uuid, token bytea, outcome text, delay double precision, error text, keep double precision, once boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.settle_single(topic text, id uuid, token bytea, outcome text, moment timestamp with time zone, keep double precision, tidy boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.split_run(topic text, tid tid, slot integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.stats(topic text, OUT at timestamp with time zone, OUT ready bigint, OUT delayed bigint, OUT leased bigint, OUT settled bigint, OUT dead bigint, OUT oldest_ready_at timestamp with time zone, OUT paused boolean, OUT upkept_at timestamp with time zone, OUT upkeep_seconds double precision, OUT upkeep_rows bigint) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.take_figures(topics text[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.take_runs(topic text, start timestamp with time zone, moment timestamp with time zone, max integer, bytes bigint, OUT ids uuid[], OUT fences bigint[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.take_waiting(topic text, id uuid, OUT pushed_at timestamp with time zone, OUT place integer, OUT fence integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.tell(topic text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.tidy_lease(topic text, key bytea, used integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.tidy_leases(topic text, tokens bytea[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.topic_names(after text, max bigint) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.topic_settings(topic text, OUT paused boolean, OUT lease double precision, OUT max_attempts integer, OUT backoff_first double precision, OUT backoff_most double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.upkeep(topic text, max integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.upkeep_due(max integer, after text) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.wait_for(topic text, waiter uuid, within double precision, OUT ready boolean, OUT due_in double precision, OUT noted boolean) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.wait_for_any(topics text[], waiter uuid, within double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.wait_for_duplicate() FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.wait_for_runs(topic text, start timestamp with time zone, moment timestamp with time zone, max integer, bytes bigint, OUT ids uuid[], OUT fences bigint[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION pushpop.weigh(payload bytea, headers jsonb, failures jsonb) FROM PUBLIC;
