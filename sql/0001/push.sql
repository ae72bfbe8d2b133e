-- Putting messages in: one at a time, or many in one statement.

-- A UUID of version 7: random, and in the order of its making.
create function pushpop.new_id() returns uuid
language sql volatile parallel safe
set search_path = pg_catalog, pg_temp
as $body$
  select encode(
    set_bit(set_bit(
      overlay(uuid_send(gen_random_uuid())
        placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
        from 1 for 6),
      52, 1), 53, 1),
    'hex')::uuid
$body$;

-- Refuses bad input, before anything is written.
create function pushpop.refuse(what text) returns void
language plpgsql immutable
as $body$
begin
  raise exception '%', what using errcode = 'invalid_parameter_value';
end
$body$;

create function pushpop.check_topic(topic text) returns void
language plpgsql immutable
as $body$
begin
  if check_topic.topic is null or octet_length(check_topic.topic) not between 1 and 255 then
    perform pushpop.refuse(format('a topic has 1 to 255 bytes, not %s',
                                  coalesce(octet_length(check_topic.topic)::text, 'null')));
  end if;
end
$body$;

-- Topics that are asked together.
create function pushpop.check_topics(topics text[]) returns void
language plpgsql immutable
as $body$
begin
  if cardinality(topics) is null or cardinality(topics) not between 1 and 10000 then
    perform pushpop.refuse(format('1 to 10000 topics are asked together, not %s', coalesce(cardinality(topics), 0)));
  end if;
  perform pushpop.check_topic(u.topic) from unnest(topics) u(topic)
  where (octet_length(u.topic) between 1 and 255) is not true;
end
$body$;

-- Payloads may have 16 MiB, or what the setting pushpop_pg.max_payload says, up to 256 MiB.
create function pushpop.check_payload(payload bytea) returns void
language plpgsql stable
as $body$
declare
  most bigint;
begin
  if check_payload.payload is null then
    perform pushpop.refuse('a payload is not null; it may be empty');
  elsif octet_length(check_payload.payload) > 16777216 then
    most := least(coalesce(nullif(current_setting('pushpop_pg.max_payload', true), '')::bigint, 16777216), 268435456);
    if octet_length(check_payload.payload) > most then
      perform pushpop.refuse(format('a payload has at most %s bytes, not %s', most, octet_length(check_payload.payload)));
    end if;
  end if;
end
$body$;

create function pushpop.check_headers(headers jsonb) returns void
language plpgsql immutable
as $body$
declare
  entries bigint;
  bytes   bigint;
begin
  if jsonb_typeof(check_headers.headers) <> 'object'
     or exists (select from jsonb_each(check_headers.headers) h where jsonb_typeof(h.value) <> 'string') then
    perform pushpop.refuse('headers are an object of text to text');
  end if;
  select count(*), sum(octet_length(h.key) + octet_length(h.value)) into entries, bytes
  from jsonb_each_text(check_headers.headers) h;
  if entries > 64 then
    perform pushpop.refuse(format('a message has at most 64 headers, not %s', entries));
  elsif bytes > 16384 then
    perform pushpop.refuse(format('the headers of a message have at most 16384 bytes, not %s', bytes));
  end if;
end
$body$;

create function pushpop.check_attempts(attempts integer) returns void
language plpgsql immutable
as $body$
begin
  if attempts not between 0 and 32767 then
    perform pushpop.refuse(format('a message has 1 to 32767 attempts, or 0 for no limit, not %s', attempts));
  end if;
end
$body$;

-- What the optional arguments of a push must be; nulls stand for the defaults.
create function pushpop.check_push(delay double precision, ready_at timestamptz, headers jsonb, max_attempts integer)
returns void
language plpgsql immutable
as $body$
begin
  if not (delay >= 0 and delay <= 250000000000) then
    perform pushpop.refuse(format('a delay has 0 to 250000000000 seconds, not %s', delay));
  elsif not (ready_at >= '0002-01-01 00:00:00+00' and ready_at < '9999-01-01 00:00:00+00') then
    perform pushpop.refuse(format('a message is ready between the years 2 and 9998, not at %s', ready_at));
  elsif delay is not null and ready_at is not null then
    perform pushpop.refuse('a message has a delay or a time, not both');
  end if;
  perform pushpop.check_attempts(max_attempts);
  if headers is not null then
    perform pushpop.check_headers(headers);
  end if;
end
$body$;

-- The clock is read under a lock that marks this transaction as one whose stamp may not be visible
-- yet: see sure_to in pushpop.topics. It is the lock that the insert takes anyway.

-- Pushes a message and returns its id, and whether one with this id was still stored in the
-- topic, which then stays as it is.
--
-- id            drawn here when null
-- delay         seconds until it is ready; null: at once
-- ready_at      the time at which it is ready, instead of a delay
-- headers       an object of text to text
-- max_attempts  1 to 32767; 0: without end; null: what the topic says, else fallback
-- sender        who pushes: wakes waiting consumers of all clients but this one, if there are
--               any. null: notifies always, as one must in a longer transaction.
-- fallback      max_attempts where neither the message nor the topic says
create function pushpop.push(
  topic        text,
  payload      bytea,
  id           uuid             default null,
  delay        double precision default null,
  ready_at     timestamptz      default null,
  headers      jsonb            default null,
  max_attempts integer          default null,
  sender       uuid             default null,
  fallback     integer          default 25,
  out pushed    uuid,
  out duplicate boolean
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
as $body$
#variable_conflict use_column
declare
  stamped timestamptz;
  due     timestamptz;
  known   record;
begin
  if (octet_length(push.topic) between 1 and 255 and octet_length(push.payload) <= 16777216) is not true then
    perform pushpop.check_topic(push.topic), pushpop.check_payload(push.payload);
  end if;
  if delay is not null or ready_at is not null or headers is not null or max_attempts is not null or fallback is distinct from 25 then
    perform pushpop.check_push(delay, ready_at, headers, max_attempts), pushpop.check_attempts(fallback);
  end if;
  pushed := coalesce(push.id, pushpop.new_id());
  select t.wanted_until, t.wanted_by, t.max_attempts, t.low into known from pushpop.topics t where t.topic = push.topic;

  lock table pushpop.messages in row exclusive mode;
  stamped := clock_timestamp();
  due := coalesce(push.ready_at, stamped + coalesce(push.delay, 0) * interval '1 second');
  insert into pushpop.messages (topic, id, payload, headers, max_attempts, place, pushed_at, ready_at)
  values (push.topic, pushed, push.payload, push.headers,
          nullif(coalesce(push.max_attempts, known.max_attempts, push.fallback), 0), 1, stamped, due)
  on conflict (topic, id) do nothing;

  duplicate := not found;
  if duplicate then
    perform pushpop.wait_for_duplicate();
  else
    perform pushpop.enqueue(push.topic, stamped, coalesce(known.low, '-infinity'), due, stamped, 1, 0, array[pushed],
                            pushpop.weigh(push.payload, push.headers, null));
    if sender is null or (known.wanted_until > stamped and known.wanted_by is distinct from sender) then
      perform pushpop.tell(push.topic);
    end if;
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
end
$body$;

-- What is acknowledged survives a crash of the server, whatever the role prefers.
create function pushpop.make_durable() returns void
language plpgsql
as $body$
begin
  perform set_config('synchronous_commit', 'on', true);
end
$body$;

-- What was stored before may itself still be on its way to a synchronous standby. Writing
-- something makes this transaction wait for it as well.
create function pushpop.wait_for_duplicate() returns void
language plpgsql
as $body$
begin
  perform pg_logical_emit_message(true, 'pushpop', 'duplicate');
end
$body$;

-- Pushes many messages in the order of the arrays, and returns the places in them of those that
-- changed nothing, because a message with their id was still stored in the topic. The arguments
-- are those of push, an array each; an array or an element that is null stands for the default.
create function pushpop.push_many(
  topic        text,
  ids          uuid[],
  payloads     bytea[],
  delays       double precision[] default null,
  ready_ats    timestamptz[]      default null,
  headers      jsonb[]            default null,
  max_attempts integer[]          default null,
  sender       uuid               default null,
  fallback     integer            default 25
) returns setof integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set plan_cache_mode = force_generic_plan
as $body$
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
  perform pushpop.check_topic(push_many.topic), pushpop.check_attempts(fallback);
  perform pushpop.check_arrays(wanted, array[coalesce(cardinality(payloads), 0), cardinality(delays), cardinality(ready_ats),
                                             cardinality(headers), cardinality(max_attempts)]);
  if array_position(ids, null) is not null then
    perform pushpop.refuse('an id is not null');
  end if;
  if wanted = 1 then
    return query
      select 1 from pushpop.push(push_many.topic, payloads[1], ids[1], delays[1], ready_ats[1], headers[1],
                                 push_many.max_attempts[1], sender, fallback) p
      where p.duplicate;
    return;
  end if;
  select max(coalesce(octet_length(u.payload), 2147483647)) into widest from unnest(payloads) u(payload);
  if widest > 16777216 then
    perform pushpop.check_payload(u.payload) from unnest(payloads) u(payload);
  end if;
  if not simple then
    perform pushpop.check_push(u.delay, u.ready_at, u.headers, u.max_attempts)
    from unnest(delays, ready_ats, headers, max_attempts) u(delay, ready_at, headers, max_attempts);
  end if;

  select t.wanted_until, t.wanted_by, t.max_attempts, t.low into known from pushpop.topics t where t.topic = push_many.topic;
  most := coalesce(known.max_attempts, fallback);
  lock table pushpop.messages in row exclusive mode;
  stamped := clock_timestamp();

  -- In the order of the ids, so that two batches with the same ones cannot deadlock. Looking for
  -- conflicts costs as much as the insert itself, so that is done only if there are any.
  begin
    if simple then
      insert into pushpop.messages (topic, id, payload, max_attempts, place, pushed_at, ready_at)
      select push_many.topic, u.id, u.payload, nullif(most, 0), u.place, stamped, stamped
      from unnest(ids, payloads) with ordinality u(id, payload, place) order by u.id;
    else
      insert into pushpop.messages (topic, id, payload, headers, max_attempts, place, pushed_at, ready_at)
      select push_many.topic, u.id, u.payload, u.headers,
             nullif(coalesce(u.max_attempts, most), 0), u.place, stamped,
             coalesce(u.ready_at, stamped + coalesce(u.delay, 0) * interval '1 second')
      from unnest(ids, payloads, delays, ready_ats, headers, max_attempts)
             with ordinality u(id, payload, delay, ready_at, headers, max_attempts, place) order by u.id;
    end if;
  exception when unique_violation then
    with stored as (
      insert into pushpop.messages (topic, id, payload, headers, max_attempts, place, pushed_at, ready_at)
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
    perform pushpop.enqueue(push_many.topic, stamped, coalesce(known.low, '-infinity'), stamped, stamped, 1, 0, ids);
  else
    -- The places within a run follow one another: what is left of it when it is cut is known by that.
    perform pushpop.enqueue(push_many.topic, stamped, coalesce(known.low, '-infinity'), r.ready_at, stamped, r.place, 0, r.ids, r.bytes)
    from (
      select s.ready_at, min(s.place) as place, array_agg(s.id order by s.place) as ids, max(s.bytes) as bytes
      from (
        select s.id, s.place, s.ready_at, s.bytes,
               s.place - row_number() over (partition by s.ready_at, s.bytes > 0 order by s.place) as island
        from (
          select u.id, u.place::integer, pushpop.weigh(u.payload, u.headers, null) as bytes,
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
      perform pushpop.tell(push_many.topic);
    end if;
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
  if places is not null then
    perform pushpop.wait_for_duplicate();
    return query select p from generate_series(1, wanted) p where p <> all (places);
  end if;
end
$body$;

-- Parallel arrays are of one length, 1 to 10000, or null.
create function pushpop.check_arrays(wanted integer, others integer[]) returns void
language plpgsql immutable
as $body$
begin
  if wanted is null or wanted not between 1 and 10000 then
    perform pushpop.refuse(format('a batch has 1 to 10000 elements, not %s', coalesce(wanted, 0)));
  elsif not (wanted = all (array_remove(others, null))) then
    perform pushpop.refuse('the arrays of a batch have the same length');
  end if;
end
$body$;
