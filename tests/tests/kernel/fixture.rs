//! A node and its pods for the kernel tests: network namespaces on one bridge, the real programs, and in each enrolled
//! pod a stand-in for the agent that tells each client what it sees. No proxy, no TLS.
//!
//! Everything made here has a name with this process's id and is taken away on drop, also when a test panics.
#![expect(unsafe_code, reason = "system calls with which an application could try to get past the mesh")]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mesh_agent::redirect::{NetnsCookie, Options, PodEntry, Redirect, v6_redirect_prefix};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Protocol, Socket, Type};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// No single step of a test takes longer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A name that nobody else has.
pub fn unique(what: &str) -> String {
    format!("kernel-{}-{}-{what}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Runs a command, and panics with what it said where it fails.
pub fn run(command: &str) {
    let words: Vec<&str> = command.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().expect(words[0]);
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Waits for a condition; panics when it does not come.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A network namespace.
pub struct Netns {
    pub name: String,
    pub file: File,
    pub cookie: NetnsCookie,
}

impl Netns {
    pub fn new(what: &str) -> Self {
        let name = unique(what);
        run(&format!("ip netns add {name}"));
        run(&format!("ip -n {name} link set lo up"));
        let file = File::open(Path::new("/run/netns").join(&name)).expect("the netns that was just made");
        let mut netns = Self { name, file, cookie: NetnsCookie(0) };
        netns.cookie = netns.run(current_cookie);
        netns
    }

    /// Runs `f` on a thread in this namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns: run as root");
            f()
        };
        thread::scope(|scope| scope.spawn(inside).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub fn ip(&self, arguments: &str) {
        run(&format!("ip -n {} {arguments}", self.name));
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn current_cookie() -> NetnsCookie {
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a socket");
    let (mut cookie, mut length) = (0u64, 8u32);
    let value = std::ptr::from_mut(&mut cookie).cast();
    // SAFETY: value and length are of the option's size.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value, &raw mut length) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    NetnsCookie(cookie)
}

/// A node: a namespace with a bridge, a bpffs of its own, and the loaded programs.
pub struct Node {
    pub netns: Netns,
    pub options: Options,
    redirect: Option<Arc<Redirect>>,
    pods: u8,
    bpffs: PathBuf,
}

impl Node {
    /// With the programs loaded.
    pub fn new() -> Self {
        let mut node = Self::without_programs();
        node.start();
        node
    }

    pub fn without_programs() -> Self {
        let netns = Netns::new("node");
        netns.ip("link add br0 type bridge");
        netns.ip("addr add 10.200.0.1/24 dev br0");
        netns.ip("addr add fd00:200::1/64 dev br0 nodad");
        netns.ip("link set br0 up");
        let bpffs = std::env::temp_dir().join(unique("bpffs"));
        let options = Options { bpffs: bpffs.clone(), ..Options::new(netns.name.clone()) };
        Self { netns, options, redirect: None, pods: 0, bpffs }
    }

    /// (Re)starts the agent's kernel side.
    pub fn start(&mut self) {
        self.redirect = None;
        let options = self.options.clone();
        let started = self.netns.run(|| Redirect::start(&options));
        self.redirect = Some(Arc::new(started.unwrap_or_else(|error| panic!("{error}"))));
    }

    /// The agent goes, and does nothing about it: as after kill -9.
    pub fn crash(&mut self) {
        self.redirect = None;
    }

    pub fn redirect(&self) -> &Arc<Redirect> {
        self.redirect.as_ref().expect("the programs are loaded")
    }

    pub fn counter(&self, name: &str, reason: &str) -> u64 {
        let counters = self.redirect().counters().expect("counters");
        let found = counters.iter().find(|(n, r, _)| (*n, *r) == (name, reason));
        found.unwrap_or_else(|| panic!("no counter {name} {reason}")).2
    }

    /// A pod on the bridge, not enrolled.
    pub fn pod(&mut self) -> Pod {
        self.pods += 1;
        let host = u32::from(self.pods) + 9;
        let (netns, node) = (Netns::new("pod"), &self.netns);
        node.ip(&format!("link add p{host} type veth peer name eth0 netns {}", netns.name));
        node.ip(&format!("link set p{host} master br0 up"));
        netns.ip(&format!("addr add 10.200.0.{host}/24 dev eth0"));
        netns.ip(&format!("addr add fd00:200::{host}/64 dev eth0 nodad"));
        netns.ip("link set eth0 up");
        netns.ip("route add default via 10.200.0.1");
        netns.ip("-6 route add default via fd00:200::1");
        let (prefix, length) = v6_redirect_prefix();
        netns.ip(&format!("-6 route add local {prefix}/{length} dev lo"));
        let v4 = format!("10.200.0.{host}").parse().expect("an address");
        let v6 = format!("fd00:200::{host}").parse().expect("an address");
        Pod { netns, v4, v6, agent: None }
    }

    /// A pod on the bridge, enrolled.
    pub fn enrolled_pod(&mut self) -> Pod {
        let mut pod = self.pod();
        self.enroll(&mut pod);
        pod
    }

    /// Gives the pod a new agent, as at enrolment and after a restart.
    pub fn enroll(&self, pod: &mut Pod) {
        pod.agent = None;
        let agent = Agent::new(&pod.netns, self.redirect());
        let entry = PodEntry {
            cookie: pod.netns.cookie,
            addresses: vec![pod.v4, pod.v6],
            hbone_listener: agent.hbone.socket.as_raw_fd(),
            plain_listener: agent.plain.socket.as_raw_fd(),
        };
        self.redirect().enroll(&entry, pod.netns.file.as_fd()).unwrap_or_else(|error| panic!("{error}"));
        pod.agent = Some(agent);
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.redirect = None;
        if let Err(error) = Redirect::cleanup(&self.options) {
            eprintln!("clean-up of {}: {error}", self.netns.name);
        }
        // Lazily: nothing of ours may hold it, but a failed test's threads could.
        let _ = Command::new("umount").arg("-l").arg(&self.bpffs).stderr(std::process::Stdio::null()).status();
        let _ = fs::remove_dir(&self.bpffs);
    }
}

/// A pod: a namespace with an address of each family.
pub struct Pod {
    pub netns: Netns,
    pub v4: IpAddr,
    pub v6: IpAddr,
    pub agent: Option<Agent>,
}

impl Pod {
    /// An app that answers "app <local> <peer>".
    pub fn serve(&self, port: u16) -> Server {
        let socket = self.netns.run(|| listen(port));
        Server::new(socket, |local, peer| Some(format!("app {local} {peer}")))
    }

    pub fn v4_port(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.v4, port)
    }

    pub fn v6_port(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.v6, port)
    }

    /// Connects, and reads what the other side says.
    pub fn call(&self, to: SocketAddr) -> io::Result<Reply> {
        self.netns.run(|| call(socket_for(to), to))
    }
}

/// What a client sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub text: String,
    pub local: SocketAddr,
    pub peer: SocketAddr,
}

pub fn socket_for(to: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).expect("a socket")
}

pub fn call(socket: Socket, to: SocketAddr) -> io::Result<Reply> {
    socket.connect_timeout(&to.into(), PATIENCE)?;
    read_reply(socket.into())
}

pub fn read_reply(mut stream: TcpStream) -> io::Result<Reply> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(Reply { text, local, peer })
}

/// A dual-stack listener in the calling thread's namespace.
pub fn listen(port: u16) -> TcpListener {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
    socket.set_only_v6(false).expect("dual stack");
    socket.set_reuse_address(true).expect("reuse");
    let any: SocketAddr = format!("[::]:{port}").parse().expect("an address");
    socket.bind(&any.into()).unwrap_or_else(|error| panic!("port {port}: {error}"));
    socket.listen(4096).expect("listen");
    socket.into()
}

type Answer = Arc<dyn Fn(SocketAddr, SocketAddr) -> Option<String> + Send + Sync>;

/// Answers each connection with one line made from its two addresses (local, peer); resets it where there is none.
pub struct Server {
    pub socket: TcpListener,
    answer: Answer,
    thread: Option<JoinHandle<()>>,
    keepers: Vec<JoinHandle<()>>,
    released: Arc<(Mutex<bool>, Condvar)>,
}

impl Server {
    pub fn new(
        socket: TcpListener,
        answer: impl Fn(SocketAddr, SocketAddr) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        let mut server =
            Self { socket, answer: Arc::new(answer), thread: None, keepers: Vec::new(), released: Arc::default() };
        server.resume();
        server
    }

    /// Listens, and does not accept.
    pub fn pause(&mut self) {
        self.stop();
        // On the same socket: the shutdown has only taken it out of the listening state.
        rustix::net::listen(&self.socket, 4096).expect("listen again");
    }

    /// Answers from now on, those that wait first.
    pub fn resume(&mut self) {
        let answer = Arc::clone(&self.answer);
        self.accept_with(move |mut stream, local, peer| match answer(local, peer) {
            Some(line) => drop(stream.write_all(line.as_bytes())),
            None => drop(Socket::from(stream).set_linger(Some(Duration::ZERO))),
        });
    }

    /// Stops answering: each connection is told to `seen` and kept open until the server goes. Each thread keeps `each`, in a table of file descriptors of its own.
    pub fn keep(&mut self, each: usize, threads: usize, seen: impl Fn(SocketAddr, SocketAddr) + Send + Sync + 'static) {
        self.pause();
        let seen = Arc::new(seen);
        for _ in 0..threads {
            let (listener, seen) = (self.socket.try_clone().expect("dup"), Arc::clone(&seen));
            let released = self.released.clone();
            self.keepers.push(thread::spawn(move || {
                own_file_table();
                let mut kept = Vec::with_capacity(each);
                while kept.len() < each {
                    let Ok((stream, peer)) = listener.accept() else { break };
                    if let Ok(local) = stream.local_addr() {
                        seen(canonical(local), canonical(peer));
                    }
                    kept.push(stream);
                }
                let mut gone = released.0.lock().expect("no panic under the lock");
                while !*gone {
                    gone = released.1.wait(gone).expect("no panic under the lock");
                }
            }));
        }
    }

    fn accept_with(&mut self, mut take: impl FnMut(TcpStream, SocketAddr, SocketAddr) + Send + 'static) {
        let listener = self.socket.try_clone().expect("dup");
        let accept = move || {
            // Ends when the socket is shut down.
            while let Ok((stream, peer)) = listener.accept() {
                let Ok(local) = stream.local_addr() else { continue };
                take(stream, canonical(local), canonical(peer));
            }
        };
        self.thread = Some(thread::spawn(accept));
    }

    fn stop(&mut self) {
        // SAFETY: a plain call on a descriptor that is open.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        *self.released.0.lock().expect("no panic under the lock") = true;
        self.released.1.notify_all();
        for keeper in self.keepers.drain(..) {
            let _ = keeper.join();
        }
    }
}

pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// Stands in for the agent in one pod. Answers "agent <original destination> <peer>", "plain <local> <peer>",
/// "hbone <local> <peer>".
pub struct Agent {
    pub outbound: Server,
    pub plain: Server,
    pub hbone: Server,
}

impl Agent {
    fn new(netns: &Netns, redirect: &Arc<Redirect>) -> Self {
        let (outbound, plain, hbone) = netns.run(|| (listen(15001), listen(15006), listen(15008)));
        let (redirect, cookie) = (Arc::clone(redirect), netns.cookie);
        Self {
            outbound: Server::new(outbound, move |local, peer| {
                redirect.original_dst(cookie, local, peer).map(|dst| format!("agent {dst} {peer}"))
            }),
            plain: Server::new(plain, |local, peer| Some(format!("plain {local} {peer}"))),
            hbone: Server::new(hbone, |local, peer| Some(format!("hbone {local} {peer}"))),
        }
    }
}

/// A cgroup2 folder below the root.
pub struct Cgroup {
    pub path: PathBuf,
}

impl Cgroup {
    pub fn new() -> Self {
        let mounts = fs::read_to_string("/proc/mounts").expect("/proc/mounts");
        let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|words| words[2] == "cgroup2");
        let path = Path::new(mount.expect("cgroup2 is mounted")[1]).join(unique("cgroup"));
        fs::create_dir(&path).expect("a cgroup: run as root");
        Self { path }
    }
}

impl Default for Cgroup {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let path = self.path.clone();
        // A process that has just ended is in it for a moment longer.
        let start = Instant::now();
        while fs::remove_dir(&path).is_err() && start.elapsed() < PATIENCE && path.exists() {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Runs a client as a process of the cgroup, in a namespace; what it read.
pub fn call_in_cgroup(cgroup: &Path, netns: &Netns, to: SocketAddr) -> String {
    let connect = format!("exec 3<>/dev/tcp/{}/{}; cat <&3", to.ip(), to.port());
    let script = "echo $$ > \"$1/cgroup.procs\" && exec nsenter --net=\"/run/netns/$2\" timeout 10 bash -c \"$3\"";
    let output = Command::new("bash")
        .args(["-c", script, "client"])
        .arg(cgroup)
        .args([&netns.name, &connect])
        .output()
        .expect("bash");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// connect(AF_UNSPEC): the socket is as before its first connect.
pub fn disconnect(socket: &Socket) {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: a whole sockaddr of the length told.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, size_of::<libc::sockaddr>() as u32) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// sendto(MSG_FASTOPEN) with one byte, in place of connect.
pub fn connect_with_fast_open(socket: &Socket, to: SocketAddr) {
    let address = socket2::SockAddr::from(to);
    let (fd, byte) = (socket.as_raw_fd(), b"x".as_ptr().cast());
    // SAFETY: buffer and address are valid for the lengths told.
    let sent = unsafe { libc::sendto(fd, byte, 1, libc::MSG_FASTOPEN, address.as_ptr().cast(), address.len()) };
    assert_eq!(sent, 1, "{}", io::Error::last_os_error());
}

/// IP_TRANSPARENT, or its IPv6 twin: the socket may have a foreign source address.
pub fn set_transparent(socket: &Socket, to: SocketAddr) {
    let (level, option) = match to {
        SocketAddr::V4(_) => (libc::SOL_IP, libc::IP_TRANSPARENT),
        SocketAddr::V6(_) => (libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
    };
    let on = 1i32;
    // SAFETY: value and length are of the option's size.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), 4) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Takes capabilities from the calling thread.
pub fn drop_capabilities(numbers: &[u32]) {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut sets = capabilities(None).expect("capabilities");
    for number in numbers {
        sets.effective.remove(CapabilitySet::from_bits_retain(1 << number));
    }
    set_capabilities(None, sets).expect("set capabilities");
}

/// Gives the calling thread a table of file descriptors of its own: the limit is for each table.
pub fn own_file_table() {
    // SAFETY: the thread's open files are copied, and from here on it opens and closes only what it made itself.
    let result = unsafe { libc::unshare(libc::CLONE_FILES) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// All pins of a node, by what they are: a map's folder is `maps`, all else are links.
fn pins(node: &Node, maps: bool) -> Vec<PathBuf> {
    let mut folders = vec![node.options.bpffs.join("nodemesh").join(&node.options.node)];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("pins") {
            let path = entry.expect("a pin").path();
            if path.is_dir() {
                folders.push(path);
            } else if folder.ends_with("maps") == maps {
                found.push(path);
            }
        }
    }
    found
}

pub fn link_ids(node: &Node) -> Vec<u32> {
    let mut ids: Vec<u32> = pinned_links(node).map(|link| link.id()).collect();
    ids.sort_unstable();
    ids
}

pub fn program_ids(node: &Node) -> Vec<u32> {
    pinned_links(node).map(|link| link.program_id()).collect()
}

fn pinned_links(node: &Node) -> impl Iterator<Item = aya::programs::links::LinkInfo> {
    use aya::programs::links::{FdLink, PinnedLink};
    pins(node, false)
        .into_iter()
        .map(|pin| FdLink::from(PinnedLink::from_pin(pin).expect("a link")).info().expect("info"))
}

pub fn map_ids(node: &Node) -> Vec<u32> {
    pins(node, true).into_iter().map(|pin| aya::maps::MapInfo::from_pin(pin).expect("a map").id()).collect()
}

/// How many entries a map with socket tuples as keys has.
pub fn map_keys(node: &Node, name: &str) -> usize {
    let path = pins(node, true).into_iter().find(|pin| pin.ends_with(name)).expect("the map's pin");
    let data = aya::maps::MapData::from_pin(path).expect("the map");
    let map = aya::maps::Map::from_map_data(data).expect("the map");
    match name {
        mesh_common::map::ATTESTED => {
            let map = aya::maps::HashMap::<_, mesh_common::SockTuple, mesh_common::Attested>::try_from(map);
            map.expect("a hash map").keys().count()
        }
        _ => {
            let map = aya::maps::HashMap::<_, mesh_common::SockTuple, mesh_common::Addr>::try_from(map);
            map.expect("a hash map").keys().count()
        }
    }
}

/// `::ffff:a.b.c.d`
pub fn mapped(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), addr.port()),
        IpAddr::V6(_) => addr,
    }
}
