//! aya-log: what the kernel programs say, into `tracing`. In: the pinned ring buffer. Out: log lines, target `kernel`.
//!
//! A thread of its own, so that `start` needs no runtime; it ends with the agent. Off: no thread, and the verifier has
//! taken the code out of the programs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::{self, JoinHandle};

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// Reads until dropped.
#[derive(Debug)]
pub struct KernelLog {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl KernelLog {
    /// Without the log the mesh works all the same: a failure is told, not returned.
    pub fn start(object: &mut Ebpf) -> Option<Self> {
        let started = EbpfLogger::init_with_logger(object, ToTracing).map_err(io::Error::other).and_then(Self::spawn);
        started.inspect_err(|error| tracing::warn!(%error, "the kernel programs' log cannot be read")).ok()
    }

    fn spawn(mut logger: EbpfLogger<ToTracing>) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let read = move || {
            loop {
                let (ring, stop) = (logger.as_fd(), stopped.as_fd());
                let mut fds =
                    [PollFd::from_borrowed_fd(ring, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
                match poll(&mut fds, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return tracing::warn!(%error, "the kernel programs' log is read no more"),
                }
                let done = fds[1].revents().contains(PollFlags::IN);
                logger.flush();
                if done {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("kernel-log".into()).spawn(read)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for KernelLog {
    fn drop(&mut self) {
        let told = rustix::io::write(&self.stop, &1u64.to_ne_bytes()).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| told) {
            // A panic there is in the log already.
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args();
        match record.level() {
            Level::Error => tracing::error!(target: "kernel", "{text}"),
            Level::Warn => tracing::warn!(target: "kernel", "{text}"),
            Level::Info => tracing::info!(target: "kernel", "{text}"),
            Level::Debug => tracing::debug!(target: "kernel", "{text}"),
            Level::Trace => tracing::trace!(target: "kernel", "{text}"),
        }
    }

    fn flush(&self) {}
}
