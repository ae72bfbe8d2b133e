//! The clock of the server is stepped, forward and back, by up to an hour.
//!
//! The server has libfaketime beneath it; the clocks of the clients stay as they are. Leases end by the clock of the server, early
//! or late; so property 3 is asked by that clock alone, and 4 by the clients'. Order is exempt:
//! what is pushed after a step back overtakes what was pushed before. That it does so at once is property 9. In the end the
//! clock is as far ahead as it ever was, so nothing is left that would have to wait for longer than usual.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pushpop_pg::BoxError;
use pushpop_pg::time::OffsetDateTime;
use pushpop_server::Setup;

use crate::director::Director;
use crate::journal::now;
use crate::plan::Fault;
use crate::store::micros;

/// The longest steps, in seconds: of each kind a third.
const STEPS: [u64; 3] = [3, 60, 3600];

/// Where distributions have the library: one directory for each architecture.
const LIBRARIES: [&str; 4] = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib"];

pub(crate) struct Clock {
    /// What the library reads, each time that the server asks for the time.
    file: PathBuf,
    ahead: i64,
    most: i64,
}

impl Clock {
    /// A clock for a server that is started so.
    pub(crate) fn before(setup: Setup, dir: &Path) -> Result<(Clock, Setup), BoxError> {
        let library =
            library().ok_or("libfaketime is missing (Debian, Ubuntu: apt-get install libfaketime)")?;
        let clock = Clock { file: dir.join("clock"), ahead: 0, most: 0 };
        clock.write()?;
        let setup = setup
            .variable("LD_PRELOAD", &library.to_string_lossy())
            .variable("FAKETIME_TIMESTAMP_FILE", &clock.file.to_string_lossy())
            .variable("FAKETIME_NO_CACHE", "1")
            .variable("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        Ok((clock, setup))
    }

    fn write(&self) -> Result<(), BoxError> {
        // In one piece, whenever it is read.
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{:+}\n", self.ahead))?;
        fs::rename(&new, &self.file)?;
        Ok(())
    }
}

fn library() -> Option<PathBuf> {
    let name = Path::new("faketime").join("libfaketime.so.1");
    let dirs = LIBRARIES.iter().map(PathBuf::from);
    let below = dirs.flat_map(|dir| {
        let inner = fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path());
        inner.chain([dir]).collect::<Vec<_>>()
    });
    below.map(|dir| dir.join(&name)).find(|path| path.is_file())
}

impl Director<'_> {
    pub(crate) fn step_clock(&mut self) -> Result<(), BoxError> {
        let Some(clock) = &self.stage.clock else { return Ok(()) };
        let longest = STEPS[self.chance.place(STEPS.len())];
        let step = 1 + i64::try_from(self.chance.below(longest))?;
        // Never further from the right time than an hour.
        let back = self.chance.below(2) == 0;
        let back = if clock.ahead.abs() + step > 3600 { clock.ahead > 0 } else { back };
        let ahead = if back { clock.ahead - step } else { clock.ahead + step };
        self.set_clock(ahead)?;
        self.mended(Fault::StepClock)
    }

    /// Lets all become due that is due by any time that the clock has shown.
    pub(crate) fn right_clock(&mut self) -> Result<(), BoxError> {
        match &self.stage.clock {
            Some(clock) if clock.ahead < clock.most => self.set_clock(clock.most),
            _ => Ok(()),
        }
    }

    fn set_clock(&mut self, ahead: i64) -> Result<(), BoxError> {
        let Some(clock) = &mut self.stage.clock else { return Ok(()) };
        let before = clock.ahead;
        clock.ahead = ahead;
        clock.most = clock.most.max(ahead);
        self.journal.line(format!("step {ahead} by {}", ahead - before));
        clock.write()?;
        let mut client = self.connect()?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let shown: OffsetDateTime = client.query_one("select clock_timestamp()", &[])?.get(0);
            if (micros(shown) - now() - ahead * 1_000_000).abs() < 5_000_000 {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err("the clock of the server does not follow".into());
            }
        }
    }
}
