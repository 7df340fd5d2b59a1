//! Why a connection did not come about or broke, and which of Istio's response flags says so.

use std::io;
use std::net::SocketAddr;

use super::policy::Denied;
use super::transport::frame::Refusal;
use super::transport::handshake::HandshakeError;
use super::transport::session::{self, SessionError, Side};
use super::transport::{copy, hbone};
use crate::model::SpiffeId;
use crate::telemetry::ResponseFlag;

#[derive(Debug, thiserror::Error)]
pub enum ConnError {
    #[error("refused by {0}")]
    Denied(Denied),
    #[error("service {service} has no port {port}; see `meshctl services`")]
    NoSuchPort { service: String, port: u16 },
    #[error("service {0} has no ready endpoint; see `meshctl services`")]
    NoEndpoint(String),
    #[error("{0} is not in the mesh, and the setting outboundPolicy is REGISTRY_ONLY")]
    Outside(SocketAddr),
    #[error("cannot reach {address}: {source}")]
    Connect { address: SocketAddr, source: io::Error },
    #[error("cannot reach {address}: no answer in time; a NetworkPolicy may block port 15008")]
    ConnectTimeout { address: SocketAddr },
    #[error("the agent of {address} does not answer, though it took the tunnel; see its log")]
    NoAnswer { address: SocketAddr },
    #[error("no mutual TLS with {address}: {source}")]
    Handshake { address: SocketAddr, source: HandshakeError },
    #[error("{address} is {found}, not {wanted}")]
    WrongIdentity { address: SocketAddr, wanted: SpiffeId, found: SpiffeId },
    #[error("no certificate for {0} yet; see `meshctl certificates`")]
    NoCertificate(SpiffeId),
    #[error("the tunnel to {address} failed: {source}")]
    Tunnel { address: SocketAddr, source: TunnelError },
    #[error("the agent of {address} refused it: {}", refusal_text(*.refusal))]
    Refused { address: SocketAddr, refusal: Refusal },
    #[error("{source}; the first bytes were sent, so no other endpoint was asked")]
    Lost { source: Box<ConnError> },
    #[error("HTTP with {address}: {text}")]
    Http { address: SocketAddr, text: String },
    #[error("a policy that changed no longer allows it")]
    PolicyChanged,
    #[error("the client broke it off: {0}")]
    ClientReset(io::Error),
    #[error("the server broke it off: {0}")]
    ServerReset(io::Error),
    #[error("the server's side broke it off")]
    PeerReset,
}

/// A fault of a tunnel that stood.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
}

impl ConnError {
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::Denied(_) => ResponseFlag::Denied,
            Self::NoSuchPort { .. } | Self::Outside(_) => ResponseFlag::NoRoute,
            Self::NoEndpoint(_) => ResponseFlag::NoHealthyUpstream,
            Self::Connect { .. } | Self::ConnectTimeout { .. } | Self::NoAnswer { .. } => ResponseFlag::ConnectFailure,
            Self::Handshake { .. } => ResponseFlag::TlsFailure,
            Self::WrongIdentity { .. } | Self::NoCertificate(_) => ResponseFlag::IdentityError,
            Self::Tunnel { .. } => ResponseFlag::TunnelFailure,
            Self::Refused { refusal: Refusal::Denied, .. } => ResponseFlag::Denied,
            Self::Refused { refusal: Refusal::Unreachable | Refusal::BadRequest, .. } => ResponseFlag::ConnectFailure,
            Self::Lost { source } => source.flag(),
            Self::PolicyChanged => ResponseFlag::PolicyChanged,
            Self::Http { .. } | Self::ClientReset(_) | Self::ServerReset(_) | Self::PeerReset => ResponseFlag::None,
        }
    }

    /// Whether another endpoint may do better. Nothing of the client's has been sent when one of these is found.
    pub fn is_worth_another_endpoint(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::ConnectTimeout { .. } | Self::Handshake { .. } | Self::Tunnel { .. } => true,
            Self::WrongIdentity { .. } | Self::NoAnswer { .. } => true,
            Self::Refused { refusal, .. } => *refusal == Refusal::Unreachable,
            Self::Denied(_) | Self::NoSuchPort { .. } | Self::NoEndpoint(_) | Self::Outside(_) => false,
            Self::NoCertificate(_) | Self::Lost { .. } | Self::PolicyChanged | Self::Http { .. } => false,
            Self::ClientReset(_) | Self::ServerReset(_) | Self::PeerReset => false,
        }
    }
}

fn refusal_text(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::BadRequest => "it does not serve that address",
        Refusal::Denied => "denied by a policy there; see its access log",
        Refusal::Unreachable => "the application does not answer",
    }
}

/// What the end of a session's connection means to the record.
pub fn of_session(end: session::End, address: SocketAddr, side: Side) -> Result<(), ConnError> {
    match end {
        session::End::Finished => Ok(()),
        session::End::Cut => Err(ConnError::PolicyChanged),
        session::End::LocalReset(e) => Err(local_reset(e, side)),
        session::End::PeerReset => Err(ConnError::PeerReset),
        session::End::Broken(e) => Err(ConnError::Tunnel { address, source: e.into() }),
    }
}

/// The same for a stream of HBONE.
pub fn of_hbone(end: hbone::End, address: SocketAddr, side: Side) -> Result<(), ConnError> {
    match end {
        hbone::End::Finished => Ok(()),
        hbone::End::Cut => Err(ConnError::PolicyChanged),
        hbone::End::LocalReset(e) => Err(local_reset(e, side)),
        hbone::End::PeerReset => Err(ConnError::PeerReset),
        hbone::End::Broken(e) => Err(ConnError::Tunnel { address, source: e.into() }),
    }
}

fn local_reset(e: io::Error, side: Side) -> ConnError {
    match side {
        Side::Client => ConnError::ClientReset(e),
        Side::Server => ConnError::ServerReset(e),
    }
}

/// The same for plain copying.
pub fn of_copy(end: copy::End) -> Result<(), ConnError> {
    match end {
        copy::End::Finished => Ok(()),
        copy::End::Cut => Err(ConnError::PolicyChanged),
        copy::End::ClientReset(e) => Err(ConnError::ClientReset(e)),
        copy::End::ServerReset(e) => Err(ConnError::ServerReset(e)),
    }
}
