//! What must be true of the tables between any two transactions. The audits of `it/` and those of the campaigns ask it in
//! one snapshot, while clients are at work.

/// A rule by what breaks it: the query finds the ids of the messages in question, or nothing. They are asked all the time,
/// so each joins its tables as a whole, by hash: arrays are unnested without a join.
pub(crate) const RULES: [(&str, &str); 10] = [
    (
        "a live message that is in no run and in no lease of its present delivery",
        "select m.id from pushpop.messages m where m.state in ('p', 'd', 'r', 'f', 'e')
         and not exists (
           select from (select q.topic, unnest(q.ids) as id from pushpop.runs q) q where q.topic = m.topic and q.id = m.id)
         and not exists (
           select from (select l.topic, unnest(l.ids) as id, unnest(l.fences) as fence from pushpop.leases l) l
           where l.topic = m.topic and l.id = m.id and l.fence = pushpop.delivery(m.pushed_at, m.fence))",
    ),
    (
        "a message that is in a run and in a lease of its present delivery",
        "select m.id from pushpop.messages m
         join (select q.topic, unnest(q.ids) as id from pushpop.runs q) q on q.topic = m.topic and q.id = m.id
         join (select l.topic, unnest(l.ids) as id, unnest(l.fences) as fence from pushpop.leases l) l
           on l.topic = m.topic and l.id = m.id
         where l.fence = pushpop.delivery(m.pushed_at, m.fence)",
    ),
    (
        "a message that is in two runs",
        "select q.id from (select q.topic, unnest(q.ids) as id from pushpop.runs q) q group by q.topic, q.id having count(*) > 1",
    ),
    (
        "a run that is not what it says",
        "select q.id from pushpop.runs q
         where q.n not between 1 and 25 or q.n <> cardinality(q.ids) or q.id <> q.ids[1]",
    ),
    (
        "a message in a run that does not wait, or not there",
        "select q.id from (
           select q.topic, q.ready_at, q.pushed_at, q.fence, unnest(q.ids) as id,
                  generate_series(q.place, q.place + cardinality(q.ids) - 1) as place
           from pushpop.runs q) q
         left join pushpop.messages m on m.topic = q.topic and m.id = q.id
         where (m.state in ('p', 'd', 'r', 'f', 'e') and m.ready_at = q.ready_at and m.pushed_at = q.pushed_at
                and m.place = q.place and m.fence = q.fence) is not true",
    ),
    (
        "a run that a pop would not find: it is before the low watermark, and no late entry says so",
        "select q.id from pushpop.runs q join pushpop.topics t on t.topic = q.topic
         left join (select b.topic, min(b.ready_at) as first from pushpop.behind b group by b.topic) b on b.topic = q.topic
         where q.ready_at < t.low and (b.first <= q.ready_at) is not true",
    ),
    (
        "a lease that nobody would reclaim: it ends before the mark of those that were",
        "select m.id from (
           select l.topic, l.key, l.lease_until, unnest(l.ids) as id, unnest(l.fences) as fence,
                  generate_series(1, cardinality(l.ids)) as slot
           from pushpop.leases l) l
         join pushpop.topics t on t.topic = l.topic
         join pushpop.messages m on m.topic = l.topic and m.id = l.id and pushpop.delivery(m.pushed_at, m.fence) = l.fence
         where l.lease_until < t.reclaimed_to and m.state in ('p', 'd', 'r', 'f', 'e')
           and (octet_length(l.key) > 16 or not exists (
             select from pushpop.leases x
             where x.topic = l.topic and x.key = l.key || int2send(l.slot::int2) || int8send(l.fence)))",
    ),
    (
        "a lease with more open messages than it counts",
        "select min(m.id::text)::uuid from (
           select l.topic, l.key, l.open, unnest(l.ids) as id, unnest(l.fences) as fence
           from pushpop.leases l where octet_length(l.key) = 16) l
         join pushpop.messages m on m.topic = l.topic and m.id = l.id and pushpop.delivery(m.pushed_at, m.fence) = l.fence
         where m.state in ('p', 'd', 'r', 'f', 'e')
         group by l.topic, l.key, l.open having count(*) > l.open",
    ),
    (
        "a dead message that is not listed as dead, or one that is listed and not dead",
        "select coalesce(m.id, d.id) from (select m.topic, m.done_at, m.id from pushpop.messages m where m.state in ('z', 'y')) m
         full join pushpop.dead d on d.topic = m.topic and d.died_at = m.done_at and d.id = m.id
         where m.id is null or d.id is null",
    ),
    (
        "a settled message that the history does not list by the time at which it is to be deleted",
        "select m.id from pushpop.messages m where m.state in ('c', 'x', 'k') and not exists (
           select from (select h.topic, h.delete_at, unnest(h.ids) as id from pushpop.history h) h
           where h.topic = m.topic and h.delete_at = m.delete_at and h.id = m.id)",
    ),
];
