//! The server's end of HBONE.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{Method, Response, StatusCode, Uri};

use super::{CONNECTION_WINDOW, MAX_FRAME, MAX_STREAMS, SEND_BUFFER, STREAM_WINDOW};
use crate::proxy::transport::frame::Refusal;
use crate::proxy::transport::handshake::Established;
use crate::proxy::transport::stream::TlsStream;

/// A CONNECT that was read and waits for its answer.
pub struct Incoming {
    pub destination: SocketAddr,
    respond: SendResponse<Bytes>,
    body: RecvStream,
}

/// Serves one HTTP/2 connection: each CONNECT goes to `handle`, which is spawned on this worker. When `drain` is done, the
/// client is told to send no more (GOAWAY), and streams under way go on to their end.
pub async fn serve<F>(
    established: Established,
    handle: impl Fn(Incoming) -> F,
    drain: impl Future<Output = ()>,
) -> Result<(), h2::Error>
where
    F: Future<Output = ()> + 'static,
{
    let mut connection = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buffer_size(SEND_BUFFER)
        // A CONNECT has a handful of short headers.
        .max_header_list_size(16 * 1024)
        .handshake::<_, Bytes>(TlsStream::new(established))
        .await?;
    tokio::pin!(drain);
    let mut draining = false;
    loop {
        let accepted = tokio::select! {
            () = &mut drain, if !draining => {
                draining = true;
                connection.graceful_shutdown();
                continue;
            }
            accepted = connection.accept() => accepted,
        };
        let Some(accepted) = accepted else { return Ok(()) };
        let (request, mut respond) = accepted?;
        let destination = match *request.method() {
            Method::CONNECT => read_authority(request.uri()),
            _ => None,
        };
        match destination {
            Some(destination) => {
                let incoming = Incoming { destination, respond, body: request.into_body() };
                tokio::task::spawn_local(handle(incoming));
            }
            None => refuse(&mut respond, Refusal::BadRequest),
        }
    }
}

impl Incoming {
    /// Says yes; bytes may flow.
    pub fn accept(mut self) -> Result<(SendStream<Bytes>, RecvStream), h2::Error> {
        let send = self.respond.send_response(Response::new(()), false)?;
        Ok((send, self.body))
    }

    pub fn refuse(mut self, refusal: Refusal) {
        refuse(&mut self.respond, refusal);
    }
}

fn refuse(respond: &mut SendResponse<Bytes>, refusal: Refusal) {
    let status = StatusCode::from_u16(refusal.status()).expect("a refusal's status is a status");
    let mut response = Response::new(());
    *response.status_mut() = status;
    // A client that has gone does not need the answer.
    let _ = respond.send_response(response, true);
}

/// The target of a CONNECT: an address and a port, nothing else. A name would have to be resolved, and only a gateway
/// does that.
pub fn read_authority(uri: &Uri) -> Option<SocketAddr> {
    if uri.scheme().is_some() || uri.path_and_query().is_some() {
        return None;
    }
    let address: SocketAddr = uri.authority()?.as_str().parse().ok()?;
    (address.port() != 0).then(|| SocketAddr::new(address.ip().to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_with_a_port_is_a_target() {
        let read = |text: &str| Uri::builder().authority(text).build().ok().and_then(|uri| read_authority(&uri));
        assert_eq!(read("10.0.0.1:80"), Some("10.0.0.1:80".parse().unwrap()));
        assert_eq!(read("[fd00::1]:80"), Some("[fd00::1]:80".parse().unwrap()));
        assert_eq!(read("[::ffff:10.0.0.1]:80"), Some("10.0.0.1:80".parse().unwrap()));
        for text in ["10.0.0.1", "10.0.0.1:0", "web:80", "web.shop.svc:80", "user@10.0.0.1:80", "10.0.0.1:99999"] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
