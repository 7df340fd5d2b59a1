//! The run itself: rounds in which every mode has its turn, then what is measured apart.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::args::Options;
use crate::load::{self, Dose};
use crate::plan::{Figure, Mode, Row, name};
use crate::results::{Failure, Results, Sample};
use crate::up::{self, Up};
use crate::{aims, bpf, facts, json, markdown, memory, run, table, tools};

pub fn bench(options: &Options) -> Result<ExitCode> {
    options.check()?;
    tools::check(options)?;
    run::catch_interrupts()?;
    for left in mesh_tests::sweep() {
        eprintln!("removed {left}, which a killed run left behind");
    }
    let modes = options.modes();
    let envoy = if modes.iter().any(|mode| mode.is_envoy()) { Some(tools::envoy()?) } else { None };
    let envoy = envoy.as_deref();
    if options.profile {
        return profile(options, envoy);
    }
    let mut results = Results {
        facts: facts::gather(envoy),
        modes: modes.clone(),
        rounds: options.rounds(),
        seconds: options.seconds(),
        rate: 0,
        samples: Vec::new(),
        failures: Vec::new(),
        memory: Vec::new(),
        bpf: Vec::new(),
    };
    if options.rows().contains(&Row::Rate) {
        results.rate = options.rate.map_or_else(|| calibrate(&modes, envoy), Ok)?;
    }
    for round in 1..=options.rounds() {
        // Each round begins with another mode, so that none always follows the same.
        for turn in 0..modes.len() {
            let mode = modes[(turn + round as usize - 1) % modes.len()];
            let dose = Dose { seconds: options.seconds(), rate: results.rate };
            up::with(mode, 1, envoy, |up| one(up, round, &options.rows(), dose, &mut results))?;
        }
    }
    if modes.contains(&Mode::Ours) {
        let dose = Dose { seconds: options.seconds(), rate: results.rate };
        match bpf::measure(envoy, dose) {
            Ok(programs) => results.bpf = programs,
            Err(error) => note(&format!("the time of the kernel programs was not measured: {error:#}"))?,
        }
    }
    if !options.no_memory {
        for mode in modes.iter().filter(|mode| **mode != Mode::NoMesh) {
            match memory::measure(*mode, envoy) {
                Ok(points) => results.memory.extend(points),
                Err(error) => note(&format!("the memory of {} was not measured: {error:#}", name(*mode)))?,
            }
        }
    }
    results.facts.load_at_end = facts::load();
    report(options, &results)
}

/// Says it, unless it is only Ctrl-C that made it so.
fn note(text: &str) -> Result<()> {
    run::check()?;
    eprintln!("{text}");
    Ok(())
}

/// Half of what Envoy reaches at 16 connections (without Envoy, of the first mode), so that nobody is near its end.
fn calibrate(modes: &[Mode], envoy: Option<&Path>) -> Result<u32> {
    let first = *modes.first().context("there is a mode")?;
    let mode = modes.iter().rev().copied().find(|mode| mode.is_envoy()).unwrap_or(first);
    up::with(mode, 1, envoy, |up| {
        let measured = load::wrk(up, 16, Dose { seconds: 3, rate: 0 })?;
        let (_, most) = measured.figures.iter().find(|(f, _)| *f == Figure::PerSecond).context("wrk gives a rate")?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "requests per second of one machine"
        )]
        let hundreds = (most / 200.0) as u32;
        let rate = hundreds.max(1) * 100;
        eprintln!("fixed rate: {rate} requests/s, half of what {} reaches", name(mode));
        Ok(rate)
    })
}

/// All rows of one mode in one round. A row that fails is noted, and the others have their turn.
fn one(up: &Up<'_>, round: u32, rows: &[Row], dose: Dose, results: &mut Results) -> Result<()> {
    // Not counted: pages, caches, pooled tunnels.
    load::wrk(up, 16, Dose { seconds: 1, ..dose }).context("the warm-up failed")?;
    for &row in rows {
        let mode = up.mode;
        match quietest(up, row, dose) {
            Ok(figures) => {
                let sample = Sample { round, mode, row, figures: figures.into_iter().collect() };
                eprintln!(
                    "round {round}/{}  {:<9} {:<8} {}",
                    results.rounds,
                    name(mode),
                    name(row),
                    table::gist(&sample)
                );
                results.samples.push(sample);
            }
            Err(error) => {
                run::check()?;
                eprintln!("round {round}/{}  {:<9} {:<8} failed: {error:#}", results.rounds, name(mode), name(row));
                up.last_words();
                results.failures.push(Failure { round, mode, row, error: format!("{error:#}") });
            }
        }
    }
    Ok(())
}

/// A row during which neighbours were loud is measured again; the quietest time counts. Chosen by the neighbours' share
/// alone, never by the figures.
fn quietest(up: &Up<'_>, row: Row, dose: Dose) -> Result<Vec<(Figure, f64)>> {
    const TRIES: usize = 3;
    const LOUD: f64 = 0.1;
    let share = |figures: &[(Figure, f64)]| {
        figures.iter().find(|(figure, _)| *figure == Figure::Neighbours).map_or(0.0, |(_, share)| *share)
    };
    let mut best = load::row(up, row, dose)?;
    for _ in 1..TRIES {
        if share(&best) <= LOUD {
            break;
        }
        let again = load::row(up, row, dose)?;
        if share(&again) < share(&best) {
            best = again;
        }
    }
    Ok(best)
}

fn report(options: &Options, results: &Results) -> Result<ExitCode> {
    println!("{}", table::render(results, &aims::judge(results)));
    let path = match &options.json {
        Some(path) => path.clone(),
        None => tools::target()?.join("bench/l4.json"),
    };
    json::write(&path, results)?;
    println!("raw data: {}", path.display());
    if options.publish {
        for path in markdown::publish(results)? {
            println!("published: {}", path.display());
        }
    }
    Ok(if results.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Keeps 16 connections busy while somebody looks on with perf.
fn profile(options: &Options, envoy: Option<&Path>) -> Result<ExitCode> {
    for mode in options.modes() {
        up::with(mode, 1, envoy, |up| {
            let pids: Vec<String> = up.proxy_pids().iter().map(ToString::to_string).collect();
            let (seconds, mode_name) = (options.seconds(), name(mode));
            println!("mode {mode_name} is up for {seconds} s under 16 connections; in another terminal:");
            let whom = if pids.is_empty() { "-a".to_owned() } else { format!("-p {}", pids.join(",")) };
            let inside = seconds.saturating_sub(5).max(1);
            println!("  perf record -F 499 -g {whom} -o {mode_name}.perf -- sleep {inside}");
            println!("  perf report -i {mode_name}.perf --no-children");
            let measured = load::wrk(up, 16, Dose { seconds, rate: 0 })?;
            let rate = measured.figures.first().map_or(0.0, |(_, value)| *value);
            println!("it carried {rate:.0} requests/s");
            Ok(())
        })?;
    }
    Ok(ExitCode::SUCCESS)
}
