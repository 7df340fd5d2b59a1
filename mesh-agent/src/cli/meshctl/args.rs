//! The command line of `meshctl`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::cluster::{self, Access};
use super::cluster_args;
use crate::cli::args::{lay_over, plain_flag};
use crate::cli::exit::{Failure, from_clap};
use crate::config::{Analysis, Cleanup, Machine, Origin, Setting, Written};
use crate::telemetry::logging;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) task: Task,
    pub(super) output: Output,
    pub(super) namespace: Option<String>,
    /// Never empty.
    pub(super) sockets: Vec<PathBuf>,
    pub(super) place: Place,
    pub(super) access: Access,
    /// Only the agent of this node.
    pub(super) node: Option<String>,
}

/// Where the agents are that are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Behind sockets of this machine.
    Here,
    /// In a cluster.
    Cluster,
    /// Here, where there is one; else in the cluster that a kubeconfig names.
    WhereItIs,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Task {
    Show(Page),
    /// Whether the agent of this very pod serves and is ready.
    Ready,
    /// Cut what the agent of this very container still has open, and end it.
    End,
    /// Show the level, or set it.
    Log(Option<String>),
    Analyze(Analysis),
    Uninstall(Cleanup),
    Cluster(cluster::Task),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Page {
    Workloads,
    Services,
    Policies,
    Certificates,
    Connections,
    Problems,
    Status,
    ConfigDump,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    Table,
    Wide,
    Json,
}

const DEFAULT_SOCKET: &str = "/run/nodemesh/admin.sock";
const SOCKET_VARIABLE: &str = "NODEMESH_ADMIN_SOCKET";

const FOOTER: &str = "\
meshctl asks the agent of this machine over its admin socket, as root. With
--socket given several times it asks several agents and shows them together.
Where no agent runs here, or with --kubernetes, it asks those of a cluster.";

const PAGES: [(&str, Page, &str); 8] = [
    ("status", Page::Status, "How the agent is"),
    ("workloads", Page::Workloads, "Pods: which are in the mesh, and which are not, and why"),
    ("services", Page::Services, "Services with their ports and endpoints"),
    ("policies", Page::Policies, "Authorization policies and whom they hold for"),
    ("certificates", Page::Certificates, "Certificates of this node's identities"),
    ("connections", Page::Connections, "Connections that are open now"),
    ("problems", Page::Problems, "What is wrong with the configuration"),
    ("config-dump", Page::ConfigDump, "All that the agent goes by, as JSON"),
];

fn command() -> Command {
    let pages = PAGES.iter().map(|(name, page, about)| {
        let with_namespace = !matches!(page, Page::Status | Page::ConfigDump);
        let command = Command::new(*name).about(*about);
        if with_namespace { command.arg(namespace()) } else { command }
    });
    let log = Command::new("log")
        .about("Show the agent's log level, or change it while it runs")
        .arg(Arg::new("level").value_name("LEVEL").help("error, warn, info, debug, trace, off, or target=level,..."));
    // For the probe of the agent's container, and scripts that wait for an agent.
    let ready = Command::new("ready").about("Succeed if the agent is ready").hide(true);
    let end = Command::new("end").about("End the agent of this container, whatever it has open").hide(true);
    let analyze = Command::new("analyze")
        .about("Check a directory of manifests; needs no agent")
        .arg(namespace())
        .args(named(&ANALYZE_SETTINGS).map(|setting| match setting.name {
            "config-dir" => {
                plain_flag(setting).short('d').help(format!("Directory of manifests [default: {}]", setting.default))
            }
            "node-name" => plain_flag(setting).help("Check as the agent of this node does"),
            _ => plain_flag(setting),
        }));
    let uninstall = Command::new("uninstall")
        .about("Remove the mesh: from a cluster with --kubernetes, else from this node's kernel")
        .args(named(&CLEANUP_SETTINGS).map(plain_flag))
        .args(cluster_args::uninstall());
    Command::new("meshctl")
        .about("Install Nodemesh, and look into it")
        .version(env!("CARGO_PKG_VERSION"))
        .max_term_width(80)
        .subcommand_required(true)
        .after_help(FOOTER)
        .arg(
            Arg::new("socket")
                .long("socket")
                .value_name("PATH")
                .action(ArgAction::Append)
                .global(true)
                .help("The agent's admin socket; may be repeated [default: /run/nodemesh/admin.sock]"),
        )
        .arg(
            Arg::new("output")
                .short('o')
                .long("output")
                .value_name("FORM")
                .value_parser(["table", "wide", "json"])
                .default_value("table")
                .hide_default_value(true)
                .hide_possible_values(true)
                .global(true)
                .help("table, wide (nothing cut off) or json [default: table]"),
        )
        .args(cluster_args::access())
        .subcommands(cluster_args::commands())
        .subcommands(pages)
        .subcommand(log)
        .subcommand(ready)
        .subcommand(end)
        .subcommand(analyze)
        .subcommand(uninstall)
}

fn namespace() -> Arg {
    Arg::new("namespace").short('n').long("namespace").value_name("NAME").help("Only this namespace")
}

const CLEANUP_SETTINGS: [&str; 3] = ["node-name", "bpffs", "cgroup"];
const ANALYZE_SETTINGS: [&str; 6] =
    ["config-dir", "node-name", "trust-domain", "cluster-domain", "root-namespace", "istio-labels"];

fn named(names: &'static [&'static str]) -> impl Iterator<Item = &'static Setting> {
    names.iter().filter_map(|name| Setting::named(name))
}

/// `Ok(Err(text))`: print this, it was asked for.
pub(super) fn parse(
    args: impl IntoIterator<Item = OsString>,
    variable: impl Fn(&str) -> Option<String>,
    machine: &Machine,
) -> anyhow::Result<Result<Wish, String>> {
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => return Ok(Err(from_clap(&error, "meshctl --help")?)),
    };
    let (name, outer) = matches.subcommand().expect("clap wants a subcommand");
    let inner = outer.subcommand().map_or(outer, |(_, inner)| inner);
    let output = match inner.get_one::<String>("output").map(String::as_str) {
        Some("json") => Output::Json,
        Some("wide") => Output::Wide,
        _ => Output::Table,
    };
    let given = inner.get_many::<String>("socket").map(|paths| paths.map(PathBuf::from).collect());
    let given = given.or_else(|| Some(vec![PathBuf::from(variable(SOCKET_VARIABLE)?)]));
    let node = inner.get_one::<String>("node").cloned();
    let said = |name: &str| inner.get_one::<String>(name).is_some();
    let in_cluster = inner.get_flag("kubernetes") || node.is_some() || said("kubeconfig") || said("context");
    let place = match (in_cluster, &given) {
        (true, _) => Place::Cluster,
        (false, Some(_)) => Place::Here,
        (false, None) => Place::WhereItIs,
    };
    let sockets: Vec<PathBuf> = given.unwrap_or_else(|| vec![DEFAULT_SOCKET.into()]);
    let task = cluster_args::task(name, outer, place)?;
    let mesh_is_named = task.is_some();
    let access = cluster_args::access_of(inner, mesh_is_named, &variable);
    let task = match (task, name, PAGES.iter().find(|(page, ..)| *page == name)) {
        (Some(task), ..) => Task::Cluster(task),
        (None, _, Some((_, page, _))) => Task::Show(*page),
        (None, "ready", None) => Task::Ready,
        (None, "end", None) => Task::End,
        (None, "log", None) => Task::Log(log_level(inner)?),
        (None, "analyze", None) => {
            let mut written = Written::default();
            lay_over(&mut written, named(&ANALYZE_SETTINGS), inner, &variable);
            Task::Analyze(Analysis::check(&written)?)
        }
        _ => Task::Uninstall(uninstall(inner, &sockets, variable, machine)?),
    };
    let namespace = inner.try_get_one::<String>("namespace").ok().flatten().cloned();
    Ok(Ok(Wish { task, output, namespace, sockets, place, access, node }))
}

fn log_level(matches: &ArgMatches) -> Result<Option<String>, Failure> {
    let level = matches.get_one::<String>("level").cloned();
    if let Some(level) = &level {
        logging::parse(level).map_err(Failure::usage)?;
    }
    Ok(level)
}

fn uninstall(
    matches: &ArgMatches,
    sockets: &[PathBuf],
    variable: impl Fn(&str) -> Option<String>,
    machine: &Machine,
) -> anyhow::Result<Cleanup> {
    let [socket] = sockets else {
        return Err(Failure::usage("uninstall takes one node's agent away; give one --socket").into());
    };
    let mut written = Written::default();
    lay_over(&mut written, named(&CLEANUP_SETTINGS), matches, &variable);
    if let Some(setting) = Setting::named("admin-socket") {
        written.set(setting, Origin::Flag, vec![socket.display().to_string()]);
    }
    Ok(Cleanup::check(&written, machine)?)
}
