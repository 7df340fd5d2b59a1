//! Connections that are older than the pod's enrolment: they go on untouched, and are counted until they end.

use std::collections::HashSet;
use std::io;

use super::Netns;

/// Both ends of a TCP connection, as /proc/net/tcp prints them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tuple(pub String);

/// TCP_ESTABLISHED, as /proc/net/tcp prints it.
const ESTABLISHED: &str = "01";

/// The TCP connections that stand in `netns`, but for those within the pod.
pub fn established(netns: &Netns) -> io::Result<HashSet<Tuple>> {
    netns.run(|| {
        let mut all = HashSet::new();
        for table in ["tcp", "tcp6"] {
            match std::fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
                Ok(text) => all.extend(parse(&text)),
                // Without IPv6 there is no tcp6.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(all)
    })?
}

/// Established connections of a table, but for those over loopback.
fn parse(table: &str) -> impl Iterator<Item = Tuple> + '_ {
    table.lines().skip(1).filter_map(|line| {
        let mut columns = line.split_whitespace().skip(1);
        let (local, remote, state) = (columns.next()?, columns.next()?, columns.next()?);
        (state == ESTABLISHED && !is_loopback(local)).then(|| Tuple(format!("{local} {remote}")))
    })
}

/// 127.0.0.0/8, ::1 and v4-mapped 127.0.0.0/8, in the kernel's hexadecimal words of little-endian machines.
fn is_loopback(address: &str) -> bool {
    let ip = address.split(':').next().unwrap_or_default();
    match ip.len() {
        8 => ip.ends_with("7F"),
        _ => {
            ip == "00000000000000000000000001000000"
                || (ip.starts_with("0000000000000000FFFF0000") && ip.ends_with("7F"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_connections_with_the_world_count() {
        let table = "  sl  local_address rem_address   st\n\
            0: 0100007F:1F90 0100007F:A0B0 01 rest\n\
            1: 0201F40A:A0B0 0302F40A:0050 01 rest\n\
            2: 0201F40A:0050 00000000:0000 0A rest\n\
            3: 0000000000000000FFFF00000100007F:0050 0000000000000000FFFF00000100007F:A0B0 01 rest\n\
            4: 0201F40A:A0B2 0302F40A:0050 06 rest\n";
        assert_eq!(parse(table).collect::<Vec<_>>(), vec![Tuple("0201F40A:A0B0 0302F40A:0050".to_owned())]);
    }
}
