-- A topic and what waits in it, in the hands of an operator: pause and resume, the topic's own
-- defaults, and messages that are cancelled or get another time.

-- Hands out no message of the topic until it is resumed. It still takes pushes, and leases that are
-- held can be settled.
create function pushpop.pause(topic text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
as $body$
#variable_conflict use_column
begin
  perform pushpop.check_topic(pause.topic);
  perform pushpop.lock_topic(pause.topic);
  insert into pushpop.topics as t (topic, paused) values (pause.topic, true)
  on conflict (topic) do update set paused = true;
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
end
$body$;

-- Hands out the messages of a paused topic again, and wakes those that wait for them.
create function pushpop.resume(topic text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
as $body$
#variable_conflict use_column
begin
  perform pushpop.check_topic(resume.topic);
  update pushpop.topics t set paused = false where t.topic = resume.topic and t.paused;
  if found then
    perform pushpop.tell(resume.topic);
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
end
$body$;

-- Sets the defaults of a topic, all of them: null takes one away. They come after what a message
-- or a call says, and before what the client's queue says.
--
-- lease          seconds that a popped message is its consumer's: 1 to 86400
-- max_attempts   1 to 32767; 0: without end
-- backoff_first  seconds until a message that failed is tried again (null: 1), doubled with each attempt
-- backoff_most   up to so many (null: 3600)
create function pushpop.set_topic(
  topic         text,
  lease         double precision,
  max_attempts  integer,
  backoff_first double precision,
  backoff_most  double precision
) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
as $body$
#variable_conflict use_column
declare
  first double precision := coalesce(set_topic.backoff_first, 1);
  most  double precision := coalesce(set_topic.backoff_most, 3600);
begin
  perform pushpop.check_topic(set_topic.topic), pushpop.lease_interval(coalesce(set_topic.lease, 1)),
          pushpop.check_attempts(set_topic.max_attempts);
  if not (first >= 0 and first <= most and most <= 250000000000) then
    perform pushpop.refuse(format('a backoff has 0 to 250000000000 seconds, first no more than most, not %s to %s', first, most));
  end if;
  perform pushpop.lock_topic(set_topic.topic);
  insert into pushpop.topics as t (topic, lease, max_attempts, backoff_first, backoff_most)
  values (set_topic.topic, set_topic.lease * interval '1 second', set_topic.max_attempts,
          set_topic.backoff_first, set_topic.backoff_most)
  on conflict (topic) do update
  set lease = excluded.lease, max_attempts = excluded.max_attempts,
      backoff_first = excluded.backoff_first, backoff_most = excluded.backoff_most;
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
end
$body$;

-- The defaults of a topic, as set_topic takes them, and whether it is paused.
create function pushpop.topic_settings(
  topic text,
  out paused        boolean,
  out lease         double precision,
  out max_attempts  integer,
  out backoff_first double precision,
  out backoff_most  double precision
)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
as $body$
#variable_conflict use_column
begin
  perform pushpop.check_topic(topic_settings.topic);
  select t.paused, extract(epoch from t.lease), t.max_attempts, t.backoff_first, t.backoff_most
  into paused, lease, max_attempts, backoff_first, backoff_most
  from pushpop.topics t where t.topic = topic_settings.topic;
  paused := coalesce(paused, false);
end
$body$;

-- Discards a message that waits, ready or delayed, so that it is not handed out any more; returns
-- whether it did. False if the message is leased, settled, dead, or not stored. Repeating it is true
-- while the message is stored: that is for `keep` seconds.
create function pushpop.cancel(topic text, id uuid, keep double precision default 3600) returns boolean
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
  moment timestamptz;
begin
  perform pushpop.check_topic(cancel.topic), pushpop.check_keep(keep);
  if (pushpop.take_waiting(cancel.topic, cancel.id)).fence is null then
    perform from pushpop.messages m where m.topic = cancel.topic and m.id = cancel.id and m.state = 'k';
    return found;
  end if;
  moment := clock_timestamp();
  if keep > 0 then
    update pushpop.messages m
    set state = 'k', done_at = moment, delete_at = moment + keep * interval '1 second'
    where m.topic = cancel.topic and m.id = cancel.id;
    insert into pushpop.history (topic, delete_at, id, n, ids)
    values (cancel.topic, moment + keep * interval '1 second', cancel.id, 1, array[cancel.id]);
  else
    delete from pushpop.messages m where m.topic = cancel.topic and m.id = cancel.id;
  end if;
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
  return true;
end
$body$;

-- Gives a message that waits another time: so many seconds from now, or a time; both null: now.
-- Returns whether it did. False if the message is leased, settled, dead, or not stored.
create function pushpop.reschedule(
  topic    text,
  id       uuid,
  delay    double precision default null,
  ready_at timestamptz      default null
) returns boolean
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
  message record;
  stamped timestamptz;
  due     timestamptz;
  bytes   integer;
begin
  perform pushpop.check_topic(reschedule.topic), pushpop.check_push(delay, ready_at, null, null);
  message := pushpop.take_waiting(reschedule.topic, reschedule.id);
  if message.fence is null then
    return false;
  end if;
  -- As a push does, with its lock.
  lock table pushpop.messages in row exclusive mode;
  stamped := clock_timestamp();
  due := coalesce(reschedule.ready_at, stamped + coalesce(delay, 0) * interval '1 second');
  update pushpop.messages m set ready_at = due where m.topic = reschedule.topic and m.id = reschedule.id
  returning pushpop.weigh(m.payload, m.headers, m.failures) into bytes;
  perform pushpop.enqueue(reschedule.topic, stamped, null, due, message.pushed_at, message.place, message.fence, array[reschedule.id],
                          bytes);
  perform pushpop.tell(reschedule.topic);
  if current_setting('synchronous_commit') = 'off' then
    perform pushpop.make_durable();
  end if;
  return true;
end
$body$;

-- Takes a message that waits out of its run, which stays locked, so that nobody pops it; the fence is
-- null if it does not wait.
create function pushpop.take_waiting(
  topic text, id uuid, out pushed_at timestamptz, out place integer, out fence integer
)
language plpgsql
as $body$
#variable_conflict use_column
declare
  message record;
  before  record;
  run     record;
begin
  loop
    select m.ready_at, m.pushed_at, m.place, m.fence into message from pushpop.messages m
    where m.topic = take_waiting.topic and m.id = take_waiting.id and m.state in ('p', 'd', 'r', 'f', 'e');
    if not found then
      return;
    end if;
    select q.ctid as tid, q.ids into run from pushpop.runs q
    where q.topic = take_waiting.topic and q.ready_at = message.ready_at and q.pushed_at = message.pushed_at
      and q.place <= message.place and take_waiting.id = any (q.ids)
    order by q.ready_at desc, q.pushed_at desc, q.place desc, q.id desc
    limit 1 for update;
    exit when found;
    -- While this waited for the run another operator may have taken it in two.
    continue when exists (
      select from pushpop.runs q
      where q.topic = take_waiting.topic and q.ready_at = message.ready_at and q.pushed_at = message.pushed_at
        and q.place <= message.place and take_waiting.id = any (q.ids));
    -- It is leased, or was moved meanwhile. A lease may have ended.
    if message is not distinct from before then
      return;
    end if;
    before := message;
    perform pushpop.reclaim(take_waiting.topic, clock_timestamp(), 1000);
  end loop;

  perform pushpop.split_run(take_waiting.topic, run.tid, array_position(run.ids, take_waiting.id));
  pushed_at := message.pushed_at;
  place := message.place;
  fence := message.fence;
end
$body$;
