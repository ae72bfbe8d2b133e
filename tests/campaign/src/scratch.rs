//! The directory of a campaign's logs. It is gone when the campaign ends, however that ends, unless it is to be kept.

use std::env;
use std::fs;
use std::io::Write;
use std::os::unix::process::{CommandExt, parent_id};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use pushpop_pg::BoxError;

use crate::args::Args;

/// Removes the directory when its standard input ends before it has said a word.
const KEEPER: &str = r#"trap '' HUP INT QUIT TERM; read -r word || rm -rf -- "$0""#;

pub(crate) struct Scratch {
    path: PathBuf,
    keeper: Child,
}

impl Scratch {
    pub(crate) fn new(args: &Args) -> Result<Scratch, BoxError> {
        let base = args.text("scratch").map_or_else(|_| env::temp_dir(), PathBuf::from);
        let path = base.join(format!("pushpop-campaign-{}", process::id()));
        let keeper = Command::new("/bin/sh")
            .args(["-c", KEEPER])
            .arg(&path)
            .process_group(0)
            .stdin(Stdio::piped())
            .spawn()?;
        let scratch = Scratch { path, keeper };
        fs::create_dir_all(&scratch.path)?;
        Ok(scratch)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the directory where it is.
    pub(crate) fn keep(mut self) -> Result<(), BoxError> {
        if let Some(stdin) = &mut self.keeper.stdin {
            stdin.write_all(b"keep\n")?;
        }
        println!("the logs are in {}", self.path.display());
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.keeper.stdin = None;
        let _ = self.keeper.wait();
    }
}

/// Ends this process soon after the one that has started it.
pub(crate) fn end_with_parent() {
    let parent = parent_id();
    thread::spawn(move || {
        while parent_id() == parent {
            thread::sleep(Duration::from_millis(500));
        }
        process::exit(1);
    });
}
