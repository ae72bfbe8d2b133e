//! What the benchmarks have in common: a server, its counters, a check for lost and doubled
//! messages, and lines of results.
//!
//! ```no_run
//! use pushpop_measure::{Bed, Check, Line, Report, payload, together};
//!
//! # struct System;
//! # impl System {
//! #     fn open(_: &str) -> pushpop_measure::Result<System> { Ok(System) }
//! #     fn push(&self, _: Vec<u8>) -> pushpop_measure::Result<()> { Ok(()) }
//! #     fn work(&self) -> pushpop_measure::Result<Vec<u8>> { Ok(Vec::new()) }
//! # }
//! # fn main() -> pushpop_measure::Result<()> {
//! let mut bed = Bed::start()?;
//! let mut report = Report::new(false);
//! let check = Check::new();
//!
//! bed.reset("system")?;
//! let system = System::open(bed.url())?;
//! let begun = bed.reading()?;
//! together(32, |_| {
//!     let mut tally = check.tally();
//!     for _ in 0..1_000 {
//!         let number = tally.next();
//!         system.push(payload(number))?;
//!         tally.pushed(number);
//!         tally.done(pushpop_measure::number(&system.work()?)?);
//!     }
//!     Ok(())
//! })?;
//! let spent = bed.since(&begun)?;
//! drop(system); // the server counts a connection's commits when it ends
//! let messages = check.finish()?;
//! report.add(Line::new("single", "system").threads(32).spent(messages, &spent).left(messages, &bed.left()?));
//! report.print()
//! # }
//! ```

mod bed;
mod check;
mod cpu;
mod histogram;
mod line;
mod report;
mod rounds;
mod threads;

pub use bed::{Backends, Bed, Left, Reading, Spent};
pub use check::{Check, Tally, number, payload};
pub use histogram::Histogram;
pub use line::Line;
pub use report::Report;
pub use rounds::{FLOOR, median, rounds};
pub use threads::together;

/// What failed, from whichever library.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A result whose error can be anything.
pub type Result<T> = std::result::Result<T, Error>;
