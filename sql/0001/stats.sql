-- Figures of a topic, and the list of topics.

-- Figures of one topic, those before paused not older than two seconds. Their cost grows with the number of runs and
-- leases, which stand for many messages each; what takes more than 10 ms is kept for others who ask.
create function pushpop.stats(
  topic text,
  out at              timestamptz,
  out ready           bigint,
  out delayed         bigint,
  out leased          bigint,
  out settled         bigint,      -- completed or discarded, and still stored
  out dead            bigint,
  out oldest_ready_at timestamptz,
  out paused          boolean,
  out upkept_at       timestamptz,      -- when upkeep was done last
  out upkeep_seconds  double precision, -- its cost so far: time
  out upkeep_rows     bigint            -- and messages that it has deleted or reclaimed
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_material = off
set random_page_cost = 0
set cpu_tuple_cost = 0
set cpu_operator_cost = 0
set cpu_index_tuple_cost = 1
as $body$
#variable_conflict use_column
declare
  exact   constant bigint := 10000;
  start   timestamptz := pushpop.bottom(topic);
  expired bigint := 0;
  doomed  bigint := 0;
  oldest  timestamptz;
  recent  record;
begin
  perform pushpop.check_topic(stats.topic);
  at := clock_timestamp();
  select t.paused, t.upkept_at, extract(epoch from t.upkeep_time), t.upkeep_rows
  into paused, upkept_at, upkeep_seconds, upkeep_rows
  from pushpop.topics t where t.topic = stats.topic;
  if not found then
    paused := false;
    upkeep_seconds := 0;
    upkeep_rows := 0;
  end if;

  select f.at, f.ready, f.delayed, f.leased, f.settled, f.dead, f.oldest_ready_at into recent
  from pushpop.figures f where f.topic = stats.topic;
  if recent.at between at - interval '2 seconds' and at then
    at := recent.at;
    ready := recent.ready;
    delayed := recent.delayed;
    leased := recent.leased;
    settled := recent.settled;
    dead := recent.dead;
    oldest_ready_at := recent.oldest_ready_at;
    return;
  end if;

  select coalesce(sum(q.n) filter (where q.ready_at <= at), 0), coalesce(sum(q.n) filter (where q.ready_at > at), 0),
         min(q.ready_at) filter (where q.ready_at <= at)
  into ready, delayed, oldest_ready_at
  from pushpop.runs q where q.topic = stats.topic and q.ready_at >= start;

  -- Leases may hold messages that were settled in their holder's transaction. While there are not
  -- too many, look at each.
  select coalesce(sum(cardinality(l.ids)), 0), coalesce(sum(l.open) filter (where l.lease_until > at), 0)
  into expired, leased
  from pushpop.leases l where l.topic = stats.topic;
  if expired <= exact then
    select count(distinct m.id) filter (where l.lease_until > at),
           count(distinct m.id) filter (where l.lease_until <= at and not m.doomed),
           count(distinct m.id) filter (where l.lease_until <= at and m.doomed),
           min(m.ready_at) filter (where l.lease_until <= at and not m.doomed)
    into leased, expired, doomed, oldest
    from (
      select u.id, u.fence, max(l.lease_until) as lease_until
      from (select l.ids, l.fences, l.lease_until from pushpop.leases l where l.topic = stats.topic offset 0) l
      cross join lateral unnest(l.ids, l.fences) u(id, fence)
      group by u.id, u.fence
    ) l
    cross join lateral (
      select m.id, m.ready_at, coalesce(m.attempt >= m.max_attempts - 1, false) as doomed from pushpop.messages m
      where m.topic = stats.topic and m.id = l.id and pushpop.delivery(m.pushed_at, m.fence) = l.fence
        and m.state in ('p', 'd', 'r', 'f', 'e') offset 0
    ) m;
    ready := ready + expired;
    oldest_ready_at := least(oldest_ready_at, oldest);
  end if;

  select coalesce(sum(h.n), 0) into settled from pushpop.history h where h.topic = stats.topic;
  select count(*) + doomed into dead from pushpop.dead d where d.topic = stats.topic;

  if clock_timestamp() > at + interval '10 milliseconds' and current_setting('transaction_read_only') = 'off' then
    if recent.at is null then
      insert into pushpop.figures (topic, at, ready, delayed, leased, settled, dead, oldest_ready_at)
      values (stats.topic, at, ready, delayed, leased, settled, dead, oldest_ready_at)
      on conflict do nothing;
    else
      update pushpop.figures f
      set at = stats.at, ready = stats.ready, delayed = stats.delayed, leased = stats.leased, settled = stats.settled,
          dead = stats.dead, oldest_ready_at = stats.oldest_ready_at
      where f.topic = (select g.topic from pushpop.figures g where g.topic = stats.topic for update skip locked);
    end if;
  end if;
end
$body$;

-- The topics in which a message is stored, or that have settings, in the order of their names.
create function pushpop.topic_names() returns setof text
language sql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $body$
  with recursive names as (
    (select m.topic from pushpop.messages m order by m.topic limit 1)
    union all
    select (select m.topic from pushpop.messages m where m.topic > n.topic order by m.topic limit 1)
    from names n where n.topic is not null
  )
  select n.topic from names n where n.topic is not null
  union
  select t.topic from pushpop.topics t
  where paused or lease is not null or max_attempts is not null or backoff_first is not null or backoff_most is not null
  order by 1
$body$;
