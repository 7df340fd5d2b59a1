//! Envoy as Istio's sidecar at L4: one in each pod, all TCP of the pod redirected into it as istio-init does it.
//!
//! Left out of what Istio adds, all in Envoy's favour: istio.stats, metadata exchange, PERMISSIVE matching, pilot-agent,
//! RSA-2048 keys.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_tests::{Mesh, Pod, Process};
use serde_json::{Value, json};

use crate::certs::{Certificate, text};
use crate::run::output;

/// The user that Istio's sidecars run as, and whose traffic is not redirected.
const USER: &str = "1337";
const OUTBOUND: u16 = 15001;
const INBOUND: u16 = 15006;
const ADMIN: &str = "127.0.0.1:15000";
const START: Duration = Duration::from_secs(30);

/// What a sidecar is to be.
#[derive(Debug, Clone, Copy)]
pub struct Sidecar<'a> {
    pub binary: &'a Path,
    pub concurrency: u32,
    pub certificate: &'a Certificate,
    pub root: &'a Path,
    /// The SPIFFE id that servers must show.
    pub server: &'a str,
    /// What a SPIFFE id that the RBAC rule lets in begins with.
    pub allowed: &'a str,
}

/// Starts a sidecar in a pod and, once it listens, redirects the pod's traffic into it.
pub fn start(mesh: &Mesh, pod: &Pod, sidecar: &Sidecar<'_>) -> Result<Process> {
    // setpriv and not `Command::uid`: the namespace can be entered by root only. The capability lets the user search the
    // folders above the binary, which a stranger's clone below /root does not.
    let mut command = pod.command("setpriv");
    command.args(["--reuid", USER, "--regid", USER, "--clear-groups", "--pdeathsig", "KILL"]);
    command.args(["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]).arg(sidecar.binary);
    command.args(["--concurrency", &sidecar.concurrency.to_string(), "--disable-hot-restart"]);
    command.args(["--log-level", "info", "--config-yaml", &config(sidecar)?.to_string()]);
    let name = format!("envoy-{}", pod.name());
    let log = mesh.logs().join(format!("{name}.log"));
    let mut process = Process::start(&name, command, &log);
    process.wait_for("starting workers", START);
    redirect(pod)?;
    Ok(process)
}

/// The rules of istio-init, in nftables. The sidecar's own traffic, and what stays on loopback, are left alone.
fn redirect(pod: &Pod) -> Result<()> {
    let rules = format!(
        "table ip mesh {{\n\
         chain prerouting {{ type nat hook prerouting priority -100; policy accept; meta l4proto tcp redirect to :{INBOUND}; }}\n\
         chain output {{ type nat hook output priority -100; policy accept; meta skuid {USER} return; \
         ip daddr 127.0.0.0/8 return; meta l4proto tcp redirect to :{OUTBOUND}; }}\n}}\n"
    );
    use std::io::Write as _;
    let mut child = pod
        .command("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run nft; `cargo xtask setup` installs it")?;
    child.stdin.take().expect("stdin is piped").write_all(rules.as_bytes()).context("nft reads its standard input")?;
    let ended = child.wait_with_output().context("nft was started")?;
    if !ended.status.success() {
        bail!("nft refused the redirect: {}", String::from_utf8_lossy(&ended.stderr).trim());
    }
    Ok(())
}

/// A counter of the sidecar.
pub fn counter(pod: &Pod, name: &str) -> Result<u64> {
    let url = format!("http://{ADMIN}/stats?filter=^{}$", name.replace('.', "\\."));
    let text = output(pod.command("curl").args(["-sS", "--globoff", "--max-time", "5", &url]))
        .with_context(|| format!("the admin port of the Envoy in {} does not answer", pod.name()))?;
    let value = text.trim().strip_prefix(name).and_then(|rest| rest.strip_prefix(": "));
    value
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("the Envoy in {} has no counter {name}", pod.name()))
}

fn config(sidecar: &Sidecar<'_>) -> Result<Value> {
    let common_tls = |matcher: Value| -> Result<Value> {
        Ok(json!({
            "alpn_protocols": ["istio"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [{
                "certificate_chain": {"inline_string": text(&sidecar.certificate.chain)?},
                "private_key": {"inline_string": text(&sidecar.certificate.key)?},
            }],
            "validation_context": {
                "trusted_ca": {"inline_string": text(sidecar.root)?},
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": matcher}],
            },
        }))
    };
    let tls = |direction: &str, content: Value| {
        let kind = format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{direction}TlsContext");
        let mut config = json!({"@type": kind});
        merge(&mut config, content);
        json!({"name": "envoy.transport_sockets.tls", "typed_config": config})
    };
    let upstream = tls("Upstream", json!({"common_tls_context": common_tls(json!({"exact": sidecar.server}))?}));
    let downstream = tls(
        "Downstream",
        json!({
            "require_client_certificate": true,
            "common_tls_context": common_tls(json!({"prefix": "spiffe://cluster.local/"}))?,
        }),
    );
    let rbac = json!({
        "name": "envoy.filters.network.rbac",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC",
            "stat_prefix": "bench.",
            "rules": {"action": "ALLOW", "policies": {"client": {
                "permissions": [{"any": true}],
                "principals": [{"authenticated": {"principal_name": {"prefix": sidecar.allowed}}}],
            }}},
        },
    });
    let mut inbound_chain = json!({"filters": [rbac, tcp_proxy("inbound")]});
    merge(&mut inbound_chain, json!({"transport_socket": downstream}));
    let mut outbound = cluster("outbound");
    merge(&mut outbound, json!({"transport_socket": upstream}));
    Ok(json!({
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 15000}}},
        "static_resources": {
            "listeners": [
                listener("outbound", OUTBOUND, json!({"filters": [tcp_proxy("outbound")]})),
                listener("inbound", INBOUND, inbound_chain),
            ],
            "clusters": [outbound, cluster("inbound")],
        },
    }))
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

fn cluster(name: &str) -> Value {
    json!({"name": name, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s"})
}

fn tcp_proxy(name: &str) -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": name,
            "cluster": name,
        },
    })
}

fn listener(name: &str, port: u16, chain: Value) -> Value {
    json!({
        "name": name,
        "stat_prefix": name,
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": port}},
        "listener_filters": [{
            "name": "envoy.filters.listener.original_dst",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"},
        }],
        "filter_chains": [chain],
    })
}
