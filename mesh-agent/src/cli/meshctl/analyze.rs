//! `meshctl analyze`: what an agent would say of a directory of manifests, before it is given them.

use std::io::Write;

use super::args::Output;
use super::layout::Screen;
use super::lists::{problems, several};
use super::{Answer, print_json};
use crate::cli::exit::Failure;
use crate::config::Analysis;
use crate::discovery::load_once;
use crate::model::{Problem, Severity};
use crate::translate::Settings;

/// Fails where an agent would not take all of it: a script can go by the exit code.
pub(super) fn analyze(
    analysis: &Analysis,
    output: Output,
    namespace: Option<&str>,
    screen: Screen,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let Analysis { config_dir, node_name, trust_domain, cluster_domain, root_namespace, istio_labels } = analysis;
    let settings = Settings {
        cluster_domain: cluster_domain.as_str().into(),
        root_namespace: root_namespace.as_str().into(),
        istio_labels: *istio_labels,
        standalone_node: node_name.as_deref().map(Into::into),
        endpoints_from_pods: true,
        ..Settings::new(trust_domain.clone())
    };
    let (snapshot, found) = load_once(config_dir, settings)?;
    let mut found: Vec<Problem> = found.to_vec();
    found.retain(|p| namespace.is_none_or(|n| p.object.namespace == n));
    found.sort();
    let errors = found.iter().filter(|p| p.severity == Severity::Error).count();
    let answers = [Answer { node: String::new(), value: found }];
    match output {
        Output::Json => print_json(&answers, out)?,
        Output::Table | Output::Wide => {
            out.write_all(problems(&answers, screen).as_bytes())?;
            let (workloads, services) = (snapshot.workloads().count(), snapshot.services().count());
            writeln!(out, "\n{}, {}", several(workloads, "workload"), several(services, "service"))?;
        }
    }
    out.flush()?;
    match errors {
        0 => Ok(()),
        n => Err(Failure::data(format!(
            "{} in {}; an agent would not take all of it",
            several(n, "error"),
            config_dir.display()
        ))
        .into()),
    }
}
