//! What carries a connection, as a byte stream: nothing is lost or added, ends and resets arrive, a session comes back.

use super::*;
use crate::proxy::transport::hbone::HboneStream;
use crate::proxy::transport::pool::Lease;
use crate::proxy::transport::session::SessionStream;
use crate::proxy::transport::upstream::{Carrier, Upstream};

/// A connection that stands, its application's end, and what is left to see whether its session came back.
struct Open {
    upstream: Upstream,
    app: TcpStream,
    counts: Rc<Counts>,
    beside: Option<Lease>,
    /// Where further connections over the same session would come.
    _served: Option<tokio::sync::mpsc::UnboundedReceiver<TcpStream>>,
}

enum Over {
    Session,
    Hbone,
    Tcp,
}

async fn over(kind: Over) -> Open {
    let counts = Rc::new(Counts::default());
    let (carrier, app, beside, _served) = match kind {
        Over::Session => {
            let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
            let (apps, mut served) = tokio::sync::mpsc::unbounded_channel();
            serve(Session::new(far), apps, Rc::default());
            let mut lease = Lease::of(Session::new(near));
            assert_eq!(lease.session().open(target(TARGET), &Early::none()).await.unwrap(), Answer::Opened);
            let beside = lease.beside();
            (
                Carrier::Session(SessionStream::new(lease).into()),
                served.recv().await.unwrap(),
                Some(beside),
                Some(served),
            )
        }
        Over::Hbone => {
            let (near, far) = Pki::new().await.tunnel(Tunnel::Hbone).await;
            let (apps, mut served) = tokio::sync::mpsc::unbounded_channel();
            let handle = move |incoming: hbone::Incoming| {
                let apps = apps.clone();
                async move {
                    let (agent, app) = pair().await;
                    apps.send(app).unwrap();
                    let (send, receive) = incoming.accept().unwrap();
                    hbone::relay(agent, send, receive, Side::Server, &Counts::default(), forever()).await;
                }
            };
            tokio::task::spawn_local(hbone::serve(far, handle, forever()));
            let connection = hbone::Connection::start(near).await.unwrap();
            let place = connection.place().unwrap();
            let baggage = http::HeaderValue::from_static("");
            let (send, receive) =
                hbone::open(&connection, target(TARGET).destination, &baggage).await.unwrap().unwrap();
            (Carrier::Hbone(HboneStream::new(send, receive, place).into()), served.recv().await.unwrap(), None, None)
        }
        Over::Tcp => {
            let (near, far) = pair().await;
            (Carrier::Tcp(near), far, None, None)
        }
    };
    Open { upstream: Upstream::new(carrier, counts.clone()), app, counts, beside, _served }
}

#[test]
fn bytes_cross_both_ways_at_once_and_ends_arrive() {
    for kind in [Over::Session, Over::Hbone, Over::Tcp] {
        on_worker(async {
            let Open { upstream, mut app, counts, beside, _served } = over(kind).await;
            let there: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
            let back = &there[..1_000_001];
            let (mut read, mut write) = tokio::io::split(upstream);
            let (mut read_far, mut write_far) = app.split();
            let (mut got, mut got_far) = (Vec::new(), Vec::new());
            tokio::join!(
                async {
                    write.write_all(&there).await.unwrap();
                    write.shutdown().await.unwrap();
                },
                async {
                    read_far.read_to_end(&mut got_far).await.unwrap();
                    // After our end, as a half-closed connection allows.
                    write_far.write_all(back).await.unwrap();
                    write_far.shutdown().await.unwrap();
                },
                async {
                    read.read_to_end(&mut got).await.unwrap();
                },
            );
            assert!(got_far == there, "our bytes came changed");
            assert!(got == back, "the application's bytes came changed");
            assert_eq!((counts.sent.get(), counts.received.get()), (3_000_000, 1_000_001));
            read.unsplit(write).close().await;
            if let Some(beside) = beside {
                let mut lease = beside.again().expect("the session has come back");
                assert_eq!(lease.session().open(target(TARGET), &Early::none()).await.unwrap(), Answer::Opened);
            }
        });
    }
}

#[test]
fn a_connection_that_is_closed_reads_what_still_comes_and_frees_the_session() {
    on_worker(async {
        let Open { upstream, mut app, beside, .. } = over(Over::Session).await;
        tokio::join!(upstream.close(), async {
            assert_eq!(app.read(&mut [0]).await.unwrap(), 0);
            // More than a record, that nobody wants.
            app.write_all(&[7; 50_000]).await.unwrap();
            app.shutdown().await.unwrap();
        });
        assert!(beside.unwrap().again().is_some());
    });
}

#[test]
fn what_is_reset_or_dropped_is_reset_at_the_application() {
    for kind in [Over::Session, Over::Hbone, Over::Tcp] {
        on_worker(async {
            let Open { upstream, mut app, beside, .. } = over(kind).await;
            upstream.reset().await;
            assert_eq!(app.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
            assert!(beside.is_none_or(|beside| beside.again().is_some()), "the session is free again");
        });
    }
    for kind in [Over::Session, Over::Hbone] {
        on_worker(async {
            let Open { upstream, mut app, beside, .. } = over(kind).await;
            drop(upstream);
            assert_eq!(app.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
            assert!(beside.is_none_or(|beside| beside.again().is_none()), "nobody may use the session again");
        });
    }
}

#[test]
fn a_reset_of_the_application_is_no_end() {
    for kind in [Over::Session, Over::Hbone, Over::Tcp] {
        on_worker(async {
            let Open { mut upstream, app, .. } = over(kind).await;
            super::super::io::reset(app);
            let error = upstream.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        });
    }
}

#[test]
fn a_stream_that_could_go_on_for_ever_yields() {
    on_worker(async {
        let Open { mut upstream, app, .. } = over(Over::Tcp).await;
        app.writable().await.unwrap();
        while app.try_write(&[7; 65536]).is_ok() {}
        upstream.read_exact(&mut [0]).await.unwrap();
        let mut into = vec![0; 65536];
        let mut most = 0;
        std::future::poll_fn(|cx| {
            let mut read = tokio::io::ReadBuf::new(&mut into);
            while std::pin::Pin::new(&mut upstream).poll_read_into(cx, &mut read) {
                most += read.filled().len();
                read.clear();
            }
            std::task::Poll::Ready(())
        })
        .await;
        assert!((64 * 1024..=256 * 1024).contains(&most), "{most}");
    });
}

/// Whether a poll gave something.
trait PollRead {
    fn poll_read_into(self, cx: &mut std::task::Context<'_>, into: &mut tokio::io::ReadBuf<'_>) -> bool;
}

impl PollRead for std::pin::Pin<&mut Upstream> {
    fn poll_read_into(self, cx: &mut std::task::Context<'_>, into: &mut tokio::io::ReadBuf<'_>) -> bool {
        use tokio::io::AsyncRead;
        self.poll_read(cx, into).is_ready() && !into.filled().is_empty()
    }
}
