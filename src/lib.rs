//! A PostgreSQL-backed message queue for threaded Rust programs.

mod builder;
mod calls;
mod crew;
mod engine;
mod error;
mod flight;
mod keeper;
mod lane;
mod lease;
mod limits;
mod link;
mod listener;
mod message;
mod observer;
mod queue;
mod schema;
mod slot;
mod task;
mod topic;
mod transaction;
mod upkeep;

pub use builder::Builder;
pub use error::{Error, ErrorKind, Result, SettleError};
pub use lease::Lease;
pub use message::{Message, NewMessage, State};
pub use observer::{Abandoned, Flight, LeaseLost, Observer, Popped, Pushed, Settled};
pub use queue::{Iter, Queue};
pub use topic::{Stats, Topic};

pub use {postgres, time, uuid};
