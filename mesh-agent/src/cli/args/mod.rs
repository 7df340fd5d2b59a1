//! The command line of `mesh-agent`, made from the table of settings; variables and file are laid under its flags.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::exit::{Failure, from_clap};
use crate::config::duration;
use crate::config::{
    Cleanup, ConfigError, Controller, Kind, Live, Machine, Node, Origin, Role, SETTINGS, Setting, Written,
};

/// What the user wants, all settings checked.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Wish {
    Node(Box<Node>, Box<Live>),
    /// And folders that go after it.
    Cleanup(Cleanup, Vec<PathBuf>),
    /// How the node is, for meshctl.
    Facts(Cleanup),
    Controller(Box<Controller>, Box<Live>),
    Token {
        controller: Controller,
        node: String,
        ttl: Duration,
    },
    RevokeToken {
        controller: Controller,
        /// Whole, or its id.
        token: String,
    },
    RotateRoot(Controller),
    /// Print this text: help or version.
    Show(String),
}

const FOOTER: &str = "\
Each setting can also be a variable (--node-name: NODEMESH_NODE_NAME) or a line
of the settings file (nodeName: a). A flag beats a variable, and a variable the
file. TIME is a number with a unit: 90s, 5m, 24h.";

const DEFAULT_TTL: &str = "365d";

pub(super) fn command() -> Command {
    let node = Command::new("node")
        .about("Carry the traffic of this node's pods")
        .after_help(FOOTER)
        .args(flags(Role::Node))
        .arg(
            Arg::new("cleanup")
                .long("cleanup")
                .action(ArgAction::SetTrue)
                .help("Remove all that an agent of this node left in the kernel, then exit"),
        )
        // For meshctl, in pods on a cluster's nodes.
        .arg(Arg::new("facts").long("facts").action(ArgAction::SetTrue).hide(true).conflicts_with("cleanup"))
        .arg(
            Arg::new("remove-folder")
                .long("remove-folder")
                .value_name("PATH")
                .action(ArgAction::Append)
                .value_parser(clap::value_parser!(PathBuf))
                .hide(true)
                .requires("cleanup"),
        );
    let token = Command::new("token")
        .about("Print a token with which one node may join")
        .arg(Arg::new("node").long("node").value_name("NAME").required(true).help("The node that may use it"))
        .arg(Arg::new("ttl").long("ttl").value_name("TIME").default_value(DEFAULT_TTL).hide_default_value(true).help(
            "How long it can be used [default: 365d]. It is shown at every renewal: it must live as long as the node",
        ));
    let revoke = Command::new("revoke-token")
        .about("Refuse a join token from now on")
        .arg(Arg::new("token").value_name("TOKEN").required(true).help("The token, or its id, as errors name it"));
    let rotate = Command::new("rotate-root").about("Change to a new root; both are trusted during the change");
    let controller = Command::new("controller")
        .about("Sign the certificates of the nodes")
        .after_help(FOOTER)
        .args(flags(Role::Controller))
        .subcommand(token)
        .subcommand(revoke)
        .subcommand(rotate);
    Command::new("mesh-agent")
        .about("Nodemesh: a service mesh without sidecars")
        .version(env!("CARGO_PKG_VERSION"))
        .max_term_width(80)
        .subcommand_required(true)
        .subcommand(node)
        .subcommand(controller)
}

fn flags(role: Role) -> Vec<Arg> {
    let settings = Arg::new("settings")
        .long("settings")
        .value_name("FILE")
        .global(role == Role::Controller)
        .help("Read settings from this YAML file");
    std::iter::once(settings)
        .chain(SETTINGS.iter().filter(|s| s.roles.contains(&role)).map(|s| flag(s, role)))
        .collect()
}

fn flag(setting: &'static Setting, role: Role) -> Arg {
    // So that `controller token --state-dir DIR` reads as it is typed.
    plain_flag(setting).help_heading(setting.heading).global(role == Role::Controller)
}

/// The flag of a setting, as every command has it.
pub(super) fn plain_flag(setting: &'static Setting) -> Arg {
    let help = match setting.default {
        "" => setting.help.to_owned(),
        default => format!("{} [default: {default}]", setting.help),
    };
    let arg = Arg::new(setting.name)
        .long(setting.name)
        .value_name(setting.value)
        .help(help)
        .hide(setting.hidden)
        .allow_negative_numbers(true);
    match setting.kind {
        Kind::One => arg,
        Kind::Many => arg.action(ArgAction::Append),
        Kind::Switch => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
    }
}

/// `args` with the program's name first; `variable` looks one up in the environment.
pub(super) fn parse(
    args: impl IntoIterator<Item = OsString>,
    variable: impl Fn(&str) -> Option<String>,
    machine: &Machine,
) -> anyhow::Result<Wish> {
    let args: Vec<OsString> = args.into_iter().collect();
    let matches = match command().try_get_matches_from(&args) {
        Ok(matches) => matches,
        Err(error) => return Ok(Wish::Show(from_clap(&error, &help_of(&args))?)),
    };
    match matches.subcommand() {
        // Whatever the file says, and where there is none.
        Some(("node", matches)) if matches.get_flag("facts") => {
            let mut laid = Written::default();
            lay_over(&mut laid, SETTINGS.iter().filter(|s| s.roles.contains(&Role::Node)), matches, &variable);
            Ok(Wish::Facts(Cleanup::check(&laid, machine)?))
        }
        Some(("node", matches)) => {
            let written = gather(matches, Role::Node, &variable)?;
            let mut laid = Written::default();
            lay_over(&mut laid, SETTINGS.iter().filter(|s| s.roles.contains(&Role::Node)), matches, &variable);
            match matches.get_flag("cleanup") {
                true => {
                    let folders = matches.get_many::<PathBuf>("remove-folder").into_iter().flatten().cloned().collect();
                    Ok(Wish::Cleanup(Cleanup::check(&written, machine)?, folders))
                }
                false => {
                    let node = Node::check(&written, machine)?;
                    Ok(Wish::Node(Box::new(node), Box::new(Live::new(laid, written, machine.clone()))))
                }
            }
        }
        Some(("controller", matches)) => {
            // Global flags stand in the innermost matches.
            let innermost = matches.subcommand().map_or(matches, |(_, inner)| inner);
            let written = gather(innermost, Role::Controller, &variable)?;
            match matches.subcommand() {
                Some(("token", token)) => token_wish(Controller::check_for_tools(&written)?, token),
                Some(("revoke-token", revoke)) => Ok(Wish::RevokeToken {
                    controller: Controller::check_for_tools(&written)?,
                    token: revoke.get_one::<String>("token").cloned().unwrap_or_default().trim().to_owned(),
                }),
                Some(("rotate-root", _)) => Ok(Wish::RotateRoot(Controller::check_for_tools(&written)?)),
                _ => {
                    let controller = Controller::check(&written)?;
                    let mut laid = Written::default();
                    let settings = SETTINGS.iter().filter(|s| s.roles.contains(&Role::Controller));
                    lay_over(&mut laid, settings, innermost, &variable);
                    Ok(Wish::Controller(Box::new(controller), Box::new(Live::new(laid, written, machine.clone()))))
                }
            }
        }
        _ => unreachable!("clap wants one of the subcommands above"),
    }
}

fn token_wish(controller: Controller, token: &ArgMatches) -> anyhow::Result<Wish> {
    let text = |name| token.get_one::<String>(name).cloned().unwrap_or_default();
    let node = crate::config::node_name(&text("node")).map_err(|e| Failure::usage(format!("--node: {e}")))?;
    let ttl = duration(&text("ttl")).map_err(|e| Failure::usage(format!("--ttl: {e}")))?;
    if ttl.is_zero() {
        return Err(Failure::usage("--ttl: a token that ends at once is of no use; write for example 1h").into());
    }
    Ok(Wish::Token { controller, node, ttl })
}

/// File, variables, flags.
fn gather(
    matches: &ArgMatches,
    role: Role,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Written, ConfigError> {
    let mut written = Written::default();
    let file = matches.get_one::<String>("settings").cloned().or_else(|| variable("NODEMESH_SETTINGS"));
    lay_over(&mut written, SETTINGS.iter().filter(|s| s.roles.contains(&role)), matches, variable);
    match (file, role) {
        (None, _) => {}
        (Some(file), Role::Node) => written.read_of_node(Path::new(&file))?,
        (Some(file), Role::Controller) => written.read(Path::new(&file))?,
    }
    Ok(written)
}

/// Variables and flags of these settings.
pub(super) fn lay_over(
    written: &mut Written,
    settings: impl Iterator<Item = &'static Setting>,
    matches: &ArgMatches,
    variable: &impl Fn(&str) -> Option<String>,
) {
    for setting in settings {
        if let Some(value) = variable(&setting.variable()) {
            let values = match setting.kind {
                Kind::Many => value.split(',').map(|v| v.trim().to_owned()).collect(),
                Kind::One | Kind::Switch => vec![value],
            };
            written.set(setting, Origin::Variable, values);
        }
        if let Some(values) = matches.get_many::<String>(setting.name) {
            written.set(setting, Origin::Flag, values.cloned().collect());
        }
    }
}

/// The `--help` that tells more about what `args` tried.
fn help_of(args: &[OsString]) -> String {
    let command = args.iter().skip(1).find_map(|a| match a.to_str() {
        Some(role @ ("node" | "controller")) => Some(role),
        _ => None,
    });
    command.map_or_else(|| "mesh-agent --help".to_owned(), |c| format!("mesh-agent {c} --help"))
}

#[cfg(test)]
mod tests;
