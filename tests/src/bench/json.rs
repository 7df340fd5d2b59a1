//! The raw data.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::aims;
use crate::plan::{LINES, name};
use crate::results::Results;

pub fn write(path: &Path, results: &Results) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let text = serde_json::to_string_pretty(&value(results)).context("numbers can be written")?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

pub fn value(results: &Results) -> Value {
    let facts = &results.facts;
    json!({
        "benchmark": "l4",
        "machine": {
            "kernel": facts.kernel,
            "cpu": facts.cpu,
            "cpus": facts.cpus,
            "memory_gib": round(facts.memory_gib),
            "load_at_start": facts.load_at_start,
            "load_at_end": facts.load_at_end,
            "neighbours_at_most": round(results.neighbours()),
        },
        "started": facts.started,
        "envoy": facts.envoy,
        "commit": facts.commit,
        "rounds": results.rounds,
        "seconds": results.seconds,
        "rate": results.rate,
        "medians": medians(results),
        "aims": aims::judge(results).iter().map(|aim| json!({
            "what": aim.what,
            "wanted": aim.wanted,
            "at_least": aim.at_least,
            "got": aim.got.map(round),
            "verdict": aim.verdict(),
        })).collect::<Vec<_>>(),
        "memory_mib": results.memory.iter().map(|point| json!({
            "mode": name(point.mode),
            "pods": point.pods,
            "rss": round(point.size.rss),
            "pss": round(point.size.pss),
            "measured": point.measured,
            "controller_rss": point.controller.map(round),
        })).collect::<Vec<_>>(),
        "bpf": results.bpf.iter().map(|program| json!({
            "row": name(program.row),
            "program": program.name,
            "runs_per_unit": round(program.runs),
            "ns_per_run": round(program.ns),
        })).collect::<Vec<_>>(),
        "samples": results.samples.iter().map(|sample| {
            let figures: Map<String, Value> =
                sample.figures.iter().map(|(figure, value)| (figure.id().to_owned(), round(*value).into())).collect();
            json!({"round": sample.round, "mode": name(sample.mode), "row": name(sample.row), "figures": figures})
        }).collect::<Vec<_>>(),
        "failures": results.failures.iter().map(|failure| json!({
            "round": failure.round,
            "mode": name(failure.mode),
            "row": name(failure.row),
            "error": failure.error,
        })).collect::<Vec<_>>(),
    })
}

/// row -> figure -> mode -> [median, least, most].
fn medians(results: &Results) -> Value {
    let mut rows = json!({});
    for line in LINES {
        for &mode in &results.modes {
            if let Some(spread) = results.spread(mode, line.row, line.figure) {
                rows[name(line.row)][line.figure.id()][name(mode)] =
                    json!([round(spread.median), round(spread.min), round(spread.max)]);
            }
        }
    }
    rows
}

/// To a thousandth: what lies beyond is noise.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    #[test]
    fn holds_medians_samples_and_aims() {
        let json = value(&example(2.0));
        assert_eq!(json["medians"]["http16"]["per_second"]["ours"], json!([20_000.0, 20_000.0, 20_000.0]));
        assert_eq!(json["aims"][0]["verdict"], "reached");
        assert_eq!(json["samples"].as_array().unwrap().len(), 21);
        assert_eq!(json["memory_mib"][0]["mode"], "envoy-c2");
    }
}
