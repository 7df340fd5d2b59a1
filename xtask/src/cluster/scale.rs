//! `cargo xtask bench scale`: what a node agent needs in a large mesh that it has no part in.
//!
//! In come the agent's binary and numbers; out come its memory and how soon it knows what changes. etcd and kube-apiserver of
//! a cluster of its own run, nothing else: objects are written into etcd as the API server would write them, a hundred a
//! request, and the agent reads them through the API server.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use serde_json::{Value, json};

use super::command::{self, SHORT, check_interrupt, wait_until};
use super::layout::{CONTROL, Cluster};
use super::process::{self, Recorded};
use super::{build, certificates, cgroups, components, down, lock, network, up};
use crate::run::is_root;

/// What a node agent may need with the numbers that are the defaults.
const LIMIT_MB: f64 = 150.0;
/// Objects in one request; etcd takes 128.
const BATCH: usize = 100;
/// The node whose agent is measured.
const NODE: &str = "node-0";
/// Of a second, in /proc: the same on every Linux.
const TICKS: f64 = 100.0;
/// For the API server to hand over everything.
const PATIENCE: Duration = Duration::from_secs(900);

#[derive(Parser)]
#[command(name = "cargo xtask bench scale")]
pub struct Arguments {
    #[arg(long, default_value_t = 100_000)]
    pods: usize,
    #[arg(long, default_value_t = 5_000)]
    nodes: usize,
    /// Each with an equal part of the pods behind it
    #[arg(long, default_value_t = 5_000)]
    services: usize,
    /// A tenth of everything, and what that means for the whole: by the difference to a twentieth, since the agent needs
    /// some memory to read pages of any mesh
    #[arg(long)]
    quick: bool,
    /// How many pods change, one after the other and then all at once
    #[arg(long, default_value_t = 100)]
    changes: usize,
    /// The agent, if not the one that is built for release
    #[arg(long)]
    agent: Option<PathBuf>,
}

impl Arguments {
    /// Whether the release's agent is needed.
    pub fn builds(&self) -> bool {
        self.agent.is_none()
    }
}

/// A cluster without nodes, ended when this is dropped.
struct Bench {
    cluster: Cluster,
    agent: Recorded,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.agent.kill();
        if let Err(e) = down::run(&self.cluster) {
            eprintln!("error: {e:#}; `cargo xtask cluster --name {} down` tries again", self.cluster.name());
        }
    }
}

/// `agent` is the one that is built for release.
pub fn run(mut arguments: Arguments, agent: &Path) -> Result<()> {
    if !is_root() {
        bail!("the benchmark makes network namespaces: run as root");
    }
    let part = if arguments.quick { 10 } else { 1 };
    for number in [&mut arguments.pods, &mut arguments.nodes, &mut arguments.services] {
        *number = number.div_ceil(part);
    }
    let agent = fs::canonicalize(arguments.agent.as_deref().unwrap_or(agent)).context("cannot find the agent")?;
    command::watch_interrupt()?;
    let programs = build::ensure()?;
    let cluster = Cluster::new("scale")?;
    let lock = lock(&cluster)?;
    down::clear(&cluster)?;
    let bench = Bench { agent: Recorded::new(&cluster, CONTROL, "agent"), cluster };
    up::step("network", || network::ensure(&bench.cluster))?;
    up::step("certificates", || certificates::ensure(&bench.cluster))?;
    fs::create_dir_all(bench.cluster.place(CONTROL)).context("cannot write to the cluster's folder")?;
    cgroups::ensure(&format!("{}/system", bench.cluster.cgroup(CONTROL)))?;
    for component in components::control_plane(&bench.cluster).iter().take(2) {
        up::ensure(&bench.cluster, &programs, component)?;
    }
    drop(lock);

    let empty = bench.measure_start(&agent, 0)?;
    println!("an agent of an empty mesh: {:.1} MB", empty.rss);
    bench.end_agent()?;
    let mut half = None;
    if part > 1 {
        bench.fill(&arguments, 0..arguments.pods / 2)?;
        half = Some(bench.measure_start(&agent, arguments.pods / 2)?);
        bench.end_agent()?;
        bench.fill(&arguments, arguments.pods / 2..arguments.pods)?;
    } else {
        bench.fill(&arguments, 0..arguments.pods)?;
    }
    let full = bench.measure_start(&agent, arguments.pods)?;
    println!(
        "{} pods, {} services, {} nodes: {:.1} MB, at most {:.1} MB; known after {:.1} s and {:.1} s of CPU",
        arguments.pods,
        arguments.services,
        arguments.nodes,
        full.rss,
        full.peak,
        full.took.as_secs_f64(),
        full.cpu
    );
    bench.measure_changes(&arguments)?;
    let whole = bench.memory()?;
    let dumped = bench.get("/config_dump")?.len();
    let after = bench.memory()?;
    println!(
        "after the changes {:.1} MB, at most {:.1} MB; a configuration dump of {:.0} MB later {:.1} MB, at most {:.1} MB",
        whole.rss,
        whole.peak,
        dumped as f64 / 1e6,
        after.rss,
        after.peak
    );
    let mut peak = after.peak;
    if let Some(half) = half {
        peak += (full.peak - half.peak) * 2.0 * (part - 1) as f64;
        println!("with {part} times as much that is about {peak:.0} MB at most");
    }
    if peak > LIMIT_MB {
        bail!("the agent needed {peak:.0} MB, more than {LIMIT_MB:.0} MB: see what `mesh-agent/src/translate` keeps");
    }
    Ok(())
}

struct Started {
    rss: f64,
    peak: f64,
    took: Duration,
    cpu: f64,
}

struct Memory {
    rss: f64,
    peak: f64,
}

impl Bench {
    fn socket(&self) -> PathBuf {
        self.cluster.folder().join("admin.sock")
    }

    /// Starts the agent and waits until it knows `pods` workloads.
    fn measure_start(&self, agent: &Path, pods: usize) -> Result<Started> {
        let folder = self.cluster.folder();
        let cgroup = mesh_tests::cgroup2_mount().join(self.cluster.cgroup(CONTROL)).join("system");
        let mut args: Vec<String> = Vec::new();
        for (name, value) in [
            ("source", "kubernetes"),
            ("embedded-ca", "true"),
            ("node-name", NODE),
            ("kubeconfig", &self.cluster.kubeconfig().display().to_string()),
            ("state-dir", &folder.join("state").display().to_string()),
            ("admin-socket", &self.socket().display().to_string()),
            ("bpffs", &folder.join("bpf").display().to_string()),
            ("cgroup", &cgroup.display().to_string()),
            ("metrics-address", "127.0.0.1:15020"),
            ("readiness-address", "127.0.0.1:15021"),
        ] {
            args.push(format!("--{name}={value}"));
        }
        fs::create_dir_all(folder.join("bpf")).context("cannot write to the cluster's folder")?;
        // Pins go with the mount namespace.
        let script = "mount --make-rprivate / && mount -t bpf bpf \"$0\" && exec \"$@\"";
        let mut shell = vec!["--mount".to_owned(), "sh".into(), "-c".into(), script.into()];
        shell.push(folder.join("bpf").display().to_string());
        shell.extend([agent.display().to_string(), "node".into()]);
        shell.extend(args);
        let start = Instant::now();
        process::start(&self.cluster, CONTROL, "agent", Path::new("unshare"), &shell)?;
        let what = format!("the agent knows {pods} workloads; its log is {}", self.agent.log().display());
        wait_until(&what, PATIENCE, || {
            if self.agent.pid().is_none() {
                bail!("the agent ended; the end of its log:\n{}", self.agent.last_words());
            }
            let status = self.get("/status").ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
            Ok(status.is_some_and(|s| s["workloads"] == pods && s["snapshot_generation"] != 0))
        })?;
        let (took, memory) = (start.elapsed(), self.memory()?);
        Ok(Started { rss: memory.rss, peak: memory.peak, took, cpu: self.cpu()? })
    }

    fn end_agent(&self) -> Result<()> {
        self.agent.kill();
        wait_until("the agent has ended", SHORT, || Ok(self.agent.pid().is_none())).map(drop)
    }

    fn pid(&self) -> Result<u32> {
        self.agent.pid().with_context(|| format!("the agent ended:\n{}", self.agent.last_words()))
    }

    fn memory(&self) -> Result<Memory> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()?)).context("the agent ended")?;
        let megabytes = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).context("the kernel counts no memory")?;
            let kib: f64 = line.split_whitespace().next().unwrap_or_default().parse()?;
            Ok(kib * 1024.0 / 1e6)
        };
        Ok(Memory { rss: megabytes("VmRSS:")?, peak: megabytes("VmHWM:")? })
    }

    /// Seconds of CPU so far.
    fn cpu(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()?)).context("the agent ended")?;
        let fields: Vec<&str> = stat.rsplit_once(')').context("no stat")?.1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(ticks as f64 / TICKS)
    }

    /// A page of the admin socket.
    fn get(&self, path: &str) -> Result<Vec<u8>> {
        let mut stream = UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").context("the agent's answer has no end")?;
        Ok(answer.split_off(end + 4))
    }

    fn generation(&self) -> Result<u64> {
        let page: Value = serde_json::from_slice(&self.get("/status")?).context("the agent's status cannot be read")?;
        page["snapshot_generation"].as_u64().context("the agent tells no generation")
    }

    fn measure_changes(&self, arguments: &Arguments) -> Result<()> {
        let changed = |i: usize, version: &str| {
            let (key, mut pod) = pod(arguments, i * arguments.pods / arguments.changes);
            pod["metadata"]["labels"]["version"] = version.into();
            (key, pod)
        };
        let mut latencies = Vec::new();
        for i in 0..arguments.changes {
            let before = self.generation()?;
            // From before it is written.
            let start = Instant::now();
            self.put(&[changed(i, "one")])?;
            while self.generation()? == before {
                check_interrupt()?;
                if start.elapsed() > PATIENCE {
                    bail!("the agent does not see a pod that changed; its log is {}", self.agent.log().display());
                }
            }
            latencies.push(start.elapsed());
        }
        latencies.sort();
        let (median, last) = (latencies[latencies.len() / 2], latencies[latencies.len() - 1]);
        println!("a pod that changes is in a snapshot after {median:.0?}, at most {last:.0?}");
        let (cpu, before) = (self.cpu()?, self.generation()?);
        for i in 0..arguments.changes {
            self.put(&[changed(i, "two")])?;
        }
        let mut seen = before;
        // Until nothing changes for a second.
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = self.generation()?;
            if now == seen {
                break;
            }
            seen = now;
        }
        let each = (self.cpu()? - cpu) / arguments.changes as f64;
        let snapshots = seen - before;
        println!(
            "a pod that changes costs {:.2} ms of CPU ({} in {snapshots} snapshots)",
            each * 1e3,
            arguments.changes
        );
        Ok(())
    }

    /// Writes all objects but for pods that are not in `pods`.
    fn fill(&self, arguments: &Arguments, pods: Range<usize>) -> Result<()> {
        let start = Instant::now();
        let namespaces = (0..namespaces(arguments)).map(namespace);
        let nodes = (0..arguments.nodes).map(node);
        let services = (0..arguments.services).map(|i| service(arguments, i));
        let slices = (0..arguments.services).map(|i| slice(arguments, i));
        let pods = pods.map(|i| pod(arguments, i));
        let mut all = namespaces.chain(nodes).chain(services).chain(slices).chain(pods).peekable();
        let mut count = 0;
        while all.peek().is_some() {
            let batch: Vec<_> = all.by_ref().take(BATCH).collect();
            count += batch.len();
            self.put(&batch)?;
        }
        println!("{count} objects are written; {:.0} s", start.elapsed().as_secs_f64());
        Ok(())
    }

    /// Puts objects where the API server keeps them.
    fn put(&self, objects: &[(String, Value)]) -> Result<()> {
        check_interrupt()?;
        let put = |(key, value): &(String, Value)| {
            let (key, value) = (base64(key.as_bytes()), base64(value.to_string().as_bytes()));
            json!({"requestPut": {"key": key, "value": value}})
        };
        let request = json!({"success": objects.iter().map(put).collect::<Vec<_>>()});
        let file = self.cluster.folder().join("put.json");
        fs::write(&file, request.to_string()).context("cannot write to the cluster's folder")?;
        let mut command: Command = process::within(&self.cluster, CONTROL)?;
        command.args(["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "--data-binary"]);
        command.arg(format!("@{}", file.display())).arg("http://127.0.0.1:2379/v3/kv/txn");
        command::output(command, SHORT).map(drop).context("etcd does not take the objects")
    }
}

fn namespaces(arguments: &Arguments) -> usize {
    (arguments.services / 10).max(1)
}

fn namespace_of(arguments: &Arguments, service: usize) -> String {
    format!("team-{}", service % namespaces(arguments))
}

/// Unlike any other of its kind, in the form of a UUID.
fn uid(kind: u8, i: usize) -> String {
    format!("{kind:08x}-1111-4222-8333-{i:012x}")
}

fn metadata(kind: u8, i: usize, name: &str, namespace: Option<&str>, labels: Value) -> Value {
    let mut metadata = json!({
        "name": name, "uid": uid(kind, i), "creationTimestamp": created(i), "labels": labels,
        "managedFields": [{"manager": "bench", "operation": "Update", "apiVersion": "v1", "time": created(i),
            "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}}}],
    });
    if let Some(namespace) = namespace {
        metadata["namespace"] = namespace.into();
    }
    metadata
}

fn created(i: usize) -> String {
    format!("2026-01-{:02}T{:02}:{:02}:{:02}Z", 1 + i / 86_400 % 28, i / 3600 % 24, i / 60 % 60, i % 60)
}

fn namespace(i: usize) -> (String, Value) {
    let name = format!("team-{i}");
    let labels = json!({"kubernetes.io/metadata.name": name, "nodemesh.io/mode": "enabled"});
    let value = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata(1, i, &name, None, labels),
        "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}});
    (format!("/registry/namespaces/{name}"), value)
}

fn node(i: usize) -> (String, Value) {
    let name = format!("node-{i}");
    let labels = json!({"kubernetes.io/hostname": name, "topology.kubernetes.io/region": "region",
        "topology.kubernetes.io/zone": format!("zone-{}", i % 3)});
    let value = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata(2, i, &name, None, labels)});
    (format!("/registry/minions/{name}"), value)
}

fn pod_address(i: usize) -> String {
    format!("10.{}.{}.{}", 128 + i / 65_536, i / 256 % 256, i % 256)
}

fn pod_name(service: usize, i: usize) -> String {
    format!("service-{service}-6d4b75cb6d-{i:05x}")
}

fn pod(arguments: &Arguments, i: usize) -> (String, Value) {
    let service = i % arguments.services;
    let (name, namespace) = (pod_name(service, i), namespace_of(arguments, service));
    let app = format!("service-{service}");
    let node = i % arguments.nodes;
    let mut labels = json!({"app": app, "pod-template-hash": "6d4b75cb6d", "version": "v1",
        "app.kubernetes.io/part-of": "shop", "security.istio.io/tlsMode": "istio"});
    if node == 0 {
        // No process of it is here.
        labels["nodemesh.io/mode"] = "disabled".into();
    }
    let mut metadata = metadata(3, i, &name, Some(&namespace), labels);
    metadata["generateName"] = format!("{app}-6d4b75cb6d-").into();
    metadata["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-6d4b75cb6d"),
        "uid": uid(9, service), "controller": true, "blockOwnerDeletion": true}]);
    let env: Vec<_> =
        (0..8).map(|n| json!({"name": format!("SETTING_{n}"), "value": "some value of a setting"})).collect();
    let container = json!({"name": "app", "image": "registry.invalid/shop/app:1.2.3", "env": env,
        "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File", "imagePullPolicy": "IfNotPresent"});
    let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": created(i)});
    let conditions: Vec<_> = ["Initialized", "Ready", "ContainersReady", "PodScheduled"].map(condition).into();
    let address = pod_address(i);
    let value = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata,
        "spec": {"nodeName": format!("node-{node}"), "serviceAccountName": app, "serviceAccount": app,
            "containers": [container], "restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
            "schedulerName": "default-scheduler", "securityContext": {}, "terminationGracePeriodSeconds": 30},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": conditions,
            "hostIP": "192.0.2.1", "startTime": created(i), "qosClass": "Burstable"}});
    (format!("/registry/pods/{namespace}/{name}"), value)
}

fn service(arguments: &Arguments, i: usize) -> (String, Value) {
    let (name, namespace) = (format!("service-{i}"), namespace_of(arguments, i));
    let address = format!("10.96.{}.{}", 16 + i / 250, 1 + i % 250);
    let value = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": metadata(4, i, &name, Some(&namespace), json!({"app": name})),
        "spec": {"clusterIP": address, "clusterIPs": [address], "selector": {"app": name}, "type": "ClusterIP",
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]},
        "status": {"loadBalancer": {}}});
    (format!("/registry/services/specs/{namespace}/{name}"), value)
}

fn slice(arguments: &Arguments, service: usize) -> (String, Value) {
    let namespace = namespace_of(arguments, service);
    let name = format!("service-{service}-x7k2p");
    let pods = (service..arguments.pods).step_by(arguments.services);
    let endpoints: Vec<_> = pods
        .map(|i| {
            let node = i % arguments.nodes;
            let target = json!({"kind": "Pod", "namespace": namespace, "name": pod_name(service, i), "uid": uid(3, i)});
            json!({"addresses": [pod_address(i)], "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": format!("node-{node}"), "zone": format!("zone-{}", node % 3), "targetRef": target})
        })
        .collect();
    let labels =
        json!({"kubernetes.io/service-name": format!("service-{service}"), "app": format!("service-{service}")});
    let value = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": metadata(5, service, &name, Some(&namespace), labels), "addressType": "IPv4",
        "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]});
    (format!("/registry/endpointslices/{namespace}/{name}"), value)
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let number = chunk.iter().chain([&0; 2]).take(3).fold(0_u32, |n, byte| n << 8 | u32::from(*byte));
        for place in 0..4 {
            let digit = DIGITS[(number >> (18 - 6 * place) & 63) as usize];
            let _ = text.write_char(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn every_pod_is_behind_one_service_and_has_an_address_of_its_own() {
        let arguments = Arguments::parse_from(["scale", "--pods=400", "--nodes=20", "--services=20"]);
        let mut addresses: Vec<String> = (0..20)
            .flat_map(|i| slice(&arguments, i).1["endpoints"].as_array().unwrap().clone())
            .map(|e| e["addresses"][0].as_str().unwrap().to_owned())
            .collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 400);
        assert!(
            (0..400).all(|i| addresses.contains(&pod(&arguments, i).1["status"]["podIP"].as_str().unwrap().to_owned()))
        );
    }
}
