//! The agent's own settings, in two steps: as written (`Written`: file, environment and flags, all still text), then as
//! used (`Node`, `Controller`: typed, checked whole). Nothing is bound, loaded or written before the second step is
//! through, so that a wrong setting stops the process and not the traffic.
//!
//! `table` names every setting once; flags, variables, keys of the file and `--help` all come from there.

mod checked;
mod live;
mod table;
mod value;
mod written;

pub use checked::{
    Analysis, CertificateAuthority, Cleanup, Cni, Controller, Kubernetes, Logging, Machine, Node, Source, Token,
};
pub use live::{Changed, Live};
pub use table::{Kind, Role, SETTINGS, Setting};
pub use value::{dns_name as node_name, duration, written_duration};
pub use written::{LAST_GOOD_SETTINGS, Origin, Written};

/// One sentence about one setting: where it was written, what is wrong, what to write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);
