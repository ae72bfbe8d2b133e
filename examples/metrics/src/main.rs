//! Serves the figures of a queue in Prometheus' text format: scrapes itself once, and prints that; or, with `--serve`,
//! stays until Enter is pressed.
//!
//! `cargo run --manifest-path examples/metrics/Cargo.toml -- --serve`

use std::collections::BTreeSet;
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use metrics::{describe_gauge, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use pushpop_pg::{Metrics, Queue, Stats};

fn main() -> Result<(), Box<dyn Error>> {
    // Before the queue, so that all is counted.
    let figures = PrometheusBuilder::new()
        .set_buckets_for_metric(
            Matcher::Suffix("_seconds".into()),
            &[0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0],
        )?
        .set_buckets_for_metric(Matcher::Prefix("pushpop_flight_callers".into()), &[1.0, 4.0, 16.0, 64.0])?
        .set_buckets_for_metric(
            Matcher::Prefix("pushpop_flight_messages".into()),
            &[1.0, 10.0, 100.0, 1000.0],
        )?
        .install_recorder()?;
    describe_gauge!("pushpop_messages", "Messages that are stored");
    describe_gauge!("pushpop_oldest_ready_age_seconds", "How long the oldest ready message has been waiting");

    let (url, _server) = pushpop_server::database_url("DATABASE_URL")?;
    let schema = format!("pushpop_metrics_{}", std::process::id());
    let queue = Queue::builder().schema(&schema).observer(Metrics::new()).connect(&url)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    println!("http://{address}/metrics");
    let server = queue.clone();
    thread::spawn(move || serve(&listener, &server, &figures));

    work(&queue)?;
    if std::env::args().any(|argument| argument == "--serve") {
        println!("until you press Enter");
        let busy = queue.clone();
        thread::spawn(move || while work(&busy).is_ok() {});
        std::io::stdin().read_line(&mut String::new())?;
        queue.close();
    } else {
        let mut scrape = TcpStream::connect(address)?;
        scrape.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        scrape.read_to_string(&mut answer)?;
        print!("{answer}");
        for line in [
            r#"pushpop_pushed_messages_total{topic="mail"} 10"#,
            r#"pushpop_settled_messages_total{topic="mail",outcome="complete"} 9"#,
            r#"pushpop_messages{topic="mail",state="settled"} 9"#,
        ] {
            assert!(answer.lines().any(|shown| shown == line), "{line} is not among the figures");
        }
    }

    // Of a queue that was closed, or is still in use.
    let queue = Queue::builder().schema(&schema).connect(&url)?;
    // Upkeep that is under way may be in the way of this.
    let clean_up = format!("drop schema {schema} cascade");
    while let Err(e) = queue.transaction(|tx| Ok(tx.batch_execute(&clean_up)?)) {
        if !e.is_retryable() {
            return Err(e.into());
        }
    }
    Ok(())
}

/// Something to be counted: nine messages that are handled, and one that fails.
fn work(queue: &Queue) -> Result<(), pushpop_pg::Error> {
    queue.push_many("mail", (0..10).map(|n| n.to_string()))?;
    for lease in queue.iter("mail").take(10) {
        let lease = lease?;
        thread::sleep(Duration::from_millis(10));
        if lease.payload() == b"7" { lease.fail("no such address")? } else { lease.complete()? }
    }
    Ok(())
}

/// Answers everybody, one after the other.
fn serve(listener: &TcpListener, queue: &Queue, figures: &PrometheusHandle) {
    let mut known = BTreeSet::new();
    for stream in listener.incoming() {
        if let Err(e) = stream.and_then(|stream| answer(stream, queue, figures, &mut known)) {
            eprintln!("a scrape failed: {e}");
        }
    }
}

fn answer(
    mut stream: TcpStream,
    queue: &Queue,
    figures: &PrometheusHandle,
    known: &mut BTreeSet<String>,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    // All is answered alike, so the request is only read to its end.
    for line in BufReader::new(&stream).lines() {
        if line?.is_empty() {
            break;
        }
    }
    let (status, text) = match look(queue, known) {
        Ok(()) => ("200 OK", figures.render()),
        Err(e) => ("503 Service Unavailable", format!("{e}\n")),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{text}",
        text.len()
    )?;
    stream.shutdown(Shutdown::Write)
}

/// Sets the gauges of what only the server knows. Every process that does so tells the same: ask one of them,
/// or take the maximum. With thousands of topics, choose those that matter.
fn look(queue: &Queue, known: &mut BTreeSet<String>) -> Result<(), pushpop_pg::Error> {
    let topics = queue.topics()?;
    known.extend(topics.iter().map(|stats| stats.topic().to_owned()));
    // A topic without messages is not among them any more, and a gauge stays as it was set.
    for topic in &*known {
        let stats = topics.iter().find(|stats| stats.topic() == topic);
        let messages = |state, count: fn(&Stats) -> u64| {
            gauge!("pushpop_messages", "topic" => topic.clone(), "state" => state)
                .set(stats.map_or(0, count) as f64);
        };
        messages("ready", Stats::ready);
        messages("delayed", Stats::delayed);
        messages("leased", Stats::leased);
        messages("settled", Stats::settled);
        messages("dead", Stats::dead);
        let age = stats.and_then(Stats::oldest_ready_age).unwrap_or_default();
        gauge!("pushpop_oldest_ready_age_seconds", "topic" => topic.clone()).set(age.as_secs_f64());
    }
    Ok(())
}
