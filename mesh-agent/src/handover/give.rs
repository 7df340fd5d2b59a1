//! The agent that is there: hands its place to the next one that asks, or goes on as if nobody had asked.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::own::Named;
use super::wire::{PROTOCOL, Talk, Word};
use super::{ANSWER, LOCK};
use crate::enrollment::{Handed, Order};
use crate::lifecycle::{KeptFile, Pen, PrivateSocket};
use crate::proxy::Proxy;
use crate::redirect::{NodeLock, Redirect};

/// How long pods that are being taken in may take to come to an end of it.
const FREEZE: Duration = Duration::from_secs(5);

/// For a file that is just being written.
const PEN: Duration = Duration::from_secs(2);

/// What there is to hand over.
pub struct Giver {
    pub node: String,
    pub orders: mpsc::UnboundedSender<Order>,
    pub proxy: Arc<Proxy>,
    pub redirect: Arc<Redirect>,
    /// Second descriptors of the sockets that are served.
    pub sockets: Vec<Named>,
    /// Who serves them.
    pub serving: Vec<AbortHandle>,
    /// Files that belong to them.
    pub files: Vec<KeptFile>,
    /// What it writes the node's files with.
    pub pen: Pen,
}

/// How it came out.
#[derive(Debug, Clone)]
pub enum Given {
    /// The next agent serves; these connections end here.
    Handed { pid: u32, version: String, connections: usize },
    /// The next agent can't take over and wants this one to stop.
    Leave { pid: u32, version: String },
}

/// The next agent, where one comes.
pub struct Successor {
    given: mpsc::UnboundedReceiver<Given>,
    preparing: watch::Receiver<usize>,
}

#[derive(Debug, thiserror::Error)]
enum GiveError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it said what has no place here")]
    Word,
    #[error("pods are just being taken in")]
    Busy,
    #[error("another agent has this one's place already")]
    Gone,
}

impl Successor {
    /// Waits until one has taken over, or wants to have room.
    pub async fn given(&mut self) -> Given {
        match self.given.recv().await {
            Some(given) => given,
            None => std::future::pending().await,
        }
    }

    /// Whether one is there and prepares.
    pub fn is_preparing(&self) -> bool {
        *self.preparing.borrow() > 0
    }

    /// Waits while one prepares, for as long as it does.
    pub async fn prepared(&mut self) -> Option<Given> {
        tokio::select! {
            Some(given) = self.given.recv() => Some(given),
            _ = self.preparing.wait_for(|preparing| *preparing == 0) => self.given.try_recv().ok(),
        }
    }
}

/// Listens for the next agent, at `path`, until the place is given away.
pub fn serve(path: &Path, giver: Giver) -> io::Result<Successor> {
    let socket = PrivateSocket::bind(path)?;
    let listener = socket.listener()?;
    let (tell, given) = mpsc::unbounded_channel();
    let (count, preparing) = watch::channel(0);
    let giver = Arc::new(Shared { giver: Mutex::new(Some(giver)), giving: tokio::sync::Mutex::new(()), count });
    tokio::spawn(async move {
        let _socket = socket;
        let mut talks = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted.and_then(|(stream, _)| stream.into_std()) {
                    Ok(stream) => {
                        let giver = giver.clone();
                        talks.spawn(async move { talk(&giver, stream).await });
                    }
                    Err(e) => {
                        tracing::warn!("cannot hear a next agent: {e}; see the limit of open files");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                },
                Some(ended) = talks.join_next() => {
                    let Ok(Some(end)) = ended else { continue };
                    let handed = matches!(end, Given::Handed { .. });
                    let _ = tell.send(end);
                    if handed {
                        return;
                    }
                }
            }
        }
    });
    Ok(Successor { given, preparing })
}

struct Shared {
    /// None once it is given away.
    giver: Mutex<Option<Giver>>,
    /// Held while a next agent takes over: the others wait, and find it done.
    giving: tokio::sync::Mutex<()>,
    count: watch::Sender<usize>,
}

/// One more who prepares, for as long as this lives.
struct Preparing<'a>(&'a watch::Sender<usize>);

impl<'a> Preparing<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|n| *n += 1);
        Self(count)
    }
}

impl Drop for Preparing<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

/// Speaks with one that wants the place.
async fn talk(shared: &Shared, stream: UnixStream) -> Option<Given> {
    let talk = match Talk::with(stream) {
        Ok(Some(talk)) => talk,
        Ok(None) => {
            tracing::warn!("a process that is not root's asked to take over from this agent, and was refused");
            return None;
        }
        Err(e) => {
            tracing::warn!("cannot see who wants to take over: {e}");
            return None;
        }
    };
    let Ok((Word::Hello { protocol, schema, node, version, pid }, _)) = talk.hear(Some(ANSWER)).await else {
        tracing::warn!("somebody came to take over and did not say hello");
        return None;
    };
    let refusal = shared.refusal(protocol, schema, &node);
    let restart = refusal.as_ref().is_some_and(|(_, restart)| *restart);
    let answer = match refusal {
        None => Word::Welcome { version: env!("CARGO_PKG_VERSION").to_owned(), pid: std::process::id() },
        Some((reason, restart)) => {
            tracing::warn!(pid, version, "an agent that came to take over was refused: {reason}");
            Word::Refused { reason, restart }
        }
    };
    let may_give = matches!(answer, Word::Welcome { .. });
    talk.say(answer, Vec::new()).await.ok()?;
    if !may_give && !restart {
        return None;
    }
    tracing::info!(pid, version, "an agent prepares to take over");
    let _preparing = Preparing::new(&shared.count);
    loop {
        match talk.hear(None).await {
            Ok((Word::Give, _)) if may_give => {}
            Ok((Word::Leave, _)) if restart => return Some(Given::Leave { pid, version }),
            Ok(_) => {
                tracing::warn!(pid, "an agent that came to take over: {}", GiveError::Word);
                return None;
            }
            Err(_) => {
                tracing::info!(pid, version, "the agent that prepared to take over has gone; this one goes on");
                shared.stay();
                return None;
            }
        }
        let _giving = shared.giving.lock().await;
        match shared.give(&talk).await {
            Ok(connections) => return Some(Given::Handed { pid, version, connections }),
            // It asks again.
            Err(e @ GiveError::Busy) => {
                talk.say(Word::Refused { reason: e.to_string(), restart: false }, Vec::new()).await.ok()?;
            }
            Err(e) => {
                tracing::warn!(pid, version, "the agent that came to take over has failed: {e}; this one goes on");
                shared.stay();
                return None;
            }
        }
    }
}

impl Shared {
    /// Why an agent can't take over, and whether it may start after this one has stopped.
    fn refusal(&self, protocol: u32, schema: u32, node: &str) -> Option<(String, bool)> {
        let own = self.lock().as_ref().map(|giver| giver.node.clone())?;
        if node != own {
            return Some((
                format!("this is the agent of node {own}, not of {node}; give it another --admin-socket"),
                false,
            ));
        }
        if protocol != PROTOCOL {
            return Some((format!("it speaks hand-over {protocol}, and this agent {PROTOCOL}"), true));
        }
        if schema != mesh_common::SCHEMA {
            let ours = mesh_common::SCHEMA;
            return Some((format!("its tables in the kernel have schema {schema}, and this agent's {ours}"), true));
        }
        None
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Giver>> {
        self.giver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        if let Some(giver) = &*self.lock() {
            // Enrolment ends with the agent.
            let _ = giver.orders.send(order);
        }
    }

    /// As if nobody had come.
    fn stay(&self) {
        self.order(Order::GoOn);
        let redirect = self.lock().as_ref().map(|giver| giver.redirect.clone());
        if let Some(Err(e)) = redirect.map(|redirect| redirect.stay()) {
            tracing::warn!("programs of an agent that did not come about stay in the kernel beside this one's: {e}");
        }
    }

    /// Hands all over, and gives up the place once it has arrived. Returns how many connections stay.
    async fn give(&self, talk: &Talk) -> Result<usize, GiveError> {
        let (reply, pods) = oneshot::channel();
        self.order(Order::Freeze(reply));
        let pods = match tokio::time::timeout(FREEZE, pods).await {
            Ok(Ok(pods)) => pods,
            Ok(Err(_)) => return Err(GiveError::Gone),
            Err(_) => {
                self.order(Order::GoOn);
                return Err(GiveError::Busy);
            }
        };
        let mut sockets = vec![(LOCK, String::new(), NodeLock::of_this_process()?.ok_or(GiveError::Gone)?)];
        for (name, at, fd) in &self.lock().as_ref().ok_or(GiveError::Gone)?.sockets {
            sockets.push((name, at.clone(), fd.try_clone()?));
        }
        for (name, at, fd) in sockets {
            talk.say(Word::Socket { name: name.to_owned(), at }, vec![fd]).await?;
        }
        let count = pods.len();
        for pod in pods {
            let Handed { uid, netns, listeners, legacy } = pod;
            let word = Word::Pod {
                uid: uid.to_string(),
                netns: netns.path().to_owned(),
                legacy: legacy.into_iter().map(|tuple| tuple.0).collect(),
            };
            let fds = vec![
                netns.fd().try_clone_to_owned()?,
                listeners.outbound.try_clone()?.into(),
                listeners.plain.try_clone()?.into(),
                listeners.hbone.try_clone()?.into(),
            ];
            talk.say(word, fds).await?;
        }
        talk.say(Word::All { pods: count }, Vec::new()).await?;
        match talk.hear(Some(ANSWER)).await? {
            (Word::Commit, _) => {}
            _ => return Err(GiveError::Word),
        }
        let connections = self.yield_place().await?;
        // It serves by now whether it hears this or not.
        let _ = talk.say(Word::Yielded { connections }, Vec::new()).await;
        Ok(connections)
    }

    /// From here on the other agent has the pods.
    async fn yield_place(&self) -> Result<usize, GiveError> {
        let giver = self.lock().take().ok_or(GiveError::Gone)?;
        let Giver { node: _, orders, proxy, redirect: _, sockets, serving, files, pen } = giver;
        let _ = orders.send(Order::Yield);
        for file in files {
            file.keep();
        }
        for task in serving {
            task.abort();
        }
        drop(sockets);
        let connections = proxy.hand_over().await;
        // A disk that does not answer must not keep the other agent from serving.
        let _ = tokio::time::timeout(PEN, tokio::task::spawn_blocking(move || pen.put_down())).await;
        NodeLock::give_up();
        Ok(connections)
    }
}
