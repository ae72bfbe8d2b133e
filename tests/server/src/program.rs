//! Where the server's programs are, and which account may run them.

use std::env;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Error;

const HOW_TO_GET_ONE: &str = "install one (Debian, Ubuntu: apt-get install postgresql; \
     Fedora: dnf install postgresql-server; macOS: brew install postgresql), \
     or name a running server in DATABASE_URL";

/// Where packages put one directory for each version: the parent, and the name before the version.
const VERSIONED: [(&str, &str); 6] = [
    ("/usr/lib/postgresql", ""),
    ("/usr", "pgsql-"),
    ("/usr/libexec", "postgresql"),
    ("/opt/homebrew/opt", "postgresql@"),
    ("/usr/local/opt", "postgresql@"),
    ("/Applications/Postgres.app/Contents/Versions", ""),
];

/// Finds the directory that holds `initdb` and `postgres`.
///
/// One that `PUSHPOP_PG_BINDIR` names is the only one looked at.
pub(crate) fn bin_dir() -> Result<PathBuf, Error> {
    const VARIABLE: &str = "PUSHPOP_PG_BINDIR";
    if let Some(named) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        let named = PathBuf::from(named);
        return fs::canonicalize(&named).ok().filter(|dir| holds_server(dir)).ok_or_else(|| {
            Error::new(format!(
                "no PostgreSQL server program found in {} ({VARIABLE}): {HOW_TO_GET_ONE}",
                named.display()
            ))
        });
    }
    candidates()
        .into_iter()
        .find(|dir| holds_server(dir))
        .ok_or_else(|| Error::new(format!("no PostgreSQL server program found: {HOW_TO_GET_ONE}")))
}

fn holds_server(dir: &Path) -> bool {
    dir.is_absolute() && ["initdb", "postgres"].iter().all(|p| dir.join(p).is_file())
}

fn candidates() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    if let Some(dir) = output(Command::new("pg_config").arg("--bindir")) {
        dirs.push(PathBuf::from(dir));
    }
    // A link in PATH leads to the directory that has the other programs too.
    for dir in env::split_paths(&env::var_os("PATH").unwrap_or_default()) {
        if let Ok(program) = fs::canonicalize(dir.join("postgres")) {
            dirs.extend(program.parent().map(Path::to_path_buf));
            dirs.push(dir);
        }
    }
    for (parent, prefix) in VERSIONED {
        let mut found: Vec<(f64, PathBuf)> = fs::read_dir(parent)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let version = name.strip_prefix(prefix)?.parse().ok()?;
                Some((version, entry.path()))
            })
            .collect();
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, dir) in found {
            dirs.push(dir.join("bin"));
            dirs.push(dir);
        }
    }
    dirs.push(PathBuf::from("/usr/local/pgsql/bin"));
    dirs.push(PathBuf::from("/opt/homebrew/bin"));
    dirs
}

/// The account that the server runs under: another than the caller's where that is root's, which
/// the server refuses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account(Option<(u32, u32)>);

impl Account {
    pub(crate) fn find() -> Result<Self, Error> {
        if id(&["-u"]) != Some(0) {
            return Ok(Account(None));
        }
        ["postgres", "nobody"]
            .iter()
            .find_map(|name| Some((id(&["-u", name])?, id(&["-g", name])?)))
            .map(|ids| Account(Some(ids)))
            .ok_or_else(|| Error::new("root cannot run PostgreSQL, and no user postgres or nobody exists"))
    }

    /// Makes a command that runs `script` in a shell: under this account, and in a process group
    /// of its own, which a terminal's Ctrl-C does not reach.
    pub(crate) fn shell(self, script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        if let Some((user, group)) = self.0 {
            command.uid(user).gid(group);
        }
        command
            .args(["-c", script])
            .env("LC_ALL", "C")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }
}

fn id(args: &[&str]) -> Option<u32> {
    output(Command::new("id").args(args))?.parse().ok()
}

fn output(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
