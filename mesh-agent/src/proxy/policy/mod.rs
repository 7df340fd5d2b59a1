//! May it pass? Pure judgement in, `Permit` or `Denied` out.

mod authorization;

pub use authorization::{Connection, Denied, Permit, Verdict, authorize};
