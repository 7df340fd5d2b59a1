//! The agent that comes: finds the one that is there, and takes its place when it has all it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::own::{Own, OwnError};
use super::wire::{PROTOCOL, Talk, Word};
use super::{ANSWER, LOCK};
use crate::config;
use crate::enrollment::{Handed, Listeners, Netns, NetnsError, Tuple};
use crate::identity::Certificates;
use crate::model::{Snapshot, SpiffeId, Transport};
use crate::redirect::{Options, RedirectError};

/// How long certificates may take before it is seen whether those that are there are enough.
const CERTIFICATES: Duration = Duration::from_secs(30);
/// An agent that has just given its place away still listens for a moment.
const HELLO: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(200);
/// How often an agent may say that it is busy.
const TRIES: usize = 50;

/// The agent that is there.
#[derive(Debug)]
pub struct Predecessor {
    talk: Talk,
    pid: u32,
    version: String,
    /// It makes room, but hands nothing over.
    restart: bool,
}

/// What came from it.
#[derive(Debug, Default)]
pub struct Taken {
    /// Sockets by name: where they listen, and themselves.
    sockets: BTreeMap<String, (String, OwnedFd)>,
    pub pods: Vec<Handed>,
}

#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    #[error("cannot ask the agent that runs, at {}: {source}; stop it, then start this one", path.display())]
    Ask { path: PathBuf, source: io::Error },
    #[error("{} is not root's, so no agent is asked there; remove it", .0.display())]
    NotRoot(PathBuf),
    #[error("the agent that runs refuses to be taken over from: {0}")]
    Refused(String),
    #[error("taking over from the agent with PID {pid} has failed, and that one goes on: {source}")]
    Talk { pid: u32, source: io::Error },
    #[error("the agent with PID {pid} has handed over what is no {what}; stop it, then start this one")]
    Foreign { pid: u32, what: &'static str },
    #[error("there is no certificate yet for {0}, which the agent that runs serves: that one goes on")]
    NoCertificate(SpiffeId),
    #[error("the agent with PID {pid} makes no room within {patience:?}; stop it, then start this one")]
    NoRoom { pid: u32, patience: Duration },
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Own(#[from] OwnError),
}

impl Taken {
    /// The socket of this name, if it listens there.
    pub fn socket(&mut self, name: &str, at: &str) -> Option<OwnedFd> {
        self.sockets.remove(name).filter(|(place, _)| place == at).map(|(_, fd)| fd)
    }
}

/// The agent of `node` that listens at `path`, if one does.
pub async fn find(path: &Path, node: &str) -> Result<Option<Predecessor>, TakeError> {
    let deadline = Instant::now() + HELLO;
    loop {
        let failed = |source| TakeError::Ask { path: path.to_owned(), source };
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(e) => return Err(failed(e)),
        };
        let talk = Talk::with(stream).map_err(failed)?.ok_or_else(|| TakeError::NotRoot(path.to_owned()))?;
        let hello = Word::Hello {
            protocol: PROTOCOL,
            schema: mesh_common::SCHEMA,
            node: node.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
        };
        let answer = match talk.say(hello, Vec::new()).await {
            Ok(()) => talk.hear(Some(ANSWER)).await,
            Err(e) => Err(e),
        };
        match answer {
            Ok((Word::Welcome { version, pid }, _)) => {
                tracing::info!(pid, version, "an agent runs; this one prepares to take over from it");
                return Ok(Some(Predecessor { talk, pid, version, restart: false }));
            }
            Ok((Word::Refused { reason, restart: true }, _)) => {
                tracing::warn!("the agent that runs cannot hand over: {reason}; it will be asked to stop");
                return Ok(Some(Predecessor { talk, pid: 0, version: String::new(), restart: true }));
            }
            Ok((Word::Refused { reason, .. }, _)) => return Err(TakeError::Refused(reason)),
            Ok(_) => return Err(failed(io::ErrorKind::InvalidData.into())),
            // Its place may be given away just now.
            Err(_) if Instant::now() < deadline => tokio::time::sleep(RETRY).await,
            Err(e) => return Err(failed(e)),
        }
    }
}

impl Predecessor {
    /// Takes the place: when this returns, the agent before serves no new connection, and what is in `Taken` is to be
    /// served. Where it fails, the agent before goes on.
    pub async fn take(
        self,
        config: &config::Node,
        in_kernel: &Options,
        snapshot: &Snapshot,
        certificates: &Certificates,
    ) -> Result<(Own, Taken), TakeError> {
        if self.restart {
            return self.after_it(config, in_kernel).await;
        }
        have_certificates(config, snapshot, certificates).await;
        let Self { pid, version, .. } = &self;
        let mut taken = self.receive().await?;
        for identity in taken.pods.iter().filter_map(|pod| Some(&snapshot.workload(&pod.uid)?.identity)) {
            if certificates.get(identity).is_none() {
                return Err(TakeError::NoCertificate(identity.clone()));
            }
        }
        let (_, lock) = taken.sockets.remove(LOCK).ok_or(TakeError::Foreign { pid: *pid, what: "whole place" })?;
        let own = Own::taken(&mut taken, lock, config, in_kernel)?;
        self.talk.say(Word::Commit, Vec::new()).await.map_err(|source| TakeError::Talk { pid: *pid, source })?;
        let (pods, connections) = match self.talk.hear(Some(ANSWER)).await {
            Ok((Word::Yielded { connections }, _)) => (taken.pods.len(), connections),
            // It has the word, and its lock is here: nobody else serves the pods from now on.
            Ok(_) | Err(_) => {
                tracing::warn!(pid, "the agent before did not say that it has let go; it may have died just now");
                (taken.pods.len(), 0)
            }
        };
        tracing::info!(connections, "took over {pods} pods from agent PID {pid} ({version})");
        Ok((own, taken))
    }

    /// Asks for all, and receives it.
    async fn receive(&self) -> Result<Taken, TakeError> {
        let pid = self.pid;
        let failed = |source| TakeError::Talk { pid, source };
        let foreign = |what| TakeError::Foreign { pid, what };
        let mut busy = 0;
        self.talk.say(Word::Give, Vec::new()).await.map_err(failed)?;
        let mut taken = Taken::default();
        loop {
            match self.talk.hear(Some(ANSWER)).await.map_err(failed)? {
                (Word::Socket { name, at }, fds) => {
                    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| foreign("socket"))?;
                    taken.sockets.insert(name, (at, fd));
                }
                (Word::Pod { uid, netns, legacy }, fds) => {
                    let [at, outbound, plain, hbone] = <[OwnedFd; 4]>::try_from(fds).map_err(|_| foreign("pod"))?;
                    let listener = |fd: OwnedFd, port| {
                        let listener = TcpListener::from(fd);
                        listener
                            .local_addr()
                            .is_ok_and(|a| a.port() == port)
                            .then_some(listener)
                            .ok_or(foreign("listener"))
                    };
                    let listeners = Listeners {
                        outbound: listener(outbound, mesh_common::OUTBOUND_PORT)?,
                        plain: listener(plain, mesh_common::PLAIN_PORT)?,
                        hbone: listener(hbone, mesh_common::HBONE_PORT)?,
                    };
                    taken.pods.push(Handed {
                        uid: uid.into(),
                        netns: Arc::new(Netns::of(File::from(at), &netns)?),
                        listeners: Arc::new(listeners),
                        legacy: legacy.into_iter().map(Tuple).collect(),
                    });
                }
                (Word::All { pods }, _) if pods == taken.pods.len() => return Ok(taken),
                (Word::Refused { reason, .. }, _) => {
                    busy += 1;
                    if busy == TRIES {
                        return Err(TakeError::Refused(reason));
                    }
                    tokio::time::sleep(RETRY).await;
                    self.talk.say(Word::Give, Vec::new()).await.map_err(failed)?;
                }
                _ => return Err(foreign("answer")),
            }
        }
    }

    /// The agent before can't hand over: it stops as on SIGTERM, and this one starts after it.
    async fn after_it(self, config: &config::Node, in_kernel: &Options) -> Result<(Own, Taken), TakeError> {
        // It drains first.
        let patience = config.drain_timeout + ANSWER;
        let pid = self.pid;
        self.talk.say(Word::Leave, Vec::new()).await.map_err(|source| TakeError::Talk { pid, source })?;
        let deadline = Instant::now() + patience;
        loop {
            match Own::bind(config, in_kernel) {
                Ok(own) => return Ok((own, Taken::default())),
                Err(OwnError::Redirect(RedirectError::Running { .. }) | OwnError::Admin(_))
                    if Instant::now() < deadline =>
                {
                    tokio::time::sleep(RETRY).await;
                }
                Err(OwnError::Redirect(RedirectError::Running { .. }) | OwnError::Admin(_)) => {
                    return Err(TakeError::NoRoom { pid, patience });
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Asks for the certificates of all pods of this node, so that none has to wait for one afterwards.
async fn have_certificates(config: &config::Node, snapshot: &Snapshot, certificates: &Certificates) {
    let local = snapshot.workloads().filter(|w| w.is_on(&config.node_name) && w.transport == Transport::Hbone);
    let identities: BTreeSet<SpiffeId> = local.map(|w| w.identity.clone()).collect();
    let all = futures_util::future::join_all(identities.iter().map(|identity| async move {
        while let Err(problem) = certificates.ensure(identity).await {
            tracing::warn!("no certificate yet to take over with: {problem}");
            tokio::time::sleep(RETRY).await;
        }
    }));
    // Whoever the agent before does not serve either needs none now.
    let _ = tokio::time::timeout(CERTIFICATES, all).await;
}
