//! What tells the process to stop: SIGTERM (kubelet, systemd) and SIGINT (Ctrl-C).

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Why to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    Terminate,
    Interrupt,
}

/// Listens from `new` on, so that no signal is lost between start and the first `recv`. SIGPIPE needs no care: Rust
/// ignores it from the start.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Inside a tokio runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next one. The first asks for a drain; the second, while draining, for an end at once.
    pub async fn recv(&mut self) -> Stop {
        tokio::select! {
            _ = self.terminate.recv() => Stop::Terminate,
            _ = self.interrupt.recv() => Stop::Interrupt,
        }
    }
}

impl Stop {
    pub fn name(self) -> &'static str {
        match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    #[tokio::test]
    async fn both_signals_are_heard_even_those_before_the_first_recv() {
        let mut signals = Signals::new().unwrap();
        kill_process(getpid(), Signal::TERM).unwrap();
        assert_eq!(signals.recv().await, Stop::Terminate);
        kill_process(getpid(), Signal::INT).unwrap();
        assert_eq!(signals.recv().await, Stop::Interrupt);
    }
}
