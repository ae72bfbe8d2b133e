//! The sources with all variants built in, of which one at most is switched on.

sources!("broken");

#[path = "builder.rs"]
mod builder;
#[path = "link.rs"]
mod link;
#[path = "outside.rs"]
mod outside;
#[path = "scenarios.rs"]
pub(crate) mod scenarios;
#[path = "schema.rs"]
mod schema;
#[path = "text.rs"]
mod text;
#[path = "times.rs"]
mod times;

pub(crate) use lease::Lease;

use std::cell::Cell;

thread_local! {
    static ON: Cell<&'static str> = const { Cell::new("") };
}

/// Switches a variant on, for the schedules of this thread.
pub(crate) fn switch_on(name: &'static str) {
    ON.set(name);
}

fn is_on(name: &str) -> bool {
    ON.get() == name
}
