//! Translation as data: each `tests/translate/*.yaml` goes in, and what comes out must be the text of the `.model` file
//! beside it. `UPDATE_EXPECT=1` rewrites those; read the difference before you commit it.
//!
//! In a case, `# settings: ...` in the first line sets what is not the default, and `# then` begins a later version of
//! the same manifests, translated with the memory of the one before.

mod changes;
mod laws;
mod rules;
mod traffic;
mod verdicts;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::*;
use crate::model::{Endpoint, Rules, Service, Transport, Workload};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/translate")
}

pub(super) fn settings() -> Settings {
    Settings::new(TrustDomain::new("cluster.local").unwrap())
}

/// All files in `folder` that end with `.yaml`, by name.
fn cases(folder: &Path) -> Vec<PathBuf> {
    let mut cases: Vec<_> = std::fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "no case in {}", folder.display());
    cases
}

#[test]
fn every_case_gives_the_expected_model() {
    let mut wrong = Vec::new();
    for case in cases(&data()) {
        let text = std::fs::read_to_string(&case).unwrap();
        let found = run(&text);
        let expected_at = case.with_extension("model");
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            std::fs::write(&expected_at, &found).unwrap();
            continue;
        }
        let expected = std::fs::read_to_string(&expected_at).unwrap_or_default();
        if expected != found {
            wrong.push(format!("{}\n--- expected\n{expected}\n--- found\n{found}", case.display()));
        }
    }
    assert!(wrong.is_empty(), "{} cases differ (UPDATE_EXPECT=1 rewrites them):\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_order_of_objects_changes_nothing() {
    for case in cases(&data()) {
        let text = std::fs::read_to_string(&case).unwrap();
        let (settings, steps) = read_case(&text);
        let Ok(mut objects) = parse("mesh.yaml", steps[0].as_bytes()) else { continue };
        let mut keys: Vec<_> = objects.iter().map(Object::key).collect();
        keys.sort();
        if keys.windows(2).any(|w| w[0] == w[1]) {
            continue; // Which of two equals is the second is a question of order.
        }
        let forth = translate(&settings, &objects, &Memory::default());
        objects.reverse();
        let back = translate(&settings, &objects, &Memory::default());
        assert_eq!(render(&forth), render(&back), "{}", case.display());
    }
}

#[test]
fn no_case_speaks_of_this_machine_or_without_a_next_step() {
    // Every expected Problem is one sentence: no full stop at its end, no capital at its beginning.
    for case in cases(&data()) {
        let expected = std::fs::read_to_string(case.with_extension("model")).unwrap_or_default();
        for line in expected.lines().filter(|l| l.starts_with("error ") || l.starts_with("warning ")) {
            assert!(!line.ends_with('.'), "{}: {line}", case.display());
        }
    }
}

fn run(text: &str) -> String {
    let (settings, steps) = read_case(text);
    let mut out = String::new();
    let mut memory = Memory::default();
    for (i, step) in steps.iter().enumerate() {
        if i > 0 {
            out.push_str("--- then\n");
        }
        match parse("mesh.yaml", step.as_bytes()) {
            Ok(objects) => {
                let translation = translate(&settings, &objects, &memory);
                out.push_str(&render(&translation));
                memory = translation.memory;
            }
            Err(e) => writeln!(out, "unreadable: {e}").unwrap(),
        }
    }
    out
}

fn read_case(text: &str) -> (Settings, Vec<String>) {
    let mut settings = settings();
    let first = text.lines().next().unwrap_or_default();
    for word in first.strip_prefix("# settings:").unwrap_or_default().split_whitespace() {
        match word.split_once('=') {
            None if word == "istio-labels" => settings.istio_labels = true,
            None if word == "endpoints-from-pods" => settings.endpoints_from_pods = true,
            None if word == "registry-only" => settings.outbound = OutboundPolicy::RegistryOnly,
            Some(("node", node)) => settings.standalone_node = Some(node.into()),
            Some(("root", namespace)) => settings.root_namespace = namespace.into(),
            _ => panic!("unknown setting {word}"),
        }
    }
    let mut steps = vec![String::new()];
    for line in text.split_inclusive('\n') {
        if line.trim_end() == "# then" {
            steps.push(String::new());
        } else {
            steps.last_mut().unwrap().push_str(line);
        }
    }
    (settings, steps)
}

fn render(t: &Translation) -> String {
    let mut out = String::new();
    for p in &t.problems {
        let severity = match p.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        writeln!(out, "{severity} {p}").unwrap();
    }
    let mut policies = BTreeMap::new();
    for w in &t.parts.workloads {
        writeln!(out, "workload {}", workload(w)).unwrap();
        for p in &rules(w).policies {
            policies.insert((p.namespace.clone(), p.name.clone()), p.clone());
        }
    }
    for p in policies.values() {
        let dry_run = if p.dry_run { " dry-run" } else { "" };
        writeln!(out, "policy {}/{} {:?}{dry_run}", p.namespace, p.name, p.action).unwrap();
        for rule in &p.rules {
            writeln!(out, "  rule {}", without_empty(serde_json::to_value(rule).unwrap())).unwrap();
        }
    }
    for s in &t.parts.services {
        writeln!(out, "service {}", service(s)).unwrap();
        for p in &s.ports {
            let protocol = p.app_protocol.as_ref().map(|a| format!(" ({a})")).unwrap_or_default();
            let name = if p.name.is_empty() { String::new() } else { format!(" {}", p.name) };
            writeln!(out, "  port {}{name}{protocol}", p.port).unwrap();
            for e in &p.endpoints {
                writeln!(out, "    {}", endpoint(e, &t.parts.workloads)).unwrap();
            }
        }
    }
    for (key, routes) in &t.parts.http {
        rules::render(key, routes, &mut out);
    }
    for (key, all) in &t.parts.traffic {
        traffic::render(key, all, &mut out);
    }
    out
}

fn rules(w: &Workload) -> &Rules {
    w.rules.as_deref().expect("all are judged here")
}

/// Only what is not the ordinary.
fn workload(w: &Workload) -> String {
    let mut t = format!("{}/{} {:?} {}", w.namespace, w.name, w.addresses, w.identity);
    t.push_str(if w.transport == Transport::Hbone { " hbone" } else { " plain" });
    let named = format!("{}/{}", w.namespace, w.name);
    let place = [&*w.locality.region, &*w.locality.zone].join("/");
    let n = &*w.names;
    let mut names = vec![("workload", &n.workload, &*w.name), ("app", &n.app, "unknown")];
    names.extend([("version", &n.version, "unknown"), ("canonical", &n.canonical_name, &n.workload)]);
    names.extend([("revision", &n.canonical_revision, "latest"), ("uid", &w.uid, &named), ("node", &w.node, "")]);
    for (key, value, usual) in names {
        if **value != *usual {
            write!(t, " {key}={value}").unwrap();
        }
    }
    if place != "/" {
        write!(t, " at={place}").unwrap();
    }
    if let Some(netns) = &w.netns {
        write!(t, " netns={}", netns.display()).unwrap();
    }
    let rules = rules(w);
    if rules.mtls != Default::default() {
        write!(t, " mtls={:?}", rules.mtls.default).unwrap();
        for (port, mode) in &rules.mtls.ports {
            write!(t, ",{port}={mode:?}").unwrap();
        }
    }
    let policies: Vec<_> = rules.policies.iter().map(|p| format!("{}/{}", p.namespace, p.name)).collect();
    if !policies.is_empty() {
        write!(t, " policies={}", policies.join(",")).unwrap();
    }
    t
}

fn service(s: &Service) -> String {
    let mut t = format!("{} {:?}", s.hostname, s.addresses);
    if s.algorithm != Default::default() {
        write!(t, " {:?}", s.algorithm).unwrap();
    }
    if s.scope != Default::default() {
        write!(t, " {:?}", s.scope).unwrap();
    }
    t
}

fn endpoint(e: &Endpoint, workloads: &[Arc<Workload>]) -> String {
    let health = match (e.ready, e.serving) {
        (true, _) => "ready",
        (false, true) => "serving",
        (false, false) => "unfit",
    };
    let mut t = format!("{} {health}", e.address);
    if !e.locality.region.is_empty() || !e.locality.zone.is_empty() {
        write!(t, " at={}/{}", e.locality.region, e.locality.zone).unwrap();
    }
    if let Some(node) = &e.node {
        write!(t, " node={node}").unwrap();
    }
    if let Some(w) = workloads.iter().find(|w| w.addresses.contains(&e.address.ip())) {
        write!(t, " -> {}/{}", w.namespace, w.name).unwrap();
    }
    t
}

fn without_empty(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Object(map) => {
            let kept = map.into_iter().filter(|(_, v)| !v.as_array().is_some_and(Vec::is_empty));
            Value::Object(kept.map(|(k, v)| (k, without_empty(v))).collect())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(without_empty).collect()),
        other => other,
    }
}
