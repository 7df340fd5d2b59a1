//! `cargo xtask test`: the rings, from what needs least to what needs most. A ring that cannot run fails: nothing is
//! skipped in silence.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::cluster::stage::Stage;
use crate::run::{Tally, cargo, is_root, root, tests, timed};
use crate::{build, lint, setup};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Ring {
    /// Format, clippy, licences, house rules
    Lint,
    /// Tests beside the code: no root, no network
    Unit,
    /// Each kernel program on real sockets (root)
    Kernel,
    /// Two nodes, five pods, real traffic (root)
    Mesh,
    /// A real Kubernetes of two nodes, and the mesh installed in it (root)
    Cluster,
}

impl Ring {
    const ALL: [Self; 5] = [Self::Lint, Self::Unit, Self::Kernel, Self::Mesh, Self::Cluster];

    fn name(self) -> &'static str {
        match self {
            Self::Lint => "lint",
            Self::Unit => "unit",
            Self::Kernel => "kernel",
            Self::Mesh => "mesh",
            Self::Cluster => "cluster",
        }
    }

    fn needs_root(self) -> bool {
        matches!(self, Self::Kernel | Self::Mesh | Self::Cluster)
    }
}

pub fn run(ring: Option<Ring>, filter: Option<&str>) -> Result<()> {
    let rings = ring.map_or_else(|| Ring::ALL.to_vec(), |ring| vec![ring]);
    let start = Instant::now();
    if rings.iter().any(|ring| ring.needs_root()) {
        if !is_root() {
            bail!(
                "the rings kernel, mesh and cluster make network namespaces: run as root, or `cargo xtask test unit`"
            );
        }
        setup::check()?;
        crate::sweep();
        build::unless_named()?;
    }
    // From nothing it takes minutes, in which the other rings leave processors free. Where it fails, the ring says why.
    let building = rings.contains(&Ring::Cluster).then(cluster_in_background).transpose()?;
    let mut results: Vec<(Ring, Tally, Duration)> = Vec::new();
    let mut building = building;
    for ring in rings {
        if ring == Ring::Cluster
            && let Some(mut child) = building.take()
        {
            child.wait().context("cannot wait for the cluster's programs")?;
        }
        let (tally, took) = timed(|| one(ring, filter));
        // A ring that could not even start is a failure of the run, with its reason; the others still have their say.
        let tally = tally.unwrap_or_else(|e| {
            eprintln!("error: ring {}: {e:#}", ring.name());
            Tally { passed: 0, failed: 1 }
        });
        results.push((ring, tally, took));
    }
    sum_up(&results, start.elapsed())
}

/// Builds the programs of a cluster that the cache does not hold, behind everything else.
fn cluster_in_background() -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new("nice");
    command.args(["-n", "19"]).arg(program).args(["cluster", "build"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("cannot run nice: `cargo xtask setup` installs it")
}

fn one(ring: Ring, filter: Option<&str>) -> Result<Tally> {
    match ring {
        Ring::Lint => Ok(lint::tally()),
        Ring::Unit => tests("unit tests", with_filter(&["test", "--workspace", "--exclude", "mesh-tests"], filter)),
        Ring::Kernel => {
            tests("kernel tests", with_filter(&["test", "--package", "mesh-tests", "--test", "kernel"], filter))
        }
        Ring::Mesh => {
            let files = mesh_files()?;
            let mut args = vec!["test", "--package", "mesh-tests", "--lib", "--bins"];
            for file in &files {
                args.extend(["--test", file]);
            }
            let mut command = with_filter(&args, filter);
            name_programs(&mut command);
            tests("mesh tests", command)
        }
        Ring::Cluster => {
            let stage = Stage::for_tests()?;
            let mut command = with_filter(&["test", "--package", "mesh-tests", "--test", "cluster"], filter);
            name_programs(&mut command);
            command.env("NODEMESH_CLUSTER", stage.folder());
            tests("cluster tests", command)
        }
    }
}

/// What was just built, even where a newer debug build lies beside it; unless the user names one.
fn name_programs(command: &mut Command) {
    for (variable, name) in [("NODEMESH_AGENT", "mesh-agent"), ("NODEMESH_MESHCTL", "meshctl")] {
        if std::env::var_os(variable).is_none() {
            command.env(variable, build::folder().join("release").join(name));
        }
    }
}

fn with_filter(args: &[&str], filter: Option<&str>) -> Command {
    let mut command = cargo(args);
    command.arg("--no-fail-fast").args(filter);
    command
}

/// The files of the mesh ring: all in tests/tests but the kernel's and the cluster's.
fn mesh_files() -> Result<Vec<String>> {
    let folder = root().join("tests/tests");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let names =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned));
    let mut names: Vec<String> = names.filter(|name| name != "kernel" && name != "cluster").collect();
    names.sort();
    Ok(names)
}

fn sum_up(results: &[(Ring, Tally, Duration)], took: Duration) -> Result<()> {
    let mut total = Tally::default();
    println!();
    for (ring, tally, took) in results {
        println!("{:8} {:4} passed {:4} failed {:7.1} s", ring.name(), tally.passed, tally.failed, took.as_secs_f64());
        total += *tally;
    }
    println!("all in {:.1} s", took.as_secs_f64());
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 {
        bail!("{} tests failed", total.failed);
    }
    if total.passed == 0 {
        bail!("no test ran: is the filter right?");
    }
    Ok(())
}
