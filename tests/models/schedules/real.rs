//! The sources as they are.

sources!("real");

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
