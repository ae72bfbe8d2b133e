//! Deliberate faults: a checker that finds none of them is worth nothing.

use pushpop_pg::BoxError;
use pushpop_pg::postgres::Client;

/// A fault, and where it is.
pub(crate) struct Broken {
    pub(crate) name: &'static str,
    /// The functions that are changed: name, what is there, what stands there instead. None: the clients do it.
    patches: &'static [(&'static str, &'static str, &'static str)],
}

/// As it is in the server, where the name of the schema is quoted.
const SETTLED: &str = "\"pushpop\".delivery(m.pushed_at, m.fence) = delivery";

pub(crate) const ALL: [Broken; 25] = [
    // Clients.
    client("settle-before-work"),
    client("new-id-on-retry"),
    client("trusting-producer"),
    client("delete-the-row"),
    client("effect-apart"),
    client("no-listen-again"),
    client("no-second-look"),
    client("gives-up"),
    // The standby: nobody waits for it.
    client("not-synchronous"),
    // Each reclaims by its own clock, and some of these are ahead.
    Broken {
        name: "client-clock",
        patches: &[(
            "reclaim",
            "l.lease_until <= moment",
            "l.lease_until <= moment + interval '10 seconds' * (pg_backend_pid() % 2)",
        )],
    },
    // The functions.
    Broken {
        name: "unfenced-settle",
        patches: &[
            ("settle_single", SETTLED, "true"),
            ("settle_single", "and m.state in ('p', 'd', 'r', 'f', 'e')", ""),
            (
                "prove",
                "return case when int8send(delivery) = substring(token from 19) then delivery end;",
                "return 1;",
            ),
            (
                "settle_done",
                "and int8send(\"pushpop\".delivery(m.pushed_at, m.fence)) = substring(u.token from 19)",
                "",
            ),
        ],
    },
    Broken {
        name: "lease-not-written",
        patches: &[(
            "pop",
            "values (pop.topic, token, until, 1, taken.ids, taken.fences);",
            "select pop.topic, token, until, 1, taken.ids, taken.fences where random() < 0.5;",
        )],
    },
    Broken {
        name: "reclaims-early",
        patches: &[(
            "reclaim",
            "l.lease_until <= moment",
            "l.lease_until <= moment + interval '1500 milliseconds'",
        )],
    },
    // What was pushed after the clock went back lay below the mark until the clock was there again.
    Broken {
        name: "marks-stay",
        patches: &[
            ("note_look", "greatest(known.sure_to, known.checking_at) > moment", "false"),
            ("enqueue", "(ready_at < low) is not true", "true"),
            (
                "begin_sweep",
                "set swept_at = moment, low = '-infinity', looked_at = '-infinity'",
                "set swept_at = moment",
            ),
            ("upkeep", "set low = '-infinity', deleted_to", "set deleted_to"),
        ],
    },
    // It was so in the code once: a second release to the same place relies on the late entry of the first, which the
    // next look deletes, and is hidden once it is committed.
    Broken {
        name: "shared-entry",
        patches: &[
            ("enqueue", "behind (topic, ready_at)", "behind (topic, ready_at, entry)"),
            (
                "enqueue",
                "values (enqueue.topic, enqueue.ready_at);",
                "values (enqueue.topic, enqueue.ready_at, '00000000-0000-0000-0000-000000000000') on conflict do nothing;",
            ),
        ],
    },
    // The watermark passes what is not committed yet.
    Broken {
        name: "no-horizon",
        patches: &[("note_look", "low = least(alive, known.sure_to)", "low = coalesce(alive, moment)")],
    },
    Broken { name: "never-reclaims", patches: &[("reclaim", "l.lease_until <= moment", "false")] },
    Broken {
        name: "run-dropped",
        patches: &[(
            "push",
            "weigh(push.payload, push.headers, null));",
            "weigh(push.payload, push.headers, null)) where random() < 0.5;",
        )],
    },
    Broken {
        name: "never-notes",
        patches: &[
            ("wait_for_any", "set wanted_until = greatest(", "set wanted_until = least('-infinity', "),
            (
                "wait_for_any",
                "(t.wanted_until >= again and (t.wanted_by is null or t.wanted_by = waiter)) is true as noted",
                "true as noted",
            ),
        ],
    },
    Broken {
        name: "newest-first",
        patches: &[(
            "take_runs",
            "order by q.ready_at, q.pushed_at, q.place, q.id",
            "order by q.ready_at desc, q.pushed_at desc, q.place desc, q.id desc",
        )],
    },
    Broken {
        name: "same-token",
        patches: &[(
            "pop",
            "token := uuid_send(gen_random_uuid());",
            "token := decode(md5(taken.ids[1]::text), 'hex');",
        )],
    },
    Broken {
        name: "other-payload",
        patches: &[(
            "pop",
            "select m.id, m.payload, m.headers, token",
            "select m.id, m.payload || '\\x00'::bytea, m.headers, token",
        )],
    },
    Broken {
        name: "duplicate-under-another-id",
        patches: &[(
            "push",
            "duplicate := not found;",
            "if not found then
               pushed := pushpop.new_id();
               insert into pushpop.messages (topic, id, payload, place, pushed_at, ready_at)
               values (push.topic, pushed, push.payload, 1, stamped, due);
             end if;
             duplicate := false;",
        )],
    },
    Broken {
        name: "settle-only-said",
        patches: &[
            ("settle_single", SETTLED, "false"),
            ("settle_many", "if coalesce(cardinality(settled), 0) < wanted then", "if false then"),
        ],
    },
    Broken {
        name: "forgets-the-first",
        patches: &[
            ("finish", "m.ctid = any (target)", "m.ctid = any (target[2:])"),
            ("settle_done", "done < cardinality(target)", "false"),
            ("settle_many", "if coalesce(cardinality(settled), 0) < wanted then", "if false then"),
        ],
    },
];

const fn client(name: &'static str) -> Broken {
    Broken { name, patches: &[] }
}

/// Breaks the functions of the schema, if it is they that are to be broken.
pub(crate) fn apply(name: &str, client: &mut Client) -> Result<(), BoxError> {
    let broken = ALL.iter().find(|broken| broken.name == name);
    let broken = broken.ok_or_else(|| format!("there is no fault {name}"))?;
    for (function, from, to) in broken.patches {
        let sql = "select pg_get_functiondef(p.oid) from pg_proc p
                   where p.pronamespace = 'pushpop'::regnamespace and p.proname = $1 and strpos(p.prosrc, $2) > 0";
        let Some(row) = client.query_opt(sql, &[function, from])? else {
            return Err(format!("{function} has changed: there is no {from:?}").into());
        };
        client.batch_execute(&row.get::<_, String>(0).replace(from, to))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use pushpop_pg::Queue;
    use pushpop_pg::postgres::NoTls;
    use pushpop_server::Server;

    use super::*;

    /// The variants themselves run for minutes, and seldom; that they fit the functions as they are is seen here.
    #[test]
    fn every_patch_fits_its_function() {
        let server = Server::start().unwrap();
        drop(Queue::connect(&server.url()).unwrap());
        let mut client = Client::connect(&server.url(), NoTls).unwrap();
        let mut unfit = Vec::new();
        for broken in &ALL {
            client.batch_execute("begin").unwrap();
            unfit.extend(apply(broken.name, &mut client).err().map(|e| format!("{}: {e}", broken.name)));
            client.batch_execute("rollback").unwrap();
        }
        assert!(unfit.is_empty(), "{unfit:#?}");
    }
}
