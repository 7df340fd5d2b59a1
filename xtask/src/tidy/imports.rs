//! Who may import whom in mesh-agent. Only downward; within a layer only what is listed.
//!
//! ```text
//! layer 5   bin  cli  app                               may import all; imported by none
//! layer 4   proxy/{outbound,inbound,gateway}  dns  admin  controller  cni  pod_status  handover
//! layer 3   proxy/{accept,detect,transport,connections}  enrollment  redirect  discovery  identity
//! layer 2   translate  proxy/{policy,route,balance}     pure
//! layer 1   api_server  telemetry  lifecycle  config  proxy/error   used by 3 and 4; never by 0 and 2
//! layer 0   model                                       imports nothing of ours
//! ```

/// A part of the agent: its path below `crate`, and its layer. The longest path that fits a file is its part.
const PARTS: &[(&str, u8)] = &[
    ("bin", 5),
    ("cli", 5),
    ("app", 5),
    ("proxy/outbound", 4),
    ("proxy/inbound", 4),
    ("proxy/gateway", 4),
    ("dns", 4),
    ("admin", 4),
    ("controller", 4),
    ("cni", 4),
    ("pod_status", 4),
    ("handover", 4),
    ("proxy/worker", 4),
    ("proxy/application", 4),
    ("proxy/accept", 3),
    ("proxy/detect", 3),
    ("proxy/transport", 3),
    ("proxy/connections", 3),
    ("proxy/error", 3),
    ("enrollment", 3),
    ("redirect", 3),
    ("discovery", 3),
    ("identity", 3),
    ("translate", 2),
    ("proxy/policy", 2),
    ("proxy/route", 2),
    ("proxy/balance", 2),
    ("api_server", 1),
    ("telemetry", 1),
    ("lifecycle", 1),
    ("config", 1),
    ("model", 0),
];

/// Imports within one layer that have a reason.
const BESIDE: &[(&str, &str)] = &[
    // A tunnel is made with a workload's certificate, and in its pod.
    ("proxy/transport", "identity"),
    ("proxy/transport", "enrollment"),
    ("proxy/transport", "redirect"),
    ("proxy/transport", "proxy/connections"),
    // The workers hold what the two sides work with, and hand connections to them.
    ("proxy/outbound", "proxy/worker"),
    ("proxy/inbound", "proxy/worker"),
    ("proxy/application", "proxy/worker"),
    ("proxy/accept", "proxy/worker"),
    ("proxy/worker", "proxy/outbound"),
    ("proxy/worker", "proxy/inbound"),
    ("proxy/outbound", "proxy/application"),
    ("proxy/inbound", "proxy/application"),
    // Faults are named where connections end, and most are the transport's.
    ("proxy/error", "proxy/transport"),
    ("proxy/transport", "proxy/error"),
    ("proxy/connections", "proxy/error"),
    ("proxy/connections", "proxy/transport"),
    ("proxy/accept", "proxy/transport"),
    // An agent's own sockets go to the next one.
    ("handover", "admin"),
    // Listeners lie in pods, and what they accept was redirected.
    ("proxy/accept", "enrollment"),
    ("proxy/accept", "redirect"),
    ("proxy/accept", "proxy/connections"),
    // Cookies name namespaces; enrolment tells the kernel.
    ("enrollment", "redirect"),
    ("redirect", "enrollment"),
    // A pod is enrolled when its certificate is there.
    ("enrollment", "identity"),
    // The access log's format is a setting, and the settings name it.
    ("config", "telemetry"),
    ("telemetry", "config"),
    ("lifecycle", "config"),
    // The date of an answer is a point in time.
    ("api_server", "telemetry"),
    ("app", "cli"),
    ("cli", "app"),
    ("bin", "cli"),
    ("bin", "app"),
];

/// The imports of a file (path below mesh-agent/src) that are not allowed.
pub fn check(file: &str, code: &[(usize, &str)]) -> Vec<String> {
    let module = module_of(file);
    let Some((from, layer)) = part_of(&module.join("/")) else { return Vec::new() };
    let mut found = Vec::new();
    for path in imports(&module, code) {
        let Some((to, below)) = part_of(&path.join("/")) else { continue };
        let allowed = from == to || BESIDE.contains(&(from, to)) || below < layer && !(below == 1 && layer == 2);
        let sentence = format!("{from} (layer {layer}) may not import {to} (layer {below})");
        if !allowed && !found.contains(&sentence) {
            found.push(sentence);
        }
    }
    found
}

fn part_of(path: &str) -> Option<(&'static str, u8)> {
    let fits = |part: &str| path == part || path.strip_prefix(part).is_some_and(|rest| rest.starts_with('/'));
    PARTS.iter().filter(|(part, _)| fits(part)).max_by_key(|(part, _)| part.len()).copied()
}

/// `proxy/policy/mod.rs` is `proxy::policy`.
fn module_of(file: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').map(str::to_owned).collect()
}

/// All paths that begin with `crate::` or `super::`, from the crate's root, groups taken apart.
fn imports(module: &[String], code: &[(usize, &str)]) -> Vec<Vec<String>> {
    let text: String = code.iter().flat_map(|(_, line)| [*line, "\n"]).collect();
    let mut paths = Vec::new();
    for keyword in ["crate::", "super::"] {
        for (at, _) in text.match_indices(keyword) {
            let before = text[..at].chars().next_back();
            // `super::super::` is met at its first; `mesh_crate::` is another word; `pub(crate)` has no colons.
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
                continue;
            }
            let mut rest = &text[at + keyword.len()..];
            let mut base = if keyword == "crate::" { Vec::new() } else { parent(module) };
            while let Some(after) = rest.strip_prefix("super::") {
                base.pop();
                rest = after;
            }
            tree(&base, &mut rest, &mut paths);
        }
    }
    paths
}

fn parent(module: &[String]) -> Vec<String> {
    module[..module.len().saturating_sub(1)].to_vec()
}

/// One path or `{group}` of a use declaration; moves `rest` behind it.
fn tree(base: &[String], rest: &mut &str, paths: &mut Vec<Vec<String>>) {
    *rest = rest.trim_start();
    if let Some(inside) = rest.strip_prefix('{') {
        *rest = inside;
        loop {
            *rest = rest.trim_start_matches([',', ' ', '\n', '\t']);
            match rest.chars().next() {
                None => return,
                Some('}') => {
                    *rest = &rest[1..];
                    return;
                }
                Some(_) => {
                    let length = rest.len();
                    tree(base, rest, paths);
                    skip_alias(rest);
                    // Text that is no use declaration (a `{` of code): go no further.
                    if rest.len() == length {
                        return;
                    }
                }
            }
        }
    }
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    let mut path = base.to_vec();
    if end > 0 {
        path.push(rest[..end].to_owned());
    }
    *rest = &rest[end..];
    if let Some(after) = rest.strip_prefix("::") {
        *rest = after;
        return tree(&path, rest, paths);
    }
    if let Some(after) = rest.strip_prefix('*') {
        *rest = after;
    }
    paths.push(path);
}

/// ` as name`
fn skip_alias(rest: &mut &str) {
    if let Some(after) = rest.trim_start().strip_prefix("as ") {
        let end = after.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(after.len());
        *rest = &after[end..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(file: &str, text: &str) -> Vec<String> {
        let code: Vec<(usize, &str)> = text.lines().enumerate().collect();
        check(file, &code)
    }

    #[test]
    fn downward_is_allowed() {
        assert!(of("proxy/outbound/tcp.rs", "use crate::proxy::{policy, transport::{Pool as P, tls}};").is_empty());
        assert!(of("proxy/outbound/tcp.rs", "use crate::model::Snapshot;\nuse super::super::connections;").is_empty());
        assert!(of("app.rs", "use crate::{admin, cli, proxy::inbound};").is_empty());
        assert!(of("lib.rs", "use crate::cli;").is_empty(), "the table of contents names all");
    }

    #[test]
    fn upward_and_sideways_are_not() {
        let upward = of("proxy/policy/x.rs", "use crate::proxy::outbound::Cx;");
        assert_eq!(upward, ["proxy/policy (layer 2) may not import proxy/outbound (layer 4)"]);
        assert_eq!(of("proxy/outbound/x.rs", "use super::super::inbound::y;").len(), 1);
        assert_eq!(of("proxy/outbound/mod.rs", "use super::inbound::y;").len(), 1);
        assert_eq!(of("discovery/x.rs", "use crate::{\n    model::A,\n    identity::{B, C},\n};").len(), 1);
        assert_eq!(of("translate/x.rs", "use crate::telemetry::Facts;").len(), 1, "pure layers do not log");
    }

    #[test]
    fn listed_neighbours_are_allowed() {
        assert!(of("proxy/transport/tls.rs", "use crate::identity::Certificate;").is_empty());
        assert_eq!(of("identity/x.rs", "let x = crate::proxy::transport::tls();").len(), 1);
    }
}
