//! Every chore of the project, one subcommand a file: `cargo xtask help` lists them.

mod bench;
mod build;
mod chart;
mod cluster;
mod demo;
mod dist;
mod fuzz;
mod image;
mod lint;
mod run;
mod setup;
mod test;
mod tidy;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Nodemesh's chores", subcommand_required = true)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Install what building and testing need; says what it does, and does nothing twice
    Setup,
    /// Build the release binaries, kernel programs included
    Build,
    /// Run the tests, all rings or one (the rings kernel, mesh and cluster need root)
    Test {
        /// lint, unit, kernel, mesh or cluster; all of them without it
        ring: Option<test::Ring>,
        /// Only tests whose name holds this
        filter: Option<String>,
    },
    /// Check format, clippy, licences and the house rules
    Lint,
    /// Run each fuzz target for a bounded time
    Fuzz {
        /// Seconds for each target
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Measure against no mesh and against sidecars
    Bench(bench::Arguments),
    /// Tell what Nodemesh does, with real traffic, on this machine (needs root)
    Demo {
        /// Leave it running and print the commands to play with it
        #[arg(long)]
        keep: bool,
        /// In a real Kubernetes of two nodes, which it starts here, as a user would install it
        #[arg(long)]
        kubernetes: bool,
    },
    /// A real Kubernetes of two nodes on this machine (needs root)
    Cluster(cluster::Arguments),
    /// Check the Helm chart with Helm, built once
    Chart,
    /// Pack the programs into an image as an OCI archive, with its bill of materials beside it
    Image(image::Arguments),
    /// Make a release: programs, image, chart, plain manifests, checksums
    Dist,
    /// Remove what killed test runs and demos left behind
    Sweep,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().chore {
        Chore::Setup => setup::run(),
        Chore::Build => build::run(),
        Chore::Test { ring, filter } => test::run(ring, filter.as_deref()),
        Chore::Lint => lint::run(),
        Chore::Fuzz { seconds } => fuzz::run(Duration::from_secs(seconds)),
        Chore::Bench(arguments) => bench::run(&arguments),
        Chore::Demo { keep, kubernetes } => demo::run(keep, kubernetes),
        Chore::Cluster(arguments) => cluster::run(&arguments),
        Chore::Chart => chart::run(),
        Chore::Dist => dist::run(),
        Chore::Image(arguments) => image::run(&arguments),
        Chore::Sweep => {
            sweep();
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Says what it removes.
fn sweep() {
    for removed in mesh_tests::sweep() {
        println!("removed {removed}, left behind by a run that was killed");
    }
}
