//! `meshctl status`: one agent, at a glance.

use super::layout::{Screen, age, wrap};
use super::lists::several;
use crate::admin::views::StatusView;

/// Width of the names at the left.
const NAMES: usize = 15;

pub(super) fn render(status: &StatusView, screen: Screen) -> String {
    // Whole: what is new has to be thought of here.
    let StatusView {
        node,
        pod: _,
        version,
        uptime_seconds,
        ready,
        waiting_for,
        trust_domain,
        outbound_policy,
        certificate_authority,
        snapshot_generation,
        workloads,
        services,
        enrolled_pods,
        refused_pods,
        legacy_connections,
        open_connections,
        certificates,
        certificates_missing,
        errors,
        warnings,
        log,
        kernel,
    } = status;
    let paint = |text: String, code: &str| {
        if screen.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text }
    };
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let value = wrap(&value, if screen.wide { usize::MAX } else { screen.width - NAMES }, 0);
        text += &format!("{name:NAMES$}{}\n", value.replace('\n', &format!("\n{:NAMES$}", "")));
    };
    line("Node", format!("{node} (Nodemesh {version}, up {})", age(*uptime_seconds)));
    line(
        "State",
        match ready {
            true => paint("ready".to_owned(), "32"),
            false => paint(format!("not ready: waiting for {}", waiting_for.join(", ")), "31"),
        },
    );
    line("Pods", {
        let mut pods = format!("{enrolled_pods} enrolled");
        if *refused_pods > 0 {
            pods += &paint(format!(", {refused_pods} refused (see `meshctl workloads`)"), "31");
        }
        pods
    });
    line("Connections", {
        let mut connections = format!("{open_connections} open");
        if *legacy_connections > 0 {
            connections += &format!(", {legacy_connections} older than enrolment and outside the mesh");
        }
        connections
    });
    line("Certificates", {
        let mut all = format!("{certificates}");
        if *certificates_missing > 0 {
            all += &paint(format!(", {certificates_missing} missing (see `meshctl certificates`)"), "31");
        }
        let signer = match certificate_authority.as_str() {
            "embedded" => "the CA in this agent",
            controllers => controllers,
        };
        format!("{all}, signed by {signer}")
    });
    line(
        "Configuration",
        format!(
            "generation {snapshot_generation}: {}, {}",
            several(*workloads, "workload"),
            several(*services, "service")
        ),
    );
    line(
        "Problems",
        match (errors, warnings) {
            (0, 0) => "none".to_owned(),
            (0, w) => paint(format!("{} (see `meshctl problems`)", several(*w, "warning")), "33"),
            (e, w) => {
                paint(format!("{}, {} (see `meshctl problems`)", several(*e, "error"), several(*w, "warning")), "31")
            }
        },
    );
    line("Mesh", format!("trust domain {trust_domain}, outside destinations {outbound_policy}"));
    line("Log", log.clone());
    let counted = kernel.iter().filter(|c| c.count > 0).map(|c| format!("{} {}: {}", c.event, c.reason, c.count));
    line(
        "Kernel",
        match counted.collect::<Vec<_>>() {
            counted if counted.is_empty() => "nothing counted yet".to_owned(),
            counted => counted.join(", "),
        },
    );
    text
}
