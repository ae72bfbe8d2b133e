//! Arguments of the form `--name value`, which a parent passes on to its children as they are.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use pushpop_pg::BoxError;

#[derive(Clone, Debug, Default)]
pub(crate) struct Args(BTreeMap<String, String>);

impl Args {
    pub(crate) fn read(args: impl IntoIterator<Item = String>) -> Result<Args, BoxError> {
        let mut read = BTreeMap::new();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let name = arg.strip_prefix("--").ok_or_else(|| format!("{arg} is no option"))?;
            let value = args.next().ok_or_else(|| format!("{arg} takes a value"))?;
            read.insert(name.to_owned(), value);
        }
        Ok(Args(read))
    }

    /// The same as a command line.
    pub(crate) fn line(&self) -> Vec<String> {
        self.0.iter().flat_map(|(name, value)| [format!("--{name}"), value.clone()]).collect()
    }

    pub(crate) fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.0.insert(name.to_owned(), value.to_string());
        self
    }

    pub(crate) fn text(&self, name: &str) -> Result<&str, BoxError> {
        Ok(self.0.get(name).ok_or_else(|| format!("--{name} is missing"))?)
    }

    /// The number of an option, or `default` without it.
    pub(crate) fn number<T: FromStr>(&self, name: &str, default: T) -> Result<T, BoxError> {
        match self.0.get(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| format!("--{name} takes a number, not {text}").into()),
        }
    }

    pub(crate) fn millis(&self, name: &str, default: Duration) -> Result<Duration, BoxError> {
        Ok(Duration::from_millis(self.number(name, u64::try_from(default.as_millis())?)?))
    }

    /// Whether the deliberate fault of this name is wanted.
    pub(crate) fn is_broken(&self, how: &str) -> bool {
        self.0.get("broken").is_some_and(|broken| broken == how)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}
