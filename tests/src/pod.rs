//! A pod: a network namespace with `eth0`, an address of each family, and what its manifest says.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;
use crate::process::Process;

/// What a pod is to be; [`crate::Mesh::add`] makes it.
#[derive(Debug, Clone)]
pub struct PodSpec {
    pub(crate) node: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) service_account: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) annotations: Vec<(String, String)>,
    pub(crate) host_number: Option<u16>,
}

impl PodSpec {
    /// `name` is `namespace/name`. The service account and the label `app` are called like the pod.
    pub fn new(node: &str, name: &str) -> Self {
        let (namespace, name) = split_name(name);
        Self {
            node: node.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            service_account: name.to_owned(),
            labels: vec![("app".to_owned(), name.to_owned())],
            annotations: Vec::new(),
            host_number: None,
        }
    }

    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.service_account);
        self
    }

    /// A label; one of the same key is replaced.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.retain(|(k, _)| k != key);
        self.labels.push((key.to_owned(), value.to_owned()));
        self
    }

    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Gives it the addresses of a pod that is gone.
    pub fn reusing(mut self, gone: &Pod) -> Self {
        self.host_number = Some(gone.host_number);
        self
    }
}

/// A running pod. Its namespace goes when this is dropped.
#[derive(Debug)]
pub struct Pod {
    pub(crate) spec: PodSpec,
    pub(crate) netns: Netns,
    pub(crate) host_number: u16,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    pub(crate) logs: PathBuf,
}

impl Pod {
    pub fn namespace(&self) -> &str {
        &self.spec.namespace
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    pub fn node(&self) -> &str {
        &self.spec.node
    }

    pub fn v4(&self) -> IpAddr {
        self.v4.into()
    }

    pub fn v6(&self) -> IpAddr {
        self.v6.into()
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// As this pod's certificate names it.
    pub fn spiffe_id(&self) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{}", self.spec.namespace, self.spec.service_account)
    }

    /// Runs `f` on a thread inside the pod.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.netns.run(f)
    }

    /// A listener on a free port, on every address of both families.
    pub fn listen(&self) -> TcpListener {
        self.listen_on("[::]:0")
    }

    /// A listener on an address of the pod, e.g. `127.0.0.1:0`.
    pub fn listen_on(&self, address: &str) -> TcpListener {
        let what = format!("{}/{} listens on {address}", self.spec.namespace, self.spec.name);
        self.run(|| TcpListener::bind(address)).unwrap_or_else(|e| panic!("{what}: {e}"))
    }

    /// A blocking connection, given five seconds to come about, with a read and write timeout so that no test hangs.
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = self.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// A TCP socket of the pod that is not connected yet.
    pub fn socket(&self, domain: Domain) -> Socket {
        self.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::TCP))).expect("a TCP socket can be made")
    }

    /// A command that will run in the pod.
    pub fn command(&self, program: &str) -> Command {
        self.netns.command(program)
    }

    /// Runs a program in the pod to its end.
    pub fn output(&self, program: &str, args: &[&str]) -> Output {
        let output = self.command(program).args(args).output();
        let output = output.unwrap_or_else(|e| panic!("cannot run {program}: {e}; `cargo xtask setup` installs it"));
        Output {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Starts a program in the pod; it ends when the returned process is dropped.
    pub fn start(&self, program: &str, args: &[&str]) -> Process {
        let mut command = self.command(program);
        command.args(args);
        self.start_command(command)
    }

    /// Starts a prepared command (see [`Pod::command`]) in the pod.
    pub fn start_command(&self, command: Command) -> Process {
        let program = PathBuf::from(command.get_program());
        let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = format!("{}-{}-{program}", self.spec.namespace, self.spec.name);
        Process::start(&name, command, &crate::mesh::fresh_log(&self.logs, &name))
    }
}

/// How a program ended.
#[derive(Debug)]
pub struct Output {
    /// `None`: by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Its output; a failure is a panic that shows what it said.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(self.code == Some(0), "exit {:?}: {}{}", self.code, self.stdout, self.stderr);
        self.stdout
    }
}

/// `namespace/name` in two.
pub(crate) fn split_name(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or_else(|| panic!("{name:?} is not of the form namespace/name"))
}
