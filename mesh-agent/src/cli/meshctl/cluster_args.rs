//! The part of meshctl's command line that is about Kubernetes.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::args::Place;
use super::chart::Given;
use super::cluster::{Access, Check, Compared, Install, Task, Uninstall};
use crate::cli::exit::Failure;
use crate::config::duration;

const DEFAULT_NAMESPACE: &str = "nodemesh-system";
const NAMESPACE_VARIABLE: &str = "NODEMESH_NAMESPACE";
const HEADING: &str = "Kubernetes";

/// Known to all commands.
pub(super) fn access() -> [Arg; 5] {
    let text = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help).help_heading(HEADING).global(true)
    };
    [
        Arg::new("kubernetes")
            .long("kubernetes")
            .action(ArgAction::SetTrue)
            .help("Of a cluster, also where an agent runs here")
            .help_heading(HEADING)
            .global(true),
        text("kubeconfig", "FILE", "How to reach it [default: $KUBECONFIG or ~/.kube/config]"),
        text("context", "NAME", "Which of the kubeconfig's contexts"),
        text("mesh-namespace", "NAME", "Where the mesh is installed [default: nodemesh-system]"),
        text("node", "NAME", "Only the agent of this node"),
    ]
}

/// In the order in which one meets them.
pub(super) fn commands() -> Vec<Command> {
    let install = Command::new("install")
        .about("Install the mesh in a cluster, or bring an installation up to what is given")
        .args(values())
        .arg(mesh_namespace())
        .arg(dry_run())
        .arg(yes())
        .arg(timeout("How long it may take until all is ready [default: 5m]"));
    let upgrade = Command::new("upgrade")
        .about("Bring the installed mesh to this version, node by node")
        .args(values())
        .arg(mesh_namespace())
        .arg(dry_run())
        .arg(yes())
        .arg(timeout("How long each node may take [default: 5m]"));
    let generate = Command::new("generate").about("Print what would be installed").args(values()).arg(mesh_namespace());
    let diff = Command::new("diff")
        .about("What an installation would change in the cluster, or how two files differ")
        .arg(Arg::new("files").value_name("FILE").num_args(2).value_parser(clap::value_parser!(PathBuf)))
        .args(values())
        .arg(mesh_namespace());
    let manifest =
        Command::new("manifest").about("What is installed").subcommand_required(true).subcommands([generate, diff]);
    let name = |id: &'static str| Arg::new(id).value_name("PROFILE").required(true);
    let profile = Command::new("profile").about("Ready-made values").subcommand_required(true).subcommands([
        Command::new("list").about("Which there are"),
        Command::new("dump")
            .about("All values, of a profile or as given")
            .arg(Arg::new("name").value_name("PROFILE"))
            .args(values()),
        Command::new("diff").about("How two differ").arg(name("old")).arg(name("new")),
    ]);
    let names = || Arg::new("names").value_name("NAME").num_args(1..).required(true).help("Namespaces");
    let namespace =
        Command::new("namespace").about("Which namespaces are in the mesh").subcommand_required(true).subcommands([
            Command::new("list").about("All namespaces with their pods"),
            Command::new("enable").about("Bring the pods of these into the mesh").arg(names()),
            Command::new("disable").about("Take the pods of these out of it").arg(names()),
        ]);
    let check = Command::new("check")
        .about("Whether a cluster can take the mesh, and how it is once it has")
        .arg(mesh_namespace())
        .arg(
            Arg::new("nodes")
                .long("nodes")
                .action(ArgAction::SetTrue)
                .help("Look at nodes without an agent too: a pod on each, as an agent's, for a moment"),
        )
        .args(values());
    let version = Command::new("version")
        .about("Of this program, and of what runs in the cluster")
        .arg(mesh_namespace())
        .arg(Arg::new("client").long("client").action(ArgAction::SetTrue).help("Only of this program"));
    vec![install, upgrade, check, version, namespace, manifest, profile]
}

pub(super) fn uninstall() -> [Arg; 4] {
    let switch = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).action(ArgAction::SetTrue).help(help).help_heading(HEADING)
    };
    [
        mesh_namespace().help_heading(HEADING),
        timeout("How long each step may take [default: 5m]").help_heading(HEADING),
        switch("force", "Go on though a node could not be cleaned"),
        switch("purge", "Remove policies and their kinds too"),
    ]
}

fn values() -> [Arg; 3] {
    [
        Arg::new("profile").long("profile").value_name("NAME").help("default, minimal, demo or production"),
        Arg::new("values")
            .short('f')
            .long("values")
            .value_name("FILE")
            .action(ArgAction::Append)
            .value_parser(clap::value_parser!(PathBuf))
            .help("Values over the profile's; may be repeated"),
        Arg::new("set")
            .long("set")
            .value_name("KEY=VALUE")
            .action(ArgAction::Append)
            .help("A value over those, such as image.tag=x; may be repeated"),
    ]
}

fn mesh_namespace() -> Arg {
    Arg::new("namespace")
        .short('n')
        .long("namespace")
        .value_name("NAME")
        .help("The mesh's namespace [default: nodemesh-system]")
}

fn dry_run() -> Arg {
    Arg::new("dry-run").long("dry-run").action(ArgAction::SetTrue).help("Say what would be done, and do nothing")
}

fn yes() -> Arg {
    Arg::new("yes")
        .short('y')
        .long("yes")
        .action(ArgAction::SetTrue)
        .help("Go on though agents cannot hand over, which cuts connections")
}

fn timeout(help: &'static str) -> Arg {
    Arg::new("timeout").long("timeout").value_name("TIME").default_value("5m").hide_default_value(true).help(help)
}

/// `mesh_is_named`: the command's `--namespace` is the mesh's, and no filter.
pub(super) fn access_of(
    matches: &ArgMatches,
    mesh_is_named: bool,
    variable: &impl Fn(&str) -> Option<String>,
) -> Access {
    let text = |name: &str| matches.try_get_one::<String>(name).ok().flatten().cloned();
    let named = if mesh_is_named { text("namespace") } else { None };
    let namespace = named.or_else(|| text("mesh-namespace")).or_else(|| variable(NAMESPACE_VARIABLE));
    Access {
        kubeconfig: text("kubeconfig").map(PathBuf::from),
        context: text("context"),
        namespace: namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
    }
}

/// The task of a command that is about a cluster; `None` for the others.
pub(super) fn task(name: &str, matches: &ArgMatches, place: Place) -> Result<Option<Task>, Failure> {
    let inner = matches.subcommand();
    Ok(Some(match (name, inner) {
        ("install", _) => Task::Install(install(matches)?),
        ("upgrade", _) => Task::Upgrade(install(matches)?),
        ("uninstall", _) if place == Place::Cluster => Task::Uninstall(Uninstall {
            timeout: time(matches)?,
            force: matches.get_flag("force"),
            purge: matches.get_flag("purge"),
        }),
        ("check", _) => Task::Check(Check { given: given(matches), nodes: matches.get_flag("nodes") }),
        ("version", _) => Task::Version { client: matches.get_flag("client") },
        ("manifest", Some(("generate", inner))) => Task::Generate(given(inner)),
        ("manifest", Some((_, inner))) => {
            let files: Vec<&PathBuf> = inner.get_many("files").into_iter().flatten().collect();
            match files[..] {
                [old, new] => Task::Diff(Compared::Files(old.clone(), new.clone())),
                _ => Task::Diff(Compared::Cluster(given(inner))),
            }
        }
        ("profile", Some(("dump", inner))) => {
            let mut given = given(inner);
            given.profile = inner.get_one::<String>("name").cloned().or(given.profile);
            Task::ProfileDump(given)
        }
        ("profile", Some(("diff", inner))) => {
            let text = |name: &str| inner.get_one::<String>(name).cloned().unwrap_or_default();
            Task::ProfileDiff(text("old"), text("new"))
        }
        ("profile", _) => Task::ProfileList,
        ("namespace", Some((verb @ ("enable" | "disable"), inner))) => {
            let names = inner.get_many::<String>("names").into_iter().flatten().cloned().collect();
            Task::NamespaceSwitch(names, verb == "enable")
        }
        ("namespace", _) => Task::NamespaceList,
        _ => return Ok(None),
    }))
}

fn install(matches: &ArgMatches) -> Result<Install, Failure> {
    Ok(Install {
        given: given(matches),
        dry_run: matches.get_flag("dry-run"),
        timeout: time(matches)?,
        yes: matches.get_flag("yes"),
    })
}

fn given(matches: &ArgMatches) -> Given {
    Given {
        profile: matches.get_one::<String>("profile").cloned(),
        files: matches.get_many::<PathBuf>("values").into_iter().flatten().cloned().collect(),
        set: matches.get_many::<String>("set").into_iter().flatten().cloned().collect(),
    }
}

fn time(matches: &ArgMatches) -> Result<Duration, Failure> {
    let text = matches.get_one::<String>("timeout").cloned().unwrap_or_default();
    duration(&text).map_err(|e| Failure::usage(format!("--timeout: {e}")))
}
