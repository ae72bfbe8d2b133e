//! One result.

use serde_json::json;

use crate::{Histogram, Left, Spent, median};

/// One line of results. A figure that makes no sense for a workload is `None`.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// What was done.
    pub workload: String,
    /// Who did it: ours, the floor, a peer.
    pub system: String,
    /// How many threads called.
    pub threads: usize,
    /// How many messages a call had.
    pub batch: usize,
    /// Messages a second, all threads together.
    pub msgs_per_s: Option<f64>,
    /// That of the floor in the same round is one. Of single calls it is the ratio of their medians.
    pub ratio_to_floor: Option<f64>,
    /// The median of what the workload times.
    pub p50_us: Option<f64>,
    /// What 99 of 100 did not exceed.
    pub p99_us: Option<f64>,
    /// Bytes written to the log, for each message.
    pub wal_bytes: Option<f64>,
    /// Transactions committed, for each message.
    pub commits: Option<f64>,
    /// CPU time of client and server together, for each message.
    pub cpu_us: Option<f64>,
    /// CPU time of the server alone, for each message.
    pub cpu_server_us: Option<f64>,
    /// Rows that were dead at the end, for each message.
    pub dead_rows: Option<f64>,
    /// Figures of one workload only, each with its name.
    pub more: Vec<(String, f64)>,
}

impl Line {
    /// A line without figures.
    pub fn new(workload: impl Into<String>, system: impl Into<String>) -> Self {
        Line { workload: workload.into(), system: system.into(), threads: 1, batch: 1, ..Line::default() }
    }

    /// Says how many threads called.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Says how many messages a call had.
    pub fn batch(mut self, batch: usize) -> Self {
        self.batch = batch;
        self
    }

    /// Takes what so many messages cost, and their rate.
    pub fn spent(mut self, messages: u64, spent: &Spent) -> Self {
        let n = messages as f64;
        let micros = |cpu: Option<std::time::Duration>| cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / n);
        self.msgs_per_s = Some(n / spent.wall.as_secs_f64());
        self.wal_bytes = Some(spent.wal_bytes / n);
        self.cpu_server_us = micros(spent.cpu_server);
        self.cpu_us =
            micros(spent.cpu_client).zip(self.cpu_server_us).map(|(client, server)| client + server);
        self
    }

    /// Takes what the server counted, for so many messages: all since the last reset.
    pub fn left(mut self, messages: u64, left: &Left) -> Self {
        self.commits = Some(left.commits / messages as f64);
        self.dead_rows = Some(left.dead_rows / messages as f64);
        self
    }

    /// Takes the median and the 99th percentile.
    pub fn times(mut self, times: &Histogram) -> Self {
        self.p50_us = times.p50_us();
        self.p99_us = times.p99_us();
        self
    }

    /// Adds a figure that only this workload has.
    pub fn with(mut self, name: impl Into<String>, figure: f64) -> Self {
        self.more.push((name.into(), figure));
        self
    }

    /// Sets the ratio to the floor: that of the rates or, without them, that of the medians.
    pub fn compare(&mut self, floor: &Line) {
        self.ratio_to_floor = match (self.msgs_per_s, floor.msgs_per_s) {
            (Some(own), Some(floor)) => Some(own / floor),
            _ => self.p50_us.zip(floor.p50_us).map(|(own, floor)| own / floor),
        };
    }

    /// The line of the medians of each figure. `None` of none.
    pub fn median(rounds: &[Line]) -> Option<Line> {
        let first = rounds.first()?;
        let of = |figure: fn(&Line) -> Option<f64>| median(rounds.iter().filter_map(figure).collect());
        let more = first.more.iter().enumerate().filter_map(|(i, (name, _))| {
            let figures = rounds.iter().filter_map(|line| Some(line.more.get(i)?.1)).collect();
            Some((name.clone(), median(figures)?))
        });
        Some(Line {
            workload: first.workload.clone(),
            system: first.system.clone(),
            threads: first.threads,
            batch: first.batch,
            msgs_per_s: of(|l| l.msgs_per_s),
            ratio_to_floor: of(|l| l.ratio_to_floor),
            p50_us: of(|l| l.p50_us),
            p99_us: of(|l| l.p99_us),
            wal_bytes: of(|l| l.wal_bytes),
            commits: of(|l| l.commits),
            cpu_us: of(|l| l.cpu_us),
            cpu_server_us: of(|l| l.cpu_server_us),
            dead_rows: of(|l| l.dead_rows),
            more: more.collect(),
        })
    }

    /// The figures that every line has a place for, in the order of the columns.
    pub(crate) fn figures(&self) -> [(&'static str, Option<f64>); 9] {
        [
            ("msgs_per_s", self.msgs_per_s),
            ("ratio_to_floor", self.ratio_to_floor),
            ("p50_us", self.p50_us),
            ("p99_us", self.p99_us),
            ("wal_bytes", self.wal_bytes),
            ("commits", self.commits),
            ("cpu_us", self.cpu_us),
            ("cpu_server_us", self.cpu_server_us),
            ("dead_rows", self.dead_rows),
        ]
    }

    /// One JSON object, its members in the order of the columns.
    pub(crate) fn json(&self) -> String {
        let mut members = vec![
            ("workload", json!(self.workload)),
            ("system", json!(self.system)),
            ("threads", json!(self.threads)),
            ("batch", json!(self.batch)),
        ];
        members.extend(self.figures().map(|(name, figure)| (name, json!(figure.map(rounded)))));
        members.extend(self.more.iter().map(|(name, figure)| (name.as_str(), json!(rounded(*figure)))));
        let members: Vec<String> =
            members.iter().map(|(name, value)| format!("{}:{value}", json!(name))).collect();
        format!("{{{}}}", members.join(","))
    }
}

/// To a thousandth: there is no more in it.
fn rounded(figure: f64) -> f64 {
    (figure * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn says_all_that_is_known_and_null_for_the_rest() {
        let spent = Spent {
            wall: Duration::from_secs(2),
            wal_bytes: 500.0,
            cpu_client: Some(Duration::from_millis(3)),
            cpu_server: Some(Duration::from_millis(7)),
        };
        let left = Left { commits: 25.0, dead_rows: 100.0 };
        let line =
            Line::new("single", "ours").threads(8).spent(100, &spent).left(100, &left).with("topics", 3.0);
        assert_eq!(
            line.json(),
            r#"{"workload":"single","system":"ours","threads":8,"batch":1,"msgs_per_s":50.0,"#.to_owned()
                + r#""ratio_to_floor":null,"p50_us":null,"p99_us":null,"wal_bytes":5.0,"commits":0.25,"#
                + r#""cpu_us":100.0,"cpu_server_us":70.0,"dead_rows":1.0,"topics":3.0}"#
        );
    }
}
