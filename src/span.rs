//! Spans around the calls of a queue, on the threads of their callers.
//!
//! What is shown is worked out only when somebody listens. Never shown: payloads, tokens, and headers
//! other than [`TRACEPARENT`].

use std::collections::BTreeMap;

use tracing::field::{Empty, display};
use tracing::{Span, debug_span, info_span};

use crate::lease::Lease;
use crate::message::{Message, NewMessage};

/// The header that says which trace a message belongs to, as W3C's Trace Context has it.
const TRACEPARENT: &str = "traceparent";

fn traceparent(headers: &BTreeMap<String, String>) -> Option<&str> {
    headers.get(TRACEPARENT).map(String::as_str)
}

fn only<T>(of: &[T]) -> Option<&T> {
    if let [one] = of { Some(one) } else { None }
}

pub(crate) fn push(topic: &str, messages: &[NewMessage]) -> Span {
    debug_span!(
        "pushpop.push",
        topic,
        count = messages.len(),
        id = only(messages).map(|message| display(message.id)),
        traceparent = only(messages).and_then(|message| traceparent(&message.headers)),
    )
}

/// What comes of it is noted by [`popped`].
pub(crate) fn pop(topic: &str) -> Span {
    debug_span!("pushpop.pop", topic, count = Empty, id = Empty, attempt = Empty, traceparent = Empty)
}

/// With all the topics that are asked.
pub(crate) fn pop_any(topics: &[impl AsRef<str>]) -> Span {
    match only(topics) {
        Some(topic) => pop(topic.as_ref()),
        None => debug_span!(
            "pushpop.pop",
            topic = ?topics.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
            count = Empty,
            id = Empty,
            attempt = Empty,
            traceparent = Empty
        ),
    }
}

pub(crate) fn popped(span: &Span, leases: &[Lease]) {
    if span.is_disabled() {
        return;
    }
    span.record("count", leases.len());
    if let Some(lease) = only(leases) {
        span.record("id", display(lease.id));
        span.record("attempt", lease.attempt);
        span.record("traceparent", traceparent(&lease.headers));
    }
}

/// Of leases of one topic.
pub(crate) fn settle(leases: &[Lease], outcome: &'static str) -> Span {
    debug_span!(
        "pushpop.settle",
        topic = leases.first().map(|lease| lease.topic()),
        outcome,
        count = leases.len(),
        id = only(leases).map(|lease| display(lease.id)),
        traceparent = only(leases).and_then(|lease| traceparent(&lease.headers)),
    )
}

/// Around the handler of a worker.
pub(crate) fn handle(message: &Message) -> Span {
    info_span!(
        "pushpop.handle",
        topic = message.topic,
        id = display(message.id),
        attempt = message.attempt,
        traceparent = traceparent(&message.headers),
    )
}
