//! What a check has found, and how it is shown: what is the same on several nodes once.

use std::io::Write;

use serde::Serialize;

use crate::api_server::ApiError;
use crate::cli::meshctl::args::Output;
use crate::cli::meshctl::layout::wrap;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Fine,
    /// It was not looked at.
    Skipped,
    Warning,
    Wrong,
}

use Level::{Fine, Skipped, Warning, Wrong};

/// One thing, and what is to be done about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) level: Level,
    /// Where it was found; none: it is of the whole cluster.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) nodes: Vec<String>,
    pub(super) text: String,
}

pub(super) fn fine(text: impl Into<String>) -> Finding {
    Finding { level: Fine, nodes: Vec::new(), text: text.into() }
}

pub(super) fn skipped(text: impl Into<String>) -> Finding {
    Finding { level: Skipped, ..fine(text) }
}

pub(super) fn warning(text: impl Into<String>) -> Finding {
    Finding { level: Warning, ..fine(text) }
}

pub(super) fn wrong(text: impl Into<String>) -> Finding {
    Finding { level: Wrong, ..fine(text) }
}

impl Finding {
    pub(super) fn on(self, node: &str) -> Self {
        Self { nodes: vec![node.to_owned()], ..self }
    }

    /// As one line.
    fn sentence(&self) -> String {
        match &self.nodes[..] {
            [] => self.text.clone(),
            [one] => format!("node {one}: {}", self.text),
            [few @ .., last] if few.len() < MANY => format!("nodes {} and {last}: {}", few.join(", "), self.text),
            many => format!("nodes {} and {} more: {}", many[..MANY].join(", "), many.len() - MANY, self.text),
        }
    }
}

/// So many nodes are named.
const MANY: usize = 3;

/// What may not be looked at is no fault of the cluster; all other errors end the check.
pub(super) fn unless_forbidden(what: &str, looked: anyhow::Result<Vec<Finding>>) -> anyhow::Result<Vec<Finding>> {
    match looked {
        Err(error) => match error.downcast_ref::<ApiError>() {
            Some(ApiError::Forbidden { why }) => Ok(vec![skipped(format!("{what}, since {}", forbidden(why)))]),
            _ => Err(error),
        },
        found => found,
    }
}

/// Of Kubernetes's sentence what tells more than that it is so:
/// `x is forbidden: User "u" cannot list resource "nodes" in API group "" at the cluster scope`
fn forbidden(why: &str) -> String {
    let read = || {
        let (verb, rest) = why.split_once(" cannot ")?.1.split_once(" resource \"")?;
        Some(format!("you may not {verb} {}", rest.split_once('"')?.0))
    };
    read().unwrap_or_else(|| why.to_owned())
}

/// Nodes on which the same was found share a line, at the place of the first.
pub(super) fn gathered(found: Vec<Finding>) -> Vec<Finding> {
    let mut all: Vec<Finding> = Vec::new();
    for finding in found {
        let same = |other: &&mut Finding| {
            !finding.nodes.is_empty() && other.level == finding.level && other.text == finding.text
        };
        match all.iter_mut().find(same) {
            Some(other) => other.nodes.extend(finding.nodes),
            None => all.push(finding),
        }
    }
    all
}

pub(super) fn print(found: &[Finding], output: Output, out: &mut impl Write) -> anyhow::Result<()> {
    if output == Output::Json {
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(found)?)?);
    }
    for finding in found {
        let word = match finding.level {
            Fine => "ok",
            Skipped => "skipped",
            Warning => "warning",
            Wrong => "wrong",
        };
        writeln!(out, "{}", wrap(&format!("{word:8} {}", finding.sentence()), 80, 9))?;
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_with_the_same_finding_share_a_line() {
        let all = gathered(vec![
            fine("a").on("n1"),
            fine("of the cluster"),
            wrong("b").on("n1"),
            fine("a").on("n2"),
            warning("a").on("n3"),
            fine("of the cluster"),
        ]);
        let lines: Vec<String> = all.iter().map(Finding::sentence).collect();
        assert_eq!(lines, ["nodes n1 and n2: a", "of the cluster", "node n1: b", "node n3: a", "of the cluster"]);
        let many = (1..=9).map(|n| fine("c").on(&format!("n{n}"))).collect();
        assert_eq!(gathered(many)[0].sentence(), "nodes n1, n2, n3 and 6 more: c");
    }

    #[test]
    fn every_line_fits_a_terminal() {
        let mut out = Vec::new();
        let text =
            "something that is wrong and needs many words, and a next step that needs some more of them, to be said";
        print(&[wrong(text).on("worker-1.example.com")], Output::Table, &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.lines().count() > 1 && out.lines().all(|line| line.len() <= 80), "{out}");
    }

    const FORBIDDEN: &str =
        "nodes is forbidden: User \"u\" cannot list resource \"nodes\" in API group \"\" at the cluster scope";

    #[test]
    fn what_one_may_not_see_is_said_and_ends_nothing() {
        let forbidden = ApiError::Forbidden { why: FORBIDDEN.to_owned() };
        let found = unless_forbidden("the nodes", Err(forbidden.into())).unwrap();
        assert_eq!(found, [skipped("the nodes, since you may not list nodes")]);
        let away = ApiError::Unreachable { url: "x".to_owned(), why: "y".to_owned() };
        assert!(unless_forbidden("the nodes", Err(away.into())).is_err());
    }
}
