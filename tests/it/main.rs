//! The guarantees of the queue, each tried on a real PostgreSQL.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod audit;
mod connect;
mod contract;
mod control;
mod dead;
mod errors;
#[cfg(feature = "json")]
mod json;
mod limits;
mod look;
mod observe;
mod outage;
mod plans;
mod pop;
mod push;
mod schema;
mod settle;
mod threads;
mod tidy;
mod transaction;
mod upkeep;
mod views;
mod wake;
mod world;
