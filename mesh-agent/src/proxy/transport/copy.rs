//! Plain bytes both ways, between two sockets: same-node connections and those that leave the mesh.

use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut};

use tokio::net::TcpStream;

use super::buffers::Buffer;
use super::io::{self as sock, Read, Turn};
use super::session::Counts;

/// How a plain connection ended.
#[derive(Debug)]
pub enum End {
    /// Both sides ended in order.
    Finished,
    /// The client's side broke; the server's was reset too.
    ClientReset(io::Error),
    /// The server's side broke; the client's was reset too.
    ServerReset(io::Error),
    /// We cut it: policy no longer allows it.
    Cut,
}

/// Which socket failed.
enum Failed {
    Read(io::Error),
    Write(io::Error),
}

/// Carries bytes between `client` and `server` until both have ended, or `cut` is done.
pub async fn relay(client: TcpStream, server: TcpStream, counts: &Counts, cut: impl Future<Output = ()>) -> End {
    let both = async {
        tokio::try_join!(
            async {
                one_way(&client, &server, &counts.sent).await.map_err(|e| match e {
                    Failed::Read(e) => End::ClientReset(e),
                    Failed::Write(e) => End::ServerReset(e),
                })
            },
            async {
                one_way(&server, &client, &counts.received).await.map_err(|e| match e {
                    Failed::Read(e) => End::ServerReset(e),
                    Failed::Write(e) => End::ClientReset(e),
                })
            },
        )
    };
    let end = tokio::select! {
        biased;
        () = cut => End::Cut,
        done = both => match done {
            Ok(_) => {
                sock::disarm(&client);
                sock::disarm(&server);
                return End::Finished;
            }
            Err(end) => end,
        },
    };
    sock::reset(client);
    sock::reset(server);
    end
}

async fn one_way(from: &TcpStream, to: &TcpStream, count: &Cell<u64>) -> Result<(), Failed> {
    let mut turn = Turn::default();
    loop {
        sock::readable(from).await.map_err(Failed::Read)?;
        let mut buffer = Buffer::take();
        let read = sock::try_read(from, &mut [IoSliceMut::new(&mut buffer)]).map_err(Failed::Read)?;
        if let Read::Bytes(n) | Read::Last(n) = read {
            let last = matches!(read, Read::Last(_));
            sock::write_all_vectored(to, &mut [IoSlice::new(&buffer[..n])], last).await.map_err(Failed::Write)?;
            count.set(count.get() + n as u64);
            turn.took(n).await;
        }
        if let Read::Last(_) | Read::End = read {
            return sock::finish(to).map_err(Failed::Write);
        }
    }
}
