//! A TLS connection as a byte stream, for HBONE's HTTP/2.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::buffers::{self, Buffer};
use super::handshake::Established;
use super::io::{self as sock, Turn};
use super::record::{HEADER, Opened, Opener, Sealer, TAG};

const SLOT: usize = buffers::SIZE / 4;
/// A quarter of a buffer holds the record of so many bytes.
const SLOT_DATA: usize = SLOT - HEADER - 1 - TAG;

pub struct TlsStream {
    tcp: TcpStream,
    sealer: Sealer,
    opener: Opener,
    early: VecDeque<Vec<u8>>,
    /// `input[start..end]` is sealed, `input[plain.0..plain.1]`, before it, is opened and not yet read.
    input: Option<Buffer>,
    plain: (usize, usize),
    start: usize,
    end: usize,
    /// `output[sent..sealed]` waits to be written.
    output: Option<Buffer>,
    sent: usize,
    sealed: usize,
    closed: bool,
    turn: Turn,
}

impl TlsStream {
    pub fn new(established: Established) -> Self {
        let Established { tcp, sealer, opener, sealed: leftover, opened, .. } = established;
        let mut input = None;
        if !leftover.is_empty() {
            let buffer: &mut Buffer = input.insert(Buffer::take());
            buffer[..leftover.len()].copy_from_slice(&leftover);
        }
        Self {
            tcp,
            sealer,
            opener,
            early: opened,
            input,
            plain: (0, 0),
            start: 0,
            end: leftover.len(),
            output: None,
            sent: 0,
            sealed: 0,
            closed: false,
            turn: Turn::default(),
        }
    }

    /// Opens the next whole record; `false` when none is there.
    fn open_next(&mut self) -> io::Result<bool> {
        while let Some(buffer) = self.input.as_deref_mut() {
            let bytes = &mut buffer[self.start..self.end];
            let len = Opener::record_len(bytes).map_err(io::Error::other)?.filter(|len| *len <= bytes.len());
            let Some(len) = len else { break };
            let at = self.start + HEADER;
            let opened = self.opener.open(&mut bytes[..len]).map_err(io::Error::other)?;
            self.start += len;
            match opened {
                Opened::Data(n) if n > 0 => {
                    self.plain = (at, at + n);
                    return Ok(true);
                }
                Opened::Data(_) | Opened::Control => {}
                Opened::Closed => {
                    self.closed = true;
                    return Ok(false);
                }
            }
        }
        Ok(false)
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.sealed {
            let buffer = self.output.as_deref().expect("sealed bytes lie in the buffer");
            match sock::try_write(&self.tcp, &[IoSlice::new(&buffer[self.sent..self.sealed])], false)? {
                Some(n) => self.sent += n,
                None => ready!(self.tcp.poll_write_ready(cx))?,
            }
        }
        self.output = None;
        (self.sent, self.sealed) = (0, 0);
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(mut record) = this.early.pop_front() {
            let n = record.len().min(into.remaining());
            into.put_slice(&record[..n]);
            if n < record.len() {
                record.drain(..n);
                this.early.push_front(record);
            }
            return Poll::Ready(Ok(()));
        }
        loop {
            if this.plain.0 < this.plain.1 {
                let buffer = this.input.as_deref().expect("opened bytes lie in the buffer");
                let n = (this.plain.1 - this.plain.0).min(into.remaining());
                into.put_slice(&buffer[this.plain.0..this.plain.0 + n]);
                this.plain.0 += n;
                return Poll::Ready(Ok(()));
            }
            if this.closed {
                return Poll::Ready(Ok(()));
            }
            if this.open_next()? || this.closed {
                continue;
            }
            if this.start == this.end {
                this.input = None;
                (this.start, this.end) = (0, 0);
            }
            ready!(this.tcp.poll_read_ready(cx))?;
            if this.turn.is_over() {
                // HTTP/2 would go on for as long as there are bytes; others wait.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let buffer = this.input.get_or_insert_with(Buffer::take);
            if this.start > 0 {
                buffer.copy_within(this.start..this.end, 0);
                (this.start, this.end) = (0, this.end - this.start);
            }
            match sock::try_read(&this.tcp, &mut [IoSliceMut::new(&mut buffer[this.end..])])?.count() {
                None => {}
                Some(0) if this.end > 0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                // Without close_notify: HTTP/2 has its own ends of streams, nothing can be cut short unseen.
                Some(0) => this.closed = true,
                Some(n) => {
                    this.end += n;
                    this.turn.count(n);
                }
            }
        }
    }
}

impl AsyncWrite for TlsStream {
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
        ready!(this.poll_drain(cx))?;
        let mut buffer = Buffer::take();
        if this.sealer.wants_key_update() {
            let record = this.sealer.key_update().map_err(io::Error::other)?;
            buffer[..record.len()].copy_from_slice(&record);
            this.sealed = record.len();
        }
        let mut parts = from.iter().map(|part| &**part);
        let (mut part, mut taken): (&[u8], usize) = (&[], 0);
        while this.sealed + SLOT <= buffer.len() {
            let at = this.sealed + HEADER;
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
            this.sealer.seal(record).map_err(io::Error::other)?;
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
        if let Ok(record) = this.sealer.close_notify() {
            let _ = sock::try_write(&this.tcp, &[IoSlice::new(&record)], false);
        }
        Poll::Ready(sock::finish(&this.tcp))
    }
}
