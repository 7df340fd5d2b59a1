//! Sockets of the agent inside a pod's network namespace: towards other pods, and towards the pod's own application with
//! the client's address.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};
use tokio::net::TcpStream;

use crate::enrollment::EnrolledPod;
use crate::enrollment::sockets::{SPOOF_MARK, Use, prepare, set_option};
use crate::redirect::Redirect;

/// How long a connection attempt may take, as Istio's default.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Connects from `pod` to `destination`, with the pod's own address.
pub async fn from_pod(
    pod: &EnrolledPod,
    redirect: &Redirect,
    destination: SocketAddr,
    what_for: Use,
) -> io::Result<TcpStream> {
    let socket = open(pod, redirect, destination, what_for)?;
    if let Some(own) = pod.workload.address_like(destination.ip()) {
        bind_without_port(&socket, own)?;
    }
    connect(socket, destination, TIMEOUT).await
}

/// Connects to the pod's own application, with `client` as the source address so that the application sees the client.
/// A client that is the pod itself needs no disguise.
pub async fn to_application(
    pod: &EnrolledPod,
    redirect: &Redirect,
    client: IpAddr,
    application: SocketAddr,
    wait: Duration,
) -> io::Result<TcpStream> {
    let socket = open(pod, redirect, application, Use::Local)?;
    let client = client.to_canonical();
    let own = pod.workload.addresses.contains(&client) || client.is_loopback() || client.is_unspecified();
    if !own && client.is_ipv4() == application.is_ipv4() {
        socket.set_mark(SPOOF_MARK)?;
        transparent(&socket, application.is_ipv4())?;
        bind_without_port(&socket, client)?;
    }
    connect(socket, application, wait).await
}

/// Notices a peer that is gone while nothing is said. No TCP_USER_TIMEOUT: it would also end the connection of a reader
/// that only pauses.
pub fn keep_alive(tcp: &TcpStream) {
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(10)).with_retries(3);
    // Best effort: a connection without it works as well, as long as nothing dies.
    let _ = socket2::SockRef::from(tcp).set_tcp_keepalive(&keepalive);
}

fn open(pod: &EnrolledPod, redirect: &Redirect, destination: SocketAddr, what_for: Use) -> io::Result<Socket> {
    let domain = Domain::for_address(destination);
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = pod.netns.run(|| Socket::new(domain, kind, Some(Protocol::TCP)))??;
    redirect.tag_own(socket.as_fd())?;
    prepare(&socket, what_for)?;
    Ok(socket)
}

async fn connect(socket: Socket, destination: SocketAddr, wait: Duration) -> io::Result<TcpStream> {
    let address = SockAddr::from(destination);
    // Over lo the handshake is done by the time `connect` returns, though it says EINPROGRESS. Asked again it says so, and
    // no event needs to be waited for.
    let pending = match socket.connect(&address) {
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => match socket.connect(&address) {
            Err(e) if e.raw_os_error() == Some(libc::EALREADY) => true,
            asked => asked.map(|()| false)?,
        },
        done => done.map(|()| false)?,
    };
    let tcp = TcpStream::from_std(socket.into())?;
    if pending {
        tokio::time::timeout(wait, tcp.writable()).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        if let Some(e) = tcp.take_error()? {
            return Err(e);
        }
    }
    Ok(tcp)
}

/// Binds the address and leaves the port to `connect`, which knows the destination and can use a port again for another.
fn bind_without_port(socket: &Socket, address: IpAddr) -> io::Result<()> {
    set_option(socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    socket.bind(&SockAddr::from(SocketAddr::new(address, 0)))
}

fn transparent(socket: &Socket, v4: bool) -> io::Result<()> {
    if v4 {
        set_option(socket, libc::SOL_IP, libc::IP_TRANSPARENT, 1)
    } else {
        set_option(socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With TCP_USER_TIMEOUT the kernel ends a connection whose reader keeps its window shut for that long.
    #[tokio::test]
    async fn a_reader_may_pause_for_ever() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        keep_alive(&tcp);
        let socket = socket2::SockRef::from(&tcp);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_user_timeout().unwrap(), None);
    }
}
