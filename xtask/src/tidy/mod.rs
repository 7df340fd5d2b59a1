//! The house rules as a check: who may import whom, which folder may name which crate, how long a file may be.
//!
//! It reads text, not syntax: comments are cut, a file ends for it at its `#[cfg(test)] mod tests`.

mod imports;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

/// Lines of code a file may have; tests, comments and blank lines are not counted.
const LONGEST: usize = 500;

/// Crates and words that have a home, as paths below mesh-agent/src, and why the rule is there.
const HOMES: &[(&[&str], &[&str], &str)] = &[
    (&["aya::", "aya_log::"], &["redirect/"], "only redirect speaks to the kernel"),
    (
        &["kube::", "k8s_openapi::"],
        // meshctl asks agents by exec.
        &["api_server/", "translate/", "cli/meshctl/cluster/remote.rs"],
        "foreign objects end at translate",
    ),
    (&["notify::"], &["discovery/", "cni/install.rs"], "two places watch files"),
    (
        &["rustls::", "tokio_rustls::", "rcgen::", "x509_parser::", "aws_lc_rs::"],
        // The composition root names the process's cryptography once.
        &["identity/", "proxy/transport/", "app", "controller/webhook.rs"],
        "keys and certificates are handled in two places",
    ),
    (
        &["hyper::", "hyper_util::", "h2::"],
        &[
            "proxy/outbound",
            "proxy/reach.rs",
            "proxy/http/",
            "proxy/inbound",
            "proxy/gateway",
            "proxy/transport/",
            "proxy/error.rs",
            "admin/",
            "identity/",
            "telemetry/",
            "cli/",
            "controller/webhook.rs",
        ],
        "HTTP stays out of the judgement",
    ),
    (&["tonic::", "prost::"], &["identity/", "telemetry/"], "gRPC is for the CA and telemetry"),
    (&["hickory"], &["dns/"], "DNS has one home"),
    (&["prometheus::"], &["telemetry/"], "others count through telemetry"),
    (&["clap::"], &["cli/", "config", "bin/", "telemetry/access_log.rs"], "the command line is one layer"),
    (&["anyhow::"], &["bin/", "cli/", "app"], "errors below the command line have a type"),
    (
        &["unsafe {", "unsafe fn", "unsafe impl"],
        &["redirect/", "enrollment/netns.rs", "enrollment/sockets.rs", "lifecycle/handover.rs", "proxy/transport/"],
        "unsafe code is kept where the kernel's interfaces ask for it",
    ),
];

/// What a pure layer must not name: it is given time, chance and the outside world as values.
const IMPURE: &[&str] = &[
    "tokio::",
    "std::fs",
    "std::env",
    "Instant::now",
    "SystemTime::now",
    "rand::rng",
    "rand::random",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
];
const PURE: &[&str] = &["model/", "translate/", "proxy/policy/", "proxy/route/", "proxy/balance/"];

/// Folders and files that are compiled for tests only.
const TESTS: &[&str] = &["tests", "tests.rs", "testing.rs", "fixtures.rs"];

/// All places that break a rule, a sentence each.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let output = git.output().context("cannot run git to list the files")?;
    let list = String::from_utf8(output.stdout).context("file names are UTF-8")?;
    let mut broken = Vec::new();
    for path in list.split('\0').filter(|path| !path.is_empty()) {
        // Binary files, and files that are deleted but not yet committed so, have no text to check.
        if let Ok(text) = fs::read_to_string(root.join(path)) {
            check_file(path, &text, &mut broken);
        }
    }
    Ok(broken)
}

fn check_file(path: &str, text: &str, broken: &mut Vec<String>) {
    // In two parts, here and below, so that this file does not break its own rules.
    for machine in [concat!("/wo", "rk/"), concat!("/ro", "ot/")] {
        if let Some(line) = text.lines().position(|line| line.contains(machine)) {
            broken.push(format!("{path}:{}: a path of one machine ({machine}...): no other has it", line + 1));
        }
    }
    if !path.ends_with(".rs") {
        return;
    }
    let first = text.lines().find(|line| !line.starts_with("#!["));
    // The body of a `mod tests;` needs no introduction.
    if !path.ends_with("/tests.rs") && !first.is_some_and(|line| line.starts_with("//!")) {
        broken.push(format!("{path}: begins without `//!`: say its place, what comes in and what goes out"));
    }
    let parts: Vec<&str> = path.split('/').collect();
    if parts.iter().any(|part| TESTS.contains(part)) {
        return;
    }
    let code = code(text);
    if code.len() > LONGEST {
        broken.push(format!("{path}: {} lines of code, more than {LONGEST}: part it", code.len()));
    }
    for (number, line) in &code {
        if line.contains(concat!(".unw", "rap()")) {
            broken.push(format!("{path}:{number}: unwrap outside tests: say with `expect` why it can't fail"));
        }
    }
    let Some(inner) = path.strip_prefix("mesh-agent/src/") else { return };
    check_homes(path, inner, &code, broken);
    for sentence in imports::check(inner, &code) {
        broken.push(format!("{path}: {sentence}"));
    }
}

fn check_homes(path: &str, inner: &str, code: &[(usize, &str)], broken: &mut Vec<String>) {
    for (words, homes, reason) in HOMES {
        if homes.iter().any(|home| inner.starts_with(home)) {
            continue;
        }
        for (number, line) in code {
            if let Some(word) = words.iter().find(|word| names(line, word)) {
                broken.push(format!("{path}:{number}: `{word}` belongs in {}: {reason}", homes.join(", ")));
            }
        }
    }
    if PURE.iter().any(|pure| inner.starts_with(pure)) {
        for (number, line) in code {
            if let Some(word) = IMPURE.iter().find(|word| names(line, word)) {
                broken.push(format!("{path}:{number}: `{word}` in a pure layer: take it as a value"));
            }
        }
    }
}

/// Whether a line names `word` and not something that ends in it (`my_aya::` for `aya::`).
fn names(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
    })
}

/// The numbered lines of code: without comments, blank lines, and items that are for tests only.
fn code(text: &str) -> Vec<(usize, &str)> {
    let mut code = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        if line.trim() == "#[cfg(test)]" {
            // The item ends where a line of its own indent closes it, or at once.
            let indent = &line[..line.len() - line.trim_start().len()];
            let end = format!("{indent}}}");
            lines.find(|(_, line)| {
                line.starts_with(&end)
                    || line.starts_with(indent) && line.ends_with(';') && !line[indent.len()..].starts_with(' ')
            });
        } else if !line.trim().is_empty() && !line.trim_start().starts_with("//") {
            code.push((at + 1, line));
        }
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(path: &str, text: &str) -> Vec<String> {
        let mut broken = Vec::new();
        check_file(path, text, &mut broken);
        broken
    }

    #[test]
    fn a_good_file_breaks_nothing() {
        let text = "//! Fine.\nuse aya::Ebpf;\n// .unwrap() in a comment\n#[cfg(test)]\nmod tests {\n x.unwrap();\n}\n";
        assert_eq!(broken("mesh-agent/src/redirect/load.rs", text), Vec::<String>::new());
    }

    #[test]
    fn items_for_tests_are_no_code() {
        let text = "//! X.\nimpl X {\n    #[cfg(test)]\n    fn len(&self) {\n        x();\n    }\n}\n#[cfg(test)]\nmod tests;\nfn y() {}\n";
        let lines: Vec<usize> = code(text).into_iter().map(|(number, _)| number).collect();
        assert_eq!(lines, [2, 7, 10]);
    }

    #[test]
    fn each_rule_is_seen_to_break() {
        let long = format!("//! Long.\n{}", "let x = 1;\n".repeat(LONGEST + 1));
        for (path, text, says) in [
            ("mesh-agent/src/admin/mod.rs", "fn x() {}\n", "begins without"),
            ("xtask/src/x.rs", "//! X.\nfoo().unwrap();\n", "unwrap outside tests"),
            ("mesh-agent/src/x.rs", long.as_str(), "lines of code"),
            ("mesh-agent/src/proxy/policy/x.rs", "//! X.\nuse aya::Ebpf;\n", "`aya::` belongs in redirect/"),
            ("mesh-agent/src/proxy/balance/x.rs", "//! X.\nlet n = std::time::Instant::now();\n", ""),
            ("mesh-agent/src/admin/x.rs", "//! X.\nunsafe { x() }\n", "`unsafe {` belongs in"),
            ("README.md", concat!("see /wo", "rk/main\n"), "a path of one machine"),
            ("mesh-agent/src/model/x.rs", "//! X.\nuse crate::proxy::policy::P;\n", "may not import"),
        ] {
            let broken = broken(path, text);
            assert!(says.is_empty() || broken.len() == 1 && broken[0].contains(says), "{path}: {broken:?}");
        }
    }

    #[test]
    fn a_pure_layer_takes_time_as_a_value() {
        let text = "//! X.\nuse std::time::Instant;\nlet n = Instant::now();\n";
        assert!(broken("mesh-agent/src/proxy/balance/x.rs", text)[0].contains("in a pure layer"));
    }

    #[test]
    fn names_are_whole() {
        assert!(names("use h2::client;", "h2::"));
        assert!(!names("use my_h2::client;", "h2::"));
        assert!(!names("use crate::config::clap::x;", "clap::"));
    }
}
