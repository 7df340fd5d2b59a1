//! The report for the documentation: written anew by every published run.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::facts::date;
use crate::plan::{LINES, Mode, name};
use crate::results::{Results, Spread, ratio};
use crate::table::{compared, fine, number, times};
use crate::{aims, chart, json};

/// Writes `docs/bench/l4.{md,json,svg}`.
pub fn publish(results: &Results) -> Result<Vec<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the crate lies in the workspace")?;
    let folder = root.join("docs/bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let write = |file: &str, text: String| -> Result<PathBuf> {
        let path = folder.join(file);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    };
    let data = folder.join("l4.json");
    json::write(&data, results)?;
    Ok(vec![write("l4.md", render(results))?, write("l4.svg", chart::render(results))?, data])
}

pub fn render(results: &Results) -> String {
    let mut text = String::new();
    let facts = &results.facts;
    let _ = write!(
        text,
        "# What the mesh costs at L4\n\n\
         Written by `cargo xtask bench l4 --publish` on {}; do not edit. Raw data: [l4.json](l4.json).\n\n\
         ![chart](l4.svg)\n\n",
        date(facts.started)
    );
    aims_table(&mut text, results);
    figures_table(&mut text, results);
    memory_table(&mut text, results);
    programs_table(&mut text, results);
    how(&mut text, results);
    text
}

fn aims_table(text: &mut String, results: &Results) {
    text.push_str("## Aims\n\nNodemesh as times Envoy's L4 sidecars, in the same run.\n\n");
    text.push_str("| | aim | got | |\n| --- | --- | --- | --- |\n");
    for aim in aims::judge(results) {
        let sign = if aim.at_least { "at least" } else { "at most" };
        let _ = writeln!(text, "| {} | {sign} {}x | {} | {} |", aim.what, aim.wanted, fine(aim.got), aim.verdict());
    }
}

fn cell(spread: Option<Spread>) -> String {
    spread.map_or_else(
        || "-".to_owned(),
        |spread| format!("**{}** ({}-{})", number(spread.median), number(spread.min), number(spread.max)),
    )
}

fn figures_table(text: &mut String, results: &Results) {
    text.push_str("\n## Figures\n\nMedian of all rounds, least and most in parentheses.\n\n| |");
    for mode in &results.modes {
        let _ = write!(text, " {} |", mode.title());
    }
    text.push_str(" of Envoy | of no mesh |\n| --- |");
    text.push_str(&" --- |".repeat(results.modes.len() + 2));
    text.push('\n');
    let compared = compared(results);
    for line in LINES {
        let _ = write!(text, "| {} |", line.label.replacen("  ", "&nbsp;&nbsp;", 1));
        for mode in &results.modes {
            let _ = write!(text, " {} |", cell(results.spread(*mode, line.row, line.figure)));
        }
        let value = compared.and_then(|mode| results.median(mode, line.row, line.figure));
        let of_envoy = ratio(value, results.best_envoy(line.row, line.figure));
        let of_none = ratio(value, results.median(Mode::NoMesh, line.row, line.figure));
        let _ = writeln!(text, " {} | {} |", times(of_envoy), times(of_none));
    }
}

fn memory_table(text: &mut String, results: &Results) {
    if results.memory.is_empty() {
        return;
    }
    text.push_str(
        "\n## Memory of the proxies of one node\n\nEvery pod has an identity of its own and has made a request. RSS \
         counts pages that processes share in each of them, PSS divides them; `~` is reckoned from ten sidecars.\n\n\
         | pods | mode | RSS, MiB | PSS, MiB |\n| --- | --- | --- | --- |\n",
    );
    for point in &results.memory {
        let mark = if point.measured { "" } else { "~" };
        let (rss, pss) = (number(point.size.rss), number(point.size.pss));
        let _ = writeln!(text, "| {} | {} | {mark}{rss} | {mark}{pss} |", point.pods, point.mode.title());
    }
    if let Some(rss) = results.memory(Mode::Ours, 100).and_then(|point| point.controller) {
        let _ = writeln!(text, "\nBeside that the one controller of the mesh, with 100 pods: {} MiB.", number(rss));
    }
}

fn programs_table(text: &mut String, results: &Results) {
    if results.bpf.is_empty() {
        return;
    }
    text.push_str(
        "\n## Kernel programs\n\nIn a round of their own, since counting them costs time. Runs per request, new \
         connection or gigabyte.\n\n| load | program | runs | ns per run |\n| --- | --- | --- | --- |\n",
    );
    for program in &results.bpf {
        let (runs, ns) = (number(program.runs), number(program.ns));
        let _ = writeln!(text, "| {} | {} | {runs} | {ns} |", name(program.row), program.name);
    }
}

fn how(text: &mut String, results: &Results) {
    let facts = &results.facts;
    let _ = write!(
        text,
        "\n## How\n\n\
         - Machine: {}, {} CPUs, {:.0} GiB, kernel {}. Load average {} before and {} after; processes that had nothing to \
         do with the run took up to {:.0} % of it.{}\n\
         - Two nodes and their pods are network namespaces of this one machine: load, server and proxies share its \
         processors, so ratios are mostly ratios of CPU cost.\n\
         - {} rounds; in each, every mode is brought up afresh, checked, measured for {} s a row and taken down, in \
         turns that begin with another mode each time.\n",
        facts.cpu,
        facts.cpus,
        facts.memory_gib,
        facts.kernel,
        facts.load_at_start,
        facts.load_at_end,
        results.neighbours() * 100.0,
        facts.commit.as_ref().map(|commit| format!(" Tree: {commit}.")).unwrap_or_default(),
        results.rounds,
        results.seconds,
    );
    let _ = write!(
        text,
        "- Checked before each measurement: the server refuses plaintext, an identity that no rule allows and a \
         certificate of a foreign CA; the counters of TLS (and of RBAC) move.\n\
         - Server: one nginx process, a body of 128 bytes. Load: `wrk -t1`; a generator of constant rate ({} \
         requests/s on 16 connections, latency counted from when a request was due); `iperf3`; `ab -c 16` without \
         keep-alive. Congestion control is reno everywhere.\n\
         - The row of 1 connection runs beside a spinner of the class SCHED_IDLE, alike for all, or it would measure how \
         fast an idle processor wakes up. The spinner's time is not counted; it spoils the tail, so none is reported there.\n\
         - A row during which other processes took more than a tenth of the machine is measured again, up to three times, \
         and the quietest time counts.\n\
         - CPU is that of the whole machine (user, system, softirq, irq), less other processes' and less what the idle \
         mesh takes. \"By tick\" is a part of it that the kernel cannot tell from the process it interrupted.\n\
         - Envoy{}: one beside the client, one beside the server, all TCP of the pods redirected by nat rules, TLS 1.3, \
         ECDSA P-256, one RBAC rule, statistics on, access log off. Left out of what Istio adds, in Envoy's favour: \
         istio.stats, metadata exchange, PERMISSIVE matching, pilot-agent. Of two Envoys the better one is compared with.\n\
         - Nodemesh: an agent on each node, a controller as CA, STRICT, one AuthorizationPolicy.\n",
        results.rate,
        facts.envoy.as_ref().map(|version| format!(" {version}")).unwrap_or_default(),
    );
    for failure in &results.failures {
        let (mode, row) = (failure.mode.title(), name(failure.row));
        let _ = writeln!(text, "- Failed: {mode}, {row}, round {}: {}.", failure.round, failure.error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    #[test]
    fn tables_are_whole() {
        let text = render(&example(1.8));
        assert!(text.contains("| requests/s at 16 connections | at least 1.7x | 1.80x | reached |"));
        assert!(text.contains("| requests/s, 16 conn | **40,000** (40,000-40,000) |"));
        for table in text.split("\n\n").filter(|block| block.starts_with("| |")) {
            let columns: Vec<usize> = table.lines().map(|line| line.matches(" |").count()).collect();
            assert!(columns.iter().all(|count| *count == columns[0]), "{table}");
        }
    }
}
