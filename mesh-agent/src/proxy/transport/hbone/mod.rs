//! HBONE: HTTP/2 CONNECT inside mutual TLS, as Istio ambient's ztunnel speaks it. Many connections share one tunnel.

mod client;
mod server;
mod stream;

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, IoSliceMut};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::net::TcpStream;

pub use client::{Connection, Place, open};
pub use server::{Incoming, read_authority, serve};
pub use stream::HboneStream;

use super::io::{self as sock, Read, Turn};
use super::session::{Counts, Side};

/// What one stream may have under way. Small against the connection's window, so that streams whose readers are slow
/// cannot take it all from the others (ztunnel#1945).
const STREAM_WINDOW: u32 = 512 * 1024;
/// Streams that share a connection. More than the hundred that RFC 9113 recommends at least: ztunnel puts so many on one
/// connection before it has read our limit, and those beyond it would wait, open to their clients, for another's end.
pub const MAX_STREAMS: u32 = 128;
/// Room for all streams at once: no stream ever waits for another's reader.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS;
/// Short frames, so that a small stream's bytes come soon after a bulk stream's.
const MAX_FRAME: u32 = 64 * 1024;
/// What a stream may buffer before its writer waits.
const SEND_BUFFER: usize = 256 * 1024;

/// How a connection over a stream ended.
#[derive(Debug)]
pub enum End {
    Finished,
    LocalReset(io::Error),
    PeerReset,
    Cut,
    Broken(h2::Error),
}

/// Carries `app`'s bytes over a stream, both ways, until both sides have ended or `cut` is done.
pub async fn relay(
    app: TcpStream,
    send: SendStream<Bytes>,
    receive: RecvStream,
    side: Side,
    counts: &Counts,
    cut: impl Future<Output = ()>,
) -> End {
    let (up, down) = match side {
        Side::Client => (&counts.sent, &counts.received),
        Side::Server => (&counts.received, &counts.sent),
    };
    let (mut send, mut receive) = (send, receive);
    let both = async { tokio::try_join!(upload(&app, &mut send, up), download(&mut receive, &app, down)).map(|_| ()) };
    let end = tokio::select! {
        biased;
        () = cut => End::Cut,
        done = both => match done {
            Ok(()) => {
                sock::disarm(&app);
                return End::Finished;
            }
            Err(end) => end,
        },
    };
    // What RFC 9113 (8.5) has for a connection that broke behind a CONNECT; ztunnel reads CANCEL as the stream's end.
    send.send_reset(Reason::CONNECT_ERROR);
    sock::reset(app);
    end
}

/// Application to tunnel.
async fn upload(app: &TcpStream, send: &mut SendStream<Bytes>, count: &Cell<u64>) -> Result<(), End> {
    let mut buffer = BytesMut::new();
    let mut turn = Turn::default();
    loop {
        sock::readable(app).await.map_err(End::LocalReset)?;
        send.reserve_capacity(super::buffers::SIZE);
        let room = poll_fn(|cx| {
            // A reset must be seen even while the window is closed.
            if let std::task::Poll::Ready(reason) = send.poll_reset(cx) {
                return std::task::Poll::Ready(Err(reset_end(reason)));
            }
            // `poll_capacity` tells of growth only, not of what is there already.
            match send.capacity() {
                0 => {}
                room => return std::task::Poll::Ready(Ok(room)),
            }
            send.poll_capacity(cx).map(|room| match room {
                Some(Ok(room)) => Ok(room),
                Some(Err(e)) => Err(broken(e)),
                None => Err(End::PeerReset),
            })
        })
        .await?;
        buffer.resize(room.min(super::buffers::SIZE), 0);
        match sock::try_read(app, &mut [IoSliceMut::new(&mut buffer)]).map_err(End::LocalReset)? {
            Read::Nothing => {}
            Read::End => return send.send_data(Bytes::new(), true).map_err(broken),
            Read::Bytes(n) => {
                send.send_data(buffer.split_to(n).freeze(), false).map_err(broken)?;
                count.set(count.get() + n as u64);
                turn.took(n).await;
            }
            Read::Last(n) => {
                count.set(count.get() + n as u64);
                return send.send_data(buffer.split_to(n).freeze(), true).map_err(broken);
            }
        }
    }
}

/// Tunnel to application.
async fn download(receive: &mut RecvStream, app: &TcpStream, count: &Cell<u64>) -> Result<(), End> {
    let mut turn = Turn::default();
    while let Some(data) = receive.data().await {
        let data = data.map_err(broken)?;
        sock::write_all(app, &data).await.map_err(End::LocalReset)?;
        count.set(count.get() + data.len() as u64);
        // Given back only now: what the application does not take, the peer must not send.
        receive.flow_control().release_capacity(data.len()).map_err(broken)?;
        turn.took(data.len()).await;
    }
    sock::finish(app).map_err(End::LocalReset)
}

fn reset_end(reason: Result<Reason, h2::Error>) -> End {
    match reason {
        Ok(_) => End::PeerReset,
        Err(e) => broken(e),
    }
}

fn broken(e: h2::Error) -> End {
    if e.is_reset() { End::PeerReset } else { End::Broken(e) }
}
