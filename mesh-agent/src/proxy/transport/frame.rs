//! The session tunnel's frames. One TLS record is one frame: a byte that says what it is, then its content. Nothing
//! needs a length, nothing is put together from parts, and a record is written to the application where it was opened.
//!
//! A session carries one connection at a time. The client sends OPEN, and may send DATA right behind it; the server answers
//! OPENED or REFUSED, and hands no DATA on before it has; then both send DATA. Each side's part ends with FIN (orderly),
//! RESET (not), or, the server's, REFUSED. When both have ended, the session is free for the next OPEN. A side that has
//! ended may still get DATA that was on its way, and drops it.
//!
//! Between two connections the server may send GO_AWAY: it stops, and wants no further OPEN. One that was on its way already
//! it still serves. The client then closes the session.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// What a frame is; the first byte of its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Data,
    Open,
    Opened,
    Refused,
    Fin,
    Reset,
    GoAway,
}

/// Why the server's agent does not carry a connection; the same three reasons as HBONE's status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The OPEN frame or CONNECT request makes no sense here (400).
    BadRequest,
    /// Policy says no (401, as ztunnel answers).
    Denied,
    /// The application does not answer (503).
    Unreachable,
}

/// What an OPEN frame asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    pub destination: SocketAddr,
    /// How long the application may take until it has the connection, in whole seconds, 1 to 255: less where the client
    /// has other endpoints to ask. The server must refuse in time, since only a refusal proves that nothing was handed on.
    pub wait: Duration,
}

/// The payload of an OPEN frame at most.
pub const OPEN_MAX: usize = 1 + 16 + 2 + 1;

impl Kind {
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Data,
            1 => Self::Open,
            2 => Self::Opened,
            3 => Self::Refused,
            4 => Self::Fin,
            5 => Self::Reset,
            6 => Self::GoAway,
            _ => return None,
        })
    }

    pub fn byte(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Open => 1,
            Self::Opened => 2,
            Self::Refused => 3,
            Self::Fin => 4,
            Self::Reset => 5,
            Self::GoAway => 6,
        }
    }
}

impl Refusal {
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::BadRequest,
            1 => Self::Denied,
            2 => Self::Unreachable,
            _ => return None,
        })
    }

    pub fn byte(self) -> u8 {
        match self {
            Self::BadRequest => 0,
            Self::Denied => 1,
            Self::Unreachable => 2,
        }
    }

    pub fn from_status(status: u16) -> Option<Self> {
        match status {
            200 => None,
            401 | 403 => Some(Self::Denied),
            503 => Some(Self::Unreachable),
            _ => Some(Self::BadRequest),
        }
    }

    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Denied => 401,
            Self::Unreachable => 503,
        }
    }
}

/// Writes the payload of an OPEN frame: family (4 or 6), address, port in network order, seconds to wait. Returns its
/// length.
pub fn write_open(open: Open, into: &mut [u8; OPEN_MAX]) -> usize {
    let address_end = match open.destination.ip().to_canonical() {
        IpAddr::V4(ip) => {
            into[0] = 4;
            into[1..5].copy_from_slice(&ip.octets());
            5
        }
        IpAddr::V6(ip) => {
            into[0] = 6;
            into[1..17].copy_from_slice(&ip.octets());
            17
        }
    };
    into[address_end..address_end + 2].copy_from_slice(&open.destination.port().to_be_bytes());
    into[address_end + 2] = open.wait.as_secs().clamp(1, u8::MAX.into()) as u8;
    address_end + 3
}

/// Reads what `write_open` wrote; `None` for anything else, port 0 and no time to wait too.
pub fn read_open(payload: &[u8]) -> Option<Open> {
    let (ip, rest): (IpAddr, &[u8]) = match payload {
        [4, a, b, c, d, rest @ ..] => ([*a, *b, *c, *d].into(), rest),
        [6, rest @ ..] => {
            let (ip, rest) = rest.split_first_chunk::<16>()?;
            ((*ip).into(), rest)
        }
        _ => return None,
    };
    let &[high, low, wait] = rest else { return None };
    let port = u16::from_be_bytes([high, low]);
    let wait = Duration::from_secs(wait.into());
    (port != 0 && !wait.is_zero()).then(|| Open { destination: SocketAddr::new(ip, port), wait })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_reads_back_as_written() {
        for text in ["10.1.2.3:80", "[fd00::1]:65535"] {
            let open = Open { destination: text.parse().unwrap(), wait: Duration::from_secs(3) };
            let mut payload = [0; OPEN_MAX];
            let len = write_open(open, &mut payload);
            assert_eq!(read_open(&payload[..len]), Some(open));
            assert_eq!(read_open(&payload[..len - 1]), None);
        }
    }

    #[test]
    fn what_is_no_destination_is_refused() {
        let wrong: [&[u8]; 6] = [
            &[],
            &[4, 1, 2, 3, 4, 0, 0, 3],
            &[4, 1, 2, 3, 4, 0, 80, 0],
            &[5, 1, 2, 3, 4, 0, 80, 3],
            &[4, 1, 2, 3, 4, 0, 80],
            &[4, 1, 2, 3, 4, 0, 80, 3, 9],
        ];
        for payload in wrong {
            assert_eq!(read_open(payload), None, "{payload:?}");
        }
    }

    #[test]
    fn codes_read_back() {
        for byte in 0..=u8::MAX {
            assert!(Kind::from_byte(byte).is_none_or(|k| k.byte() == byte));
            assert!(Refusal::from_byte(byte).is_none_or(|r| r.byte() == byte));
        }
    }
}
