//! The TLS handshake, both sides; what comes out is an `Established`: keys in our hands, the peer's identity proved.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;

use super::record::{self, Opener, RecordError, Sealer};
use super::{ALPN_HBONE, ALPN_SESSION, buffers, io as sock};
use crate::identity::{PeerError, describe, peer_identity};
use crate::model::SpiffeId;

/// How long a handshake may take; a peer that is slower is cut off.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// No message of a handshake between workloads comes near this. What is left over fits a buffer.
const MAX_FLIGHT: usize = buffers::SIZE / 2;

/// Which tunnel the two sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunnel {
    Session,
    Hbone,
}

/// A connection with TLS established.
pub struct Established {
    pub tcp: TcpStream,
    pub sealer: Sealer,
    pub opener: Opener,
    pub peer: SpiffeId,
    pub tunnel: Tunnel,
    /// Bytes that came behind the handshake, not opened yet.
    pub sealed: Vec<u8>,
    /// Records that came with it and were opened already.
    pub opened: VecDeque<Vec<u8>>,
}

#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("the connection broke during the TLS handshake: {0}")]
    Io(#[from] io::Error),
    #[error("the peer ended the connection during the TLS handshake")]
    Closed,
    #[error("the TLS handshake took more than {} seconds", TIMEOUT.as_secs())]
    TimedOut,
    #[error("no mutual TLS: {}", describe(.0))]
    Tls(#[from] rustls::Error),
    #[error("the peer's certificate is not a workload's: {0}")]
    Peer(#[from] PeerError),
    #[error("the peer speaks neither nodemesh/1 nor h2 over TLS")]
    Protocol,
    #[error("cannot take over the TLS keys: {0}")]
    Keys(#[from] RecordError),
    #[error("the peer's TLS handshake is larger than {MAX_FLIGHT} bytes")]
    TooLarge,
}

/// Shakes hands as the client. `config` verifies that the server is *a* workload of the mesh; the caller compares `peer`
/// with the workload that it wanted, before it sends a byte.
pub async fn client(tcp: TcpStream, config: Arc<rustls::ClientConfig>) -> Result<Established, HandshakeError> {
    // The name goes nowhere: SNI is off, and the verifier looks at the SPIFFE id only.
    let name = ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into());
    let connection = UnbufferedClientConnection::new(config, name)?;
    let mut drive = Drive::new(tcp);
    let connection =
        tokio::time::timeout(TIMEOUT, drive.client(connection)).await.map_err(|_| HandshakeError::TimedOut)??;
    let peer = peer_identity(connection.peer_certificates().unwrap_or_default())?;
    let tunnel = tunnel(connection.alpn_protocol())?;
    let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
    let (sealer, opener) = record::client(secrets, kernel)?;
    Ok(drive.established(sealer, opener, peer, tunnel))
}

/// Shakes hands as the server; the client has shown a certificate of the mesh.
pub async fn server(tcp: TcpStream, config: Arc<rustls::ServerConfig>) -> Result<Established, HandshakeError> {
    let connection = UnbufferedServerConnection::new(config)?;
    let mut drive = Drive::new(tcp);
    let connection =
        tokio::time::timeout(TIMEOUT, drive.server(connection)).await.map_err(|_| HandshakeError::TimedOut)??;
    let peer = peer_identity(connection.peer_certificates().unwrap_or_default())?;
    let tunnel = tunnel(connection.alpn_protocol())?;
    let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
    let (sealer, opener) = record::server(secrets, kernel)?;
    Ok(drive.established(sealer, opener, peer, tunnel))
}

fn tunnel(alpn: Option<&[u8]>) -> Result<Tunnel, HandshakeError> {
    match alpn {
        Some(ALPN_SESSION) => Ok(Tunnel::Session),
        Some(ALPN_HBONE) => Ok(Tunnel::Hbone),
        _ => Err(HandshakeError::Protocol),
    }
}

/// Moves bytes between the socket and rustls until both sides are done.
struct Drive {
    tcp: TcpStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    opened: VecDeque<Vec<u8>>,
}

/// What rustls wants next.
enum Step {
    Again,
    Send,
    Receive,
    Done,
}

impl Drive {
    fn new(tcp: TcpStream) -> Self {
        Self { tcp, incoming: Vec::with_capacity(4096), outgoing: Vec::with_capacity(4096), opened: VecDeque::new() }
    }

    fn established(self, sealer: Sealer, opener: Opener, peer: SpiffeId, tunnel: Tunnel) -> Established {
        let Self { tcp, incoming, outgoing: _, opened } = self;
        Established { tcp, sealer, opener, peer, tunnel, sealed: incoming, opened }
    }

    async fn client(
        &mut self,
        mut connection: UnbufferedClientConnection,
    ) -> Result<UnbufferedClientConnection, HandshakeError> {
        loop {
            let Self { incoming, outgoing, opened, .. } = self;
            let step = step(connection.process_tls_records(incoming), outgoing, opened);
            let step = match step {
                Ok((discard, step)) => {
                    self.incoming.drain(..discard);
                    step
                }
                Err(e) => {
                    self.last_words(|outgoing, opened| {
                        step_of_alert(connection.process_tls_records(&mut []), outgoing, opened);
                    })
                    .await;
                    return Err(e);
                }
            };
            match step {
                Step::Done if !connection.is_handshaking() => return Ok(connection),
                step => self.act(step).await?,
            }
        }
    }

    async fn server(
        &mut self,
        mut connection: UnbufferedServerConnection,
    ) -> Result<UnbufferedServerConnection, HandshakeError> {
        loop {
            let Self { incoming, outgoing, opened, .. } = self;
            let step = step(connection.process_tls_records(incoming), outgoing, opened);
            let step = match step {
                Ok((discard, step)) => {
                    self.incoming.drain(..discard);
                    step
                }
                Err(e) => {
                    self.last_words(|outgoing, opened| {
                        step_of_alert(connection.process_tls_records(&mut []), outgoing, opened);
                    })
                    .await;
                    return Err(e);
                }
            };
            match step {
                Step::Done if !connection.is_handshaking() => return Ok(connection),
                step => self.act(step).await?,
            }
        }
    }

    async fn act(&mut self, step: Step) -> Result<(), HandshakeError> {
        match step {
            Step::Again => Ok(()),
            Step::Send => {
                sock::write_all(&self.tcp, &self.outgoing).await?;
                self.outgoing.clear();
                Ok(())
            }
            Step::Receive | Step::Done => self.receive().await,
        }
    }

    async fn receive(&mut self) -> Result<(), HandshakeError> {
        if self.incoming.len() >= MAX_FLIGHT {
            return Err(HandshakeError::TooLarge);
        }
        let filled = self.incoming.len();
        self.incoming.resize(filled + 4096, 0);
        let read = loop {
            let into = &mut self.incoming[filled..];
            match sock::try_read(&self.tcp, &mut [io::IoSliceMut::new(into)]).map(sock::Read::count) {
                Ok(Some(n)) => break Ok(n),
                Ok(None) => sock::readable(&self.tcp).await?,
                Err(e) => break Err(e),
            }
        };
        self.incoming.truncate(filled + *read.as_ref().unwrap_or(&0));
        if read? == 0 { Err(HandshakeError::Closed) } else { Ok(()) }
    }

    /// Sends the alert that says why we refuse, if the socket takes it.
    async fn last_words(&mut self, alert: impl FnOnce(&mut Vec<u8>, &mut VecDeque<Vec<u8>>)) {
        alert(&mut self.outgoing, &mut self.opened);
        let _ = sock::try_write(&self.tcp, &[io::IoSlice::new(&self.outgoing)], false);
        let _ = sock::finish(&self.tcp);
    }
}

/// Does what rustls asks for; gives how many bytes of the input are used up, and what comes next.
fn step<D>(
    status: UnbufferedStatus<'_, '_, D>,
    outgoing: &mut Vec<u8>,
    opened: &mut VecDeque<Vec<u8>>,
) -> Result<(usize, Step), HandshakeError>
where
    for<'c, 'i> ConnectionState<'c, 'i, D>: Sized,
{
    let UnbufferedStatus { mut discard, state, .. } = status;
    let step = match state? {
        ConnectionState::EncodeTlsData(mut data) => {
            encode(outgoing, |room| data.encode(room))?;
            Step::Again
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Step::Send
        }
        ConnectionState::BlockedHandshake => Step::Receive,
        ConnectionState::WriteTraffic(_) => Step::Done,
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                opened.push_back(record.payload.to_vec());
            }
            Step::Again
        }
        ConnectionState::PeerClosed | ConnectionState::Closed => return Err(HandshakeError::Closed),
        // Early data is never offered nor taken.
        _ => return Err(HandshakeError::Protocol),
    };
    Ok((discard, step))
}

fn step_of_alert<D>(status: UnbufferedStatus<'_, '_, D>, outgoing: &mut Vec<u8>, _: &mut VecDeque<Vec<u8>>) {
    if let Ok(ConnectionState::EncodeTlsData(mut data)) = status.state {
        let _ = encode(outgoing, |room| data.encode(room));
    }
}

fn encode(
    outgoing: &mut Vec<u8>,
    mut into: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<(), HandshakeError> {
    let filled = outgoing.len();
    let mut room = 2048;
    loop {
        outgoing.resize(filled + room, 0);
        match into(&mut outgoing[filled..]) {
            Ok(n) => {
                outgoing.truncate(filled + n);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(e)) if e.required_size > room => room = e.required_size,
            Err(_) => return Err(HandshakeError::Protocol),
        }
    }
}
