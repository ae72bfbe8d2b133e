//! All results of a run.

use std::io::Write;

use crate::{Line, Result};

/// Keeps the lines of a run until its end: one that fails is to print none.
#[derive(Debug)]
pub struct Report {
    json: bool,
    lines: Vec<Line>,
}

impl Report {
    /// A report for people, or with one JSON object a line.
    pub fn new(json: bool) -> Self {
        Report { json, lines: Vec::new() }
    }

    /// Adds a line.
    pub fn add(&mut self, line: Line) {
        self.lines.push(line);
    }

    /// Adds lines.
    pub fn extend(&mut self, lines: impl IntoIterator<Item = Line>) {
        self.lines.extend(lines);
    }

    /// Prints all lines to the standard output.
    pub fn print(&self) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            for line in &self.lines {
                writeln!(out, "{}", line.json())?;
            }
        } else {
            out.write_all(table(&self.lines).as_bytes())?;
        }
        Ok(out.flush()?)
    }
}

/// The lines as a table, with an empty row where the first word of the workload changes.
fn table(lines: &[Line]) -> String {
    let Some(first) = lines.first() else { return String::new() };
    let mut head: Vec<String> = ["workload", "system", "threads", "batch"].map(str::to_owned).to_vec();
    head.extend(first.figures().map(|(name, _)| name.to_owned()));
    let mut rows = vec![head];
    rows.extend(lines.iter().map(row));

    let columns = rows[0].len();
    let width = |i: usize| rows.iter().filter_map(|row| Some(row.get(i)?.chars().count())).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    let mut group = "";
    for (i, row) in rows.iter().enumerate() {
        let word = row[0].split(' ').next().unwrap_or_default();
        if i > 1 && word != group {
            text.push('\n');
        }
        group = word;
        for (j, cell) in row.iter().enumerate() {
            match (widths.get(j), j) {
                (Some(width), 0 | 1) => text.push_str(&format!("{cell:<width$}  ")),
                (Some(width), _) => text.push_str(&format!("{cell:>width$}  ")),
                (None, _) => text.push_str(cell),
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

fn row(line: &Line) -> Vec<String> {
    let mut cells =
        vec![line.workload.clone(), line.system.clone(), line.threads.to_string(), line.batch.to_string()];
    cells.extend(line.figures().map(|(_, figure)| figure.map_or(String::new(), digits)));
    let more: Vec<String> =
        line.more.iter().map(|(name, figure)| format!("{name} {}", digits(*figure))).collect();
    cells.push(more.join(", "));
    cells
}

/// As many digits as there is any truth in.
fn digits(figure: f64) -> String {
    match figure.abs() {
        x if x >= 100.0 => format!("{figure:.0}"),
        x if x >= 10.0 => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
}
