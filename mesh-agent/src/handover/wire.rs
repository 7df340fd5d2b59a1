//! What two agents of a node say to each other while one takes the other's place: a few messages, some of which carry
//! descriptors. In: values and open files. Out: the same, in the other process.
//!
//! A message is its length (four bytes, network order) and JSON; descriptors go along with the length. What a version does
//! not know in a message it passes over; a message that it does not know ends the talk, and nothing has changed.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

/// The version of this talk. Raised with any change that an older agent cannot pass over.
pub const PROTOCOL: u32 = 1;

/// Descriptors in a message at most.
const MAX_FDS: usize = 4;
/// The longest message is a pod's, whose older connections are named.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// All that is said.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "word", rename_all = "snake_case")]
pub enum Word {
    /// The new agent, first.
    Hello { protocol: u32, schema: u32, node: String, version: String, pid: u32 },
    /// The old one: it will hand over when it is asked to.
    Welcome { version: String, pid: u32 },
    /// The old one will not, and why. `restart`: because the two cannot share what is in the kernel; it will make room for
    /// a start without a predecessor.
    Refused { reason: String, restart: bool },
    /// The new one has all it needs: hand over.
    Give,
    /// A socket or the lock; one descriptor.
    Socket { name: String, at: String },
    /// An enrolled pod; descriptors of its network namespace and its listeners: outbound, plaintext, mutual TLS.
    Pod { uid: String, netns: PathBuf, legacy: Vec<String> },
    /// That was all.
    All { pods: usize },
    /// The new one has it, and serves from now on.
    Commit,
    /// The old one serves no new connection any more.
    Yielded { connections: usize },
    /// The new one can't take over: stop, as on SIGTERM.
    Leave,
}

/// One end of a talk.
#[derive(Debug, Clone)]
pub struct Talk(Arc<UnixStream>);

impl Talk {
    /// `None`: who is at the other end is neither root nor this process's own user.
    pub fn with(stream: UnixStream) -> io::Result<Option<Self>> {
        // Not rustix's: it fails where the peer has no process id in our container.
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let uid = stream.peer_cred()?.uid();
        let trusted = uid == 0 || uid == rustix::process::geteuid().as_raw();
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(trusted.then(|| Self(Arc::new(stream))))
    }

    pub async fn say(&self, word: Word, fds: Vec<OwnedFd>) -> io::Result<()> {
        let stream = self.0.clone();
        let said = tokio::task::spawn_blocking(move || {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            write(&stream, &word, &fds)
        });
        said.await.map_err(io::Error::other)?
    }

    /// The next message. `None` for `patience` waits for as long as the other end lives.
    pub async fn hear(&self, patience: Option<Duration>) -> io::Result<(Word, Vec<OwnedFd>)> {
        let stream = self.0.clone();
        let heard = tokio::task::spawn_blocking(move || {
            stream.set_read_timeout(patience)?;
            read(&stream)
        });
        heard.await.map_err(io::Error::other)?
    }
}

fn write(mut stream: &UnixStream, word: &Word, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    /// Whoever does not read for so long is gone.
    const PATIENCE: Duration = Duration::from_secs(10);
    stream.set_write_timeout(Some(PATIENCE))?;
    let json = serde_json::to_vec(word)?;
    let length = u32::try_from(json.len()).map_err(io::Error::other)?.to_be_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for a message"));
    }
    let sent = sendmsg(stream, &[IoSlice::new(&length)], &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(&length[sent..])?;
    stream.write_all(&json)
}

fn read(mut stream: &UnixStream) -> io::Result<(Word, Vec<OwnedFd>)> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut length)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("descriptors got lost; see the limit of open files"));
    }
    stream.read_exact(&mut length[received.bytes..])?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_BYTES {
        return Err(io::Error::other("a message that is too long"));
    }
    let mut json = vec![0; length];
    stream.read_exact(&mut json)?;
    Ok((serde_json::from_slice(&json)?, fds))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn pair() -> (Talk, Talk) {
        let (a, b) = UnixStream::pair().unwrap();
        (Talk::with(a).unwrap().unwrap(), Talk::with(b).unwrap().unwrap())
    }

    #[tokio::test]
    async fn descriptors_arrive_with_their_message() {
        let (old, new) = pair();
        for n in 0..300u32 {
            let fds: Vec<OwnedFd> = (0..n % 5).map(|_| File::open("/dev/null").unwrap().into()).collect();
            let sent = tokio::spawn({
                let old = old.clone();
                let pod = Word::Pod { uid: n.to_string(), netns: "/x".into(), legacy: vec!["y".repeat(n as usize)] };
                async move { old.say(pod, fds).await }
            });
            let (word, fds) = new.hear(Some(Duration::from_secs(10))).await.unwrap();
            assert!(matches!(&word, Word::Pod { uid, .. } if *uid == n.to_string()), "{word:?}");
            assert_eq!(fds.len(), n as usize % 5);
            sent.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn what_a_later_version_adds_is_passed_over_and_what_it_says_anew_is_not() {
        let (old, new) = pair();
        let say = |json: &str| {
            let mut stream = &*old.0;
            stream.write_all(&u32::try_from(json.len()).unwrap().to_be_bytes()).unwrap();
            stream.write_all(json.as_bytes()).unwrap();
        };
        say(r#"{"word":"welcome","version":"9","pid":1,"colour":"blue"}"#);
        assert!(matches!(new.hear(None).await.unwrap().0, Word::Welcome { pid: 1, .. }));
        say(r#"{"word":"sing"}"#);
        assert!(new.hear(None).await.unwrap_err().to_string().contains("unknown variant `sing`"));
        (&*old.0).write_all(&[0xff; 4]).unwrap();
        assert!(new.hear(None).await.unwrap_err().to_string().contains("too long"));
    }

    #[tokio::test]
    async fn nobody_waits_for_ever() {
        let (old, new) = pair();
        let error = new.hear(Some(Duration::from_millis(20))).await.unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
        let waiting = tokio::spawn({
            let new = new.clone();
            async move { new.hear(None).await }
        });
        drop(old);
        assert_eq!(waiting.await.unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
