//! The real binary under test: node agents and the controller, as child processes in their nodes' namespaces.

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::cgroup;
use crate::http;
use crate::mesh::{Mesh, Node, fresh_log};
use crate::netns::Netns;
use crate::pod::{Output, Pod};
use crate::process::{Process, tail};
use crate::wait::eventually;

/// How long an agent or controller may take until it is ready.
const READY: Duration = Duration::from_secs(20);
const METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 15020);
const READINESS: ([u8; 4], u16) = ([127, 0, 0, 1], 15021);
const CA_PORT: u16 = 15012;

/// A node agent. Killed on drop.
#[derive(Debug)]
pub struct Agent {
    node: Arc<Node>,
    arguments: Vec<OsString>,
    admin_socket: PathBuf,
    log: PathBuf,
    process: Process,
    /// What its own pod would be called in Kubernetes.
    pod: Option<String>,
}

/// The controller. Killed on drop.
#[derive(Debug)]
pub struct Controller {
    netns: Arc<Netns>,
    address: SocketAddr,
    arguments: Vec<OsString>,
    log: PathBuf,
    process: Process,
}

impl Mesh {
    /// Starts the controller in the mesh's control namespace and waits until it listens. `flags` come beyond the usual.
    pub fn start_controller(&self, flags: &[&str]) -> Controller {
        let netns = Arc::clone(self.control());
        let address = SocketAddr::from((self.control_v4(), CA_PORT));
        let mut arguments: Vec<OsString> = vec!["controller".into(), "--listen".into(), address.to_string().into()];
        arguments.extend(["--san".into(), address.ip().to_string().into()]);
        arguments.extend(["--config-dir".into(), self.manifests().folder().into()]);
        arguments.extend(["--state-dir".into(), controller_state(self).into()]);
        arguments.extend(flags.iter().map(OsString::from));
        let log = fresh_log(&self.logs(), "controller");
        let process = start("controller", &netns, &arguments, &log, None);
        let mut controller = Controller { netns, address, arguments, log, process };
        controller.wait_ready();
        controller
    }

    /// Starts the agent of a node and waits until it is ready. `flags` come beyond the usual. Unless `--embedded-ca` is
    /// among them, certificates come from the controller, with a join token made for this node.
    pub fn start_agent(&self, node: &str, flags: &[&str]) -> Agent {
        let mut agent = self.spawn_agent(node, flags);
        agent.wait_ready();
        agent
    }

    /// The same without waiting: for agents that are not to become ready.
    pub fn spawn_agent(&self, node: &str, flags: &[&str]) -> Agent {
        let node = Arc::clone(self.get_node(node));
        let admin_socket = admin_socket(self, &node);
        let mut arguments: Vec<OsString> = vec!["node".into(), "--node-name".into(), node.name().into()];
        arguments.extend(["--config-dir".into(), self.manifests().folder().into()]);
        arguments.extend(["--state-dir".into(), self.dir().join(format!("state-{}", node.name())).into()]);
        arguments.extend(["--admin-socket".into(), admin_socket.clone().into()]);
        arguments.extend(["--bpffs".into(), self.bpffs(node.name()).into()]);
        arguments.extend(["--metrics-address".into(), SocketAddr::from(METRICS).to_string().into()]);
        arguments.extend(["--readiness-address".into(), SocketAddr::from(READINESS).to_string().into()]);
        let given = |flag: &str| flags.contains(&flag);
        if !given("--embedded-ca") && !given("--ca-address") {
            let controller = SocketAddr::from((self.control_v4(), CA_PORT));
            arguments.extend(["--ca-address".into(), controller.to_string().into()]);
        }
        if !given("--embedded-ca") && !given("--join-token-file") {
            arguments.extend(["--join-token-file".into(), self.join_token(node.name()).into()]);
        }
        arguments.extend(flags.iter().map(OsString::from));
        let log = fresh_log(&self.logs(), &format!("agent-{}", node.name()));
        let process = start(&format!("agent {}", node.name()), node.netns(), &arguments, &log, None);
        Agent { node, arguments, admin_socket, log, process, pod: None }
    }

    /// A file with a token that lets `node` join, and no other.
    pub fn join_token(&self, node: &str) -> PathBuf {
        let mut command = Command::new(agent_binary());
        command.args(["controller", "token", "--node", node, "--state-dir"]).arg(controller_state(self));
        command.arg("--config-dir").arg(self.manifests().folder());
        let output = command.output().expect("the agent's binary runs");
        assert!(output.status.success(), "no join token: {}", String::from_utf8_lossy(&output.stderr));
        let path = self.dir().join(format!("token-{node}"));
        fs::write(&path, output.stdout).expect("the temporary folder is ours");
        path
    }

    /// Changes to a new root of the CA, as `mesh-agent controller rotate-root` does.
    pub fn rotate_root(&self) -> Output {
        let mut command = Command::new(agent_binary());
        command.args(["controller", "rotate-root", "--state-dir"]).arg(controller_state(self));
        command.arg("--config-dir").arg(self.manifests().folder());
        run(command)
    }

    /// Runs `mesh-agent node --cleanup` for a node whose agent is gone.
    pub fn cleanup(&self, node: &str) -> Output {
        self.cleanup_by(node, &admin_socket(self, self.get_node(node)))
    }

    /// The same by another admin socket, at which nobody answers.
    pub fn cleanup_by(&self, node: &str, admin_socket: &Path) -> Output {
        let node = self.get_node(node);
        let mut command = node.netns().command(&agent_binary().display().to_string());
        command.args(["node", "--cleanup", "--node-name", node.name(), "--bpffs"]).arg(self.bpffs(node.name()));
        command.arg("--admin-socket").arg(admin_socket);
        run(command)
    }
}

impl Agent {
    pub fn node(&self) -> &Node {
        &self.node
    }

    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What `meshctl --socket` is given.
    pub fn admin_socket(&self) -> &Path {
        &self.admin_socket
    }

    /// All that it has printed, over all its restarts: its log and the access log.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for readiness; says how long it took since the call.
    pub fn wait_ready(&mut self) -> Duration {
        let (node, process) = (&self.node, &mut self.process);
        eventually(READY, &format!("agent {} is ready", node.name()), || {
            assert!(process.is_running(), "agent {} ended before it was ready:\n{}", node.name(), process.log());
            http::get(node.netns(), READINESS.into(), "/healthz/ready").is_ok_and(|(status, _)| status == 200)
        })
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGTERM; it must end by itself.
    pub fn stop(&mut self) {
        let status = self.process.stop();
        assert!(status.success(), "agent {} ended with {status}:\n{}", self.node.name(), self.log());
    }

    /// SIGSTOP and SIGCONT: an agent that hangs.
    pub fn freeze(&self) {
        self.process.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.process.signal(Signal::CONT);
    }

    /// Starts it again as it was started, after [`Agent::kill`] or [`Agent::stop`]; says how long it took to be ready.
    pub fn restart(&mut self) -> Duration {
        let name = format!("agent {}", self.node.name());
        self.process = start(&name, self.node.netns(), &self.arguments, &self.log, self.pod.as_deref());
        self.wait_ready()
    }

    /// Starts a new agent with `flags` more, which takes over from this one, and waits until it has: the process of this
    /// one, which drains.
    pub fn upgrade(&mut self, flags: &[&str]) -> Process {
        let old = self.take_over(flags);
        self.process.wait_for("took over ", READY);
        self.wait_ready();
        old
    }

    /// Agents that are started from now on are in this pod of Kubernetes.
    pub fn be_in_pod(&mut self, pod: Option<&str>) {
        self.pod = pod.map(str::to_owned);
    }

    /// The process is the agent again, after another that was to take over from it has come to nothing.
    pub fn put_back(&mut self, old: Process) {
        self.log = old.log_file().to_owned();
        self.process = old;
    }

    /// Starts a new agent that is to take over from this one, and waits for nothing: the process of this one.
    pub fn take_over(&mut self, flags: &[&str]) -> Process {
        let name = format!("agent {}", self.node.name());
        let mut arguments = self.arguments.clone();
        arguments.push("--take-over".into());
        arguments.extend(flags.iter().map(OsString::from));
        let folder = self.log.parent().expect("a log lies in a folder");
        self.log = fresh_log(folder, &format!("agent-{}", self.node.name()));
        let new = start(&name, self.node.netns(), &arguments, &self.log, self.pod.as_deref());
        std::mem::replace(&mut self.process, new)
    }

    /// What Prometheus would scrape.
    pub fn metrics(&self) -> String {
        let (status, body) =
            http::get(self.node.netns(), METRICS.into(), "/metrics").expect("the agent serves metrics");
        assert_eq!(status, 200, "{body}");
        body
    }

    /// The sum of a metric over the series that have all of `labels`.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        http::metric(&self.metrics(), name, labels)
    }

    /// Runs `meshctl` against this agent.
    pub fn meshctl(&self, args: &[&str]) -> Output {
        let mut command = self.node.netns().command(&binary("meshctl", "NODEMESH_MESHCTL").display().to_string());
        command.arg("--socket").arg(&self.admin_socket).args(args);
        run(command)
    }

    /// The same with `-o json`, parsed.
    pub fn meshctl_json(&self, args: &[&str]) -> Value {
        let text = self.meshctl(&[args, &["-o", "json"]].concat()).success();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("meshctl {args:?} prints no JSON: {e}\n{text}"))
    }

    /// Waits until this agent has taken a pod in, or, with `false`, let it go.
    pub fn wait_enrolled(&self, pod: &Pod, enrolled: bool) {
        let what = format!("pod {}/{} has enrolled = {enrolled}", pod.namespace(), pod.name());
        let patience = Duration::from_secs(10);
        let start = Instant::now();
        while self.is_enrolled(pod) != enrolled {
            let shown = || format!("{}\n{}", self.meshctl(&["workloads"]).stdout, tail(&self.log(), 40));
            assert!(start.elapsed() < patience, "waited {patience:?} in vain: {what}; the agent says:\n{}", shown());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether this agent has taken a pod in, as `meshctl workloads` says.
    pub fn is_enrolled(&self, pod: &Pod) -> bool {
        find_pod(&self.meshctl_json(&["workloads"]), pod).unwrap_or(false)
    }
}

impl Controller {
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    pub fn restart(&mut self) {
        self.process = start("controller", &self.netns, &self.arguments, &self.log, None);
        self.wait_ready();
    }

    fn wait_ready(&mut self) {
        let (netns, address, process) = (&self.netns, self.address, &mut self.process);
        eventually(READY, "the controller listens", || {
            assert!(process.is_running(), "the controller ended before it was ready:\n{}", process.log());
            netns.run(|| std::net::TcpStream::connect(address).is_ok())
        });
    }
}

/// Whether the JSON of `meshctl workloads` has the pod as enrolled; `None` where it is not listed.
fn find_pod(json: &Value, pod: &Pod) -> Option<bool> {
    match json {
        Value::Array(items) => items.iter().find_map(|item| find_pod(item, pod)),
        Value::Object(map) => {
            if map.get("namespace").and_then(Value::as_str) == Some(pod.namespace())
                && map.get("name").and_then(Value::as_str) == Some(pod.name())
            {
                return map.get("state").and_then(Value::as_str).map(|state| state == "enrolled");
            }
            map.values().find_map(|value| find_pod(value, pod))
        }
        _ => None,
    }
}

/// In the cgroup that `--cgroup` names, where it does: an agent must be in it.
fn start(name: &str, netns: &Netns, arguments: &[OsString], log: &Path, pod: Option<&str>) -> Process {
    let binary = agent_binary().display().to_string();
    let cgroup = arguments.iter().skip_while(|argument| *argument != "--cgroup").nth(1);
    let mut command = match cgroup {
        Some(cgroup) => cgroup::within(Path::new(cgroup), netns.command("sh"), &binary),
        None => netns.command(&binary),
    };
    command.args(arguments);
    if let Some(pod) = pod {
        command.env("NODEMESH_POD_NAME", pod);
    }
    Process::start(name, command, log)
}

fn controller_state(mesh: &Mesh) -> PathBuf {
    mesh.dir().join("state-controller")
}

fn admin_socket(mesh: &Mesh, node: &Node) -> PathBuf {
    mesh.dir().join(format!("admin-{}.sock", node.name()))
}

fn run(mut command: Command) -> Output {
    let output = command.output().expect("the binary runs");
    Output {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The binary `mesh-agent` under test.
pub fn agent_binary() -> PathBuf {
    binary("mesh-agent", "NODEMESH_AGENT")
}

/// The binary `meshctl` under test.
pub fn meshctl_binary() -> PathBuf {
    binary("meshctl", "NODEMESH_MESHCTL")
}

/// The test peer, which the test build has put beside the tests.
pub fn peer_binary() -> PathBuf {
    let me = std::env::current_exe().expect("a process knows its own file");
    let beside = me.ancestors().skip(1).take(2).map(|folder| folder.join("mesh-peer")).find(|path| path.exists());
    beside.unwrap_or_else(|| panic!("mesh-peer is not built; run `cargo build -p mesh-tests --bins`"))
}

/// What the variable names, or the newest build.
fn binary(name: &str, variable: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let target = target_folder();
    let builds = ["release", "debug"].map(|profile| target.join(profile).join(name));
    let built = |path: &PathBuf| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let newest = builds.into_iter().filter(|path| built(path).is_some()).max_by_key(built);
    newest.unwrap_or_else(|| panic!("{name} is not built; run `cargo xtask build`, or set {variable} to its path"))
}

fn target_folder() -> PathBuf {
    if let Some(path) = std::env::var_os("CARGO_TARGET_DIR") {
        return path.into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").join("target")
}
