//! Follows a message from the request that pushed it to its handler, by the header `traceparent`, which all spans show.

use std::error::Error;

use pushpop_pg::{NewMessage, Queue};
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::prelude::*;

fn main() -> Result<(), Box<dyn Error>> {
    // Shows spans when they end, and how long they took. A layer of OpenTelemetry's would be added here.
    let spans = tracing_subscriber::fmt::layer().with_span_events(FmtSpan::CLOSE);
    let of_ours =
        Targets::new().with_target("pushpop_pg", Level::DEBUG).with_target(module_path!(), Level::INFO);
    tracing_subscriber::registry().with(spans.with_filter(of_ours)).init();

    let (url, _server) = pushpop_server::database_url("DATABASE_URL")?;
    let schema = format!("pushpop_tracing_{}", std::process::id());
    let queue = Queue::builder().schema(&schema).connect(&url)?;

    // As it came with a request; or made of the present span by a tracer such as OpenTelemetry's.
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let id = queue.push("mail", NewMessage::new("hello").header("traceparent", traceparent))?;

    // In the consumer, which is often another program.
    let lease = queue.pop("mail")?;
    assert_eq!((lease.id(), lease.header("traceparent")), (id, Some(traceparent)));
    // A tracer would be told here that this is the parent.
    let span = tracing::info_span!("send", traceparent = lease.header("traceparent"));
    span.in_scope(|| tracing::info!("sending {} bytes", lease.payload().len()));
    lease.complete()?;

    // Upkeep that is under way may be in the way of this.
    let clean_up = format!("drop schema {schema} cascade");
    while let Err(e) = queue.transaction(|tx| Ok(tx.batch_execute(&clean_up)?)) {
        if !e.is_retryable() {
            return Err(e.into());
        }
    }
    Ok(())
}
