-- What an operator looks at again and again: select * from pushpop.overview \watch
--
-- A role needs the right to select from them; for the overview, also to execute what it calls.

-- A row for each topic.
create view pushpop.overview as
  select s.topic, s.ready, s.delayed, s.leased, s.dead, s.settled,
         case when isfinite(s.oldest_ready_at) then date_trunc('second', s.at - s.oldest_ready_at) end as oldest_ready_age,
         s.paused, s.upkept_at
  from pushpop.all_stats() s;

-- Messages that somebody holds, those first whose lease ends soonest.
-- The number of the delivery is written out: a reader of the view may have no right to the function.
create view pushpop.in_flight as
  select l.topic, l.id, l.lease_until, case when isfinite(l.lease_until) then date_trunc('second', l.lease_until - statement_timestamp()) end as time_left, m.attempt
  from (
    select l.topic, u.id, u.fence, max(l.lease_until) as lease_until
    from pushpop.leases l cross join lateral unnest(l.ids, l.fences) u(id, fence)
    where l.lease_until > statement_timestamp()
    group by l.topic, u.id, u.fence
  ) l
  cross join lateral (
    select least(m.attempt, 2147483646) + 1 as attempt from pushpop.messages m
    where m.topic = l.topic and m.id = l.id and case when isfinite(m.pushed_at) then (date_part('epoch', m.pushed_at) * 1000000)::bigint end + m.fence + 1 = l.fence
      and m.state in ('p', 'd', 'r', 'f', 'e') offset 0
  ) m
  order by l.lease_until, l.topic, l.id;

-- Messages that are out of attempts, newest first.
create view pushpop.dead_messages as
  select d.topic, d.id, d.died_at, m.attempt, left(m.failures -> -1 ->> 'error', 200) as error
  from pushpop.dead d
  cross join lateral (
    select m.attempt, m.failures from pushpop.messages m where m.topic = d.topic and m.id = d.id offset 0
  ) m
  order by d.died_at desc, d.topic, d.id;
