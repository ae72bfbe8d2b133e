-- Figures of a topic, and the list of topics.

-- Figures of one topic, as of now: their cost does not grow with the number that waits.
create function pushpop.stats(
  topic text,
  out at         timestamptz,
  out ready      bigint,
  out delayed    bigint,
  out leased     bigint,
  out settled    bigint,      -- completed or discarded, and still stored
  out dead       bigint,
  out oldest_ready_at timestamptz
)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
set enable_sort = off
as $body$
#variable_conflict use_column
declare
  most    constant bigint := 10000;
  moment  timestamptz := clock_timestamp();
  bottom  record;
  live    bigint;
  expired bigint;
  exhausted bigint;
begin
  perform pushpop.check_topic(stats.topic);
  at := moment;
  bottom := pushpop.bottom(stats.topic);

  select coalesce(sum(c.live), 0), coalesce(sum(c.leased), 0), coalesce(sum(c.settled), 0), coalesce(sum(c.dead), 0)
  into live, leased, settled, dead
  from (
    select b.live, b.leased, b.settled, b.dead from pushpop.counts b
    where b.topic = stats.topic and b.at = '-infinity'
    union all
    select c.live, c.leased, c.settled, c.dead from pushpop.counts c
    where c.topic = stats.topic and c.at > '-infinity'
      and c.at >= coalesce((select t.counted_to from pushpop.topics t where t.topic = stats.topic), '-infinity')
  ) c;

  -- The leased ones stand near the bottom; knowing their number, the scan ends with the last.
  select count(*) filter (where l.lease_until <= moment),
         count(*) filter (where l.lease_until <= moment and l.attempt >= l.max_attempts)
  into expired, exhausted
  from (
    select m.lease_until, m.attempt, m.max_attempts from pushpop.messages m
    where m.topic = stats.topic and m.done_at is null and m.state = 'l'
      and (m.ready_at, m.pushed_at) >= (bottom.ready_at, bottom.pushed_at)
    order by m.ready_at, m.pushed_at
    limit leased
  ) l;
  leased := leased - expired;
  live := live - exhausted;
  dead := dead + exhausted;

  -- Usually few are ready or few are delayed: count those, and know the others.
  select count(*) into ready from (
    select from pushpop.messages m
    where m.topic = stats.topic and m.done_at is null
      and (m.ready_at, m.pushed_at) >= (bottom.ready_at, bottom.pushed_at) and m.ready_at <= moment
      and (m.lease_until is null or m.lease_until <= moment and not coalesce(m.attempt >= m.max_attempts, false))
    order by m.ready_at, m.pushed_at
    limit most
  ) r;
  if ready < most then
    delayed := live - leased - ready;
  else
    select count(*) into delayed from pushpop.messages m
    where m.topic = stats.topic and m.done_at is null and m.ready_at > moment;
    ready := live - leased - delayed;
  end if;

  select m.ready_at into oldest_ready_at from pushpop.messages m
  where m.topic = stats.topic and m.done_at is null
    and (m.ready_at, m.pushed_at) >= (bottom.ready_at, bottom.pushed_at) and m.ready_at <= moment
    and (m.lease_until is null or m.lease_until <= moment and not coalesce(m.attempt >= m.max_attempts, false))
  order by m.ready_at, m.pushed_at
  limit 1;
end
$body$;

-- The topics in which a message is stored.
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
$body$;
