//! An accepted connection's original destination. In: the accepted socket's two addresses. Out: what the app asked for.
//!
//! One system call that looks up and deletes: an entry serves one connection, and a port that is used again never finds
//! an old one.

use std::net::SocketAddr;

use mesh_common::{Addr, SockTuple};

use super::maps::Map;
use super::{NetnsCookie, sys};

/// `local` and `peer` are the accepted socket's. The kernel wrote the entry from the client's side.
pub fn take(
    map: &Map<SockTuple, Addr>,
    cookie: NetnsCookie,
    local: SocketAddr,
    peer: SocketAddr,
) -> Option<SocketAddr> {
    let key = key_of(cookie, local, peer);
    match sys::lookup_and_delete::<SockTuple, Addr>(map.fd(), &key) {
        Ok(found) => found.map(SocketAddr::from),
        Err(error) => {
            tracing::error!(%error, "cannot read the map ORIG_DST, so the connection is reset");
            None
        }
    }
}

fn key_of(cookie: NetnsCookie, local: SocketAddr, peer: SocketAddr) -> SockTuple {
    SockTuple::new(cookie.0, Addr::from(peer), Addr::from(local))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_as_the_client_has_it() {
        let key = key_of(NetnsCookie(9), "127.64.0.1:15001".parse().unwrap(), "10.0.0.1:4000".parse().unwrap());
        assert_eq!((key.netns, key.local_port, key.remote_port), (9, 4000, 15001));
        assert_eq!(key.local_ip, Addr::from("10.0.0.1:0".parse::<SocketAddr>().unwrap()).ip);
    }

    #[test]
    fn v4_mapped_or_not_is_the_same_key() {
        let plain = key_of(NetnsCookie(9), "127.64.0.1:15001".parse().unwrap(), "10.0.0.1:4000".parse().unwrap());
        let mapped = key_of(
            NetnsCookie(9),
            "[::ffff:127.64.0.1]:15001".parse().unwrap(),
            "[::ffff:10.0.0.1]:4000".parse().unwrap(),
        );
        assert_eq!(plain, mapped);
    }
}
