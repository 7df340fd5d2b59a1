//! `mesh-agent`: parse, check, call.

use std::ffi::OsString;
use std::io::Write;

use super::args::{Wish, parse};
use super::cleanup::{cleanup, remove_folders};
use super::facts;
use crate::app;
use crate::config::Machine;

pub(super) fn run(args: impl IntoIterator<Item = OsString>) -> anyhow::Result<()> {
    match parse(args, |name| std::env::var(name).ok(), &Machine::here())? {
        Wish::Show(text) => Ok(write!(std::io::stdout(), "{text}")?),
        Wish::Node(config, live) => app::run_node(*config, *live),
        Wish::Cleanup(config, folders) => {
            cleanup(&config, &mut std::io::stdout())?;
            remove_folders(&folders, &mut std::io::stdout())
        }
        Wish::Facts(config) => facts::tell(&config, &mut std::io::stdout()),
        Wish::Controller(config, live) => app::run_controller(*config, *live),
        Wish::Token { controller, node, ttl } => {
            Ok(writeln!(std::io::stdout(), "{}", app::join_token(controller, &node, ttl)?)?)
        }
        Wish::RevokeToken { controller, token } => {
            Ok(writeln!(std::io::stdout(), "{}", app::revoke_token(&controller, &token)?)?)
        }
        Wish::RotateRoot(config) => Ok(writeln!(std::io::stdout(), "{}", app::rotate_root(config)?)?),
    }
}
