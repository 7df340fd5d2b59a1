//! What an application may expect of connect, accept and the addresses they show.
//! Cases 11, 12, 21-29 and 35 of the list that sidecarless meshes have been caught at.

#![expect(unsafe_code, reason = "io_uring and AF_UNSPEC have no safe interface")]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::ring::{Case, Mode, World, run};
use mesh_tests::traffic::{
    PATIENCE, Refusal, accept, call, echo, echo_in, pair_at, ping, port, readable, ready, refusal,
};

use mesh_tests::{Mesh, MeshMode, Pod, eventually, peer_binary};
use rustix::event::PollFlags;
use rustix::process::{Resource, getrlimit};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

struct Addresses {
    world: World,
    client: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
}

fn build() -> Addresses {
    let mode = Mode::of_this_run();
    let mesh = Mesh::new().node("n1").node("n2");
    if mode.is_meshed() {
        mesh.manifests().label("addr", MeshMode::Enabled);
    }
    let client = mesh.pod("n1", "addr/client");
    let near = mesh.pod("n1", "addr/near");
    let far = mesh.pod("n2", "addr/far");
    let world = World::start(mesh, mode, &[]);
    world.wait_enrolled(&[&client, &near, &far]);
    Addresses { world, client, near, far }
}

const CASES: &[Case<Addresses>] = &[
    ("case_11_twenty_thousand_short_connections", case_11_twenty_thousand_short_connections),
    ("case_11_more_connections_than_ports", case_11_more_connections_than_ports),
    ("case_12_thousands_of_connections_at_once", case_12_thousands_of_connections_at_once),
    ("case_21_nonblocking_connect_to_a_closed_port", case_21_nonblocking_connect_to_a_closed_port),
    ("case_21_connect_to_nobody", case_21_connect_to_nobody),
    ("case_22_port_probe", case_22_port_probe),
    ("case_23_bound_before_connect", case_23_bound_before_connect),
    ("case_23_bound_to_a_device", case_23_bound_to_a_device),
    ("case_24_own_and_peers_address_v4", |a| case_24_own_and_peers_address(a, Form::V4)),
    ("case_24_own_and_peers_address_v6", |a| case_24_own_and_peers_address(a, Form::V6)),
    ("case_24_own_and_peers_address_v4_mapped", |a| case_24_own_and_peers_address(a, Form::Mapped)),
    ("case_24_mptcp", case_24_mptcp),
    ("case_25_families_of_the_server", case_25_families_of_the_server),
    ("case_26_udp_is_left_alone", case_26_udp_is_left_alone),
    ("case_27_reuseport_workers_and_their_restart", case_27_reuseport_workers_and_their_restart),
    ("case_28_loopback_servers_stay_private", case_28_loopback_servers_stay_private),
    ("case_28_a_pod_talks_to_itself", case_28_a_pod_talks_to_itself),
    ("case_29_io_uring_connects", case_29_io_uring_connects),
    ("case_29_connect_again_after_af_unspec", case_29_connect_again_after_af_unspec),
    ("case_29_connect_twice_is_eisconn", case_29_connect_twice_is_eisconn),
    ("case_35_the_server_sees_the_clients_address", case_35_the_server_sees_the_clients_address),
    ("case_35_a_closed_port_is_reset_quickly", case_35_a_closed_port_is_reset_quickly),
];

fn main() -> ExitCode {
    run(build, |a| &a.world, CASES)
}

fn case_11_twenty_thousand_short_connections(a: &Addresses) {
    const EACH: usize = 10_000;
    let to = SocketAddr::new(a.far.v4(), echo_in(&a.far));
    let client = || {
        a.client.run(|| {
            for n in 0..EACH {
                let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5));
                let stream = stream.unwrap_or_else(|e| panic!("connection {n}: {e}"));
                stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                ping(&stream, b"x").unwrap_or_else(|e| panic!("connection {n}: {e}"));
            }
        });
    };
    thread::scope(|s| {
        s.spawn(client);
        s.spawn(client);
    });
}

/// Runs `f` while the client's pod has only these ephemeral ports.
fn with_port_range<T>(pod: &Pod, range: &str, f: impl FnOnce() -> T) -> T {
    struct Restore<'p>(&'p Pod);
    impl Drop for Restore<'_> {
        fn drop(&mut self) {
            self.0.netns().sysctl("net.ipv4.ip_local_port_range", "32768 60999");
        }
    }
    let _restore = Restore(pod);
    pod.netns().sysctl("net.ipv4.ip_local_port_range", range);
    f()
}

fn case_11_more_connections_than_ports(a: &Addresses) {
    // A port may serve many destinations. A mesh that sends all to one address of its own has 100 connections in all.
    const DESTINATIONS: usize = 5;
    const EACH: usize = 60;
    let ports: Vec<u16> = (0..DESTINATIONS).map(|_| echo_in(&a.far)).collect();
    with_port_range(&a.client, "40000 40099", || {
        let mut open = Vec::new();
        for round in 0..EACH {
            for to in &ports {
                let stream = a.client.connect((a.far.v4(), *to).into());
                let stream = stream.unwrap_or_else(|e| panic!("connection {} of this round {round}: {e}", open.len()));
                ping(&stream, b"x").unwrap();
                open.push(stream);
            }
        }
    });
}

fn case_12_thousands_of_connections_at_once(a: &Addresses) {
    // 30000, or what the machine's limit of descriptors allows an agent that holds two for each connection.
    let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let count = usize::try_from(limit.saturating_sub(2000) / 2).unwrap_or(usize::MAX).min(30_000);
    assert!(count >= 5_000, "the limit of descriptors is {limit}: raise it to 12000 at least (`ulimit -n`)");
    let listen = |port: u16| {
        let mut server = a.far.start(&peer_binary().display().to_string(), &["keep", &format!("[::]:{port}")]);
        server.wait_for("listening", PATIENCE);
        server
    };
    let _servers = (listen(7001), listen(7002));
    // Fewer ports than connections, so that both destinations must share them.
    let range = format!("20000 {}", 20_000 + count * 3 / 4);
    with_port_range(&a.client, &range, || {
        let to = [7001, 7002].map(|port| SocketAddr::new(a.far.v4(), port).to_string());
        let mut command = a.client.command(&peer_binary().display().to_string());
        command.args(["hold", &count.to_string()]).args(to);
        let mut holder = a.client.start_command(command);
        holder.wait_for("\"held\"", Duration::from_secs(120));
        assert!(holder.log().contains(&format!("{{\"held\":{count}}}")), "of {count}: {}", holder.log());
    });
}

/// A port of the pod where nobody listens.
fn closed_port(pod: &Pod) -> u16 {
    port(&pod.listen())
}

/// Starts a non-blocking connect; the socket, and the error it gave at once, if any.
fn start_connect(client: &Pod, to: SocketAddr) -> (Socket, Option<std::io::Error>) {
    let socket = client.socket(Domain::for_address(to));
    socket.set_nonblocking(true).unwrap();
    let result = socket.connect(&to.into()).err();
    let result = result.filter(|e| e.raw_os_error() != Some(libc::EINPROGRESS));
    (socket, result)
}

fn case_21_nonblocking_connect_to_a_closed_port(a: &Addresses) {
    for server in [&a.near, &a.far] {
        let start = Instant::now();
        let (socket, at_once) = start_connect(&a.client, (server.v4(), closed_port(server)).into());
        assert!(at_once.is_none(), "{at_once:?}");
        assert!(ready(&socket, PollFlags::OUT, Duration::from_secs(1)), "connect hangs");
        let error = socket.take_error().unwrap().map(|e| e.kind());
        if a.world.mode.is_meshed() {
            // By design the agent accepts in the pod's place, and tells by a reset what it finds.
            assert!(matches!(error, None | Some(ErrorKind::ConnectionReset)), "{error:?}");
            assert!(ready(&socket, PollFlags::IN, Duration::from_secs(1)), "no reset within a second");
            if error.is_none() {
                let end = (&socket).read(&mut [0; 1]).map_err(|e| e.kind());
                assert_eq!(end, Err(ErrorKind::ConnectionReset));
            }
        } else {
            assert_eq!(error, Some(ErrorKind::ConnectionRefused));
        }
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

fn case_21_connect_to_nobody(a: &Addresses) {
    // An address of the other node's pods that no pod has: it answers no ARP, which takes the kernel three seconds.
    let nobody = SocketAddr::new(Ipv4Addr::new(10, 244, 2, 250).into(), 80);
    let (socket, at_once) = start_connect(&a.client, nobody);
    assert!(at_once.is_none(), "{at_once:?}");
    let patience = Duration::from_secs(12);
    assert!(ready(&socket, PollFlags::OUT, patience), "connect hangs");
    let error = socket.take_error().unwrap().map(|e| e.kind());
    if a.world.mode.is_meshed() && error.is_none() {
        assert!(readable(&socket, patience), "no reset, but a hang");
        assert_eq!((&socket).read(&mut [0; 1]).map_err(|e| e.kind()), Err(ErrorKind::ConnectionReset));
    } else {
        assert_eq!(error, Some(ErrorKind::HostUnreachable));
    }
}

fn case_22_port_probe(a: &Addresses) {
    for server in [&a.near, &a.far] {
        // As `nc -z` does: connect, and go. An open port stays well...
        let listener = server.listen();
        let to = SocketAddr::new(server.v4(), port(&listener));
        for _ in 0..10 {
            drop(a.client.connect(to).expect("an open port"));
        }
        echo(listener);
        call(&a.client, to).expect("the server still serves");
        // ... and a closed one is told from it, promptly.
        let closed = SocketAddr::new(server.v4(), closed_port(server));
        let refused = refusal(&a.client, closed).expect("nobody is there");
        assert!(refused.is_prompt(), "{refused:?}");
        if !a.world.mode.is_meshed() {
            assert_eq!(refused, Refusal::AtConnect(ErrorKind::ConnectionRefused));
        }
    }
}

fn case_23_bound_before_connect(a: &Addresses) {
    let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let free = closed_port(&a.client);
    for (address, port) in [(a.client.v4(), 0), (unspecified, free), (a.client.v4(), free)] {
        for server in [&a.near, &a.far] {
            let to = SocketAddr::new(server.v4(), echo_in(server));
            let socket = a.client.socket(Domain::IPV4);
            socket.set_reuse_address(true).unwrap();
            socket.bind(&SocketAddr::new(address, port).into()).unwrap();
            let connected = socket.connect_timeout(&to.into(), Duration::from_secs(5));
            connected.unwrap_or_else(|e| panic!("bound to {address}:{port}, connect to {to}: {e}"));
            let stream = TcpStream::from(socket);
            ping(&stream, b"bound").unwrap();
            let local = stream.local_addr().unwrap();
            assert_eq!(local.ip(), a.client.v4(), "bound to {address}:{port}");
            assert!(port == 0 || local.port() == port, "bound to port {port}, has {local}");
            // Ends by reset: the port is used again at once.
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
}

fn case_23_bound_to_a_device(a: &Addresses) {
    let to = SocketAddr::new(a.far.v4(), echo_in(&a.far));
    let socket = a.client.socket(Domain::IPV4);
    socket.bind_device(Some(b"eth0")).unwrap();
    // A redirect to loopback would hang here.
    socket.connect_timeout(&to.into(), Duration::from_secs(2)).expect("a socket bound to eth0 connects");
    ping(&TcpStream::from(socket), b"bound to a device").unwrap();
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    V4,
    V6,
    /// An IPv6 socket and `::ffff:a.b.c.d`.
    Mapped,
}

fn case_24_own_and_peers_address(a: &Addresses, form: Form) {
    let of = |pod: &Pod| match form {
        Form::V4 => pod.v4(),
        Form::V6 => pod.v6(),
        Form::Mapped => match pod.v4() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
            IpAddr::V6(_) => unreachable!("v4() is IPv4"),
        },
    };
    for server in [&a.near, &a.far] {
        // One listener of each kind that the client can reach.
        let listeners = match form {
            Form::V4 => vec![server.listen_on("0.0.0.0:0"), server.listen_on("[::]:0")],
            Form::V6 => vec![server.listen_on("[::]:0"), server.listen_on(&format!("[{}]:0", server.v6()))],
            Form::Mapped => vec![server.listen_on("[::]:0"), server.listen_on("0.0.0.0:0")],
        };
        for listener in listeners {
            let to = SocketAddr::new(of(server), port(&listener));
            let near = a.client.connect(to).unwrap();
            let (far, shown_at_accept) = accept(&listener);
            assert_eq!(near.peer_addr().unwrap(), to, "getpeername of the client");
            assert_eq!(near.local_addr().unwrap().ip(), of(&a.client), "getsockname of the client");
            let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
            assert_eq!(canonical(far.local_addr().unwrap()), canonical(to), "getsockname of the server");
            assert_eq!(canonical(shown_at_accept).ip(), of(&a.client).to_canonical(), "what accept says");
            assert_eq!(far.peer_addr().unwrap(), shown_at_accept, "getpeername of the server");
        }
    }
}

fn case_24_mptcp(a: &Addresses) {
    let mptcp = Protocol::from(262);
    let socket = a.client.run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(mptcp)));
    let socket = match socket {
        Ok(socket) => socket,
        // A kernel without MPTCP has nothing that could go wrong.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EINVAL)) => return,
        Err(e) => panic!("{e}"),
    };
    let to = SocketAddr::new(a.far.v4(), echo_in(&a.far));
    socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
    ping(&TcpStream::from(socket), b"over MPTCP or, at least, TCP").unwrap();
}

fn case_25_families_of_the_server(a: &Addresses) {
    for server in [&a.near, &a.far] {
        // A dual-stack server and clients of both families.
        let port = echo_in(server);
        call(&a.client, (server.v4(), port).into()).expect("v4 to [::]");
        call(&a.client, (server.v6(), port).into()).expect("v6 to [::]");

        // An IPv6-only server has no IPv4.
        let socket = server.socket(Domain::IPV6);
        socket.set_only_v6(true).unwrap();
        socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0).into()).unwrap();
        socket.listen(16).unwrap();
        let listener = TcpListener::from(socket);
        let port = listener.local_addr().unwrap().port();
        echo(listener);
        call(&a.client, (server.v6(), port).into()).expect("v6 to an IPv6-only server");
        let refused = refusal(&a.client, (server.v4(), port).into());
        assert!(refused.is_some_and(Refusal::is_prompt), "v4 to an IPv6-only server: {refused:?}");

        // And an IPv4 server no IPv6.
        let listener = server.listen_on("0.0.0.0:0");
        let port = listener.local_addr().unwrap().port();
        echo(listener);
        call(&a.client, (server.v4(), port).into()).expect("v4 to 0.0.0.0");
        let refused = refusal(&a.client, (server.v6(), port).into());
        assert!(refused.is_some_and(Refusal::is_prompt), "v6 to an IPv4 server: {refused:?}");
    }
}

fn case_26_udp_is_left_alone(a: &Addresses) {
    for server in [&a.near, &a.far] {
        for (listen, ip) in [("0.0.0.0:0", server.v4()), ("[::]:0", server.v6())] {
            let resolver = server.run(|| UdpSocket::bind(listen)).unwrap();
            let to = SocketAddr::new(ip, resolver.local_addr().unwrap().port());
            resolver.set_read_timeout(Some(PATIENCE)).unwrap();
            for connected in [true, false] {
                let client = a.client.run(|| UdpSocket::bind(listen)).unwrap();
                client.set_read_timeout(Some(PATIENCE)).unwrap();
                if connected {
                    client.connect(to).unwrap();
                    assert_eq!(client.peer_addr().unwrap(), to);
                    client.send(b"query").unwrap();
                } else {
                    client.send_to(b"query", to).unwrap();
                }
                let mut buffer = [0; 16];
                let (length, from) = resolver.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"query");
                resolver.send_to(b"answer", from).unwrap();
                // A resolver drops an answer that does not come from the address it asked.
                let (length, from) = client.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from), (&b"answer"[..], to));
            }
        }
    }
}

/// A worker of a server: counts what it accepts, says its name on each connection.
struct Worker {
    count: Arc<AtomicUsize>,
    stop: UdpSocket,
    thread: thread::JoinHandle<()>,
}

impl Worker {
    /// `at`: 0 takes a free port.
    fn start(pod: &Pod, at: u16) -> (Self, u16) {
        let socket = pod.socket(Domain::IPV4);
        socket.set_reuse_port(true).unwrap();
        socket.bind(&SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), at).into()).unwrap();
        socket.listen(128).unwrap();
        let listener = TcpListener::from(socket);
        let at = port(&listener);
        let count = Arc::new(AtomicUsize::new(0));
        // A datagram wakes the worker's poll: it ends between two connections, as servers do.
        let wake = UdpSocket::bind("127.0.0.1:0").unwrap();
        let stop = UdpSocket::bind("127.0.0.1:0").unwrap();
        stop.connect(wake.local_addr().unwrap()).unwrap();
        let counter = Arc::clone(&count);
        let thread = thread::spawn(move || {
            use rustix::event::{PollFd, poll};
            listener.set_nonblocking(true).unwrap();
            wake.set_nonblocking(true).unwrap();
            loop {
                poll(&mut [PollFd::new(&listener, PollFlags::IN), PollFd::new(&wake, PollFlags::IN)], None).unwrap();
                let stopping = wake.recv(&mut [0]).is_ok();
                while let Ok((mut stream, _)) = listener.accept() {
                    counter.fetch_add(1, Ordering::Relaxed);
                    let _ = stream.write_all(b"served");
                }
                if stopping {
                    return;
                }
            }
        });
        (Self { count, stop, thread }, at)
    }

    /// Serves what is in its queue, and ends.
    fn stop(self) -> usize {
        self.stop.send(b"x").unwrap();
        self.thread.join().unwrap();
        self.count.load(Ordering::Relaxed)
    }
}

fn case_27_reuseport_workers_and_their_restart(a: &Addresses) {
    const CALLS: usize = 200;
    const RESTARTS: usize = 20;
    for server in [&a.near, &a.far] {
        let total = AtomicUsize::new(0);
        // As servers with SO_REUSEPORT do on Linux, the old socket's queue moves to the others when it closes.
        server.netns().sysctl("net.ipv4.tcp_migrate_req", "1");
        let (first, port) = Worker::start(server, 0);
        let mut workers = vec![first];
        workers.extend((1..4).map(|_| Worker::start(server, port).0));
        let to = SocketAddr::new(server.v4(), port);
        let fetch = || {
            total.fetch_add(1, Ordering::Relaxed);
            let mut text = String::new();
            let read = a.client.connect(to).and_then(|mut stream| stream.read_to_string(&mut text));
            read.map(|_| text).unwrap_or_else(|e| e.to_string())
        };
        for _ in 0..CALLS {
            assert_eq!(fetch(), "served");
        }
        let counts: Vec<usize> = workers.iter().map(|worker| worker.count.load(Ordering::Relaxed)).collect();
        assert_eq!(counts.iter().sum::<usize>(), CALLS);
        assert!(counts.iter().all(|count| *count >= CALLS / 20), "not spread over the workers: {counts:?}");

        // Rolling restarts: a new worker, then an old one goes. Linux itself resets a handshake that meets a socket while it
        // closes (one call in some hundred restarts, without any mesh too); the call after it must find a worker.
        let done = AtomicBool::new(false);
        thread::scope(|s| {
            let calls = s.spawn(|| {
                let mut failed = Vec::new();
                while !done.load(Ordering::Relaxed) && failed.len() < RESTARTS {
                    let text = fetch();
                    if text != "served" {
                        failed.push(text);
                        assert_eq!(fetch(), "served", "and so did the call before it: {failed:?}");
                    }
                }
                failed
            });
            for _ in 0..RESTARTS {
                let before = total.load(Ordering::Relaxed);
                eventually(PATIENCE, "calls are under way", || total.load(Ordering::Relaxed) > before);
                workers.push(Worker::start(server, port).0);
                workers.remove(0).stop();
            }
            done.store(true, Ordering::Relaxed);
            let failed = calls.join().unwrap();
            assert!(failed.len() <= RESTARTS / 4, "calls failed during {RESTARTS} rolling restarts: {failed:?}");
        });
    }
}

fn case_28_loopback_servers_stay_private(a: &Addresses) {
    for server in [&a.near, &a.far] {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = server.listen_on(address);
            let port = port(&listener);
            for ip in [server.v4(), server.v6()] {
                let refused = refusal(&a.client, (ip, port).into());
                assert!(refused.is_some_and(Refusal::is_prompt), "{ip} reaches {address}: {refused:?}");
            }
            assert!(!readable(&listener, Duration::ZERO), "somebody reached a server on {address}");
        }
    }
}

fn case_28_a_pod_talks_to_itself(a: &Addresses) {
    let pod = &a.far;
    let listener = pod.listen();
    let port = port(&listener);
    for ip in
        [Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(127, 9, 9, 9).into(), Ipv6Addr::LOCALHOST.into(), pod.v4(), pod.v6()]
    {
        let near = pod.connect((ip, port).into()).unwrap_or_else(|e| panic!("by {ip}: {e}"));
        let (far, from) = accept(&listener);
        assert_eq!(from, near.local_addr().map(|own| own_as_seen_by(&listener, own)).unwrap(), "by {ip}");
        (&near).write_all(b"self").unwrap();
        (&far).read_exact(&mut [0; 4]).unwrap();
    }
    if a.world.mode.is_meshed() {
        // By its own service, which leads it out through the mesh and back in.
        let own = a.world.mesh().manifests().service("addr/own", &[(80, port)], &[pod]);
        echo(listener);
        let served = || call(pod, (own.v4, 80).into()).is_ok();
        eventually(PATIENCE, "the pod reaches itself by its service", served);
        call(pod, (own.v6, 80).into()).expect("by its service over IPv6");
    }
}

/// A [::] listener shows IPv4 clients as v4-mapped.
fn own_as_seen_by(listener: &TcpListener, own: SocketAddr) -> SocketAddr {
    match (listener.local_addr().unwrap(), own) {
        (SocketAddr::V6(_), SocketAddr::V4(v4)) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
        _ => own,
    }
}

fn case_29_io_uring_connects(a: &Addresses) {
    let to = SocketAddr::new(a.far.v4(), echo_in(&a.far));
    let socket = a.client.socket(Domain::IPV4);
    let address = SockAddr::from(to);
    let mut ring = io_uring::IoUring::new(4).expect("io_uring is there");
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let entry = io_uring::opcode::Connect::new(fd, address.as_ptr().cast(), address.len()).build();
    // SAFETY: the address lives until the completion, which is waited for below.
    unsafe { ring.submission().push(&entry).unwrap() };
    ring.submit_and_wait(1).unwrap();
    let result = ring.completion().next().expect("one completion").result();
    assert_eq!(result, 0, "{}", std::io::Error::from_raw_os_error(-result));
    let stream = TcpStream::from(socket);
    assert_eq!(stream.peer_addr().unwrap(), to);
    assert_eq!(stream.local_addr().unwrap().ip(), a.client.v4());
    ping(&stream, b"by io_uring").unwrap();
}

fn case_29_connect_again_after_af_unspec(a: &Addresses) {
    let first = SocketAddr::new(a.far.v4(), echo_in(&a.far));
    let second = SocketAddr::new(a.near.v4(), echo_in(&a.near));
    let stream = a.client.connect(first).unwrap();
    ping(&stream, b"first").unwrap();
    let disconnect = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: the address is a whole sockaddr and its size is passed.
    let result = unsafe {
        libc::connect(stream.as_raw_fd(), &raw const disconnect, size_of::<libc::sockaddr>() as libc::socklen_t)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    let socket = Socket::from(stream);
    socket.connect(&second.into()).unwrap();
    let stream = TcpStream::from(socket);
    assert_eq!(stream.peer_addr().unwrap(), second);
    ping(&stream, b"second").unwrap();
}

fn case_29_connect_twice_is_eisconn(a: &Addresses) {
    let to = SocketAddr::new(a.far.v4(), echo_in(&a.far));
    let socket = a.client.socket(Domain::IPV4);
    socket.connect(&to.into()).unwrap();
    assert_eq!(socket.connect(&to.into()).unwrap_err().raw_os_error(), Some(libc::EISCONN));
    let stream = TcpStream::from(socket);
    assert_eq!(stream.peer_addr().unwrap(), to);
    ping(&stream, b"still well").unwrap();
}

fn case_35_the_server_sees_the_clients_address(a: &Addresses) {
    for server in [&a.near, &a.far] {
        for (own, to) in [(a.client.v4(), server.v4()), (a.client.v6(), server.v6())] {
            let (_near, far) = pair_at(&a.client, server, to);
            assert_eq!(far.peer_addr().unwrap().ip().to_canonical(), own);
        }
    }
}

fn case_35_a_closed_port_is_reset_quickly(a: &Addresses) {
    let mut times = Vec::new();
    for n in 0..20 {
        let server = if n % 2 == 0 { &a.near } else { &a.far };
        let ip = if n % 4 < 2 { server.v4() } else { server.v6() };
        let to = SocketAddr::new(ip, closed_port(server));
        let start = Instant::now();
        let refused = refusal(&a.client, to).expect("nobody is there");
        assert!(refused.is_prompt(), "{refused:?}");
        times.push(start.elapsed());
    }
    times.sort();
    assert!(times[10] < Duration::from_millis(100), "median {:?}", times[10]);
    assert!(times[19] < Duration::from_secs(1), "worst {:?}", times[19]);
}
