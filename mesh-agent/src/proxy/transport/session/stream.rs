//! A session's connection as a byte stream, for HTTP: frames in, bytes out, and the other way.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::super::buffers::Buffer;
use super::super::frame::Kind;
use super::super::io as sock;
use super::super::pool::Lease;
use super::super::record::{HEADER, OVERHEAD, TAG};
use super::{DATA_AT, DISCARD, Frame, SLOT, SLOT_DATA, Session, SessionError};

/// A connection that stands. Give the session back with `close` or `reset`; dropped, it is thrown away.
pub struct SessionStream {
    lease: Lease,
    /// Opened and not yet read: this part of the receiver's buffer.
    plain: (usize, usize),
    /// The same of a record that came with the handshake, from `early.1` on.
    early: (Vec<u8>, usize),
    /// `output[sent..sealed]` waits to be written.
    output: Option<Buffer>,
    sent: usize,
    sealed: usize,
    we_ended: bool,
    peer_ended: bool,
}

impl SessionStream {
    /// Of a session whose connection has been opened.
    pub fn new(lease: Lease) -> Self {
        Self {
            lease,
            plain: (0, 0),
            early: (Vec::new(), 0),
            output: None,
            sent: 0,
            sealed: 0,
            we_ended: false,
            peer_ended: false,
        }
    }

    /// Ends the connection in order; the session is free for another when the peer has ended too.
    pub async fn close(mut self) {
        let ended = tokio::time::timeout(DISCARD, async {
            poll_fn(|cx| Pin::new(&mut self).poll_shutdown(cx)).await?;
            let mut rest = [0; 1024];
            while !self.peer_ended {
                let mut rest = ReadBuf::new(&mut rest);
                poll_fn(|cx| Pin::new(&mut self).poll_read(cx, &mut rest)).await?;
            }
            Ok::<_, io::Error>(())
        });
        if let Ok(Ok(())) = ended.await {
            self.lease.finish();
        }
    }

    /// Breaks the connection off. Half a record that is out lets nothing follow: then the session goes too.
    pub async fn reset(mut self) {
        if self.sent < self.sealed {
            return;
        }
        let (peer_ended, session) = (self.peer_ended, self.lease.session());
        let told = tokio::time::timeout(DISCARD, async {
            match peer_ended {
                true => session.sender.send(&session.tcp, Kind::Reset, &[]).await,
                false => session.reset().await,
            }
        });
        if let Ok(Ok(())) = told.await {
            self.lease.finish();
        }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let tcp = self.lease.session().tcp();
        while self.sent < self.sealed {
            let buffer = self.output.as_deref().expect("sealed bytes lie in the buffer");
            match sock::try_write(tcp, &[IoSlice::new(&buffer[self.sent..self.sealed])], false)? {
                Some(n) => self.sent += n,
                None => ready!(tcp.poll_write_ready(cx))?,
            }
        }
        self.output = None;
        (self.sent, self.sealed) = (0, 0);
        Poll::Ready(Ok(()))
    }

    /// A buffer for records, with a change of keys in it where one is due.
    fn begin(&mut self) -> io::Result<Buffer> {
        let sealer = &mut self.lease.session().sender.sealer;
        let mut buffer = Buffer::take();
        if sealer.wants_key_update() {
            let record = sealer.key_update().map_err(io::Error::other)?;
            buffer[..record.len()].copy_from_slice(&record);
            self.sealed = record.len();
        }
        Ok(buffer)
    }
}

impl AsyncRead for SessionStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Session { tcp, receiver, .. } = this.lease.session();
        loop {
            let (start, end) = this.plain;
            if start < end {
                let buffer = receiver.buffer.as_deref().expect("opened bytes lie in the buffer");
                let n = (end - start).min(into.remaining());
                into.put_slice(&buffer[start..start + n]);
                this.plain.0 += n;
                return Poll::Ready(Ok(()));
            }
            let (early, at) = &mut this.early;
            if *at < early.len() {
                let n = (early.len() - *at).min(into.remaining());
                into.put_slice(&early[*at..*at + n]);
                *at += n;
                return Poll::Ready(Ok(()));
            }
            if this.peer_ended {
                return Poll::Ready(Ok(()));
            }
            match receiver.next().map_err(io::Error::other)? {
                Some(Frame::At { kind: Kind::Data, start, end }) => this.plain = (start, end),
                Some(Frame::Early { kind: Kind::Data, payload }) => this.early = (payload, 0),
                Some(Frame::At { kind, .. } | Frame::Early { kind, .. }) => match kind {
                    Kind::Fin => this.peer_ended = true,
                    Kind::Reset => {
                        this.peer_ended = true;
                        return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                    }
                    _ => return Poll::Ready(Err(io::Error::other(SessionError::Protocol))),
                },
                None => match ready!(receiver.poll_fill(tcp, cx)) {
                    Ok(true) => {}
                    Ok(false) => return Poll::Ready(Err(io::Error::other(SessionError::Closed))),
                    Err(e) => return Poll::Ready(Err(io::Error::other(e))),
                },
            }
        }
    }
}

impl AsyncWrite for SessionStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(from)])
    }

    /// Seals up to four records and sends them; takes no more while the socket is full.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.we_ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(this.poll_drain(cx))?;
        let mut buffer = this.begin()?;
        let sealer = &mut this.lease.session().sender.sealer;
        let mut parts = from.iter().map(|part| &**part);
        let (mut part, mut taken): (&[u8], usize) = (&[], 0);
        while this.sealed + SLOT <= buffer.len() {
            let at = this.sealed + DATA_AT;
            let mut data = 0;
            while data < SLOT_DATA {
                if part.is_empty() {
                    match parts.next() {
                        Some(next) => part = next,
                        None => break,
                    }
                }
                let n = part.len().min(SLOT_DATA - data);
                buffer[at + data..at + data + n].copy_from_slice(&part[..n]);
                part = &part[n..];
                data += n;
            }
            if data == 0 {
                break;
            }
            let record = &mut buffer[this.sealed..at + data + 1 + TAG];
            record[HEADER] = Kind::Data.byte();
            sealer.seal(record).map_err(io::Error::other)?;
            this.sealed += record.len();
            taken += data;
        }
        this.output = Some(buffer);
        match this.poll_drain(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            // What the socket does not take now is ours to send: the caller's bytes are sealed.
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(taken)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_drain(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        if !this.we_ended {
            let mut buffer = this.begin()?;
            let record = &mut buffer[this.sealed..this.sealed + OVERHEAD + 1];
            record[HEADER] = Kind::Fin.byte();
            this.lease.session().sender.sealer.seal(record).map_err(io::Error::other)?;
            this.sealed += OVERHEAD + 1;
            this.output = Some(buffer);
            this.we_ended = true;
        }
        this.poll_drain(cx)
    }
}
