//! The guarantees of the queue, each tried on a real PostgreSQL.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod audit;
mod connect;
mod contract;
mod control;
mod dead;
mod documents;
mod encoding;
mod errors;
mod foreign;
#[cfg(unix)]
mod forks;
mod hands;
mod heartbeat;
mod hostile;
mod install;
#[cfg(feature = "json")]
mod json;
mod languages;
mod limits;
mod look;
mod machine;
#[cfg(feature = "metrics")]
mod metrics;
mod names;
mod network;
mod observe;
mod operations;
mod order;
mod outage;
mod plans;
mod pooler;
mod pop;
mod push;
#[cfg(feature = "metrics")]
mod recorder;
mod roles;
mod schema;
mod settle;
#[cfg(target_os = "linux")]
mod shortage;
mod spans;
mod threads;
mod tidy;
#[cfg(feature = "rustls")]
mod tls;
mod topics;
mod transaction;
mod traps;
mod upkeep;
mod views;
mod wake;
mod worker;
mod world;
