-- Figures of topics, and the list of topics.

-- Figures of one topic, those before paused not older than two seconds. Their cost grows with the number of runs and
-- leases, which stand for many messages each.
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
set plan_cache_mode = force_generic_plan
as $body$
begin
  perform pushpop.check_topic(stats.topic);
  select f.at, f.ready, f.delayed, f.leased, f.settled, f.dead, f.oldest_ready_at, f.paused,
         f.upkept_at, f.upkeep_seconds, f.upkeep_rows
  into at, ready, delayed, leased, settled, dead, oldest_ready_at, paused, upkept_at, upkeep_seconds, upkeep_rows
  from pushpop.take_figures(array[stats.topic]) f;
end
$body$;

-- The same of all topics in which a message is stored, or that have settings, in the order of their names.
--
-- after    only topics whose names come after this one
-- seconds  stops after about so many, with one topic at least; null: does not stop. With the last topic that was
--          shown as `after`, the answer goes on behind it; there is no more when it is empty.
create function pushpop.all_stats(after text default '', seconds double precision default null)
returns table (
  topic           text,
  at              timestamptz,
  ready           bigint,
  delayed         bigint,
  leased          bigint,
  settled         bigint,
  dead            bigint,
  oldest_ready_at timestamptz,
  paused          boolean,
  upkept_at       timestamptz,
  upkeep_seconds  double precision,
  upkeep_rows     bigint
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
set plan_cache_mode = force_generic_plan
as $body$
declare
  begun constant timestamptz := clock_timestamp();
  since timestamptz;
  last  text := coalesce(all_stats.after, '');
  names text[];
  many  integer := 1;
begin
  loop
    since := clock_timestamp();
    names := array(select pushpop.topic_names(last, many));
    exit when cardinality(names) = 0;
    return query select f.* from pushpop.take_figures(names) f;
    last := names[cardinality(names)];
    exit when clock_timestamp() > begun + seconds * interval '1 second';
    -- Few at a time where they take long, so that it stops when it should.
    many := case when clock_timestamp() > since + interval '20 milliseconds' then 1 else least(many * 2, 100) end;
  end loop;
end
$body$;

-- Takes the figures of some topics, or those that somebody has just taken: what took long is kept for others who ask
-- within two seconds.
create function pushpop.take_figures(topics text[]) returns table (
  topic           text,
  at              timestamptz,
  ready           bigint,
  delayed         bigint,
  leased          bigint,
  settled         bigint,
  dead            bigint,
  oldest_ready_at timestamptz,
  paused          boolean,
  upkept_at       timestamptz,
  upkeep_seconds  double precision,
  upkeep_rows     bigint
)
language plpgsql
as $body$
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
      select f.* from pushpop.figures f
      where f.topic = n.topic and f.at between now - interval '2 seconds' and now offset 0
    ) f on true
    left join lateral (select t.* from pushpop.topics t where t.topic = n.topic offset 0) t on true
    cross join lateral pushpop.bottoms(n.topic) s
    cross join lateral (
      select count(*) as read, coalesce(sum(q.n) filter (where q.ready_at <= now), 0) as ready,
             coalesce(sum(q.n) filter (where q.ready_at > now), 0) as delayed,
             min(q.ready_at) filter (where q.ready_at <= now) as oldest
      from pushpop.runs q where q.topic = n.topic and f.at is null and q.ready_at >= s.start
    ) q
    cross join lateral (
      select coalesce(sum(cardinality(l.ids)), 0) as n,
             coalesce(sum(l.open) filter (where l.lease_until > now), 0) as leased
      from pushpop.leases l where l.topic = n.topic and f.at is null
    ) held
    left join lateral (
      select count(distinct m.id) filter (where l.lease_until > now) as leased,
             count(distinct m.id) filter (where l.lease_until <= now and not m.doomed) as expired,
             count(distinct m.id) filter (where l.lease_until <= now and m.doomed) as doomed,
             min(m.ready_at) filter (where l.lease_until <= now and not m.doomed) as oldest
      from (
        select u.id, u.fence, max(l.lease_until) as lease_until
        from (
          select l.ids, l.fences, l.lease_until from pushpop.leases l
          where l.topic = n.topic and held.n between 1 and exact offset 0
        ) l
        cross join lateral unnest(l.ids, l.fences) u(id, fence)
        group by u.id, u.fence
      ) l
      cross join lateral (
        select m.id, m.ready_at, coalesce(m.attempt >= m.max_attempts - 1, false) as doomed from pushpop.messages m
        where m.topic = n.topic and m.id = l.id and pushpop.delivery(m.pushed_at, m.fence) = l.fence
          and m.state in ('p', 'd', 'r', 'f', 'e') offset 0
      ) m
      having held.n between 1 and exact
    ) x on true
    cross join lateral (
      select count(*) as read, coalesce(sum(h.n), 0) as settled
      from pushpop.history h where h.topic = n.topic and f.at is null
    ) h
    cross join lateral (
      select count(*) as dead from pushpop.dead d where d.topic = n.topic and f.at is null
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
      update pushpop.figures f
      set at = taken.at, ready = taken.ready, delayed = taken.delayed, leased = taken.leased, settled = taken.settled,
          dead = taken.dead, oldest_ready_at = taken.oldest_ready_at
      where f.topic = (select g.topic from pushpop.figures g where g.topic = taken.topic for update skip locked);
      if not found then
        insert into pushpop.figures (topic, at, ready, delayed, leased, settled, dead, oldest_ready_at)
        values (taken.topic, taken.at, taken.ready, taken.delayed, taken.leased, taken.settled, taken.dead,
                taken.oldest_ready_at)
        on conflict do nothing;
      end if;
    end if;
  end loop;
end
$body$;

-- The topics in which a message is stored, or that have settings, in the order of their names: all of them, or up to
-- max that come after a name.
create function pushpop.topic_names(after text default '', max bigint default null) returns setof text
language sql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $body$
  with recursive names as (
    select coalesce(after, '') collate "C" as topic
    union all
    select least(
      (select m.topic from pushpop.messages m where m.topic > n.topic order by m.topic limit 1),
      (select t.topic from pushpop.topics t
       where t.topic > n.topic
         and (paused or lease is not null or max_attempts is not null or backoff_first is not null
              or backoff_most is not null)
       order by t.topic limit 1))
    from names n where n.topic is not null
  )
  select n.topic from names n where n.topic is not null offset 1 limit max
$body$;
