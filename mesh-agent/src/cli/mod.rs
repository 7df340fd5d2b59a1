//! The command lines: `mesh-agent` (roles node and controller) and `meshctl`. Arguments come in; one call into the
//! rest, an exit code and, where it failed, one sentence go out.

mod agent;
mod args;
mod cleanup;
mod exit;
mod facts;
mod meshctl;

pub use exit::{Exit, Failure};

use std::process::ExitCode;

/// The binary `mesh-agent`.
pub fn mesh_agent() -> ExitCode {
    exit::report("mesh-agent", agent::run(std::env::args_os()))
}

/// The binary `meshctl`.
pub fn meshctl() -> ExitCode {
    exit::report("meshctl", meshctl::run(std::env::args_os()))
}
