//! Envoy's response flags of HTTP requests.

use std::fmt;
use std::ops::BitOr;

/// Why an answer is not the server's own, or not whole. Several may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags(u16);

impl Flags {
    pub const NONE: Self = Self(0);
    /// `UH`: no endpoint of the service is ready.
    pub const NO_HEALTHY_UPSTREAM: Self = Self(1);
    /// `UF`: no endpoint could be reached.
    pub const CONNECT_FAILURE: Self = Self(1 << 1);
    /// `UC`: the connection ended before the answer did.
    pub const UPSTREAM_ENDED: Self = Self(1 << 2);
    /// `UPE`: the server's answer was no HTTP.
    pub const PROTOCOL_ERROR: Self = Self(1 << 3);
    /// `UT`: the answer took too long.
    pub const TIMEOUT: Self = Self(1 << 4);
    /// `DC`: the client left before the end of the answer.
    pub const CLIENT_LEFT: Self = Self(1 << 5);
    /// `DPE`: the client's request is not one.
    pub const CLIENT_ERROR: Self = Self(1 << 6);
    /// `NR`: no rule matches.
    pub const NO_ROUTE: Self = Self(1 << 7);
    /// `NC`: the rule's backend is not there.
    pub const NO_BACKEND: Self = Self(1 << 8);
    /// `DI`: a delay on purpose.
    pub const DELAYED: Self = Self(1 << 9);
    /// `FI`: an abort on purpose.
    pub const ABORTED: Self = Self(1 << 10);
    /// `URX`: it was tried as often as the rule allows.
    pub const RETRIES_EXHAUSTED: Self = Self(1 << 11);
    /// `DENY`: a policy refused it.
    pub const DENIED: Self = Self(1 << 12);

    const NAMES: [&str; 13] = ["UH", "UF", "UC", "UPE", "UT", "DC", "DPE", "NR", "NC", "DI", "FI", "URX", "DENY"];
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Joined by commas; `-` where there is none.
impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::NONE {
            return f.write_str("-");
        }
        let set = Self::NAMES.iter().enumerate().filter(|(bit, _)| self.0 & 1 << bit != 0);
        for (i, (_, name)) in set.enumerate() {
            f.write_str(if i > 0 { "," } else { "" })?;
            f.write_str(name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_as_envoy_writes_them() {
        assert_eq!(Flags::NONE.to_string(), "-");
        assert_eq!((Flags::RETRIES_EXHAUSTED | Flags::UPSTREAM_ENDED).to_string(), "UC,URX");
        assert_eq!(Flags::DENIED.to_string(), "DENY");
    }
}
