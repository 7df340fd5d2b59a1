//! Runs the cases of one file against one mesh: each a named test, the mesh built once and removed at the end.
//!
//! The standard test harness never drops a shared value, so that a shared mesh would be left behind; hence `harness =
//! false` and libtest-mimic, which understands the same arguments and prints the same lines.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Failed, Trial};

use crate::agent::{Agent, Controller};
use crate::mesh::{Mesh, lock};
use crate::pod::Pod;
use crate::process::tail;

/// Whether the mesh's agents run. Without them a case proves that it is itself right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `NODEMESH_MODE=plain`: no agent, no label; pods talk directly.
    Plain,
    Meshed,
}

impl Mode {
    pub fn of_this_run() -> Self {
        match std::env::var("NODEMESH_MODE").as_deref() {
            Ok("plain") => Self::Plain,
            Ok("mesh") | Err(_) => Self::Meshed,
            Ok(other) => panic!("NODEMESH_MODE is {other:?}; set it to `mesh` or `plain`"),
        }
    }

    pub fn is_meshed(self) -> bool {
        self == Self::Meshed
    }
}

/// A mesh with its agents. Dropped in the order of the fields: agents before the mesh they run in.
#[derive(Debug)]
pub struct World {
    pub mode: Mode,
    agents: Vec<Mutex<Agent>>,
    controller: Option<Mutex<Controller>>,
    mesh: Mesh,
}

impl World {
    /// Starts controller and agents in `mesh`, unless the mode is plain, and waits until they are ready.
    pub fn start(mesh: Mesh, mode: Mode, flags: &[&str]) -> Self {
        let mut world = Self { mode, agents: Vec::new(), controller: None, mesh };
        if mode.is_meshed() {
            world.controller = Some(Mutex::new(world.mesh.start_controller(&[])));
            for node in world.mesh.nodes() {
                world.agents.push(Mutex::new(world.mesh.start_agent(node.name(), flags)));
            }
        }
        world
    }

    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// The agent of a node, for this caller alone.
    pub fn agent(&self, node: &str) -> std::sync::MutexGuard<'_, Agent> {
        let agents = self.agents.iter().map(lock);
        agents.into_iter().find(|agent| agent.node().name() == node).expect("each node of a meshed world has an agent")
    }

    pub fn controller(&self) -> std::sync::MutexGuard<'_, Controller> {
        lock(self.controller.as_ref().expect("a meshed world has a controller"))
    }

    /// Waits until the agents have taken these pods in; at once in plain mode.
    pub fn wait_enrolled(&self, pods: &[&Pod]) {
        if self.mode.is_meshed() {
            for pod in pods {
                self.agent(pod.node()).wait_enrolled(pod, true);
            }
        }
    }

    /// Starts what a failed case has left dead, so that the next one fails for reasons of its own only.
    fn revive(&self) {
        if let Some(mut controller) = self.controller.as_ref().map(lock)
            && !controller.process().is_running()
        {
            controller.restart();
        }
        for mut agent in self.agents.iter().map(lock) {
            agent.thaw();
            if !agent.process().is_running() {
                agent.restart();
            }
        }
    }

    fn logs(&self) -> Vec<(String, String)> {
        let agents = self.agents.iter().map(|agent| {
            let agent = lock(agent);
            (format!("agent {}", agent.node().name()), agent.log())
        });
        let controller = self.controller.iter().map(|c| ("controller".to_owned(), lock(c).log()));
        agents.chain(controller).collect()
    }
}

/// A case: its name, and what it does with what [`run`] built.
pub type Case<T> = (&'static str, fn(&T));

/// Cases that say something about the mesh only: there are none of them in plain mode.
pub fn meshed_only<T>(cases: &'static [Case<T>]) -> &'static [Case<T>] {
    if Mode::of_this_run().is_meshed() { cases } else { &[] }
}

/// The cases of one file. `build` makes the mesh when the first case runs.
pub fn run<T: Send + Sync + 'static>(build: fn() -> T, world: fn(&T) -> &World, cases: &[Case<T>]) -> ExitCode {
    run_shared(build, move |built| world(built).revive(), move |built| world(built).logs(), cases)
}

/// The same for whatever cases share: `before` each, and the logs (name, text) to show when one fails.
pub fn run_shared<T: Send + Sync + 'static>(
    build: fn() -> T,
    before: impl Fn(&T) + Copy + Send + 'static,
    logs: impl Fn(&T) -> Vec<(String, String)> + Copy + Send + 'static,
    cases: &[Case<T>],
) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Cases of one file share pods and policies, and two cores.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let shared: Arc<Mutex<Stage<T>>> = Arc::new(Mutex::new(Stage::Unbuilt));
    let trials = cases.iter().map(|&(name, case)| {
        let shared = Arc::clone(&shared);
        Trial::test(name, move || {
            let built = shared_mesh(&shared, build)?;
            before(&built);
            let seen = logs(&built);
            // The panic's message and place have been printed by the time it is caught.
            catch_unwind(AssertUnwindSafe(|| case(&built))).map_err(|panic| {
                show_logs(&seen, &logs(&built));
                Failed::from(message(&*panic))
            })
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    // All that the cases held is gone: this removes the mesh.
    drop(std::mem::replace(&mut *lock(&shared), Stage::Broken));
    conclusion.exit_code()
}

enum Stage<T> {
    Unbuilt,
    Built(Arc<T>),
    Broken,
}

fn shared_mesh<T>(stage: &Mutex<Stage<T>>, build: fn() -> T) -> Result<Arc<T>, Failed> {
    let mut stage = lock(stage);
    match &*stage {
        Stage::Built(built) => return Ok(Arc::clone(built)),
        Stage::Broken => return Err("the mesh could not be built: see the first failure".into()),
        Stage::Unbuilt => *stage = Stage::Broken,
    }
    let built = catch_unwind(build).map(Arc::new).map_err(|panic| Failed::from(message(&*panic)))?;
    *stage = Stage::Built(Arc::clone(&built));
    Ok(built)
}

/// What agents and controller have said since the case began.
fn show_logs(before: &[(String, String)], after: &[(String, String)]) {
    for (name, log) in after {
        let seen = before.iter().find(|(n, _)| n == name).map_or(0, |(_, log)| log.len());
        let new = log.get(seen..).unwrap_or(log);
        if !new.is_empty() {
            eprintln!("--- {name} said ---\n{}", tail(new, 40));
        }
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_else(|| "it panicked".to_owned())
}
