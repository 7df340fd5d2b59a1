//! The way to an endpoint as a byte stream, whatever carries it: a session, a stream of HBONE, or a socket.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::hbone::HboneStream;
use super::io::{self as sock, Turn};
use super::session::{Counts, SessionStream};

/// How long an endpoint may go on after our orderly end, before the connection is broken off.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Counts what passes, and yields after a turn. End it with `close` or `reset`; dropped, it is broken off.
pub struct Upstream {
    carrier: Carrier,
    counts: Rc<Counts>,
    turn: Turn,
}

pub enum Carrier {
    Session(Box<SessionStream>),
    Hbone(Box<HboneStream>),
    Tcp(TcpStream),
}

impl Upstream {
    pub fn new(carrier: Carrier, counts: Rc<Counts>) -> Self {
        Self { carrier, counts, turn: Turn::default() }
    }

    /// Ends our side in order, and waits for the endpoint's end. A session then goes back to its pool.
    pub async fn close(mut self) {
        match self.carrier {
            Carrier::Session(session) => session.close().await,
            Carrier::Tcp(tcp) => {
                sock::disarm(&tcp);
                let _ = sock::finish(&tcp);
            }
            Carrier::Hbone(_) => {
                let ended = tokio::time::timeout(LAST_WORDS, async {
                    poll_fn(|cx| Pin::new(&mut self).poll_shutdown(cx)).await?;
                    let mut rest = [0; 1024];
                    loop {
                        let mut rest = ReadBuf::new(&mut rest);
                        poll_fn(|cx| Pin::new(&mut self).poll_read(cx, &mut rest)).await?;
                        if rest.filled().is_empty() {
                            return Ok::<_, io::Error>(());
                        }
                    }
                });
                let _ = ended.await;
            }
        }
    }

    /// Breaks it off.
    pub async fn reset(self) {
        match self.carrier {
            Carrier::Session(session) => session.reset().await,
            Carrier::Tcp(tcp) => sock::reset(tcp),
            Carrier::Hbone(stream) => drop(stream),
        }
    }
}

impl AsyncRead for Upstream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.turn.is_over() {
            // HTTP would go on for as long as there are bytes; others wait.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = into.filled().len();
        ready!(match &mut this.carrier {
            Carrier::Session(s) => Pin::new(&mut **s).poll_read(cx, into),
            Carrier::Hbone(s) => Pin::new(&mut **s).poll_read(cx, into),
            Carrier::Tcp(s) => Pin::new(s).poll_read(cx, into),
        })?;
        let n = into.filled().len() - before;
        this.turn.count(n);
        this.counts.received.set(this.counts.received.get() + n as u64);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Upstream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(from)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let n = ready!(match &mut this.carrier {
            Carrier::Session(s) => Pin::new(&mut **s).poll_write_vectored(cx, from),
            Carrier::Hbone(s) => Pin::new(&mut **s).poll_write_vectored(cx, from),
            Carrier::Tcp(s) => Pin::new(s).poll_write_vectored(cx, from),
        })?;
        this.counts.sent.set(this.counts.sent.get() + n as u64);
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().carrier {
            Carrier::Session(s) => Pin::new(&mut **s).poll_flush(cx),
            Carrier::Hbone(s) => Pin::new(&mut **s).poll_flush(cx),
            Carrier::Tcp(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().carrier {
            Carrier::Session(s) => Pin::new(&mut **s).poll_shutdown(cx),
            Carrier::Hbone(s) => Pin::new(&mut **s).poll_shutdown(cx),
            Carrier::Tcp(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
