//! Measures the storage shapes that the queue could have had, each as a prototype in `sql/`.
//!
//! `cargo run --release --manifest-path benches/shapes/Cargo.toml -- [what] [shape,...] [--full]`
//!
//! `what` is `life`, `ready`, `delayed`, `inflight`, `snapshot`, `snapshot1` (one message a
//! statement) or `race`, and all without it. A run that loses or doubles a message ends with an
//! error and prints no figures.

mod queue;

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use pushpop_server::Server;
use queue::{Cost, Queue, Result, Shape};
use uuid::Uuid;

struct Bench {
    url: String,
    shapes: Vec<Shape>,
    full: bool,
}

fn main() -> Result<()> {
    let (full, mut words): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|a| a == "--full");
    words.retain(|a| a != "--bench");
    let what = words.first().map_or("all", String::as_str);
    let shapes = match words.get(1) {
        None => Shape::ALL.to_vec(),
        Some(names) => names.split(',').map(shape).collect::<Result<_>>()?,
    };
    // No checkpoint falls into a run.
    let server =
        Server::with(&[("max_wal_size", "16GB"), ("checkpoint_timeout", "1h"), ("shared_buffers", "1GB")])?;
    let bench = Bench { url: server.url(), shapes, full: !full.is_empty() };
    match what {
        "life" => bench.life(),
        "ready" => bench.ready(),
        "delayed" => bench.delayed(),
        "inflight" => bench.inflight(),
        "snapshot" => bench.snapshot(100, bench.size(1_000_000, 200_000)),
        "snapshot1" => bench.snapshot(1, bench.size(200_000, 20_000)),
        "race" => bench.race(),
        "all" => {
            bench.life()?;
            bench.ready()?;
            bench.delayed()?;
            bench.inflight()?;
            bench.snapshot(100, bench.size(1_000_000, 200_000))?;
            bench.snapshot(1, bench.size(200_000, 20_000))?;
            bench.race()
        }
        _ => {
            Err(format!("{what} is none of life, ready, delayed, inflight, snapshot, snapshot1, race").into())
        }
    }
}

fn shape(name: &str) -> Result<Shape> {
    let shape = Shape::ALL.into_iter().find(|s| s.name() == name);
    shape.ok_or_else(|| format!("{name} is no shape").into())
}

impl Bench {
    /// The shapes that are queues.
    fn queues(&self) -> impl Iterator<Item = Shape> {
        self.shapes.iter().copied().filter(|s| *s != Shape::Floor)
    }

    fn size(&self, full: usize, moderate: usize) -> usize {
        if self.full { full } else { moderate }
    }

    /// Push, pop and settle in turn, in statements of so many messages.
    fn life(&self) -> Result<()> {
        let rounds = self.size(5, 3);
        for (each_push, each_pop, total) in [
            (1, 1, self.size(2_000, 1_000)),
            (32, 32, self.size(32_000, 9_600)),
            (100, 100, self.size(60_000, 20_000)),
            (1_000, 1_000, self.size(100_000, 30_000)),
            (1, 100, self.size(5_000, 2_000)),
        ] {
            for keep in [false, true] {
                println!(
                    "\nPushed by {each_push}, popped and settled by {each_pop}, history {}: \
                     median of {rounds} rounds, for a message",
                    if keep { "kept" } else { "not kept" }
                );
                println!(
                    "| shape | CPU us | push | pop | settle | later deletion | all | time us | WAL bytes |"
                );
                println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|");
                let mut rows = vec![Vec::new(); self.shapes.len()];
                for _ in 0..rounds {
                    for (shape, rows) in self.shapes.iter().zip(&mut rows) {
                        if *shape != Shape::Floor || !keep {
                            rows.push(self.one_life(*shape, each_push, each_pop, total, keep)?);
                        }
                    }
                }
                for (shape, rows) in self.shapes.iter().zip(rows) {
                    if !rows.is_empty() {
                        let r: [f64; 8] =
                            std::array::from_fn(|i| median(rows.iter().map(|r| r[i]).collect()));
                        println!(
                            "| {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.1} | {:.0} |",
                            shape.name(),
                            r[0],
                            r[1],
                            r[2],
                            r[3],
                            r[4],
                            r[5],
                            r[6],
                            r[7]
                        );
                    }
                }
            }
        }
        Ok(())
    }

    fn one_life(
        &self,
        shape: Shape,
        each_push: usize,
        each_pop: usize,
        total: usize,
        keep: bool,
    ) -> Result<[f64; 8]> {
        let mut queue = Queue::create(&self.url, shape)?;
        let pass = |queue: &mut Queue| -> Result<()> {
            for _ in 0..each_pop / each_push {
                queue.push(each_push)?;
            }
            let leases = queue.pop_all(each_pop)?;
            queue.settle(&leases, keep)
        };
        let turns = total / each_pop;
        let warm = (turns / 10).max(3);
        for _ in 0..warm {
            pass(&mut queue)?;
        }
        let wal = queue.wal()?;
        queue.take_costs()?;
        for _ in 0..turns {
            pass(&mut queue)?;
        }
        let costs = queue.take_costs()?;
        let wal = queue.wal()? - wal;
        let passed = (warm + turns) * each_pop;
        queue.check(if keep { i64::try_from(passed)? } else { 0 })?;
        let mut later = 0.0;
        if shape != Shape::Floor {
            later = queue.sweep()?.cpu / passed as f64;
        }
        queue.check(0)?;
        let n = (turns * each_pop) as f64;
        let [push, pop, settle] = costs.map(|c| c.cpu / n);
        let wall = costs.iter().map(|c| c.wall).sum::<f64>() / n;
        let sum = push + pop + settle;
        Ok([sum, push, pop, settle, later, sum + later, wall, wal / n])
    }

    /// The same by 32, with many messages that wait.
    fn ready(&self) -> Result<()> {
        let many = self.size(1_000_000, 200_000);
        let turns = 500_i32;
        println!("\nPush, pop and settle by 32 with {many} ready, history kept");
        println!("| shape | CPU us with 1,000 ready | with {many} | ratio | drained by 1,000 |");
        println!("|---|---:|---:|---:|---:|");
        for shape in self.queues() {
            let mut figures = Vec::new();
            for ready in [1_000, many] {
                let mut queue = Queue::create(&self.url, shape)?;
                for _ in 0..ready / 1_000 {
                    queue.push(1_000)?;
                }
                queue.client.batch_execute("analyze")?;
                queue.take_costs()?;
                for _ in 0..turns {
                    queue.push(32)?;
                    let leases = queue.pop_all(32)?;
                    queue.settle(&leases, true)?;
                }
                figures.push(cpu(&queue.take_costs()?) / f64::from(turns * 32));
                queue.drain(i64::from(turns * 32))?;
                figures.push(cpu(&queue.take_costs()?) / ready as f64);
            }
            println!(
                "| {} | {:.2} | {:.2} | {:.2} | {:.2} |",
                shape.name(),
                figures[0],
                figures[2],
                figures[2] / figures[0],
                figures[3]
            );
        }
        Ok(())
    }

    /// A pop that finds nothing.
    fn delayed(&self) -> Result<()> {
        let many = self.size(200_000, 50_000);
        println!("\nA pop of one that finds nothing: medians of 500");
        println!("| shape | CPU us, empty | {many} delayed | ratio | time us, empty | {many} delayed |");
        println!("|---|---:|---:|---:|---:|---:|");
        for shape in self.queues() {
            let mut queue = Queue::create(&self.url, shape)?;
            let empty = median_pop(&mut queue, false)?;
            for _ in 0..many / 100 {
                let ids: Vec<Uuid> = (0..100).map(|_| Uuid::now_v7()).collect();
                queue.push_ids(&ids, Some(3600.0))?;
            }
            let full = median_pop(&mut queue, false)?;
            queue.check(i64::try_from(many)?)?;
            print_pair(shape, [empty, full]);
        }
        Ok(())
    }

    /// A pop of one beside leased messages, all popped one by one.
    fn inflight(&self) -> Result<()> {
        let many = self.size(10_000, 2_000);
        println!("\nA pop of one beside messages in flight: medians of 500");
        println!("| shape | CPU us, 10 in flight | {many} | ratio | time us, 10 in flight | {many} |");
        println!("|---|---:|---:|---:|---:|---:|");
        for shape in self.queues() {
            let mut queue = Queue::create(&self.url, shape)?;
            for _ in 0..(many + 2_000) / 1_000 {
                queue.push(1_000)?;
            }
            let mut held = Vec::new();
            let mut figures = [Cost::default(); 2];
            for (in_flight, figure) in [10, many].into_iter().zip(&mut figures) {
                while held.len() < in_flight {
                    held.extend(queue.pop_all(1)?);
                }
                *figure = median_pop(&mut queue, true)?;
            }
            queue.settle(&held, false)?;
            queue.drain(0)?;
            print_pair(shape, figures);
        }
        Ok(())
    }

    /// A transaction holds its snapshot, so that nothing can be cleaned up.
    fn snapshot(&self, each: usize, total: usize) -> Result<()> {
        println!("\n{total} messages pass by {each} while a snapshot is held, leases of 2 s");
        println!(
            "| shape | messages/s, 2nd tenth | last tenth | ratio | CPU us, 2nd tenth | last tenth | pop and upkeep, 2nd tenth | last tenth |"
        );
        println!("|---|---:|---:|---:|---:|---:|---:|---:|");
        for shape in self.queues() {
            let tenths = self.pass_snapshot(shape, each, total)?;
            let [a, b] = [tenths[1], tenths[9]];
            println!(
                "| {} | {:.0} | {:.0} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
                shape.name(),
                a[0],
                b[0],
                b[0] / a[0],
                a[1],
                b[1],
                a[2],
                b[2]
            );
        }
        Ok(())
    }

    /// The rate, the CPU, and the CPU of pop and upkeep of each tenth of the messages.
    fn pass_snapshot(&self, shape: Shape, each: usize, total: usize) -> Result<Vec<[f64; 3]>> {
        let mut queue = Queue::create(&self.url, shape)?;
        queue.lease = 2.0;
        let mut holder = Client::connect(&self.url, NoTls)?;
        holder.batch_execute("begin isolation level repeatable read; select 1 from pg_class limit 1")?;
        let mut upkeep = Instant::now();
        let mut tenths = Vec::new();
        for _ in 0..10 {
            queue.take_costs()?;
            for _ in 0..total / 10 / each {
                queue.push(each)?;
                let leases = queue.pop_all(each)?;
                queue.settle(&leases, false)?;
                if upkeep.elapsed() > Duration::from_secs(1) {
                    upkeep = Instant::now();
                    queue.upkeep()?;
                }
            }
            let costs = queue.take_costs()?;
            let n = (total / 10) as f64;
            let wall: f64 = costs.iter().map(|c| c.wall).sum();
            tenths.push([n / wall * 1e6, cpu(&costs) / n, costs[1].cpu / n]);
        }
        queue.drain(0)?;
        Ok(tenths)
    }

    /// A push is repeated while its message is settled, and a lease ends.
    fn race(&self) -> Result<()> {
        let times: i64 = 2_000;
        println!("\nA push repeated while its message is settled, history kept, {times} times");
        println!("| shape | delivered again | a lease that ended |");
        println!("|---|---:|---|");
        for shape in self.queues() {
            let mut queue = Queue::create(&self.url, shape)?;
            let mut other = Queue::open(&self.url, shape)?;
            let ids: Vec<Uuid> = (0..times).map(|_| Uuid::now_v7()).collect();
            let start = Barrier::new(2);
            thread::scope(|s| -> Result<()> {
                let pusher = s.spawn(|| {
                    for id in &ids {
                        start.wait();
                        let pushed = other.push_ids(&[*id], None).map_err(|e| e.to_string());
                        start.wait();
                        pushed?;
                    }
                    Ok::<(), String>(())
                });
                for id in &ids {
                    queue.push_ids(&[*id], None)?;
                    queue.expect(*id);
                    let leases = queue.pop_all(1)?;
                    start.wait();
                    let settled = queue.settle(&leases, true);
                    start.wait();
                    settled?;
                    if !queue.pop(1)?.is_empty() {
                        return Err("a settled message was delivered again".into());
                    }
                }
                Ok(pusher.join().map_err(|_| "the pusher panicked")??)
            })?;
            queue.check(times)?;
            end_of_lease(&mut queue, times)?;
            println!("| {} | 0 | back at its place |", shape.name());
        }
        Ok(())
    }
}

/// Messages whose lease ends come back in their order, and their old tokens are worth nothing.
fn end_of_lease(queue: &mut Queue, kept: i64) -> Result<()> {
    for keep in [false, true] {
        queue.lease = 1.0;
        queue.push(300)?;
        let old = queue.pop_all(300)?;
        queue.settle(&old[..10], keep)?;
        queue.settle(&old[10..11], keep)?;
        thread::sleep(Duration::from_millis(1_100));
        for lease in &old[11..] {
            queue.expect(lease.id);
        }
        queue.lease = 300.0;
        let mut new = queue.pop_all(1)?;
        new.extend(queue.pop_all(288)?);
        if new.iter().map(|l| l.id).ne(old[11..].iter().map(|l| l.id)) {
            return Err("messages came back in another order".into());
        }
        let settled = queue.try_settle(&old, keep)? + queue.try_settle(&old[20..21], keep)?;
        if settled != 0 {
            return Err(format!("{settled} messages settled by an old token").into());
        }
        queue.settle(&new, false)?;
        queue.drain(kept + if keep { 11 } else { 0 })?;
    }
    Ok(())
}

/// The medians of a pop of one, and settles what it found.
fn median_pop(queue: &mut Queue, found: bool) -> Result<Cost> {
    let mut costs = Vec::new();
    for _ in 0..500 {
        queue.take_costs()?;
        let leases = queue.pop(1)?;
        costs.push(queue.take_costs()?[1]);
        if leases.is_empty() == found {
            return Err(format!("popped {} messages", leases.len()).into());
        } else if found {
            queue.settle(&leases, false)?;
        }
    }
    Ok(Cost {
        cpu: median(costs.iter().map(|c| c.cpu).collect()),
        wall: median(costs.iter().map(|c| c.wall).collect()),
    })
}

fn print_pair(shape: Shape, [a, b]: [Cost; 2]) {
    println!(
        "| {} | {:.0} | {:.0} | {:.2} | {:.0} | {:.0} |",
        shape.name(),
        a.cpu,
        b.cpu,
        b.cpu / a.cpu,
        a.wall,
        b.wall
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn cpu(costs: &[Cost; 3]) -> f64 {
    costs.iter().map(|c| c.cpu).sum()
}
