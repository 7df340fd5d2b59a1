//! Whether the program at the far end of a connection has closed its socket. A FIN alone does not say: it may only have
//! said all, and wait for the answer. The kernel of the pod's own namespace knows: a socket that no program holds any
//! more has no inode in its tables.

use std::io;
use std::net::{IpAddr, SocketAddr};

/// Of a connection within this thread's network namespace, from `program` to `agent`. Reads the kernel's whole table: not
/// for a thread that others wait for.
pub fn has_left(program: SocketAddr, agent: SocketAddr) -> io::Result<bool> {
    for table in ["tcp", "tcp6"] {
        match std::fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(text) if is_held(&text, program, agent) => return Ok(false),
            Ok(_) => {}
            // Without IPv6 there is no tcp6.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

fn is_held(table: &str, program: SocketAddr, agent: SocketAddr) -> bool {
    let (program, agent) = (written(program), written(agent));
    table.lines().skip(1).any(|line| {
        let mut columns = line.split_whitespace().skip(1);
        let is = |column: Option<&str>, wanted: &[String; 2]| column.is_some_and(|c| wanted.iter().any(|w| w == c));
        is(columns.next(), &program) && is(columns.next(), &agent) && columns.nth(6).is_some_and(|inode| inode != "0")
    })
}

/// As the two tables print it: a program may reach an IPv4 address by a socket of IPv6.
fn written(address: SocketAddr) -> [String; 2] {
    let port = address.port();
    let words = |octets: &[u8]| -> String {
        octets.chunks_exact(4).map(|w| format!("{:08X}", u32::from_ne_bytes([w[0], w[1], w[2], w[3]]))).collect()
    };
    match address.ip() {
        IpAddr::V4(v4) => {
            let (four, six) = (words(&v4.octets()), words(&v4.to_ipv6_mapped().octets()));
            [format!("{four}:{port:04X}"), format!("{six}:{port:04X}")]
        }
        IpAddr::V6(v6) => {
            let six = format!("{}:{port:04X}", words(&v6.octets()));
            [six.clone(), six]
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Shutdown, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_program_that_has_said_all_is_told_from_one_that_is_gone() {
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(listen) else { continue };
            let agent = listener.local_addr().unwrap();
            let program = TcpStream::connect(agent).unwrap();
            let (_accepted, from) = listener.accept().unwrap();
            assert!(!has_left(from, agent).unwrap());
            program.shutdown(Shutdown::Write).unwrap();
            assert!(!has_left(from, agent).unwrap(), "it only says no more");
            drop(program);
            assert!(has_left(from, agent).unwrap());
        }
    }

    #[test]
    fn an_ipv4_connection_of_an_ipv6_socket_is_found() {
        let (program, agent) = ("127.0.0.1:40000".parse().unwrap(), "127.64.0.1:15001".parse().unwrap());
        let line = |inode: u32| {
            format!(
                "  sl  local_address rem_address   st\n   3: 0000000000000000FFFF00000100007F:9C40 \
                 0000000000000000FFFF00000100407F:3A99 05 00000000:00000000 00:00000000 00000000     0        0 {inode} 1"
            )
        };
        assert!(is_held(&line(77), program, agent));
        assert!(!is_held(&line(0), program, agent));
        assert!(!is_held(&line(77), agent, program));
    }
}
