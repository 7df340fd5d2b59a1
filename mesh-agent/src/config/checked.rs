//! Settings as used: typed, with defaults, each checked alone and then against the others.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::value;
use super::written::io_reason;
use super::{ConfigError, Written};
use crate::model::{OutboundPolicy, TrustDomain};
use crate::telemetry::{LogFormat, logging};

/// What the machine says of itself; a parameter, so that the checks can be tested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub hostname: String,
    pub cores: usize,
}

/// `mesh-agent node`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub node_name: String,
    pub source: Source,
    pub state_dir: PathBuf,
    pub admin_socket: PathBuf,
    /// `None`: no CNI plugin, and pods that start do not wait.
    pub cni: Option<Cni>,
    /// Never 0.
    pub workers: usize,
    pub drain_timeout: Duration,
    /// The same where another agent serves already.
    pub upgrade_drain: Duration,
    /// From an agent that runs; else it is an error that there is one.
    pub take_over: bool,
    pub ca: CertificateAuthority,
    pub cert_lifetime: Duration,
    pub trust_domain: TrustDomain,
    pub cluster_domain: String,
    pub cluster_id: String,
    pub root_namespace: String,
    pub istio_labels: bool,
    pub outbound_policy: OutboundPolicy,
    pub bpffs: PathBuf,
    pub cgroup: Option<PathBuf>,
    pub probe_cgroup: Option<PathBuf>,
    /// The node's /proc: its processes lead to the network namespaces of pods.
    pub host_proc: PathBuf,
    pub kernel_log: bool,
    pub orig_dst_entries: u32,
    pub metrics_address: SocketAddr,
    pub readiness_address: SocketAddr,
    /// `None` is off.
    pub access_log: Option<LogFormat>,
    pub logging: Logging,
}

/// The CNI plugin on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cni {
    /// The node's /etc/cni/net.d.
    pub conf_dir: PathBuf,
    /// The node's /opt/cni/bin.
    pub bin_dir: PathBuf,
    pub socket: PathBuf,
}

/// Who signs this node's certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateAuthority {
    /// In this process; its keys lie in the state directory.
    Embedded,
    /// One of these controllers, `host:port`; the first that answers.
    Remote { addresses: Vec<String>, token: Token },
}

/// By what a controller knows this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// A file with a join token, which pins the root too.
    Join(PathBuf),
    /// A file with a token of this pod's service account, which Kubernetes renews; the root is in a ConfigMap.
    ServiceAccount(PathBuf),
}

/// Where objects are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifests.
    Directory(PathBuf),
    Kubernetes(Kubernetes),
}

/// The Kubernetes API, and who we are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubernetes {
    /// `None`: as the service account of the pod in which this runs.
    pub kubeconfig: Option<PathBuf>,
    /// Where the mesh is installed: its ConfigMaps, its Secret, its Lease.
    pub namespace: String,
}

/// `mesh-agent controller`, and its subcommands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    pub source: Source,
    pub state_dir: PathBuf,
    pub listen: SocketAddr,
    /// These three only with Kubernetes: nobody probes a controller beside a node, whose ports they are.
    pub webhook_address: SocketAddr,
    pub metrics_address: SocketAddr,
    pub readiness_address: SocketAddr,
    /// The user's own CA; `None` makes one in the state directory at the first start.
    pub ca_dir: Option<PathBuf>,
    /// Names and addresses for the controller's own certificate. Never empty: localhost where none is given.
    pub sans: Vec<String>,
    pub cert_lifetime: Duration,
    pub trust_domain: TrustDomain,
    pub cluster_domain: String,
    pub root_namespace: String,
    pub istio_labels: bool,
    pub logging: Logging,
}

/// `mesh-agent node --cleanup`: what is needed to find all that an agent of this node leaves behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cleanup {
    pub node_name: String,
    pub bpffs: PathBuf,
    pub cgroup: Option<PathBuf>,
    pub admin_socket: PathBuf,
    pub state_dir: PathBuf,
    pub cni: Option<Cni>,
    pub logging: Logging,
}

/// `meshctl analyze`: where the manifests are, and what their meaning depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Analysis {
    pub config_dir: PathBuf,
    /// The node whose pods must name their network namespace; `None` looks at no node in particular.
    pub node_name: Option<String>,
    pub trust_domain: TrustDomain,
    pub cluster_domain: String,
    pub root_namespace: String,
    pub istio_labels: bool,
}

/// The agent's own log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logging {
    /// As tracing's EnvFilter reads it.
    pub filter: String,
    pub format: LogFormat,
}

const DEFAULT_CONFIG_DIR: &str = "/etc/nodemesh/manifests";
/// A certificate must live long enough to be renewed at half its life by a CA that is busy or away for a moment.
const MIN_CERT_LIFETIME: Duration = Duration::from_secs(10);
const MAX_CERT_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
const MAX_DRAIN: Duration = Duration::from_secs(3600);
const MAX_UPGRADE_DRAIN: Duration = Duration::from_secs(7 * 86_400);
const MAX_WORKERS: u32 = 1024;
/// 64 bytes an entry: a gigabyte, above which a kernel map is a mistake.
const MAX_ORIG_DST_ENTRIES: u32 = 16 * 1024 * 1024;
/// `sockaddr_un::sun_path` has 108 bytes, one of which ends the text; the socket is bound under a name that may be a
/// little longer first.
const MAX_SOCKET_PATH: usize = 100;

impl Machine {
    /// This machine.
    pub fn here() -> Self {
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { hostname: hostname.trim().to_lowercase(), cores }
    }
}

impl Node {
    pub fn check(written: &Written, machine: &Machine) -> Result<Self, ConfigError> {
        let w = Reader(written);
        let node = Self {
            node_name: w.node_name(machine)?,
            source: w.source()?,
            state_dir: w.path("state-dir", "/var/lib/nodemesh")?,
            admin_socket: w.admin_socket()?,
            cni: w.cni()?,
            workers: match w.or("workers", "0", |t| value::number(t, 0, MAX_WORKERS))? {
                0 => machine.cores.max(1),
                n => usize::try_from(n).expect("a u32 fits"),
            },
            upgrade_drain: w
                .or("upgrade-drain", "1h", |t| value::duration_between(t, Duration::ZERO, MAX_UPGRADE_DRAIN))?,
            drain_timeout: w.or("drain-timeout", "5s", |t| value::duration_between(t, Duration::ZERO, MAX_DRAIN))?,
            take_over: w.or("take-over", "false", value::boolean)?,
            ca: w.certificate_authority()?,
            cert_lifetime: w.cert_lifetime()?,
            trust_domain: w.trust_domain()?,
            cluster_domain: w.cluster_domain()?,
            cluster_id: w.or("cluster-id", "Kubernetes", |t| match t {
                "" => Err("is empty; write the name of this cluster".to_owned()),
                t => Ok(t.to_owned()),
            })?,
            root_namespace: w.root_namespace()?,
            istio_labels: w.istio_labels()?,
            outbound_policy: w.or("outbound-policy", "ALLOW_ANY", |t| match t {
                "ALLOW_ANY" => Ok(OutboundPolicy::AllowAny),
                "REGISTRY_ONLY" => Ok(OutboundPolicy::RegistryOnly),
                _ => Err(format!("`{t}` is no policy; write ALLOW_ANY or REGISTRY_ONLY")),
            })?,
            bpffs: w.path("bpffs", "/sys/fs/bpf")?,
            cgroup: w.optional_directory("cgroup")?,
            probe_cgroup: w.optional_directory("probe-cgroup")?,
            host_proc: w.directory("host-proc", "/proc")?,
            kernel_log: w.or("kernel-log", "false", value::boolean)?,
            orig_dst_entries: w.or("orig-dst-entries", "65536", |t| value::number(t, 1, MAX_ORIG_DST_ENTRIES))?,
            metrics_address: w.metrics_address()?,
            readiness_address: w.readiness_address()?,
            access_log: w.or("access-log", "text", |t| match t {
                "off" => Ok(None),
                "text" => Ok(Some(LogFormat::Text)),
                "json" => Ok(Some(LogFormat::Json)),
                _ => Err(format!("`{t}` is no format; write text, json or off")),
            })?,
            logging: w.logging()?,
        };
        if node.metrics_address == node.readiness_address && node.metrics_address.port() != 0 {
            let (one, other) = (written.place("metrics-address"), written.place("readiness-address"));
            return Err(ConfigError(format!(
                "{one} and {other} are both {}; give each a port of its own",
                node.metrics_address
            )));
        }
        if node.take_over && node.ca == CertificateAuthority::Embedded {
            let (one, other) = (written.place("take-over"), written.place("embedded-ca"));
            return Err(ConfigError(format!(
                "{one} and {other} exclude each other: one CA has one process; give --ca-address of a controller"
            )));
        }
        Ok(node)
    }
}

impl Controller {
    pub fn check(written: &Written) -> Result<Self, ConfigError> {
        let controller = Self::check_for_tools(written)?;
        let source = Reader(written).source()?;
        if matches!(source, Source::Kubernetes(_)) && controller.ca_dir.is_some() {
            return Err(ConfigError(format!(
                "{} is for a controller outside Kubernetes: put your own CA into the Secret nodemesh-ca",
                written.place("ca-dir")
            )));
        }
        Ok(Self { source, ..controller })
    }

    /// For `token`, `revoke-token` and `rotate-root`, which read no manifests: a directory of them need not be there.
    pub fn check_for_tools(written: &Written) -> Result<Self, ConfigError> {
        let w = Reader(written);
        Ok(Self {
            source: match w.kubernetes()? {
                Some(kubernetes) => Source::Kubernetes(kubernetes),
                None => Source::Directory(w.path("config-dir", DEFAULT_CONFIG_DIR)?),
            },
            state_dir: w.path("state-dir", "/var/lib/nodemesh")?,
            listen: w.or("listen", "0.0.0.0:15012", value::address)?,
            webhook_address: w.or("webhook-address", "0.0.0.0:15017", value::address)?,
            metrics_address: w.metrics_address()?,
            readiness_address: w.readiness_address()?,
            ca_dir: w.optional_directory("ca-dir")?,
            sans: match w.every("san", |t| match t.parse::<IpAddr>() {
                Ok(_) => Ok(t.to_owned()),
                Err(_) => value::dns_name(t).map_err(|_| format!("`{t}` is neither a DNS name nor an IP address")),
            })? {
                sans if sans.is_empty() => vec!["localhost".to_owned()],
                sans => sans,
            },
            cert_lifetime: w.cert_lifetime()?,
            trust_domain: w.trust_domain()?,
            cluster_domain: w.cluster_domain()?,
            root_namespace: w.root_namespace()?,
            istio_labels: w.istio_labels()?,
            logging: w.logging()?,
        })
    }
}

impl Cleanup {
    pub fn check(written: &Written, machine: &Machine) -> Result<Self, ConfigError> {
        let w = Reader(written);
        Ok(Self {
            node_name: w.node_name(machine)?,
            bpffs: w.path("bpffs", "/sys/fs/bpf")?,
            cgroup: w.optional_directory("cgroup")?,
            admin_socket: w.admin_socket()?,
            state_dir: w.path("state-dir", "/var/lib/nodemesh")?,
            cni: w.cni()?,
            logging: w.logging()?,
        })
    }
}

impl Analysis {
    pub fn check(written: &Written) -> Result<Self, ConfigError> {
        let w = Reader(written);
        Ok(Self {
            config_dir: w.directory("config-dir", DEFAULT_CONFIG_DIR)?,
            node_name: match written.get("node-name") {
                Some(name) => Some(w.or("node-name", name, value::dns_name)?),
                None => None,
            },
            trust_domain: w.trust_domain()?,
            cluster_domain: w.cluster_domain()?,
            root_namespace: w.root_namespace()?,
            istio_labels: w.istio_labels()?,
        })
    }
}

/// Reads single settings; every error names the place where the setting was written.
struct Reader<'a>(&'a Written);

impl Reader<'_> {
    fn error(&self, name: &'static str, problem: &str) -> ConfigError {
        ConfigError(format!("{}: {problem}", self.0.place(name)))
    }

    fn or<T>(
        &self,
        name: &'static str,
        default: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        parse(self.0.get(name).unwrap_or(default)).map_err(|problem| self.error(name, &problem))
    }

    fn every<T>(&self, name: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, ConfigError> {
        self.0.all(name).iter().map(|t| parse(t).map_err(|problem| self.error(name, &problem))).collect()
    }

    fn path(&self, name: &'static str, default: &str) -> Result<PathBuf, ConfigError> {
        self.or(name, default, |t| match Path::new(t) {
            path if path.is_absolute() => Ok(path.to_owned()),
            _ if t.is_empty() => Err("is empty; write a path".to_owned()),
            // Relative to where the process happens to be started: after a restart by a supervisor it would be another.
            _ => std::path::absolute(t).map_err(|e| format!("`{t}`: {}", io_reason(&e))),
        })
    }

    /// A directory that has to be there already.
    fn directory(&self, name: &'static str, default: &str) -> Result<PathBuf, ConfigError> {
        let path = self.path(name, default)?;
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => Ok(path),
            Ok(_) => Err(self.error(name, &format!("{} is no directory", path.display()))),
            Err(e) => {
                let problem =
                    format!("cannot use {}: {}; name a directory that is there", path.display(), io_reason(&e));
                Err(self.error(name, &problem))
            }
        }
    }

    fn optional_directory(&self, name: &'static str) -> Result<Option<PathBuf>, ConfigError> {
        self.0.get(name).map(|text| self.directory(name, text)).transpose()
    }

    fn node_name(&self, machine: &Machine) -> Result<String, ConfigError> {
        if self.0.get("node-name").is_none() && value::dns_name(&machine.hostname).is_err() {
            return Err(ConfigError(format!(
                "the hostname `{}` cannot be a node's name; give one with --node-name",
                machine.hostname
            )));
        }
        self.or("node-name", &machine.hostname, value::dns_name)
    }

    fn admin_socket(&self) -> Result<PathBuf, ConfigError> {
        self.socket("admin-socket", "/run/nodemesh/admin.sock")
    }

    fn cni(&self) -> Result<Option<Cni>, ConfigError> {
        let socket = self.socket("cni-socket", "/run/nodemesh/cni.sock")?;
        let (conf_dir, bin_dir) = (self.optional_directory("cni-conf-dir")?, self.optional_directory("cni-bin-dir")?);
        match (conf_dir, bin_dir) {
            (None, None) => Ok(None),
            (Some(conf_dir), Some(bin_dir)) => Ok(Some(Cni { conf_dir, bin_dir, socket })),
            (Some(_), None) => Err(ConfigError(format!(
                "{} needs --cni-bin-dir: the node's folder of CNI plugins, such as /opt/cni/bin",
                self.0.place("cni-conf-dir")
            ))),
            (None, Some(_)) => Err(ConfigError(format!(
                "{} needs --cni-conf-dir: the node's folder of CNI configurations, such as /etc/cni/net.d",
                self.0.place("cni-bin-dir")
            ))),
        }
    }

    fn socket(&self, name: &'static str, default: &str) -> Result<PathBuf, ConfigError> {
        let path = self.path(name, default)?;
        let length = path.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            let problem =
                format!("{length} bytes are too long for a Unix socket; use a path of up to {MAX_SOCKET_PATH}");
            return Err(self.error(name, &problem));
        }
        Ok(path)
    }

    fn source(&self) -> Result<Source, ConfigError> {
        match self.kubernetes()? {
            Some(kubernetes) => Ok(Source::Kubernetes(kubernetes)),
            None => Ok(Source::Directory(self.directory("config-dir", DEFAULT_CONFIG_DIR)?)),
        }
    }

    fn kubernetes(&self) -> Result<Option<Kubernetes>, ConfigError> {
        let kubernetes = self.or("source", "directory", |t| match t {
            "directory" => Ok(false),
            "kubernetes" => Ok(true),
            _ => Err(format!("`{t}` is no source; write directory or kubernetes")),
        })?;
        if !kubernetes {
            return Ok(None);
        }
        let kubeconfig = self.0.get("kubeconfig").map(|text| self.path("kubeconfig", text)).transpose()?;
        let namespace = self.or("namespace", "nodemesh-system", value::label)?;
        Ok(Some(Kubernetes { kubeconfig, namespace }))
    }

    fn certificate_authority(&self) -> Result<CertificateAuthority, ConfigError> {
        let embedded = self.or("embedded-ca", "false", value::boolean)?;
        let addresses = self.every("ca-address", value::host_port)?;
        match (embedded, addresses.is_empty()) {
            (true, true) => Ok(CertificateAuthority::Embedded),
            (true, false) => Err(ConfigError(format!(
                "{} and {} exclude each other: the CA is either in this agent or in a controller",
                self.0.place("embedded-ca"),
                self.0.place("ca-address")
            ))),
            (false, true) => Err(ConfigError(
                "no certificate authority: give --ca-address HOST:PORT of a controller, or --embedded-ca for a mesh on \
                 one machine"
                    .to_owned(),
            )),
            (false, false) => Ok(CertificateAuthority::Remote { addresses, token: self.token()? }),
        }
    }

    fn token(&self) -> Result<Token, ConfigError> {
        match (self.0.get("join-token-file"), self.0.get("ca-token-file")) {
            (Some(text), None) => self.file("join-token-file", text).map(Token::Join),
            (None, Some(text)) => self.file("ca-token-file", text).map(Token::ServiceAccount),
            (Some(_), Some(_)) => Err(ConfigError(format!(
                "{} and {} exclude each other: a controller knows this node by one token",
                self.0.place("join-token-file"),
                self.0.place("ca-token-file")
            ))),
            (None, None) => Err(ConfigError(format!(
                "{} needs --join-token-file: make a token with `mesh-agent controller token --node NAME` on the \
                 controller",
                self.0.place("ca-address")
            ))),
        }
    }

    fn file(&self, name: &'static str, text: &str) -> Result<PathBuf, ConfigError> {
        let path = self.path(name, text)?;
        match std::fs::File::open(&path).and_then(|f| f.metadata()) {
            Ok(meta) if meta.is_file() => Ok(path),
            Ok(_) => Err(self.error(name, &format!("{} is no file", path.display()))),
            Err(e) => Err(self.error(name, &format!("cannot read {}: {}", path.display(), io_reason(&e)))),
        }
    }

    fn cert_lifetime(&self) -> Result<Duration, ConfigError> {
        self.or("cert-lifetime", "24h", |t| value::duration_between(t, MIN_CERT_LIFETIME, MAX_CERT_LIFETIME))
    }

    fn cluster_domain(&self) -> Result<String, ConfigError> {
        self.or("cluster-domain", "cluster.local", value::dns_name)
    }

    fn root_namespace(&self) -> Result<String, ConfigError> {
        self.or("root-namespace", "istio-system", value::label)
    }

    fn istio_labels(&self) -> Result<bool, ConfigError> {
        self.or("istio-labels", "false", value::boolean)
    }

    fn trust_domain(&self) -> Result<TrustDomain, ConfigError> {
        self.or("trust-domain", "cluster.local", |t| TrustDomain::new(t).map_err(|e| e.to_string()))
    }

    fn metrics_address(&self) -> Result<SocketAddr, ConfigError> {
        self.or("metrics-address", "0.0.0.0:15020", value::address)
    }

    fn readiness_address(&self) -> Result<SocketAddr, ConfigError> {
        self.or("readiness-address", "0.0.0.0:15021", value::address)
    }

    fn logging(&self) -> Result<Logging, ConfigError> {
        Ok(Logging {
            filter: self.or("log", "info", |t| logging::parse(t).map(|_| t.to_owned()))?,
            format: self.or("log-format", "text", |t| match t {
                "text" => Ok(LogFormat::Text),
                "json" => Ok(LogFormat::Json),
                _ => Err(format!("`{t}` is no format; write text or json")),
            })?,
        })
    }
}
