//! A network namespace: made, entered, and removed with everything in it.
//!
//! `Netns::run` takes a closure to a thread of its own inside the namespace. Sockets that it returns stay there, which is
//! why most cases need no second process: a test holds both ends of a connection that crosses two pods.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A named network namespace (`/run/netns/<name>`), deleted on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
    /// Somebody else's is not deleted.
    ours: bool,
}

impl Netns {
    /// Makes the namespace, with `lo` up and IPv6 addresses usable at once.
    pub fn create(name: &str) -> Self {
        ip(None, &[&format!("netns add {name}")]);
        let path = format!("/run/netns/{name}");
        let file = File::open(&path).unwrap_or_else(|e| panic!("cannot open {path}: {e}"));
        let netns = Self { name: name.to_owned(), file: Arc::new(file), ours: true };
        // Duplicate address detection would keep a fresh address unusable for a second.
        netns.sysctl("net.ipv6.conf.all.accept_dad", "0");
        netns.sysctl("net.ipv6.conf.default.accept_dad", "0");
        netns.ip(&["link set lo up"]);
        netns
    }

    /// One that is there, such as a node's of a cluster; it stays.
    pub fn open(name: &str) -> Self {
        let path = format!("/run/netns/{name}");
        let file = File::open(&path).unwrap_or_else(|e| panic!("cannot open {path}: {e}"));
        Self { name: name.to_owned(), file: Arc::new(file), ours: false }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the annotation `nodemesh.io/netns` holds.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `f` on a thread inside the namespace; a panic in it is the caller's.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                        .unwrap_or_else(|e| panic!("cannot enter namespace {}: {e}; run as root", self.name));
                    f()
                })
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Runs `f` in the background on a thread inside the namespace.
    pub fn spawn<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let file = Arc::clone(&self.file);
        thread::spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("the namespace could be entered before");
            f()
        })
    }

    /// A command whose process will be born inside the namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let file = Arc::clone(&self.file);
        #[expect(unsafe_code, reason = "a child must be told before it begins")]
        // SAFETY: between fork and exec the closure makes one system call, on a descriptor that it keeps open itself; it
        // allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command
    }

    /// Runs lines of `ip` inside the namespace.
    pub fn ip(&self, lines: &[&str]) {
        ip(Some(&self.name), lines);
    }

    /// Sets a `net.` sysctl of this namespace.
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.run(|| fs::write(&path, value).unwrap_or_else(|e| panic!("cannot set {key} in {}: {e}", self.name)));
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if self.ours {
            delete(&self.name);
        }
    }
}

/// Removes a namespace by name; links inside it go with it. One that is gone already is no error.
pub(crate) fn delete(name: &str) {
    let _ = Command::new("ip").args(["netns", "delete", name]).stderr(Stdio::null()).status();
}

/// Runs lines of iproute2's `ip`, all in one process, in a namespace or where the caller is.
fn ip(netns: Option<&str>, lines: &[&str]) {
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot run `ip`: {e}; `cargo xtask setup` installs it"));
    let mut script = lines.join("\n");
    script.push('\n');
    child.stdin.take().expect("stdin is piped").write_all(script.as_bytes()).expect("`ip` reads its standard input");
    let output = child.wait_with_output().expect("`ip` was started");
    assert!(
        output.status.success(),
        "`ip` failed in namespace {}: {}; the lines were:\n{script}",
        netns.unwrap_or("of the host"),
        String::from_utf8_lossy(&output.stderr).trim(),
    );
}
