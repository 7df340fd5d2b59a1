//! One mode, up: two nodes, pods, a server, and what carries the traffic between them.
//!
//! Each mode of each round is brought up afresh and taken down after: nothing of one mode (a nat table, a program on a
//! cgroup hook) is there while another is measured.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_tests::{Mesh, Pod, PodSpec, Process, eventually};

use crate::certs::Ca;
use crate::cpu::Role;
use crate::envoy::{self, Sidecar};
use crate::ours::{self, Ours};
use crate::parse::WRK_SCRIPT;
use crate::plan::Mode;
use crate::{checks, load, run};

const HTTP: u16 = 8080;
const BULK: u16 = 5201;
/// What nginx answers.
pub const BODY: usize = 128;

#[derive(Debug)]
pub struct Up<'m> {
    // Dropped in this order: what carries the traffic first.
    proxies: Proxies,
    nginx: Process,
    iperf: Process,
    pub mesh: &'m Mesh,
    pub mode: Mode,
    pub client: Arc<Pod>,
    pub clients: Vec<Arc<Pod>>,
    pub server: Arc<Pod>,
    /// In the mesh, and not allowed to speak to the server.
    pub stranger: Arc<Pod>,
    /// Not in the mesh.
    pub outsider: Arc<Pod>,
    /// Of Envoy's mode: the CA that its certificates come from.
    pub ca: Option<Ca>,
    /// Seconds of processor that a second takes without load.
    pub idle: f64,
    proxy_pids: Vec<u32>,
    controller: Option<u32>,
    log_number: AtomicU32,
}

#[derive(Debug)]
enum Proxies {
    None,
    Envoy { _processes: Vec<Process> },
    Ours(Ours),
}

/// Brings a mode up with so many client pods, checks that it is what it claims to be, does `work`, takes it down.
pub fn with<R>(mode: Mode, clients: usize, envoy: Option<&Path>, work: impl FnOnce(&Up<'_>) -> Result<R>) -> Result<R> {
    run::check()?;
    let mesh = Mesh::new().node("n1").node("n2");
    let mut up = Up::start(&mesh, mode, clients, envoy)?;
    checks::check(&up)?;
    up.idle = load::idle(Duration::from_millis(700))?;
    work(&up)
}

impl<'m> Up<'m> {
    fn start(mesh: &'m Mesh, mode: Mode, clients: usize, envoy: Option<&Path>) -> Result<Self> {
        let pod = |node: &str, name: &str| {
            let pod = mesh.add(PodSpec::new(node, name));
            tune(&pod);
            pod
        };
        let server = pod("n2", "bench/server");
        let clients: Vec<Arc<Pod>> = (1..=clients).map(|n| pod("n1", &format!("bench/client-{n}"))).collect();
        let client = Arc::clone(clients.first().context("there is a client")?);
        let (stranger, outsider) = (pod("n1", "bench/stranger"), pod("n1", "plain/outsider"));
        let nginx = start_nginx(mesh, &server)?;
        let iperf = server.start("iperf3", &["-s", "-p", &BULK.to_string()]);
        for port in [HTTP, BULK] {
            listens(&server, port)?;
        }
        let (mut proxies, mut ca, mut proxy_pids, mut controller) = (Proxies::None, None, Vec::new(), None);
        match mode {
            Mode::NoMesh => {}
            Mode::EnvoyC1 | Mode::EnvoyC2 => {
                let binary = envoy.context("Envoy was installed")?;
                let made = Ca::make(mesh.dir(), "ca")?;
                let processes = start_envoys(mesh, mode, binary, &made, &clients, &server)?;
                proxy_pids = processes.iter().map(Process::id).collect();
                ca = Some(made);
                proxies = Proxies::Envoy { _processes: processes };
            }
            Mode::Ours => {
                let inside = clients.iter().chain([&server, &stranger]).map(AsRef::as_ref).collect::<Vec<&Pod>>();
                let mut ours = ours::start(mesh, &inside)?;
                proxy_pids = ours.agent_pids();
                controller = Some(ours.controller_pid());
                proxies = Proxies::Ours(ours);
            }
        }
        let script = mesh.dir().join("wrk.lua");
        fs::write(&script, WRK_SCRIPT).with_context(|| format!("cannot write {}", script.display()))?;
        Ok(Self {
            proxies,
            nginx,
            iperf,
            mesh,
            mode,
            client,
            clients,
            server,
            stranger,
            outsider,
            ca,
            idle: 0.0,
            proxy_pids,
            controller,
            log_number: AtomicU32::new(0),
        })
    }

    pub fn http(&self) -> SocketAddr {
        (self.server.v4(), HTTP).into()
    }

    pub fn bulk(&self) -> SocketAddr {
        (self.server.v4(), BULK).into()
    }

    pub fn url(&self) -> String {
        format!("http://{}/", self.http())
    }

    pub fn wrk_script(&self) -> PathBuf {
        self.mesh.dir().join("wrk.lua")
    }

    /// A fresh file for what a program says.
    pub fn log(&self, what: &str) -> PathBuf {
        let number = self.log_number.fetch_add(1, Ordering::Relaxed);
        self.mesh.logs().join(format!("{}-{number}.log", what.replace(' ', "-")))
    }

    pub fn roles(&self) -> Vec<(u32, Role)> {
        let proxies = self.proxy_pids.iter().map(|pid| (*pid, Role::Proxy));
        proxies.chain([self.nginx.id(), self.iperf.id()].map(|pid| (pid, Role::Server))).collect()
    }

    /// Of the proxies: the sidecars of the clients in their order, then the server's; or the agents.
    pub fn proxy_pids(&self) -> &[u32] {
        &self.proxy_pids
    }

    pub fn controller_pid(&self) -> Option<u32> {
        self.controller
    }

    pub fn ours(&self) -> Option<&Ours> {
        match &self.proxies {
            Proxies::Ours(ours) => Some(ours),
            Proxies::None | Proxies::Envoy { .. } => None,
        }
    }

    /// What the proxies said last, for whoever looks into a load that failed: the logs go with the mesh.
    pub fn last_words(&self) {
        let logs = fs::read_dir(self.mesh.logs()).into_iter().flatten().flatten().map(|entry| entry.path());
        for path in logs {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if ["agent", "controller", "envoy", "ab", "iperf3"].iter().any(|program| name.starts_with(program)) {
                let text = fs::read_to_string(&path).unwrap_or_default();
                eprintln!("--- end of {name} ---\n{}", mesh_tests::tail(&text, 8));
            }
        }
    }

    pub fn proxies_rss_mib(&self) -> f64 {
        self.proxy_pids.iter().map(|pid| crate::memory::of(*pid).rss).sum()
    }
}

/// Alike for all modes. The kernel's default congestion control may pace iperf3 (bbr does), a namespace may not have any
/// other than reno on some machines; and ab leaves a port in TIME_WAIT with every connection.
fn tune(pod: &Pod) {
    let netns = pod.netns();
    netns.sysctl("net.ipv4.tcp_congestion_control", "reno");
    netns.sysctl("net.ipv4.ip_local_port_range", "16000 65000");
    netns.sysctl("net.ipv4.tcp_tw_reuse", "1");
}

/// One process that answers everything with 128 bytes.
fn start_nginx(mesh: &Mesh, server: &Pod) -> Result<Process> {
    let folder = mesh.dir().join("nginx");
    fs::create_dir(&folder).context("the temporary folder is ours")?;
    let config = folder.join("nginx.conf");
    let text = format!(
        "daemon off;\nmaster_process off;\npid {pid};\nerror_log stderr error;\nevents {{ worker_connections 4096; }}\n\
         http {{\n  access_log off;\n  keepalive_requests 100000000;\n{paths}  server {{\n    listen {HTTP} backlog=4096;\n    \
         location / {{ default_type text/plain; return 200 \"{body}\"; }}\n  }}\n}}\n",
        pid = folder.join("pid").display(),
        paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("  {kind}_temp_path {};\n", folder.join(kind).display()))
            .concat(),
        body = "m".repeat(BODY),
    );
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    Ok(server.start("nginx", &["-p", &folder.display().to_string(), "-c", &config.display().to_string()]))
}

fn listens(pod: &Pod, port: u16) -> Result<()> {
    let sees = || {
        let table = pod.output("ss", &["-Hltn", &format!("sport = :{port}")]);
        !table.stdout.trim().is_empty()
    };
    eventually(Duration::from_secs(10), &format!("the server listens on {port}"), sees);
    run::check()
}

fn start_envoys(
    mesh: &Mesh,
    mode: Mode,
    binary: &Path,
    ca: &Ca,
    clients: &[Arc<Pod>],
    server: &Arc<Pod>,
) -> Result<Vec<Process>> {
    let mut processes = Vec::new();
    let (root, server_id) = (ca.root(), server.spiffe_id());
    for pod in clients.iter().chain([server]) {
        run::check()?;
        let certificate = ca.issue(pod.name(), &pod.spiffe_id())?;
        let sidecar = Sidecar {
            binary,
            concurrency: if mode == Mode::EnvoyC1 { 1 } else { 2 },
            certificate: &certificate,
            root: &root,
            server: &server_id,
            allowed: "spiffe://cluster.local/ns/bench/sa/client",
        };
        processes.push(envoy::start(mesh, pod, &sidecar)?);
    }
    Ok(processes)
}
