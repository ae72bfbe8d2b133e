//! Draws results: JSON lines of the peers on the standard input, an SVG on the standard output.
//!
//! `cargo run -p pushpop-measure --bin plot < benches/peers/results.jsonl > benches/peers/results.svg`

use std::fmt::Write as _;
use std::io::{self, BufRead};

use serde_json::Value;

const WIDTH: f64 = 760.0;
/// Where bars begin, and how long the longest of a group is.
const LEFT: f64 = 190.0;
const LONGEST: f64 = 460.0;
const ROW: f64 = 20.0;

/// A bar: whose it is, and messages a second.
type Bar = (String, f64);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut groups: Vec<(String, Vec<Bar>)> = Vec::new();
    for line in io::stdin().lock().lines() {
        let line: Value = serde_json::from_str(&line?)?;
        let Some(rate) = line["msgs_per_s"].as_f64() else { continue };
        let bar = (line["system"].as_str().unwrap_or_default().to_owned(), rate);
        let title = title(&line);
        match groups.iter_mut().find(|(known, _)| *known == title) {
            Some((_, bars)) => bars.push(bar),
            None => groups.push((title, vec![bar])),
        }
    }
    for (_, bars) in &mut groups {
        bars.sort_by(|a, b| b.1.total_cmp(&a.1));
    }
    print!("{}", draw(&groups)?);
    Ok(())
}

fn title(line: &Value) -> String {
    let (threads, batch) = (&line["threads"], &line["batch"]);
    match line["workload"].as_str() {
        Some("single") => format!("{threads} threads, strictly one message a call"),
        Some("batched inside") => format!("{threads} threads, one message a call, combined inside"),
        _ => format!("{threads} threads, {batch} messages a call"),
    }
}

fn draw(groups: &[(String, Vec<Bar>)]) -> Result<String, std::fmt::Error> {
    let rows: usize = groups.iter().map(|(_, bars)| bars.len() + 2).sum();
    let height = ROW * (rows as f64 + 1.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <title>Messages a second, pushed and worked at the same time</title>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    let mut y = ROW;
    for (title, bars) in groups {
        y += ROW;
        writeln!(svg, "<text x=\"12\" y=\"{y}\" font-weight=\"bold\" fill=\"#222222\">{title}</text>")?;
        let most = bars.iter().map(|bar| bar.1).fold(1.0, f64::max);
        for (system, rate) in bars {
            y += ROW;
            let (length, ours) = (LONGEST * rate / most, system.starts_with("pushpop"));
            let color = if ours { "#2f6f4f" } else { "#9aa5b1" };
            let (top, label) = (y - 13.0, LEFT - 8.0);
            let end = LEFT + length + 6.0;
            writeln!(
                svg,
                "<text x=\"{label}\" y=\"{y}\" text-anchor=\"end\" fill=\"#222222\">{system}</text>"
            )?;
            writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{length:.1}\" height=\"15\" fill=\"{color}\"/>"
            )?;
            writeln!(svg, "<text x=\"{end:.1}\" y=\"{y}\" fill=\"#222222\">{}</text>", thousands(*rate))?;
        }
        y += ROW;
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

/// A whole number, with commas.
fn thousands(n: f64) -> String {
    let digits = format!("{n:.0}");
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
