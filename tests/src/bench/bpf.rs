//! How long the kernel programs run, in a round of its own: the kernel's own counting (`kernel.bpf_stats_enabled`) costs
//! two clock readings for each run, which would be in the other figures.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::load::{self, Dose};
use crate::plan::{Mode, Row, name};
use crate::run::output;
use crate::up;

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// One program under one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    pub row: Row,
    pub name: String,
    /// Runs per request, connection or gigabyte.
    pub runs: f64,
    /// Nanoseconds per run.
    pub ns: f64,
}

/// Puts the switch back as it was.
struct Switched {
    before: String,
}

impl Switched {
    fn on() -> Result<Self> {
        let before = fs::read_to_string(SWITCH).with_context(|| format!("cannot read {SWITCH}"))?;
        fs::write(SWITCH, "1").with_context(|| format!("cannot write {SWITCH}"))?;
        Ok(Self { before })
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, self.before.trim());
    }
}

/// (runs, nanoseconds) of each program by its kernel id, with its name.
type Stats = BTreeMap<u64, (String, f64, f64)>;

pub fn measure(envoy: Option<&Path>, dose: Dose) -> Result<Vec<Program>> {
    // What is loaded already is somebody else's.
    let foreign: BTreeSet<u64> = stats()?.into_keys().collect();
    up::with(Mode::Ours, 1, envoy, |up| {
        let mut programs = Vec::new();
        let _switched = Switched::on()?;
        for row in [Row::Http16, Row::Connect, Row::Bulk1] {
            let before = stats()?;
            let measured =
                load::generate(up, row, dose).with_context(|| format!("{} with BPF statistics", name(row)))?;
            programs.extend(difference(row, &foreign, &before, &stats()?, measured.amount));
        }
        Ok(programs)
    })
}

fn stats() -> Result<Stats> {
    let text = output(Command::new("bpftool").args(["-j", "prog", "show"]))?;
    parse(&serde_json::from_str(&text).context("bpftool prints no JSON")?)
}

fn parse(json: &Value) -> Result<Stats> {
    let programs = json.as_array().context("bpftool's JSON is no list")?;
    let one = |program: &Value| {
        let number = |key: &str| program.get(key).and_then(Value::as_f64).unwrap_or(0.0);
        let name = program.get("name").and_then(Value::as_str).unwrap_or("unnamed").to_owned();
        Some((program.get("id")?.as_u64()?, (name, number("run_cnt"), number("run_time_ns"))))
    };
    Ok(programs.iter().filter_map(one).collect())
}

/// Programs of one name (one sk_lookup for each pod, each agent its own set) are added up.
fn difference(row: Row, foreign: &BTreeSet<u64>, before: &Stats, after: &Stats, amount: f64) -> Vec<Program> {
    let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for (id, (name, runs, ns)) in after {
        if foreign.contains(id) {
            continue;
        }
        let (_, runs_before, ns_before) = before.get(id).cloned().unwrap_or_default();
        let sum = sums.entry(name).or_default();
        sum.0 += runs - runs_before;
        sum.1 += ns - ns_before;
    }
    let ran = sums.into_iter().filter(|(_, (runs, _))| *runs > 0.0);
    ran.map(|(name, (runs, ns))| Program { row, name: name.to_owned(), runs: runs / amount, ns: ns / runs }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn adds_up_programs_of_one_name_and_leaves_out_foreign_ones() {
        let before = json!([
            {"id": 1, "name": "connect4", "run_cnt": 10, "run_time_ns": 1000},
            {"id": 3, "name": "stranger", "run_cnt": 1, "run_time_ns": 1},
        ]);
        let after = json!([
            {"id": 1, "name": "connect4", "run_cnt": 20, "run_time_ns": 3000},
            {"id": 2, "name": "connect4", "run_cnt": 10, "run_time_ns": 2000},
            {"id": 3, "name": "stranger", "run_cnt": 100, "run_time_ns": 100},
            {"id": 4, "name": "idle"},
        ]);
        let got =
            difference(Row::Connect, &BTreeSet::from([3]), &parse(&before).unwrap(), &parse(&after).unwrap(), 10.0);
        assert_eq!(got, [Program { row: Row::Connect, name: "connect4".to_owned(), runs: 2.0, ns: 200.0 }]);
    }
}
