//! How a command ends: exit codes as sysexits.h has them, and an error as one sentence on stderr.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::meshctl::{terminal_width, wrap};
use crate::admin::AdminError;
use crate::api_server::ApiError;
use crate::config::ConfigError;
use crate::discovery::DiscoveryError;
use crate::handover::{OwnError, TakeError};
use crate::identity::{CaError, TokenError};
use crate::redirect::RedirectError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Wrong usage or a wrong setting. It will be wrong at the next try too.
    Usage = 64,
    /// The manifests that `meshctl analyze` was shown have errors.
    Data = 65,
    /// Something outside is not there: an agent, a port, a mount. It may be there later.
    Unavailable = 69,
    /// Our own fault, or one we did not think of.
    Internal = 70,
    /// Rights are missing.
    NoPermission = 77,
}

/// An error that knows its exit code. `app` may put it around any other (`anyhow::Error::context`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
}

impl Failure {
    pub fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, message: message.into() }
    }

    pub fn data(message: impl Into<String>) -> Self {
        Self { exit: Exit::Data, message: message.into() }
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { exit: Exit::Unavailable, message: message.into() }
    }

    pub fn no_permission(message: impl Into<String>) -> Self {
        Self { exit: Exit::NoPermission, message: message.into() }
    }
}

/// Prints the sentence of an error and gives the code to exit with.
pub(super) fn report(program: &str, result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // `meshctl ... | head` has seen enough: no fault.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("{program}: {}", sentence(&error));
            // On a terminal no word is torn; what reads a pipe gets one line.
            match io::stderr().is_terminal() {
                true => eprintln!("{}", wrap(&text, terminal_width(), 2)),
                false => eprintln!("{text}"),
            }
            ExitCode::from(code(&error) as u8)
        }
    }
}

pub(super) fn code(error: &anyhow::Error) -> Exit {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return failure.exit;
    }
    error.chain().find_map(of_cause).unwrap_or(Exit::Internal)
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(failure.exit);
    }
    if cause.is::<ConfigError>() {
        return Some(Exit::Usage);
    }
    if let Some(error) = cause.downcast_ref::<RedirectError>() {
        return of_redirect(error);
    }
    if let Some(error) = cause.downcast_ref::<ApiError>() {
        return Some(match error {
            ApiError::NoConfig(_) | ApiError::Kubeconfig { .. } => Exit::Usage,
            ApiError::Unauthorized { .. } | ApiError::Forbidden { .. } => Exit::NoPermission,
            ApiError::Unreachable { .. }
            | ApiError::Untrusted { .. }
            | ApiError::NotFound { .. }
            | ApiError::Conflict { .. }
            | ApiError::Refused { .. }
            | ApiError::Other { .. } => Exit::Unavailable,
        });
    }
    if cause.is::<TakeError>() {
        return Some(Exit::Unavailable);
    }
    match cause.downcast_ref::<OwnError>() {
        Some(OwnError::Redirect(error)) => return of_redirect(error),
        Some(OwnError::Admin(error)) => return of_io(error.kind()),
        Some(OwnError::Socket(error)) => return of_io(error.kind()),
        None => {}
    }
    if let Some(error) = cause.downcast_ref::<CaError>() {
        return match error {
            CaError::Lifetime(_) | CaError::Brought => Some(Exit::Usage),
            CaError::Locked(_) | CaError::NoController(_) | CaError::UnderWay(_) | CaError::Expired(_) => {
                Some(Exit::Unavailable)
            }
            // What is below them may know more.
            _ => None,
        };
    }
    if let Some(TokenError::Id(_) | TokenError::NoSecret(_) | TokenError::Foreign) = cause.downcast_ref::<TokenError>()
    {
        return Some(Exit::Usage);
    }
    match cause.downcast_ref::<DiscoveryError>() {
        Some(DiscoveryError::Missing(_) | DiscoveryError::NoDirectory(_)) => return Some(Exit::Usage),
        Some(DiscoveryError::Unreadable { .. } | DiscoveryError::Thread { .. }) | None => {}
    }
    let kind = match cause.downcast_ref::<AdminError>() {
        Some(error) => error.kind(),
        None => cause.downcast_ref::<io::Error>()?.kind(),
    };
    of_io(kind)
}

fn of_redirect(error: &RedirectError) -> Option<Exit> {
    match error {
        RedirectError::NotCgroup2 { .. }
        | RedirectError::NotInCgroup { .. }
        | RedirectError::ForeignFolder { .. }
        | RedirectError::NotBpffs { .. }
        | RedirectError::NodeName { .. } => Some(Exit::Usage),
        RedirectError::Capability { .. } => Some(Exit::NoPermission),
        RedirectError::Cgroup { source, .. }
        | RedirectError::Bpffs { source, .. }
        | RedirectError::Attach { source, .. }
        | RedirectError::Pin { source, .. } => of_io(source.kind()).or(Some(Exit::Unavailable)),
        // The machine is not what it has to be; another kernel or another owner would mend it.
        RedirectError::Running { .. }
        | RedirectError::NotTheLock { .. }
        | RedirectError::NotTheRoot { .. }
        | RedirectError::NoCgroup2
        | RedirectError::Load { .. }
        | RedirectError::Object { .. }
        | RedirectError::ForeignExclusive { .. }
        | RedirectError::TooManyPods { .. }
        | RedirectError::HostNetwork { .. }
        | RedirectError::NetnsCookie { .. } => Some(Exit::Unavailable),
        RedirectError::Map { source, .. } => of_io(source.kind()),
    }
}

fn of_io(kind: io::ErrorKind) -> Option<Exit> {
    match kind {
        io::ErrorKind::PermissionDenied => Some(Exit::NoPermission),
        io::ErrorKind::AddrInUse
        | io::ErrorKind::AddrNotAvailable
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::NotFound
        | io::ErrorKind::TimedOut => Some(Exit::Unavailable),
        _ => None,
    }
}

/// The whole chain in one line. A cause that the error above it has already told is not told twice.
pub(super) fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string().replace('\n', " ");
        let reason = cause.split(" (os error").next().unwrap_or(&cause).to_lowercase();
        if text.to_lowercase().contains(&reason) {
            continue;
        }
        if !text.is_empty() {
            text += ": ";
        }
        text += &cause;
    }
    text
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|c| c.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe))
}

/// What clap has to say: a text that was asked for (help, version), or a usage error as one sentence.
pub(super) fn from_clap(error: &clap::Error, help: &str) -> Result<String, Failure> {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(all)) => Some(all.join(", ")),
        _ => None,
    };
    // `--workers <N>` -> `--workers`
    let flag = |text: String| text.split([' ', '=', '[']).next().unwrap_or_default().to_owned();
    let argument = context(ContextKind::InvalidArg).unwrap_or_default();
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    let see = format!("see `{help}`");
    let sentence = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => return Ok(error.to_string()),
        ErrorKind::UnknownArgument => {
            let next = context(ContextKind::SuggestedArg).map(|s| format!("did you mean `{s}`?")).unwrap_or(see);
            match argument.starts_with('-') {
                true => format!("unknown flag `{argument}`; {next}"),
                false => format!("`{argument}` is one argument too many; {next}"),
            }
        }
        ErrorKind::InvalidSubcommand => {
            let command = context(ContextKind::InvalidSubcommand).unwrap_or_default();
            let next = context(ContextKind::SuggestedSubcommand).map_or(see, |s| format!("did you mean `{s}`?"));
            format!("unknown command `{command}`; {next}")
        }
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let commands = context(ContextKind::ValidSubcommand).unwrap_or_default();
            match commands.is_empty() {
                true => format!("which command? {see}"),
                false => format!("which command? there are {commands}; {see}"),
            }
        }
        ErrorKind::MissingRequiredArgument => format!("{argument} is missing; {see}"),
        ErrorKind::InvalidValue if value.is_empty() => format!("{} needs a value; {see}", flag(argument)),
        ErrorKind::InvalidValue => match context(ContextKind::ValidValue) {
            Some(valid) => format!("{}: `{value}` is none of {valid}", flag(argument)),
            None => format!("{}: `{value}` cannot be used; {see}", flag(argument)),
        },
        ErrorKind::ArgumentConflict => match context(ContextKind::PriorArg) {
            Some(prior) if prior != argument => format!("{argument} and {prior} exclude each other"),
            _ => format!("{} is given more than once", flag(argument)),
        },
        ErrorKind::InvalidUtf8 => "an argument is no UTF-8 text".to_owned(),
        _ => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            format!("{}; {see}", line.strip_prefix("error: ").unwrap_or(line))
        }
    };
    Err(Failure::usage(sentence))
}
