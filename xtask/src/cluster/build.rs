//! The programs of a cluster, built once from Go modules and kept by version outside the tree.
//!
//! In come versions; out come folders of static binaries in the cache. Nothing but Go and its module proxy is needed:
//! Debian has no kubelet and no apiserver, and its etcd is too old for them.

use std::fs::{self, File};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

use super::command;
use crate::run::has;

const KUBERNETES: &str = "v1.36.3";
const CONTAINERD: &str = "v2.4.2";
const ETCD: &str = "v3.6.5";
pub const COREDNS: &str = "v1.15.0";
const HELM: &str = "v4.3.1";
/// Raised when PAUSE changes.
const PAUSE_VERSION: &str = "v1";

/// Names another folder for the binaries.
const CACHE_VARIABLE: &str = "NODEMESH_CACHE";

/// From nothing it takes five minutes on two free cores; this is for a slow line and a busy machine.
const LONGEST: Duration = Duration::from_secs(3600);

/// Holds a pod's namespaces: waits to be told to end, and reaps what its pod leaves to it.
const PAUSE: &str = r#"package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for signal := range signals {
		if signal != syscall.SIGCHLD {
			os.Exit(0)
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}
"#;

/// Programs that come out of one Go module.
struct Part {
    name: &'static str,
    module: &'static str,
    version: &'static str,
    /// Package, and what its program is called.
    programs: &'static [(&'static str, &'static str)],
    tags: &'static str,
    /// Variables that the programs report as their version.
    stamps: &'static [(&'static str, &'static str)],
}

const PARTS: &[Part] = &[
    Part {
        name: "kubernetes",
        module: "k8s.io/kubernetes",
        version: KUBERNETES,
        programs: &[
            ("k8s.io/kubernetes/cmd/kube-apiserver", "kube-apiserver"),
            ("k8s.io/kubernetes/cmd/kube-controller-manager", "kube-controller-manager"),
            ("k8s.io/kubernetes/cmd/kube-proxy", "kube-proxy"),
            ("k8s.io/kubernetes/cmd/kube-scheduler", "kube-scheduler"),
            ("k8s.io/kubernetes/cmd/kubectl", "kubectl"),
            ("k8s.io/kubernetes/cmd/kubelet", "kubelet"),
        ],
        tags: "",
        stamps: &[
            ("k8s.io/component-base/version.gitVersion", KUBERNETES),
            ("k8s.io/component-base/version.gitMajor", "1"),
            ("k8s.io/component-base/version.gitMinor", "36"),
        ],
    },
    Part {
        name: "containerd",
        module: "github.com/containerd/containerd/v2",
        version: CONTAINERD,
        programs: &[
            ("github.com/containerd/containerd/v2/cmd/containerd", "containerd"),
            ("github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2", "containerd-shim-runc-v2"),
            ("github.com/containerd/containerd/v2/cmd/ctr", "ctr"),
        ],
        // They would need C libraries.
        tags: "no_btrfs,no_zfs",
        stamps: &[("github.com/containerd/containerd/v2/version.Version", CONTAINERD)],
    },
    Part {
        name: "etcd",
        module: "go.etcd.io/etcd/server/v3",
        version: ETCD,
        programs: &[("go.etcd.io/etcd/server/v3", "etcd")],
        tags: "",
        stamps: &[],
    },
    Part {
        name: "coredns",
        module: "github.com/coredns/coredns",
        version: COREDNS,
        programs: &[("github.com/coredns/coredns", "coredns")],
        tags: "",
        stamps: &[],
    },
];

/// No cluster needs it: it checks the chart.
const HELM_PART: Part = Part {
    name: "helm",
    module: "helm.sh/helm/v4",
    version: HELM,
    programs: &[("helm.sh/helm/v4/cmd/helm", "helm")],
    tags: "",
    stamps: &[("helm.sh/helm/v4/internal/version.version", HELM)],
};

/// Servers and clients that Kubernetes itself is tested with: they speak what its probes speak.
const AGNHOST_PART: Part = Part {
    name: "agnhost",
    module: "k8s.io/kubernetes",
    version: KUBERNETES,
    programs: &[("k8s.io/kubernetes/test/images/agnhost", "agnhost")],
    tags: "",
    stamps: &[],
};

/// Where the programs of a cluster are.
pub struct Programs {
    cache: PathBuf,
}

impl Programs {
    /// The path of a program by its name.
    pub fn path(&self, program: &str) -> PathBuf {
        let part = PARTS.iter().find(|part| part.programs.iter().any(|(_, name)| *name == program));
        self.cache.join(folder_of(part.expect("each program that is asked for has a part"))).join(program)
    }

    pub fn pause(&self) -> PathBuf {
        self.cache.join(format!("pause-{PAUSE_VERSION}")).join("pause")
    }
}

fn folder_of(part: &Part) -> String {
    format!("{}-{}", part.name, part.version)
}

/// Builds what the cache does not hold yet.
pub fn ensure() -> Result<Programs> {
    let cache = make_cache()?;
    for part in PARTS {
        ensure_part(&cache, part)?;
    }
    kept(&cache, &format!("pause-{PAUSE_VERSION}"), |target| build_pause(&cache.join("src/pause"), target))?;
    Ok(Programs { cache })
}

/// Helm, built if the cache does not hold it yet.
pub fn ensure_helm() -> Result<PathBuf> {
    let cache = make_cache()?;
    ensure_part(&cache, &HELM_PART)?;
    Ok(cache.join(folder_of(&HELM_PART)).join("helm"))
}

/// Kubernetes's test server, built if the cache does not hold it yet.
pub fn ensure_agnhost() -> Result<PathBuf> {
    let cache = make_cache()?;
    ensure_part(&cache, &AGNHOST_PART)?;
    Ok(cache.join(folder_of(&AGNHOST_PART)).join("agnhost"))
}

fn make_cache() -> Result<PathBuf> {
    let cache = cache_folder(|name| std::env::var_os(name).map(PathBuf::from))?;
    fs::create_dir_all(&cache)
        .with_context(|| format!("cannot make {}: name another folder in {CACHE_VARIABLE}", cache.display()))?;
    Ok(cache)
}

fn ensure_part(cache: &Path, part: &Part) -> Result<()> {
    kept(cache, &folder_of(part), |target| build(part, &cache.join("src").join(part.name), target))
}

/// Where the cache is, without building anything.
pub fn cached() -> Result<Programs> {
    Ok(Programs { cache: cache_folder(|name| std::env::var_os(name).map(PathBuf::from))? })
}

/// `$NODEMESH_CACHE`, or `nodemesh` in the user's cache folder; in it, what belongs to clusters.
fn cache_folder(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| value.is_absolute());
    let folder = set(CACHE_VARIABLE)
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("nodemesh")))
        .or_else(|| Some(set("HOME")?.join(".cache/nodemesh")));
    let folder = folder.with_context(|| {
        format!("there is no place for the cluster's programs: set {CACHE_VARIABLE} to an absolute path, or HOME")
    })?;
    Ok(folder.join("cluster"))
}

/// Makes a folder of the cache whole or not at all: a build that is cut short leaves nothing that looks finished.
fn kept(cache: &Path, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let finished = cache.join(name);
    if finished.is_dir() {
        return Ok(());
    }
    need_go()?;
    // One build at a time: they share folders.
    let lock = File::open(cache).with_context(|| format!("cannot open {}", cache.display()))?;
    command::wait_until("another command has built the cluster's programs", LONGEST, || {
        Ok(flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok())
    })?;
    if finished.is_dir() {
        return Ok(());
    }
    let start = Instant::now();
    println!("==> build {name} (once; kept in {})", cache.display());
    let partial = cache.join(format!("{name}.partial"));
    // Of a build that was killed.
    let _ = fs::remove_dir_all(&partial);
    let made = fs::create_dir_all(&partial)
        .with_context(|| format!("cannot make {}", partial.display()))
        .and_then(|()| make(&partial))
        .and_then(|()| fs::rename(&partial, &finished).with_context(|| format!("cannot make {}", finished.display())));
    let _ = fs::remove_dir_all(&partial);
    made?;
    println!("    {name}: {:.0} s, {} MB", start.elapsed().as_secs_f64(), size(&finished) / 1_000_000);
    Ok(())
}

fn size(folder: &Path) -> u64 {
    fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

fn need_go() -> Result<()> {
    if !has("go") {
        bail!(
            "the cluster's programs are built by Go, which is not on PATH: install Go 1.26 or newer from https://go.dev/dl"
        );
    }
    Ok(())
}

/// Go in a folder of ours: no C, and no settings of a workspace around it.
fn go(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("go");
    command.current_dir(folder).args(args).env("CGO_ENABLED", "0").env("GOWORK", "off");
    command
}

fn build(part: &Part, source: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(source).with_context(|| format!("cannot make {}", source.display()))?;
    let own = module_file(part)?;
    write(&source.join("go.mod"), &own)?;
    // What an older version has needed would otherwise stay.
    let _ = fs::remove_file(source.join("go.sum"));
    let packages: Vec<&str> = part.programs.iter().map(|(package, _)| *package).collect();
    let tags = format!("-tags={}", part.tags);
    let mut progress = Progress::new(format!("{}: modules", part.name));
    let list = [&["list", "-mod=mod", &tags, "-deps", "-f", "{{.ImportPath}}"], packages.as_slice()].concat();
    // Once to download with something to see, once to count.
    command::watch_stderr(go(source, &list), LONGEST, |line| {
        if line.starts_with("go: downloading") {
            progress.step();
        }
    })
    .with_context(|| unreachable_proxy(part))?;
    progress.done();
    let all = command::output(go(source, &list), LONGEST)?.lines().count();
    println!("    {}: {all} packages at most", part.name);
    let stamps: Vec<String> = part.stamps.iter().map(|(variable, value)| format!("-X {variable}={value}")).collect();
    let linker = format!("-ldflags=-s -w {}", stamps.join(" "));
    for (package, program) in part.programs {
        let file = target.join(program);
        let file = file.to_str().context("the cache folder's name is not UTF-8")?;
        let args = ["build", "-v", "-mod=mod", "-trimpath", "-buildvcs=false", &tags, &linker, "-o", file, package];
        let mut progress = Progress::new(format!("{program}: packages"));
        command::watch_stderr(go(source, &args), LONGEST, |_| progress.step()).with_context(|| {
            format!("cannot build {program} {}: see what Go says, then run this again", part.version)
        })?;
        progress.done();
    }
    Ok(())
}

/// A module that requires the part, so that its dependencies are those that it was released with.
///
/// `k8s.io/kubernetes` names the modules that it is released together with at v0.0.0: each is there as v0.X.
fn module_file(part: &Part) -> Result<String> {
    let (module, version) = (part.module, part.version);
    let wanted = format!("{module}@{version}");
    let nowhere = std::env::temp_dir();
    // Once for a reason where it fails, which is told to a person, and once for a program's eyes.
    let answer = command::watch_stderr(go(&nowhere, &["mod", "download", &wanted]), LONGEST, |_| {})
        .and_then(|()| command::output(go(&nowhere, &["mod", "download", "-json", &wanted]), LONGEST));
    let answer = answer.with_context(|| unreachable_proxy(part))?;
    let answer: Value =
        serde_json::from_str(&answer).with_context(|| format!("cannot read what Go says of {module}"))?;
    let file = answer["GoMod"].as_str().with_context(|| format!("Go has no go.mod of {module} {version}"))?;
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
    let go = text.lines().find_map(|line| line.strip_prefix("go ")).unwrap_or("1.26");
    let mut own = format!("module nodemesh.invalid/cluster/{}\n\ngo {go}\n\nrequire {module} {version}\n", part.name);
    for staging in staging_modules(&text) {
        let released = version.replacen("v1.", "v0.", 1);
        own.push_str(&format!("\nreplace {staging} => {staging} {released}\n"));
    }
    Ok(own)
}

fn unreachable_proxy(part: &Part) -> String {
    format!("cannot get {} {} (is Go's module proxy, `go env GOPROXY`, reachable?)", part.module, part.version)
}

fn staging_modules(text: &str) -> Vec<&str> {
    let names = text.lines().filter_map(|line| line.trim().trim_start_matches("require ").strip_suffix(" v0.0.0"));
    names.filter(|name| name.starts_with("k8s.io/")).collect()
}

fn build_pause(source: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(source).with_context(|| format!("cannot make {}", source.display()))?;
    write(&source.join("go.mod"), "module nodemesh.invalid/cluster/pause\n\ngo 1.22\n")?;
    write(&source.join("main.go"), PAUSE)?;
    let file = target.join("pause");
    let file = file.to_str().context("the cache folder's name is not UTF-8")?;
    let args = ["build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", file, "."];
    command::output(go(source, &args), LONGEST).map(drop)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// A count that moves on a terminal, and a line now and then elsewhere.
struct Progress {
    what: String,
    count: usize,
    start: Instant,
    shown: Instant,
}

impl Progress {
    fn new(what: String) -> Self {
        Self { what, count: 0, start: Instant::now(), shown: Instant::now() }
    }

    fn step(&mut self) {
        self.count += 1;
        let terminal = std::io::stdout().is_terminal();
        let pause = if terminal { Duration::from_millis(200) } else { Duration::from_secs(15) };
        if self.shown.elapsed() < pause {
            return;
        }
        self.shown = Instant::now();
        if terminal {
            print!("\r    {}", self.text());
            let _ = std::io::stdout().flush();
        } else {
            println!("    {}", self.text());
        }
    }

    fn done(&self) {
        let back = if std::io::stdout().is_terminal() { "\r" } else { "" };
        println!("{back}    {}", self.text());
    }

    fn text(&self) -> String {
        format!("{} {}, {:.0} s", self.what, self.count, self.start.elapsed().as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_user_says() {
        let with = |set: &'static [(&str, &str)]| {
            let found = cache_folder(|name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v)));
            found.map(|path| path.display().to_string()).ok()
        };
        assert_eq!(with(&[("HOME", "/home/a")]).as_deref(), Some("/home/a/.cache/nodemesh/cluster"));
        assert_eq!(with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]).as_deref(), Some("/c/nodemesh/cluster"));
        assert_eq!(with(&[("HOME", "/h"), ("NODEMESH_CACHE", "/n")]).as_deref(), Some("/n/cluster"));
        assert_eq!(with(&[("HOME", "relative")]), None, "it would land wherever one happens to stand");
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn only_modules_at_nought_are_staging() {
        let text = "require (\n\tk8s.io/api v0.0.0\n\tk8s.io/utils v0.0.0-20260210185600-b8788abfbbc2\n\tother.org/x v0.0.0\n)\n";
        assert_eq!(staging_modules(text), ["k8s.io/api"]);
    }

    #[test]
    fn each_program_has_a_place() {
        let programs = Programs { cache: PathBuf::from("/c") };
        assert_eq!(programs.path("ctr"), Path::new("/c").join(format!("containerd-{CONTAINERD}/ctr")));
    }
}
