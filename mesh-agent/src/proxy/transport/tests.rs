//! Both tunnels over real sockets and real TLS, in one thread: what an application's bytes and ends become.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;

use super::frame::{Open, Refusal};
use super::handshake::{self, Established, HandshakeError, Tunnel};
use super::hbone;
use super::session::{Answer, Counts, Early, End, Session, Side};
use crate::identity::{Ca, CaOptions, CertificateOptions, Certificates, Clock};
use crate::model::{SpiffeId, TrustDomain};

mod upstream;

const TARGET: &str = "10.1.2.3:80";

struct Pki {
    _dir: tempfile::TempDir,
    certificates: Certificates,
}

impl Pki {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let trust_domain = TrustDomain::new("cluster.local").unwrap();
        let ca = Ca::open(CaOptions::new(dir.path(), trust_domain.clone())).unwrap();
        let options = CertificateOptions {
            trust_domains: vec![trust_domain],
            lifetime: Duration::from_secs(3600),
            clock: Clock::system(),
        };
        let certificates = Certificates::embedded(ca, options);
        certificates.ensure(&id("a")).await.unwrap();
        certificates.ensure(&id("b")).await.unwrap();
        Self { _dir: dir, certificates }
    }

    /// A tunnel from `a` to `b`.
    async fn tunnel(&self, kind: Tunnel) -> (Established, Established) {
        let (near, far) = pair().await;
        let (a, b) = (self.certificates.get(&id("a")).unwrap(), self.certificates.get(&id("b")).unwrap());
        let config = match kind {
            Tunnel::Session => a.client.clone(),
            Tunnel::Hbone => a.client_h2.clone(),
        };
        let (near, far) =
            tokio::try_join!(handshake::client(near, config), handshake::server(far, b.server.clone())).unwrap();
        assert_eq!((near.tunnel, far.tunnel), (kind, kind));
        assert_eq!((&near.peer, &far.peer), (&id("b"), &id("a")));
        (near, far)
    }
}

fn id(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/test/sa/{account}").parse().unwrap()
}

/// Two connected sockets.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// Runs a test on one thread, as a worker is, and fails it after two minutes.
fn on_worker<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tasks = LocalSet::new();
    tasks.block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(120), test).await.expect("the test hangs");
    });
}

async fn forever() {
    std::future::pending::<()>().await;
}

/// The server's end of a session: takes each connection to an application of its own and hands that out.
fn serve(mut session: Session, apps: tokio::sync::mpsc::UnboundedSender<TcpStream>, ends: Rc<Cell<usize>>) {
    tokio::task::spawn_local(async move {
        while let Ok(Some(open)) = session.accept().await {
            if open.destination.port() == 1 {
                session.refuse(Refusal::Denied).await.unwrap();
                continue;
            }
            let (agent, app) = pair().await;
            apps.send(app).unwrap();
            session.opened().await.unwrap();
            session.relay(agent, Side::Server, 0, &Counts::default(), forever()).await;
            ends.set(ends.get() + 1);
            if session.is_broken() {
                return;
            }
        }
    });
}

fn target(text: &str) -> Open {
    Open { destination: text.parse().unwrap(), wait: Duration::from_secs(3) }
}

/// Opens for an application that has said nothing yet.
async fn open(session: &mut Session, to: &str) -> Answer {
    let (_app, agent) = pair().await;
    session.open(target(to), &Early::new(&agent)).await.unwrap()
}

#[test]
fn a_session_carries_one_connection_after_the_other() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let (apps, mut served) = tokio::sync::mpsc::unbounded_channel();
        serve(Session::new(far), apps, Rc::default());
        let mut session = Session::new(near);
        for round in 0u8..5 {
            assert_eq!(open(&mut session, TARGET).await, Answer::Opened);
            let (mut client, agent) = pair().await;
            let mut server = served.recv().await.unwrap();
            let counts = Counts::default();
            let talk = async {
                // Larger than all buffers on the way, both ways at once.
                let bytes = vec![round; 3_000_000];
                let (mut read, mut write) = client.split();
                let (mut read_far, mut write_far) = server.split();
                let mut there = Vec::new();
                let mut back = Vec::new();
                tokio::join!(
                    async {
                        write.write_all(&bytes).await.unwrap();
                        write.shutdown().await.unwrap();
                    },
                    async {
                        read_far.read_to_end(&mut there).await.unwrap();
                        // After the client's end, as a half-closed connection allows.
                        write_far.write_all(&bytes[..100_000]).await.unwrap();
                        write_far.shutdown().await.unwrap();
                    },
                    async {
                        read.read_to_end(&mut back).await.unwrap();
                    },
                );
                assert!(there == bytes, "the client's bytes came changed");
                assert!(back == bytes[..100_000], "the server's bytes came changed");
            };
            let (end, ()) = tokio::join!(session.relay(agent, Side::Client, 0, &counts, forever()), talk);
            assert!(matches!(end, End::Finished), "{end:?}");
            assert_eq!((counts.sent.get(), counts.received.get()), (3_000_000, 100_000));
            assert!(!session.is_broken());
        }
        assert!(session.is_quiet());
    });
}

#[test]
fn a_refusal_leaves_the_session_free() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let (apps, mut served) = tokio::sync::mpsc::unbounded_channel();
        serve(Session::new(far), apps, Rc::default());
        let mut session = Session::new(near);
        assert_eq!(open(&mut session, "10.1.2.3:1").await, Answer::Refused(Refusal::Denied));
        assert_eq!(open(&mut session, TARGET).await, Answer::Opened);
        served.recv().await.unwrap();
    });
}

#[test]
fn early_bytes_arrive_once_though_asked_twice() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let (apps, mut served) = tokio::sync::mpsc::unbounded_channel();
        serve(Session::new(far), apps, Rc::default());
        let mut session = Session::new(near);
        for ended in [false, true] {
            let (mut client, agent) = pair().await;
            client.write_all(b"early, ").await.unwrap();
            if ended {
                client.shutdown().await.unwrap();
            }
            agent.readable().await.unwrap();
            let early = Early::new(&agent);
            assert_eq!(session.open(target("10.1.2.3:1"), &early).await.unwrap(), Answer::Refused(Refusal::Denied));
            assert_eq!(early.sent(), 0, "nobody has got them");
            assert_eq!(session.open(target(TARGET), &early).await.unwrap(), Answer::Opened);
            let sent = early.sent();
            assert_eq!(sent, 7);
            let mut server = served.recv().await.unwrap();
            let counts = Counts::default();
            let (end, ()) = tokio::join!(session.relay(agent, Side::Client, sent, &counts, forever()), async {
                if !ended {
                    // They are there before anything else is said.
                    let mut first = [0; 7];
                    server.read_exact(&mut first).await.unwrap();
                    assert_eq!(&first, b"early, ");
                    client.write_all(b"late").await.unwrap();
                    client.shutdown().await.unwrap();
                }
                let mut rest = Vec::new();
                server.read_to_end(&mut rest).await.unwrap();
                assert_eq!(rest, if ended { &b"early, "[..] } else { b"late" });
                server.shutdown().await.unwrap();
                assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
            });
            assert!(matches!(end, End::Finished), "{end:?}");
            assert_eq!(counts.sent.get(), if ended { 7 } else { 11 });
        }
    });
}

#[test]
fn early_bytes_are_asked_again_only_where_nobody_got_them() {
    for reset in [false, true] {
        on_worker(async {
            let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
            let mut session = Session::new(near);
            let (mut client, agent) = pair().await;
            client.write_all(b"pay once").await.unwrap();
            agent.readable().await.unwrap();
            let early = Early::new(&agent);
            let mut server = Session::new(far);
            let (opened, ()) = tokio::join!(session.open(target(TARGET), &early), async {
                server.accept().await.unwrap();
                // An orderly end says that it has not been answered. A reset says nothing: the answer may be lost.
                if reset { server.abort() } else { server.close() }
            });
            assert!(opened.is_err());
            assert_eq!(early.sent(), if reset { 8 } else { 0 });
        });
    }
}

#[test]
fn a_stream_with_much_to_do_lets_others_have_their_turn() {
    const MOST: u64 = 256 * 1024;
    on_worker(async {
        // Far more is there to read, and room to write, than one turn may take.
        let filled = async |socket: &TcpStream| {
            while socket.try_write(&[7; 65536]).is_ok() {}
            tokio::task::yield_now().await;
        };
        let polled_once = async |relay: &mut (dyn Future<Output = ()> + Unpin)| {
            std::future::poll_fn(|cx| {
                assert!(std::pin::Pin::new(&mut *relay).poll(cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
        };
        let ((client, near), (far, _server)) = (pair().await, pair().await);
        filled(&client).await;
        near.readable().await.unwrap();
        let counts = Counts::default();
        let mut relay = Box::pin(async { drop(super::copy::relay(near, far, &counts, forever()).await) });
        polled_once(&mut relay).await;
        assert!((1..=MOST).contains(&counts.sent.get()), "plain: {} bytes", counts.sent.get());

        let (near, _far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let mut session = Session::new(near);
        let (client, agent) = pair().await;
        filled(&client).await;
        agent.readable().await.unwrap();
        let counts = Counts::default();
        let mut relay = Box::pin(async { drop(session.relay(agent, Side::Client, 0, &counts, forever()).await) });
        polled_once(&mut relay).await;
        assert!((1..=MOST).contains(&counts.sent.get()), "session: {} bytes", counts.sent.get());
    });
}

#[test]
fn a_read_knows_the_end_behind_the_last_bytes() {
    on_worker(async {
        let (mut writer, reader) = pair().await;
        writer.write_all(b"all").await.unwrap();
        writer.shutdown().await.unwrap();
        let ended = tokio::io::Interest::READABLE;
        while !reader.ready(ended).await.unwrap().is_read_closed() {
            tokio::task::yield_now().await;
        }
        let mut bytes = [0; 8];
        let read = super::io::try_read(&reader, &mut [std::io::IoSliceMut::new(&mut bytes)]);
        assert_eq!(read.unwrap(), super::io::Read::Last(3));
        // A full buffer says nothing of what is behind it; and bytes before a reset are not the last ones.
        for reset in [false, true] {
            let (mut writer, reader) = pair().await;
            writer.write_all(b"four").await.unwrap();
            if reset {
                super::io::reset(writer);
            }
            reader.readable().await.unwrap();
            let mut bytes = [0; 4];
            let read = super::io::try_read(&reader, &mut [std::io::IoSliceMut::new(&mut bytes)]);
            assert!(!matches!(read, Ok(super::io::Read::Last(_) | super::io::Read::End)), "{read:?}");
        }
    });
}

#[test]
fn a_reset_comes_through_and_the_session_lives() {
    for from_client in [true, false] {
        on_worker(async {
            let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
            let (apps, mut served) = tokio::sync::mpsc::unbounded_channel();
            let ends = Rc::new(Cell::new(0));
            serve(Session::new(far), apps, ends.clone());
            let mut session = Session::new(near);
            open(&mut session, TARGET).await;
            let (client, agent) = pair().await;
            let server = served.recv().await.unwrap();
            let (breaks, mut sees) = if from_client { (client, server) } else { (server, client) };
            let counts = Counts::default();
            let (end, ()) = tokio::join!(session.relay(agent, Side::Client, 0, &counts, forever()), async {
                super::io::reset(breaks);
                let error = sees.read(&mut [0; 10]).await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            });
            match from_client {
                true => assert!(matches!(end, End::LocalReset(_)), "{end:?}"),
                false => assert!(matches!(end, End::PeerReset), "{end:?}"),
            }
            assert!(!session.is_broken());
            assert_eq!(open(&mut session, TARGET).await, Answer::Opened);
            served.recv().await.unwrap();
        });
    }
}

#[test]
fn a_cut_resets_both_ends() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let (apps, mut served) = tokio::sync::mpsc::unbounded_channel();
        serve(Session::new(far), apps, Rc::default());
        let mut session = Session::new(near);
        open(&mut session, TARGET).await;
        let (mut client, agent) = pair().await;
        let mut server = served.recv().await.unwrap();
        let (cut, asked) = tokio::sync::oneshot::channel::<()>();
        let counts = Counts::default();
        let stop = async { drop(asked.await) };
        let (end, ()) = tokio::join!(session.relay(agent, Side::Client, 0, &counts, stop), async {
            client.write_all(b"hello").await.unwrap();
            server.read_exact(&mut [0; 5]).await.unwrap();
            cut.send(()).unwrap();
            for side in [&mut client, &mut server] {
                let error = side.read(&mut [0; 10]).await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            }
        });
        assert!(matches!(end, End::Cut), "{end:?}");
        assert!(!session.is_broken());
    });
}

#[test]
fn a_session_that_the_peer_closed_is_not_quiet() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let session = Session::new(near);
        assert!(session.is_quiet());
        Session::new(far).close();
        super::io::readable(session.tcp()).await.unwrap();
        assert!(!session.is_quiet());
    });
}

/// The server stops; what the client sent before it heard of that is served all the same.
#[test]
fn a_session_that_goes_away_serves_what_is_on_its_way() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let (apps, mut served) = tokio::sync::mpsc::unbounded_channel();
        let (mut session, mut server) = (Session::new(near), Session::new(far));
        server.go_away().await.unwrap();
        serve(server, apps, Rc::default());
        let (mut client, agent) = pair().await;
        client.write_all(b"asked before").await.unwrap();
        super::io::readable(&agent).await.unwrap();
        let early = Early::new(&agent);
        assert_eq!(session.open(target(TARGET), &early).await.unwrap(), Answer::Opened);
        assert!(session.is_leaving(), "and the session is used no more after it");
        let sent = early.sent();
        let mut app = served.recv().await.unwrap();
        let talk = async {
            let mut heard = [0; 12];
            app.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"asked before");
            drop((app, client));
        };
        let counts = Counts::default();
        tokio::join!(talk, session.relay(agent, Side::Client, sent, &counts, forever()));
    });
}

/// An idle session that was told so is not taken again.
#[test]
fn a_session_that_goes_away_is_not_quiet() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let (session, mut server) = (Session::new(near), Session::new(far));
        assert!(session.is_quiet());
        server.go_away().await.unwrap();
        super::io::readable(session.tcp()).await.unwrap();
        assert!(!session.is_quiet());
    });
}

#[test]
fn hbone_carries_many_connections_at_once() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Hbone).await;
        // The server echoes, through a socket pair as an application would.
        tokio::task::spawn_local(hbone::serve(
            far,
            |incoming| async move {
                if incoming.destination.port() == 1 {
                    return incoming.refuse(Refusal::Unreachable);
                }
                let (agent, mut app) = pair().await;
                tokio::task::spawn_local(async move {
                    let (mut read, mut write) = app.split();
                    tokio::io::copy(&mut read, &mut write).await.unwrap();
                    write.shutdown().await.unwrap();
                });
                let (send, receive) = incoming.accept().unwrap();
                hbone::relay(agent, send, receive, Side::Server, &Counts::default(), forever()).await;
            },
            forever(),
        ));
        let connection = hbone::Connection::start(near).await.unwrap();
        let baggage = http::HeaderValue::from_static("k8s.namespace.name=test");
        let refused = hbone::open(&connection, target("10.1.2.3:1").destination, &baggage).await.unwrap();
        assert!(matches!(refused, Err(Refusal::Unreachable)));
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0u8..20 {
            let (connection, baggage) = (connection.clone(), baggage.clone());
            tasks.spawn_local(async move {
                let _place = connection.place().unwrap();
                let (send, receive) =
                    hbone::open(&connection, target(TARGET).destination, &baggage).await.unwrap().unwrap();
                let (mut client, agent) = pair().await;
                let counts = Counts::default();
                let (end, ()) =
                    tokio::join!(hbone::relay(agent, send, receive, Side::Client, &counts, forever()), async {
                        let bytes = vec![n; 1_000_000];
                        let (mut read, mut write) = client.split();
                        let mut back = Vec::new();
                        let (_, read) = tokio::join!(
                            async {
                                write.write_all(&bytes).await.unwrap();
                                write.shutdown().await.unwrap();
                            },
                            read.read_to_end(&mut back)
                        );
                        read.unwrap();
                        assert!(back == bytes);
                    });
                assert!(matches!(end, hbone::End::Finished), "{end:?}");
            });
        }
        tasks.join_all().await;
        assert!(connection.is_idle());
    });
}

/// ztunnel opens so many before it has heard how many the server allows (RFC 9113, 6.5.2: it should be no fewer).
#[test]
fn a_client_of_hbone_may_have_a_hundred_open_at_once() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Hbone).await;
        let handle = |incoming: hbone::Incoming| async move {
            let _open = incoming.accept().unwrap();
            forever().await;
        };
        tokio::task::spawn_local(hbone::serve(far, handle, forever()));
        let connection = hbone::Connection::start(near).await.unwrap();
        let baggage = http::HeaderValue::from_static("");
        let mut open = Vec::new();
        for _ in 0..100 {
            open.push(hbone::open(&connection, target(TARGET).destination, &baggage).await.unwrap().unwrap());
        }
    });
}

/// As RFC 9113 (8.5) wants it, and not as CANCEL, which ztunnel reads as the stream's end.
#[test]
fn a_reset_crosses_hbone_as_a_connect_error() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Hbone).await;
        let (streams, mut served) = tokio::sync::mpsc::unbounded_channel();
        let handle = move |incoming: hbone::Incoming| {
            let streams = streams.clone();
            async move { streams.send(incoming.accept().unwrap()).unwrap() }
        };
        tokio::task::spawn_local(hbone::serve(far, handle, forever()));
        let connection = hbone::Connection::start(near).await.unwrap();
        let baggage = http::HeaderValue::from_static("");
        let (send, receive) = hbone::open(&connection, target(TARGET).destination, &baggage).await.unwrap().unwrap();
        let (_send, mut body) = served.recv().await.unwrap();
        let (client, agent) = pair().await;
        super::io::reset(client);
        let end = hbone::relay(agent, send, receive, Side::Client, &Counts::default(), forever()).await;
        assert!(matches!(end, hbone::End::LocalReset(_)), "{end:?}");
        let seen = body.data().await.unwrap().unwrap_err();
        assert_eq!(seen.reason(), Some(h2::Reason::CONNECT_ERROR));
    });
}

#[test]
fn a_stream_whose_reader_stands_still_does_not_stop_the_others() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Hbone).await;
        let (apps, mut served) = tokio::sync::mpsc::unbounded_channel();
        tokio::task::spawn_local(hbone::serve(
            far,
            move |incoming| {
                let apps = apps.clone();
                async move {
                    let (agent, app) = pair().await;
                    apps.send(app).unwrap();
                    let (send, receive) = incoming.accept().unwrap();
                    hbone::relay(agent, send, receive, Side::Server, &Counts::default(), forever()).await;
                }
            },
            forever(),
        ));
        let connection = hbone::Connection::start(near).await.unwrap();
        let baggage = http::HeaderValue::from_static("");
        let mut clients = Vec::new();
        let mut stuck = Vec::new();
        // As many as may share the connection, all but the last with a server that reads nothing.
        for n in 0..hbone::MAX_STREAMS {
            let _place = connection.place().unwrap();
            let (send, receive) =
                hbone::open(&connection, target(TARGET).destination, &baggage).await.unwrap().unwrap();
            let (client, agent) = pair().await;
            tokio::task::spawn_local(async move {
                let _place = _place;
                hbone::relay(agent, send, receive, Side::Client, &Counts::default(), forever()).await;
            });
            let server = served.recv().await.unwrap();
            if n + 1 < hbone::MAX_STREAMS {
                stuck.push(server);
                // Fills every buffer on the way: until the socket takes no more for a while.
                let bytes = vec![0; 65536];
                while tokio::time::timeout(Duration::from_millis(50), client.writable()).await.is_ok() {
                    drop(client.try_write(&bytes));
                }
                clients.push(client);
            } else {
                let (mut client, mut server) = (client, server);
                client.write_all(b"small").await.unwrap();
                let mut small = [0; 5];
                server.read_exact(&mut small).await.unwrap();
                assert_eq!(&small, b"small");
            }
        }
    });
}

#[test]
fn keys_are_changed_when_the_peer_asks_and_when_they_are_worn() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let (mut sealer, mut opener) = (near.sealer, far.opener);
        for round in 0..3 {
            let update = sealer.key_update().unwrap();
            let mut record = update.to_vec();
            assert_eq!(super::record::Opener::record_len(&record).unwrap(), Some(record.len()));
            assert_eq!(opener.open(&mut record).unwrap(), super::record::Opened::Control);
            let mut record = vec![0; super::record::OVERHEAD + 5];
            record[5..10].copy_from_slice(b"hello");
            sealer.seal(&mut record).unwrap();
            assert_eq!(opener.open(&mut record).unwrap(), super::record::Opened::Data(5), "round {round}");
            assert_eq!(&record[5..10], b"hello");
        }
    });
}

#[test]
fn a_changed_byte_is_found() {
    on_worker(async {
        let (near, far) = Pki::new().await.tunnel(Tunnel::Session).await;
        let (mut sealer, mut opener) = (near.sealer, far.opener);
        let mut record = vec![7; super::record::OVERHEAD + 100];
        sealer.seal(&mut record).unwrap();
        record[50] ^= 1;
        assert!(matches!(opener.open(&mut record), Err(super::record::RecordError::Forged)));
    });
}

#[test]
fn a_stranger_gets_no_tunnel() {
    on_worker(async {
        let (ours, theirs) = (Pki::new().await, Pki::new().await);
        let (near, far) = pair().await;
        let client = theirs.certificates.get(&id("a")).unwrap().client.clone();
        let server = ours.certificates.get(&id("b")).unwrap().server.clone();
        let (near, far) = tokio::join!(handshake::client(near, client), handshake::server(far, server));
        assert!(matches!(near, Err(HandshakeError::Tls(_))), "{:?}", near.err());
        assert!(matches!(far, Err(HandshakeError::Tls(_) | HandshakeError::Closed)), "{:?}", far.err());
    });
}
