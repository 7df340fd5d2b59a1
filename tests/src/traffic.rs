//! Bytes to send and ways to look at them: what the cases have in common.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::pod::Pod;

/// How long anything that must happen may take before a case fails in place of hanging.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// Accepts one connection, or panics after [`PATIENCE`].
#[track_caller]
pub fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    assert!(readable(listener, PATIENCE), "no connection came to {:?}", listener.local_addr());
    let (stream, peer) = listener.accept().expect("a connection is waiting");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket takes a timeout");
    stream.set_write_timeout(Some(Duration::from_secs(30))).expect("a socket takes a timeout");
    stream.set_nodelay(true).expect("a socket takes TCP_NODELAY");
    (stream, peer)
}

/// Whether there is something to read, or to accept, within `patience`.
pub fn readable(socket: &impl AsFd, patience: Duration) -> bool {
    ready(socket, PollFlags::IN, patience)
}

/// Whether `socket` has one of `flags` (or an error, or a hang-up) within `patience`.
pub fn ready(socket: &impl AsFd, flags: PollFlags, patience: Duration) -> bool {
    let patience = Timespec::try_from(patience).expect("a short time");
    poll(&mut [PollFd::new(socket, flags)], Some(&patience)).expect("poll works") > 0
}

/// A connection from `client` to a fresh listener of `server`: both its ends.
#[track_caller]
pub fn pair(client: &Pod, server: &Pod) -> (TcpStream, TcpStream) {
    pair_at(client, server, server.v4())
}

/// The same by one of the server's addresses.
#[track_caller]
pub fn pair_at(client: &Pod, server: &Pod, address: IpAddr) -> (TcpStream, TcpStream) {
    let listener = server.listen();
    let to = SocketAddr::new(address, port(&listener));
    let near = client.connect(to).unwrap_or_else(|e| panic!("{} cannot connect to {to}: {e}", client.name()));
    let (far, _) = accept(&listener);
    (near, far)
}

pub fn port(listener: &TcpListener) -> u16 {
    listener.local_addr().expect("a listener has an address").port()
}

/// Bytes that no two positions near each other share, from a seed.
#[derive(Debug, Clone)]
pub struct Pattern(u64);

impl Pattern {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            // xorshift64: no cryptography, but order and loss show.
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }

    pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Self::new(seed).fill(&mut bytes);
        bytes
    }
}

/// Pieces of the patterned streams below; a multiple of eight.
const PIECE: usize = 64 * 1024;

/// Sends `length` patterned bytes (a multiple of 64 KiB) and shuts its direction.
pub fn send_pattern(stream: &TcpStream, seed: u64, length: usize) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut piece = vec![0; PIECE];
    for _ in 0..length / PIECE {
        pattern.fill(&mut piece);
        (&*stream).write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)
}

/// Reads to the end and checks that it is just what [`send_pattern`] sent.
#[track_caller]
pub fn expect_pattern(stream: &TcpStream, seed: u64, length: usize) {
    let mut pattern = Pattern::new(seed);
    let (mut want, mut got) = (vec![0; PIECE], vec![0; PIECE]);
    for at in 0..length / PIECE {
        pattern.fill(&mut want);
        (&*stream).read_exact(&mut got).unwrap_or_else(|e| panic!("{} of {length} bytes came: {e}", at * PIECE));
        assert!(got == want, "other bytes than were sent, within {PIECE} from byte {}", at * PIECE);
    }
    let more = (&*stream).read(&mut got).expect("the end of the stream is read");
    assert_eq!(more, 0, "bytes after the end");
}

/// Serves every connection by sending back what comes, until the listener's pod goes.
pub fn echo(listener: TcpListener) -> JoinHandle<()> {
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            thread::spawn(move || {
                let _ = stream.set_nodelay(true);
                let _ = io::copy(&mut &stream, &mut &stream);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    })
}

/// An echo server on a free port of a pod; its port.
pub fn echo_in(pod: &Pod) -> u16 {
    let listener = pod.listen();
    let port = port(&listener);
    echo(listener);
    port
}

/// Sends `text` and waits for it to come back.
pub fn ping(mut stream: &TcpStream, text: &[u8]) -> io::Result<()> {
    stream.write_all(text)?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    if back == text { Ok(()) } else { Err(io::Error::other("other bytes came back")) }
}

/// One connection with one echo, from the first packet to the last.
pub fn call(client: &Pod, to: SocketAddr) -> io::Result<()> {
    let stream = client.connect(to)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    ping(&stream, b"are you there?")
}

/// Sets a flag when it is dropped, so that threads which look at it end also where the case fails.
#[derive(Debug)]
pub struct SetOnDrop<'f>(pub &'f AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes zeros until `done` or an error; then what time it is.
pub fn pour(mut stream: &TcpStream, done: &AtomicBool) -> Instant {
    loop {
        if done.load(Ordering::Relaxed) || stream.write_all(&[0; 65536]).is_err() {
            return Instant::now();
        }
    }
}

/// How an attempt to talk was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `connect` itself failed with this error.
    AtConnect(io::ErrorKind),
    /// It succeeded, and then the connection ended without a byte: by a reset, or (`None`) an orderly end.
    Afterwards(Option<io::ErrorKind>),
}

/// Tries to talk to somebody who must not answer: how it was refused, or `None` where an echo came back.
pub fn refusal(client: &Pod, to: SocketAddr) -> Option<Refusal> {
    let stream = match client.connect(to) {
        Ok(stream) => stream,
        Err(e) => return Some(Refusal::AtConnect(e.kind())),
    };
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket takes a timeout");
    match ping(&stream, b"are you there?") {
        Ok(()) => None,
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Some(Refusal::Afterwards(None)),
        Err(e) => Some(Refusal::Afterwards(Some(e.kind()))),
    }
}

impl Refusal {
    /// A reset or a refusal, not a wait that ran out.
    pub fn is_prompt(self) -> bool {
        use io::ErrorKind::{ConnectionRefused, ConnectionReset, PermissionDenied};
        match self {
            // A write into a reset connection says EPIPE where the reset came before it.
            Self::Afterwards(Some(kind)) => matches!(kind, ConnectionReset | io::ErrorKind::BrokenPipe),
            Self::Afterwards(None) => false,
            Self::AtConnect(kind) => matches!(kind, ConnectionRefused | ConnectionReset | PermissionDenied),
        }
    }
}
