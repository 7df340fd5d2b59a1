//! The lists: what agents said -> a table, with the sentences that belong to it below.

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Answer;
use super::layout::{Column, Cut, Mood, Screen, Table, age, bytes, column, wide, wrap};
use crate::admin::views::{PolicyView, PortView, ServiceView, WorkloadView};
use crate::identity::CertificateInfo;
use crate::model::{Problem, Severity};
use crate::proxy::connections::ConnectionInfo;
use crate::telemetry::clock::parse_rfc3339;

type Row = Vec<(String, Mood)>;

pub(super) fn workloads(answers: &[Answer<Vec<WorkloadView>>], screen: Screen) -> String {
    // Every agent knows all workloads; the one on whose node it runs knows most.
    let local: HashSet<&str> =
        answers.iter().flat_map(|a| &a.value).filter(|w| w.local).map(|w| w.uid.as_str()).collect();
    let mut table = Grouped::new(
        answers,
        vec![
            column("NAMESPACE", Cut::End),
            column("NAME", Cut::Start),
            column("ADDRESS", Cut::End),
            column("ON", Cut::End),
            column("STATE", Cut::Never),
            column("MTLS", Cut::End),
            wide("POLICIES"),
            wide("IDENTITY"),
            wide("WORKLOAD"),
            wide("ZONE"),
            wide("UID"),
        ],
    );
    let mut notes = Vec::new();
    for (node, w) in table.items(answers) {
        if !w.local && local.contains(w.uid.as_str()) {
            continue;
        }
        let mood = match w.state.as_str() {
            "enrolled" => Mood::Good,
            "refused" => Mood::Bad,
            "waiting" => Mood::Warning,
            _ => Mood::Plain,
        };
        let state = match (w.state.as_str(), w.transport.as_str()) {
            ("remote", "plain") => "remote, outside",
            (state, _) => state,
        };
        let addresses = w.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        let address = if screen.wide { joined(&addresses) } else { first(&addresses) };
        table.add(
            node,
            vec![
                plain(&w.namespace),
                plain(&w.name),
                plain(address),
                plain(dash(&w.node)),
                (state.to_owned(), mood),
                plain(dash(&w.mtls)),
                plain(joined(&w.policies)),
                plain(&w.identity),
                plain(&w.workload),
                plain(dash(&w.zone)),
                plain(&w.uid),
            ],
        );
        if let Some(problem) = &w.problem {
            notes.push(format!("{}/{} is not enrolled: {problem}", w.namespace, w.name));
        }
        if w.legacy_connections > 0 {
            notes.push(format!(
                "{}/{} has {} older than its enrolment, outside the mesh",
                w.namespace,
                w.name,
                several(w.legacy_connections, "connection")
            ));
        }
    }
    table.render(screen, "no workloads: no Pod with an address in the configuration", &notes)
}

pub(super) fn services(answers: &[Answer<Vec<ServiceView>>], screen: Screen) -> String {
    let mut table = Grouped::new(
        answers,
        vec![
            column("NAMESPACE", Cut::End),
            column("NAME", Cut::End),
            column("ADDRESS", Cut::End),
            column("PORTS", Cut::End),
            column("ENDPOINTS", Cut::End),
            wide("HOSTNAME"),
            wide("BALANCING"),
            wide("PREFERS"),
        ],
    );
    for (node, s) in table.items(answers) {
        let addresses = s.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        let address = match (addresses.is_empty(), screen.wide) {
            (true, _) => "headless".to_owned(),
            (false, true) => joined(&addresses),
            (false, false) => first(&addresses),
        };
        let ports = s.ports.iter().map(|p| p.port.to_string()).collect::<Vec<_>>();
        let (endpoints, mood) = endpoints(&s.ports, screen.wide);
        table.add(
            node,
            vec![
                plain(&s.namespace),
                plain(&s.name),
                plain(address),
                plain(joined(&ports)),
                (endpoints, mood),
                plain(&s.hostname),
                plain(&s.algorithm),
                plain(&s.scope),
            ],
        );
    }
    table.render(screen, "no services in the configuration", &[])
}

/// `2/3 ready`: over all ports an address counts once; with `wide` they are named.
fn endpoints(ports: &[PortView], wide: bool) -> (String, Mood) {
    let all: Vec<_> = ports.iter().flat_map(|p| &p.endpoints).collect();
    let ready = all.iter().filter(|e| e.ready).count();
    let mood = match (ready, all.len()) {
        (0, _) => Mood::Bad,
        (ready, total) if ready < total => Mood::Warning,
        _ => Mood::Good,
    };
    let count = if all.is_empty() { "none".to_owned() } else { format!("{ready}/{} ready", all.len()) };
    if !wide || all.is_empty() {
        return (count, mood);
    }
    let names: Vec<_> =
        all.iter().map(|e| format!("{}{}", e.address, if e.ready { "" } else { " (not ready)" })).collect();
    (format!("{count}: {}", joined(&names)), mood)
}

pub(super) fn policies(answers: &[Answer<Vec<PolicyView>>], screen: Screen) -> String {
    let mut table = Grouped::new(
        answers,
        vec![
            column("NAMESPACE", Cut::End),
            column("NAME", Cut::End),
            column("ACTION", Cut::Never),
            column("RULES", Cut::Never),
            column("HOLDS FOR", Cut::End),
        ],
    );
    for (node, p) in table.items(answers) {
        let mood = match (p.action.as_str(), p.dry_run) {
            ("DENY", false) => Mood::Bad,
            ("ALLOW", false) => Mood::Good,
            _ => Mood::Plain,
        };
        let action = if p.dry_run { format!("{} (dry run)", p.action) } else { p.action.clone() };
        table.add(
            node,
            vec![
                plain(&p.namespace),
                plain(&p.name),
                (action, mood),
                plain(p.rules.len().to_string()),
                plain(if screen.wide { joined(&p.workloads) } else { first(&p.workloads) }),
            ],
        );
    }
    table.render(screen, "no authorization policy holds for any workload: all may connect to all", &[])
}

pub(super) fn certificates(answers: &[Answer<Vec<CertificateInfo>>], screen: Screen) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    certificates_at(answers, screen, now)
}

pub(super) fn certificates_at(answers: &[Answer<Vec<CertificateInfo>>], screen: Screen, now: i64) -> String {
    let mut table = Grouped::new(
        answers,
        vec![
            column("IDENTITY", Cut::Start),
            column("STATE", Cut::Never),
            column("ENDS IN", Cut::Never),
            wide("SERIAL"),
            wide("FROM"),
            wide("UNTIL"),
            wide("ROOTS"),
        ],
    );
    let mut notes = Vec::new();
    for (node, c) in table.items(answers) {
        let mood = match c.state.as_str() {
            "ready" => Mood::Good,
            "renewing" => Mood::Warning,
            _ => Mood::Bad,
        };
        let ends = match parse_rfc3339(&c.not_after) {
            Some(end) if end > now => age(end.abs_diff(now)),
            Some(_) => "over".to_owned(),
            None => "-".to_owned(),
        };
        table.add(
            node,
            vec![
                plain(&c.identity),
                (c.state.clone(), mood),
                plain(ends),
                plain(dash(&c.serial)),
                plain(dash(&c.not_before)),
                plain(dash(&c.not_after)),
                plain(joined(&c.roots)),
            ],
        );
        if let Some(problem) = &c.problem {
            notes.push(format!("{}: {problem}", c.identity));
        }
    }
    table.render(screen, "no certificates: no pod of this node is in the mesh", &notes)
}

pub(super) fn connections(answers: &[Answer<Vec<ConnectionInfo>>], screen: Screen) -> String {
    let mut table = Grouped::new(
        answers,
        vec![
            column("POD", Cut::Start),
            column("", Cut::Never),
            column("PEER", Cut::Start),
            column("BY", Cut::Never),
            column("SENT", Cut::Never),
            column("RECEIVED", Cut::Never),
            column("AGE", Cut::Never),
            wide("SOURCE"),
            wide("DESTINATION"),
            wide("IDENTITY OF PEER"),
        ],
    );
    for (node, c) in table.items(answers) {
        let outbound = c.direction == "outbound";
        let peer = match (&c.service, &c.peer_identity) {
            (Some(service), _) if outbound => service.clone(),
            (_, Some(identity)) if !outbound => short_identity(identity).to_owned(),
            _ if outbound => c.destination.clone(),
            _ => c.source.clone(),
        };
        table.add(
            node,
            vec![
                plain(&c.pod),
                plain(if outbound { "->" } else { "<-" }),
                plain(peer),
                (c.transport.clone(), if c.transport == "plain" { Mood::Warning } else { Mood::Good }),
                plain(bytes(c.bytes_sent)),
                plain(bytes(c.bytes_received)),
                plain(age(c.age_seconds)),
                plain(&c.source),
                plain(&c.destination),
                plain(c.peer_identity.as_deref().unwrap_or("-")),
            ],
        );
    }
    table.render(screen, "no open connections", &[])
}

/// Not a table: the sentences are what counts here.
pub(super) fn problems(answers: &[Answer<Vec<Problem>>], screen: Screen) -> String {
    const INDENT: usize = 9;
    let mut all: Vec<(&Problem, Vec<&str>)> = Vec::new();
    for answer in answers {
        for problem in &answer.value {
            match all.iter_mut().find(|(known, _)| *known == problem) {
                Some((_, nodes)) => nodes.push(&answer.node),
                None => all.push((problem, vec![&answer.node])),
            }
        }
    }
    if all.is_empty() {
        return "no problems\n".to_owned();
    }
    let mut text = String::new();
    for (problem, nodes) in all {
        let (word, code) = match problem.severity {
            Severity::Error => ("error", "31"),
            Severity::Warning => ("warning", "33"),
        };
        let pad = " ".repeat(INDENT - word.len());
        let word = if screen.colour { format!("\u{1b}[{code}m{word}\u{1b}[0m") } else { word.to_owned() };
        let on = if nodes.len() < answers.len() { format!(" (on {})", nodes.join(", ")) } else { String::new() };
        text += &format!("{word}{pad}{}{on}\n", problem.object);
        let sentence = match problem.field.as_str() {
            "" => problem.message.clone(),
            field => format!("{field}: {}", problem.message),
        };
        let width = if screen.wide { usize::MAX } else { screen.width };
        let lead = " ".repeat(INDENT);
        text += &format!(
            "{lead}{}\n",
            wrap(&sentence, width.saturating_sub(INDENT), 0).replace('\n', &format!("\n{lead}"))
        );
    }
    text
}

/// The namespace in `spiffe://domain/ns/<namespace>/sa/<account>`.
pub(super) fn namespace_of(identity: &str) -> &str {
    identity.split('/').nth(4).unwrap_or_default()
}

/// Without the trust domain, which is the same for all: `ns/shop/sa/web`.
fn short_identity(identity: &str) -> &str {
    identity.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/')).map_or(identity, |(_, path)| path)
}

/// Rows of several agents in one table. A row that several have is shown once, with their names.
struct Grouped {
    columns: Vec<Column>,
    rows: Vec<(Row, Vec<String>)>,
    nodes: usize,
}

impl Grouped {
    fn new<T>(answers: &[Answer<T>], columns: Vec<Column>) -> Self {
        Self { columns, rows: Vec::new(), nodes: answers.len() }
    }

    fn items<'a, T>(&self, answers: &'a [Answer<Vec<T>>]) -> impl Iterator<Item = (&'a str, &'a T)> + use<'a, T> {
        answers.iter().flat_map(|a| a.value.iter().map(|item| (a.node.as_str(), item)))
    }

    fn add(&mut self, node: &str, row: Row) {
        match self.rows.iter_mut().find(|(known, _)| *known == row) {
            // With one node two equal rows are two things: connections that look alike.
            Some((_, nodes)) if !nodes.iter().any(|n| n == node) => nodes.push(node.to_owned()),
            _ => self.rows.push((row, vec![node.to_owned()])),
        }
    }

    fn render(self, screen: Screen, empty: &str, notes: &[String]) -> String {
        if self.rows.is_empty() {
            return format!("{}\n", wrap(empty, screen.width, 0));
        }
        let several = self.nodes > 1;
        let mut columns = self.columns;
        if several {
            columns.insert(0, column("NODE", Cut::End));
        }
        let mut table = Table::new(columns);
        let mut rows = self.rows;
        if several {
            let key = |row: &Row| row.iter().map(|(text, _)| text.clone()).collect::<Vec<_>>();
            rows.sort_by_cached_key(|(row, _)| key(row));
        }
        for (mut row, nodes) in rows {
            if several {
                let all = nodes.len() == self.nodes;
                row.insert(0, plain(if all { "all".to_owned() } else { nodes.join(",") }));
            }
            table.row(row);
        }
        let mut text = table.render(screen);
        let width = if screen.wide { usize::MAX } else { screen.width };
        for (i, note) in notes.iter().enumerate() {
            text += if i == 0 { "\n" } else { "" };
            text += &wrap(note, width, 2);
            text.push('\n');
        }
        text
    }
}

fn plain(text: impl Into<String>) -> (String, Mood) {
    (text.into(), Mood::Plain)
}

fn dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

fn joined(all: &[String]) -> String {
    dash(&all.join(",")).to_owned()
}

/// The first, and how many more there are: `10.0.1.2 +1`.
fn first(all: &[String]) -> String {
    match all {
        [] => "-".to_owned(),
        [only] => only.clone(),
        [first, more @ ..] => format!("{first} +{}", more.len()),
    }
}

pub(super) fn several(n: impl TryInto<u64>, word: &str) -> String {
    let n = n.try_into().unwrap_or(u64::MAX);
    if n == 1 { format!("1 {word}") } else { format!("{n} {word}s") }
}
