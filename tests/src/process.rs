//! A program that runs in a pod or on a node until the test lets go of it.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};

use crate::wait::eventually;

/// A running child. Output goes to a file, which is printed where a test fails; killed and reaped on drop, with all
/// that it has started itself.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    /// How it ended, once it is reaped.
    status: Option<ExitStatus>,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output in `log` (appended to). It dies with this process, even when that is killed.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Self {
        let file = File::options().create(true).append(true).open(log);
        let file = file.unwrap_or_else(|e| panic!("cannot write log {}: {e}", log.display()));
        // A group of its own, so that a master's workers go with it.
        command.stdin(Stdio::null()).process_group(0);
        command.stdout(file.try_clone().expect("a file can be duplicated")).stderr(file);
        #[expect(unsafe_code, reason = "a child must be told before it begins")]
        // SAFETY: one system call between fork and exec, no allocation, no lock.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let child = spawn(command)
            .unwrap_or_else(|e| panic!("cannot start {program} for {name}: {e}; `cargo xtask setup` installs it"));
        Self { name: name.to_owned(), child, status: None, log: log.to_owned() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// All that it has printed so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    pub fn log_file(&self) -> &Path {
        &self.log
    }

    pub fn is_running(&mut self) -> bool {
        self.ended().is_none()
    }

    /// Waits until its output holds `text`; fails at once when it ends before.
    pub fn wait_for(&mut self, text: &str, deadline: Duration) {
        let what = format!("{} prints {text:?}", self.name);
        eventually(deadline, &what, || {
            let running = self.is_running();
            let found = self.log().contains(text);
            assert!(found || running, "{} ended before it printed {text:?}; its output:\n{}", self.name, self.log());
            found
        });
    }

    pub fn signal(&self, signal: Signal) {
        // A child that has ended but is not reaped keeps its id, so this never hits a stranger.
        if self.status.is_none() {
            let _ = kill_process(self.pid(), signal);
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed()).expect("a child's id is not zero")
    }

    /// kill -9, and reaps; what it has started itself goes with it.
    pub fn kill(&mut self) {
        if self.status.is_none() {
            self.reap();
        }
    }

    /// Kills what is left of its group, and takes its status. The group has the child's id, which nobody else can get
    /// before the child is reaped: hence in this order, and only once.
    fn reap(&mut self) -> ExitStatus {
        let _ = kill_process_group(self.pid(), Signal::KILL);
        let status = self.child.wait().expect("a child can be waited for");
        self.status = Some(status);
        status
    }

    /// How it ended, if it has.
    fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            waitid(WaitId::Pid(self.pid()), look).expect("a child can be waited for")?;
            self.reap();
        }
        self.status
    }

    /// Asks it to end, and waits; one that has not ended after ten seconds is killed and that is a failure.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait(Duration::from_secs(10))
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            if start.elapsed() > deadline {
                self.kill();
                panic!("{} did not end within {deadline:?}; its output:\n{}", self.name, self.log());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Resident memory in KiB, as the kernel counts it now.
    pub fn rss_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- output of {} ---\n{}", self.name, tail(&self.log(), 60));
        }
        self.kill();
    }
}

/// The last `lines` lines.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

type Job = (Command, SyncSender<io::Result<Child>>);

/// Spawns from one thread that lives as long as the process: PR_SET_PDEATHSIG counts the death of the *thread* that
/// forked, and a test's own thread ends before a mesh that several tests share.
fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });
    let (reply, answer) = sync_channel(1);
    spawner
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .send((command, reply))
        .expect("the spawner lives");
    answer.recv().expect("the spawner answers")
}
