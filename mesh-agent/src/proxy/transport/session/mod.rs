//! A session: one TLS connection between two agents of ours, that carries one connection of the applications at a time.
//! `frame` has the rules; here the bytes move.

use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::buffers::{self, Buffer};
use super::frame::{self, Kind, OPEN_MAX, Open, Refusal};
use super::handshake::Established;
use super::io::{self as sock, Read, Turn};
use super::record::{HEADER, MAX_RECORD, OVERHEAD, RecordError, Sealer, TAG};
use crate::model::SpiffeId;

mod receiver;
mod stream;

use receiver::{Frame, Receiver};
pub use stream::SessionStream;

/// A quarter of a buffer holds one whole record of a DATA frame.
const SLOT: usize = buffers::SIZE / 4;
/// Application bytes in a slot: less header, kind, content type and tag.
const SLOT_DATA: usize = SLOT - OVERHEAD - 1;
const DATA_AT: usize = HEADER + 1;

const _: () = assert!(buffers::SIZE >= 2 * MAX_RECORD, "a buffer must hold a whole record and more");

/// How long the peer may go on with a connection that our side has reset, before the session is thrown away.
const DISCARD: Duration = Duration::from_secs(5);

pub struct Session {
    tcp: TcpStream,
    peer: SpiffeId,
    sender: Sender,
    receiver: Receiver,
    /// A connection ended without the peer's end: the session must not be used again.
    broken: bool,
}

struct Sender {
    sealer: Sealer,
    /// A record is being written. Where the writer is dropped then, half of it is out, and nothing may follow.
    midway: bool,
    /// So many application bytes at a time, where there are many.
    burst: usize,
}

/// Counts the bytes of one connection, in both directions, as they pass.
#[derive(Debug, Default)]
pub struct Counts {
    /// Towards the server.
    pub sent: Cell<u64>,
    /// Towards the client.
    pub received: Cell<u64>,
}

/// Which side of the connection this agent serves: says what counts as sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Client,
    Server,
}

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the tunnel broke: {0}")]
    Io(#[from] io::Error),
    #[error("the other agent closed the tunnel")]
    Closed,
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the other agent sent a frame that has no place here; check that both agents have one version")]
    Protocol,
}

/// The server's answer to OPEN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Opened,
    Refused(Refusal),
}

/// How a connection over a session ended.
#[derive(Debug)]
pub enum End {
    /// Both sides ended in order; the session is free again.
    Finished,
    /// The application on this side broke or reset its connection. The peer was told.
    LocalReset(io::Error),
    /// The peer's application did.
    PeerReset,
    /// We cut it: policy no longer allows it.
    Cut,
    /// The session itself is broken.
    Broken(SessionError),
}

/// What a client's application has said before its connection stands. It goes along with OPEN, so that the server need not
/// wait for it; it stays in the application's socket until `relay` takes it, since another session or another endpoint may
/// have to be asked.
#[derive(Debug)]
pub struct Early<'a> {
    app: Option<&'a TcpStream>,
    asked: Cell<bool>,
    sent: Cell<usize>,
}

impl Session {
    pub fn new(established: Established) -> Self {
        let Established { tcp, sealer, opener, peer, tunnel: _, sealed, opened } = established;
        let burst = burst(sock::mss(&tcp));
        let mut receiver = Receiver { opener, early: opened, buffer: None, start: 0, end: 0, leaving: false };
        if !sealed.is_empty() {
            let mut buffer = Buffer::take();
            // It fits: the handshake takes no more than half a buffer.
            buffer[..sealed.len()].copy_from_slice(&sealed);
            receiver.end = sealed.len();
            receiver.buffer = Some(buffer);
        }
        Self { tcp, peer, sender: Sender { sealer, midway: false, burst }, receiver, broken: false }
    }

    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// Whether the session can carry another connection after `relay` or a refusal.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether the server has said GO_AWAY, as far as it was read.
    pub fn is_leaving(&self) -> bool {
        self.receiver.leaving
    }

    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Whether an idle session can still be used: nothing has come in, not even its end.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [0];
        !self.broken
            && self.receiver.is_empty()
            && matches!(sock::try_read(&self.tcp, &mut [IoSliceMut::new(&mut byte)]), Ok(Read::Nothing))
    }

    /// Client: asks for a connection and waits for the answer. What the application has said by now goes along (`early`).
    /// After a refusal the session is free again.
    pub async fn open(&mut self, open: Open, early: &Early<'_>) -> Result<Answer, SessionError> {
        early.sent.set(0);
        self.sender.open(&self.tcp, open, early).await?;
        early.asked.set(true);
        let answer = self.receiver.frame(&self.tcp).await;
        // The server's agent hands nothing on before it has answered, and its answer comes before its end: where the end is
        // all that came, nothing was handed on.
        if let Ok(None) | Err(SessionError::Closed) | Ok(Some((Kind::Refused, _))) = answer {
            early.sent.set(0);
        }
        match answer?.ok_or(SessionError::Closed)? {
            (Kind::Opened, _) => Ok(Answer::Opened),
            (Kind::Refused, payload) => {
                let code = payload.first().copied().and_then(Refusal::from_byte);
                self.sender.send(&self.tcp, Kind::Fin, &[]).await?;
                Ok(Answer::Refused(code.ok_or(SessionError::Protocol)?))
            }
            _ => Err(SessionError::Protocol),
        }
    }

    /// Server: waits for the next connection. `Ok(None)`: the client has closed the session. An OPEN that can't be read
    /// has been refused already.
    pub async fn accept(&mut self) -> Result<Option<Open>, SessionError> {
        loop {
            match self.receiver.frame(&self.tcp).await? {
                None => return Ok(None),
                Some((Kind::Open, payload)) => match frame::read_open(&payload) {
                    Some(open) => return Ok(Some(open)),
                    None => self.refuse(Refusal::BadRequest).await?,
                },
                // Told to a connection that had ended here already.
                Some((Kind::Reset, _)) => {}
                Some(_) => return Err(SessionError::Protocol),
            }
        }
    }

    /// Server: says no, and waits until the client has taken note; the session is free again.
    pub async fn refuse(&mut self, refusal: Refusal) -> Result<(), SessionError> {
        self.sender.send(&self.tcp, Kind::Refused, &[refusal.byte()]).await?;
        tokio::time::timeout(DISCARD, self.discard()).await.unwrap_or(Err(SessionError::Closed))
    }

    /// Server: whether the client's agent has given up the session, so that what it sent must not be handed on.
    pub fn is_abandoned(&self) -> bool {
        sock::is_closed(&self.tcp)
    }

    /// Server: says that the application has taken the connection.
    pub async fn opened(&mut self) -> Result<(), SessionError> {
        self.sender.send(&self.tcp, Kind::Opened, &[]).await
    }

    /// Server: asks for no more connections over this session; one that is on its way will still come. Between two of them.
    pub async fn go_away(&mut self) -> Result<(), SessionError> {
        self.sender.send(&self.tcp, Kind::GoAway, &[]).await
    }

    /// Carries `app`'s bytes both ways until both sides have ended, or `cut` is done. `early`: so many of them went along
    /// with OPEN.
    pub async fn relay(
        &mut self,
        app: TcpStream,
        side: Side,
        early: usize,
        counts: &Counts,
        cut: impl Future<Output = ()>,
    ) -> End {
        let (up, down) = match side {
            Side::Client => (&counts.sent, &counts.received),
            Side::Server => (&counts.received, &counts.sent),
        };
        let (we_ended, peer_ended, ended) = (Cell::new(false), Cell::new(false), Notify::new());
        let Self { tcp, sender, receiver, .. } = self;
        let there = async {
            upload(&app, tcp, sender, early, up).await?;
            we_ended.set(true);
            ended.notify_one();
            Ok(())
        };
        let back = async {
            download(tcp, receiver, &app, down).await?;
            peer_ended.set(true);
            // Half-closed: the peer may still break it off, or die.
            while !we_ended.get() {
                tokio::select! {
                    () = ended.notified() => {}
                    frame = receiver.frame(tcp) => return Err(after_end(frame)),
                }
            }
            Ok(())
        };
        let end = tokio::select! {
            // First, so that the cause on record is the true one.
            biased;
            () = cut => End::Cut,
            done = async { tokio::try_join!(there, back) } => match done {
                Ok(_) => {
                    sock::disarm(&app);
                    return End::Finished;
                }
                Err(end) => end,
            },
        };
        sock::reset(app);
        // Nothing may follow half a record, and a peer that does not read must not keep a connection that has ended.
        let told = async {
            match &end {
                _ if self.sender.midway => Err(SessionError::Closed),
                End::LocalReset(_) | End::Cut if !peer_ended.get() => self.reset().await,
                End::PeerReset if we_ended.get() => Ok(()),
                End::LocalReset(_) | End::Cut | End::PeerReset => self.sender.send(&self.tcp, Kind::Reset, &[]).await,
                End::Finished | End::Broken(_) => Err(SessionError::Closed),
            }
        };
        let told = tokio::time::timeout(DISCARD, told).await.unwrap_or(Err(SessionError::Closed));
        self.broken = told.is_err();
        end
    }

    /// Breaks off the connection that the session carries; the session is free again when the peer has ended too.
    async fn reset(&mut self) -> Result<(), SessionError> {
        self.sender.send(&self.tcp, Kind::Reset, &[]).await?;
        self.discard().await
    }

    /// Tells the peer that no more comes; for an idle session.
    pub fn close(mut self) {
        if let Ok(record) = self.sender.sealer.close_notify() {
            let _ = sock::try_write(&self.tcp, &[IoSlice::new(&record)], false);
        }
    }

    #[cfg(test)]
    pub fn abort(self) {
        sock::reset(self.tcp);
    }

    /// Drops what still comes for a connection that our side has ended, up to the peer's own end.
    async fn discard(&mut self) -> Result<(), SessionError> {
        let rest = async {
            loop {
                match self.receiver.frame(&self.tcp).await?.ok_or(SessionError::Closed)? {
                    (Kind::Fin | Kind::Reset, _) => return Ok(()),
                    (Kind::Data, _) => {}
                    _ => return Err(SessionError::Protocol),
                }
            }
        };
        rest.await
    }
}

impl<'a> Early<'a> {
    pub fn new(app: &'a TcpStream) -> Self {
        Self { app: Some(app), asked: Cell::new(false), sent: Cell::new(0) }
    }

    /// For those who send their first bytes when the connection stands.
    pub fn none() -> Self {
        Self { app: None, asked: Cell::new(false), sent: Cell::new(0) }
    }

    /// Whether the server's agent was asked for the connection.
    pub fn asked(&self) -> bool {
        self.asked.get()
    }

    /// How many bytes the server's application may have got.
    pub fn sent(&self) -> usize {
        self.sent.get()
    }
}

impl Sender {
    /// Sends OPEN, and right behind it what the application has said.
    async fn open(&mut self, tcp: &TcpStream, open: Open, early: &Early<'_>) -> Result<(), SessionError> {
        let mut payload = [0; OPEN_MAX];
        let len = frame::write_open(open, &mut payload);
        let mut buffer = Buffer::take();
        let room = &mut buffer[SLOT + DATA_AT..SLOT + DATA_AT + SLOT_DATA];
        let peeked = early.app.map_or(0, |app| sock::peek(app, room));
        if peeked == 0 {
            return self.send(tcp, Kind::Open, &payload[..len]).await;
        }
        self.rekey(tcp).await?;
        // So that OPEN ends where the data begin.
        let start = SLOT - OVERHEAD - 1 - len;
        let record = &mut buffer[start..SLOT];
        record[HEADER] = Kind::Open.byte();
        record[DATA_AT..DATA_AT + len].copy_from_slice(&payload[..len]);
        self.sealer.seal(record)?;
        let data = &mut buffer[SLOT..SLOT + OVERHEAD + 1 + peeked];
        data[HEADER] = Kind::Data.byte();
        self.sealer.seal(data)?;
        let end = SLOT + data.len();
        self.write(tcp, &buffer[start..end]).await?;
        early.sent.set(peeked);
        Ok(())
    }

    /// Sends a small frame.
    async fn send(&mut self, tcp: &TcpStream, kind: Kind, payload: &[u8]) -> Result<(), SessionError> {
        const MOST: usize = OVERHEAD + 1 + OPEN_MAX;
        let mut record = [0; MOST];
        record[HEADER] = kind.byte();
        record[DATA_AT..DATA_AT + payload.len()].copy_from_slice(payload);
        let record = &mut record[..OVERHEAD + 1 + payload.len()];
        self.rekey(tcp).await?;
        self.sealer.seal(record)?;
        self.write(tcp, record).await
    }

    async fn write(&mut self, tcp: &TcpStream, records: &[u8]) -> Result<(), SessionError> {
        self.midway = true;
        sock::write_all(tcp, records).await?;
        self.midway = false;
        Ok(())
    }

    async fn rekey(&mut self, tcp: &TcpStream) -> Result<(), SessionError> {
        if self.sealer.wants_key_update() {
            let record = self.sealer.key_update()?;
            self.write(tcp, &record).await?;
        }
        Ok(())
    }
}

/// How many application bytes, sealed, fill what the kernel hands to the network at a time: at most 64 KiB, less headers,
/// of whole segments. A few more would go in a packet of their own, and cost as much.
fn burst(mss: usize) -> usize {
    /// GSO_MAX_SIZE less MAX_TCP_HEADER + 1.
    const MOST: usize = 65_215;
    const OVERHEADS: usize = 4 * (OVERHEAD + 1);
    let whole = MOST.checked_div(mss).unwrap_or(0) * mss;
    if whole > 3 * SLOT + OVERHEAD + 1 { (whole - OVERHEADS).min(4 * SLOT_DATA) } else { 4 * SLOT_DATA }
}

/// What a frame means that comes after the peer's own end.
fn after_end(frame: Result<Option<(Kind, Vec<u8>)>, SessionError>) -> End {
    match frame {
        Ok(Some((Kind::Reset, _))) => End::PeerReset,
        Ok(Some(_)) => End::Broken(SessionError::Protocol),
        Ok(None) => End::Broken(SessionError::Closed),
        Err(e) => End::Broken(e),
    }
}

/// Application to tunnel.
async fn upload(
    app: &TcpStream,
    tcp: &TcpStream,
    sender: &mut Sender,
    early: usize,
    count: &Cell<u64>,
) -> Result<(), End> {
    // What went along with OPEN is still to be taken from the socket.
    let mut skip = early;
    count.set(count.get() + early as u64);
    let mut turn = Turn::default();
    // One slot for a start: small messages need no more, and a vector costs more than a buffer.
    let mut bulk = false;
    loop {
        sock::readable(app).await.map_err(End::LocalReset)?;
        let mut buffer = Buffer::take();
        let read = if skip > 0 {
            let (slot, rest) = buffer.split_at_mut(SLOT);
            let slot = IoSliceMut::new(&mut slot[DATA_AT..DATA_AT + SLOT_DATA]);
            sock::try_read(app, &mut [IoSliceMut::new(&mut rest[..skip]), slot])
        } else if !bulk {
            sock::try_read(app, &mut [IoSliceMut::new(&mut buffer[DATA_AT..DATA_AT + SLOT_DATA])])
        } else {
            let sizes = [SLOT_DATA, SLOT_DATA, SLOT_DATA, sender.burst - 3 * SLOT_DATA];
            let mut slots = buffer
                .chunks_exact_mut(SLOT)
                .zip(sizes)
                .map(|(slot, size)| IoSliceMut::new(&mut slot[DATA_AT..DATA_AT + size]));
            let mut slots = [(); 4].map(|()| slots.next().expect("a buffer has four slots"));
            sock::try_read(app, &mut slots)
        };
        let read = read.map_err(End::LocalReset)?;
        let Some(bytes) = read.count() else { continue };
        let known = bytes.min(skip);
        let bytes = bytes - known;
        skip -= known;
        bulk = bytes >= SLOT_DATA;
        sender.rekey(tcp).await.map_err(End::Broken)?;
        let (mut rest, mut sealed) = (bytes, 0);
        while rest > 0 {
            let data = rest.min(SLOT_DATA);
            let record = &mut buffer[sealed..sealed + DATA_AT + data + 1 + TAG];
            record[HEADER] = Kind::Data.byte();
            sender.sealer.seal(record).map_err(|e| End::Broken(e.into()))?;
            // All slots but the last are full, so that the records lie end to end.
            sealed += record.len();
            rest -= data;
        }
        let last = matches!(read, Read::Last(_) | Read::End);
        let fin = buffer.get_mut(sealed..sealed + OVERHEAD + 1).filter(|_| last);
        let fits = fin.is_some();
        if let Some(record) = fin {
            record[HEADER] = Kind::Fin.byte();
            sender.sealer.seal(record).map_err(|e| End::Broken(e.into()))?;
            sealed += record.len();
        }
        if sealed > 0 {
            sender.write(tcp, &buffer[..sealed]).await.map_err(End::Broken)?;
        }
        count.set(count.get() + bytes as u64);
        match (last, fits) {
            (false, _) => turn.took(bytes).await,
            (true, true) => return Ok(()),
            (true, false) => return sender.send(tcp, Kind::Fin, &[]).await.map_err(End::Broken),
        }
    }
}

/// Tunnel to application.
async fn download(tcp: &TcpStream, receiver: &mut Receiver, app: &TcpStream, count: &Cell<u64>) -> Result<(), End> {
    /// DATA frames that go to the application in one call.
    const BATCH: usize = 8;
    let mut turn = Turn::default();
    loop {
        let mut batch = [(0, 0); BATCH];
        let (mut frames, mut last) = (0, None);
        while frames < BATCH {
            match receiver.next().map_err(End::Broken)? {
                None => break,
                Some(Frame::At { kind: Kind::Data, start, end }) => {
                    batch[frames] = (start, end);
                    frames += 1;
                }
                Some(Frame::At { kind, .. }) => {
                    last = Some(kind);
                    break;
                }
                Some(Frame::Early { kind: Kind::Data, payload }) => {
                    sock::write_all(app, &payload).await.map_err(End::LocalReset)?;
                    count.set(count.get() + payload.len() as u64);
                }
                Some(Frame::Early { kind, .. }) => {
                    last = Some(kind);
                    break;
                }
            }
        }
        if frames > 0 {
            let buffer = receiver.buffer.as_deref().expect("frames lie in the buffer");
            let mut parts = batch.map(|(start, end)| IoSlice::new(&buffer[start..end]));
            // The end, where it has come too, goes in the same segment as the last bytes.
            let more = last == Some(Kind::Fin);
            sock::write_all_vectored(app, &mut parts[..frames], more).await.map_err(End::LocalReset)?;
            let bytes: usize = batch.iter().map(|(start, end)| end - start).sum();
            count.set(count.get() + bytes as u64);
            turn.took(bytes).await;
        }
        match last {
            Some(Kind::Fin) => return sock::finish(app).map_err(End::LocalReset),
            Some(Kind::Reset) => return Err(End::PeerReset),
            Some(_) => return Err(End::Broken(SessionError::Protocol)),
            None if frames == BATCH => {}
            None => {
                if !receiver.fill(tcp).await.map_err(End::Broken)? {
                    return Err(End::Broken(SessionError::Closed));
                }
            }
        }
    }
}
