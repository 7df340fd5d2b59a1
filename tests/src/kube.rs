//! A real cluster, as `cargo xtask cluster` starts it, seen as its user sees it: with kubectl and meshctl.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::agent::meshctl_binary;
use crate::capture::{Capture, DISCARD};
use crate::cgroup::cgroup2_mount;
use crate::netns::Netns;
use crate::process::Process;
use crate::wait::eventually;

/// Names the cluster's folder.
const VARIABLE: &str = "NODEMESH_CLUSTER";
/// Where the API server is, seen from a node.
const CONTROL: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 1);

/// The cluster of this run.
#[derive(Debug)]
pub struct Kube {
    folder: PathBuf,
    /// With its prefix: begins the names of its network namespaces.
    name: String,
    control: Netns,
    logs: tempfile::TempDir,
    next: AtomicUsize,
}

/// How a command ended.
#[derive(Debug)]
pub struct Said {
    pub ok: bool,
    pub out: String,
    pub err: String,
    what: String,
}

impl Said {
    /// Its standard output; panics with its errors where it failed.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(self.ok, "`{}` failed: {}{}", self.what, self.out, self.err);
        self.out
    }

    /// Its errors; panics where it did not fail.
    #[track_caller]
    pub fn failure(self) -> String {
        assert!(!self.ok, "`{}` should have failed, and said: {}", self.what, self.out);
        self.err
    }
}

impl Kube {
    /// The cluster that `NODEMESH_CLUSTER` names.
    pub fn of_this_run() -> Self {
        let folder = std::env::var_os(VARIABLE).map(PathBuf::from);
        Self::at(&folder.unwrap_or_else(|| panic!("set {VARIABLE}, or run `cargo xtask test cluster`")))
    }

    /// The cluster in this folder.
    pub fn at(folder: &Path) -> Self {
        let folder = folder.to_owned();
        let name = folder.file_name().and_then(|n| n.to_str()).expect("a cluster's folder has its name").to_owned();
        let control = Netns::open(&format!("{name}-control"));
        let logs = tempfile::tempdir().expect("a temporary folder");
        Self { folder, name, control, logs, next: AtomicUsize::new(0) }
    }

    /// The programs' logs, process ids and settings of a place: `control`, `n1` or `n2`.
    pub fn place(&self, place: &str) -> PathBuf {
        self.folder.join(place)
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("pki/admin.conf")
    }

    /// The network namespace of a node.
    pub fn netns(&self, node: &str) -> Netns {
        Netns::open(&format!("{}-{node}", self.name))
    }

    /// A command in a node's network and file system.
    pub fn on_node(&self, node: &str, program: &str) -> Command {
        let record = std::fs::read_to_string(self.place(node).join("holder.pid")).expect("the node runs");
        let holder = record.split(' ').next().expect("the record begins with a process id").to_owned();
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}-{node}", self.name)).arg(format!("--mount=/proc/{holder}/ns/mnt"));
        command.arg(program);
        command
    }

    pub fn kubectl(&self, args: &[&str]) -> Said {
        self.kubectl_with(args, "")
    }

    /// With `input` on its standard input.
    pub fn kubectl_with(&self, args: &[&str], input: &str) -> Said {
        let mut command = Command::new(self.folder.join("bin/kubectl"));
        command.arg("--request-timeout=20s").args(args).env("KUBECONFIG", self.kubeconfig());
        run(command, input)
    }

    pub fn meshctl(&self, args: &[&str]) -> Said {
        let mut command = self.control.command(&meshctl_binary().display().to_string());
        command.args(args).env("KUBECONFIG", self.kubeconfig());
        run(command, "")
    }

    /// Applies manifests.
    #[track_caller]
    pub fn apply(&self, manifests: &str) {
        self.kubectl_with(&["apply", "-f", "-"], manifests).success();
    }

    /// One object, or a list; `null` where there is none.
    #[track_caller]
    pub fn get(&self, args: &[&str]) -> Value {
        let said = self.kubectl(&[&["get", "-o", "json"], args].concat());
        if !said.ok && said.err.contains("NotFound") {
            return Value::Null;
        }
        serde_json::from_str(&said.success()).expect("kubectl prints JSON")
    }

    /// A running pod's output since it started.
    pub fn log(&self, namespace: &str, pod: &str) -> String {
        self.kubectl(&["-n", namespace, "logs", pod]).out
    }

    /// Waits until the rollout of `what`, such as `deploy/web`, is done.
    #[track_caller]
    pub fn rolled_out(&self, namespace: &str, what: &str) {
        self.kubectl(&["-n", namespace, "rollout", "status", what, "--timeout=120s", "--request-timeout=0"]).success();
    }

    /// Waits until the pod is Ready.
    #[track_caller]
    pub fn ready(&self, namespace: &str, pod: &str) {
        let what = format!("pod/{pod}");
        self.kubectl(&[
            "-n",
            namespace,
            "wait",
            "--for=condition=Ready",
            &what,
            "--timeout=120s",
            "--request-timeout=0",
        ])
        .success();
    }

    /// What passes the link of a node from now on.
    pub fn capture(&self, node: &str) -> Capture {
        let log = self.fresh_log("tcpdump");
        let sender = self.netns(node).run(|| UdpSocket::bind(("0.0.0.0", 0)).expect("a UDP socket"));
        sender.connect((CONTROL, DISCARD)).expect("a UDP socket connects to anything");
        Capture::on(&self.control, node, &log, sender)
    }

    /// Runs a program on this machine, inside a node's network, until the test lets go of it.
    pub fn start(&self, node: &str, program: &str, args: &[&str]) -> Process {
        let mut command = self.netns(node).command(program);
        command.args(args);
        Process::start(program, command, &self.fresh_log("process"))
    }

    fn fresh_log(&self, name: &str) -> PathBuf {
        self.logs.path().join(format!("{name}-{}.log", self.next.fetch_add(1, Ordering::Relaxed)))
    }

    /// Kills a program of a node, such as kubelet, and starts it again as it was started. It runs on after the test.
    pub fn restart(&self, node: &str, program: &str) {
        let record = self.place(node).join(format!("{program}.pid"));
        let text = std::fs::read_to_string(&record).unwrap_or_else(|e| panic!("{program} of {node} does not run: {e}"));
        let old = text.split(' ').next().and_then(|id| id.parse().ok()).expect("a record begins with a process id");
        let proc = PathBuf::from(format!("/proc/{old}"));
        let read =
            |name: &str| std::fs::read(proc.join(name)).unwrap_or_else(|e| panic!("{program} has no {name}: {e}"));
        let words = |bytes: Vec<u8>| -> Vec<OsString> {
            bytes
                .split(|b| *b == 0)
                .filter(|word| !word.is_empty())
                .map(|word| OsString::from_vec(word.to_vec()))
                .collect()
        };
        let (arguments, variables) = (words(read("cmdline")), words(read("environ")));
        let executable = std::fs::read_link(proc.join("exe")).expect("a process has a program");
        let own = String::from_utf8_lossy(&read("cgroup")).into_owned();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("a process has a cgroup");
        let procs = cgroup2_mount().join(own).join("cgroup.procs");
        let begun = |stat: &str| -> Option<String> {
            let rest = stat.rsplit_once(')')?.1.trim_start();
            (!rest.starts_with('Z')).then(|| rest.split_whitespace().nth(19).map(str::to_owned)).flatten()
        };
        let lives = |id: u32| std::fs::read_to_string(format!("/proc/{id}/stat")).ok().and_then(|stat| begun(&stat));
        assert_eq!(lives(old).as_deref(), text.trim().split(' ').nth(1), "{program} of {node} is another process");
        let pid = Pid::from_raw(old.cast_signed()).expect("a process id is not 0");
        kill_process(pid, Signal::KILL).expect("it can be killed");
        self.eventually(&format!("{program} of {node} is gone"), || lives(old).is_none());

        let mut command = self.on_node(node, "sh");
        command.args(["-c", "echo $$ > \"$1\" && shift && exec \"$@\"", "sh"]).arg(procs).arg(executable);
        command.args(&arguments[1..]).env_clear();
        for variable in &variables {
            let text = variable.as_bytes();
            if let Some(at) = text.iter().position(|b| *b == b'=') {
                command.env(OsStr::from_bytes(&text[..at]), OsStr::from_bytes(&text[at + 1..]));
            }
        }
        let log = self.place(node).join(format!("{program}.log"));
        let log = File::options().append(true).open(log).expect("a program of the cluster has a log");
        command.stdin(Stdio::null()).stderr(log.try_clone().expect("a file can be duplicated")).stdout(log);
        let mut child = command.process_group(0).spawn().expect("it can be started as before");
        let new = child.id();
        // Should it end while this runs, it leaves nothing.
        std::thread::spawn(move || child.wait());
        let begun = lives(new).unwrap_or_else(|| panic!("{program} of {node} has ended at once"));
        std::fs::write(record, format!("{new} {begun}\n")).expect("the cluster's folder can be written to");
    }

    /// What agents and controllers have said, by pod.
    pub fn mesh_logs(&self) -> Vec<(String, String)> {
        let pods = self.kubectl(&["-n", "nodemesh-system", "get", "pods", "-o", "name"]).out;
        let log = |pod: &str| self.kubectl(&["-n", "nodemesh-system", "logs", pod, "--all-containers"]).out;
        pods.lines().map(|pod| (pod.to_owned(), log(pod))).collect()
    }

    /// Polls until `condition` holds; says how long it took.
    #[track_caller]
    pub fn eventually(&self, what: &str, condition: impl FnMut() -> bool) -> Duration {
        eventually(Duration::from_secs(60), what, condition)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

fn run(mut command: Command, input: &str) -> Said {
    let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let program = command.get_program().to_string_lossy().into_owned();
    let what = format!("{} {}", program.rsplit('/').next().unwrap_or_default(), words.join(" "));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot run `{what}`: {e}"));
    // A command that reads nothing may end before all is written.
    let _ = child.stdin.take().expect("stdin is piped").write_all(input.as_bytes());
    let output = child.wait_with_output().expect("the command was started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said { ok: output.status.success(), out: text(&output.stdout), err: text(&output.stderr), what }
}
