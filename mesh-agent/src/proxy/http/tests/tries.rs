//! Endpoints that fail, and what the client gets then.

use super::*;
use crate::model::http::{Retry, RetryOn};

fn retry(attempts: u32, on: RetryOn) -> Option<Retry> {
    Some(Retry {
        attempts,
        on,
        per_try: None,
        backoff: Duration::from_millis(1),
        previous_hosts: false,
        least: Duration::ZERO,
    })
}

/// An address where nobody listens.
async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// A server that does something to each connection.
async fn rude<A: Future<Output = ()> + 'static>(act: impl Fn(TcpStream) -> A + 'static) -> Origin {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = Origin { address: listener.local_addr().unwrap(), connections: Rc::default() };
    let connections = origin.connections.clone();
    tokio::task::spawn_local(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            connections.set(connections.get() + 1);
            tokio::task::spawn_local(act(tcp));
        }
    });
    origin
}

/// Reads a request without a body.
async fn hear(tcp: &mut TcpStream) {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        read.push(tcp.read_u8().await.unwrap());
    }
}

#[test]
fn an_endpoint_that_takes_no_connection_is_left_behind_for_another() {
    on_worker(async {
        let web = echo("web").await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[nobody().await, web.address])]).await;
        for _ in 0..6 {
            // Without a rule that asks for it: nobody has got anything.
            assert_eq!(code(&get(engine.address, "/").await), 200);
        }
        let alone = super::engine(vec![all_to_web()], &[("web", "http", &[nobody().await])]).await;
        let answer = get(alone.address, "/").await;
        assert_eq!(code(&answer), 503);
        assert!(answer.1.starts_with("cannot reach 127.0.0.1"), "{}", answer.1);
        eventually("it is on record", || metric(&alone, "istio_requests_total", &["response_flags=\"UF\""]) == 1.0)
            .await;
    });
}

#[test]
fn a_request_is_tried_again_elsewhere_with_its_body() {
    on_worker(async {
        let tries = Rc::new(RefCell::new(Vec::new()));
        let server = async |name: &'static str, status_: u16| {
            let tries = tries.clone();
            origin(Protocol::Http1, move |request| {
                let tries = tries.clone();
                async move {
                    let body = whole(request.into_body()).await.unwrap();
                    tries.borrow_mut().push((name, body.len()));
                    if status_ == 200 { text("ok") } else { status(status_) }
                }
            })
            .await
        };
        let (bad, good) = (server("bad", 503).await, server("good", 200).await);
        let mut again = all_to_web();
        again.retry = retry(1, RetryOn { gateway_error: true, ..RetryOn::default() });
        let engine = engine(vec![again], &[("web", "http", &[bad.address, good.address])]).await;
        let mut client = Raw::to(engine.address).await;
        let post =
            |size: usize| format!("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: {size}\r\n\r\n{}", "x".repeat(size));
        for _ in 0..10 {
            assert_eq!(code(&client.ask(&post(1000)).await), 200);
        }
        let (of_bad, of_good) = {
            let tries = tries.borrow();
            assert!(tries.iter().all(|(_, size)| *size == 1000), "a body came short: {tries:?}");
            let of = |name| tries.iter().filter(|(n, _)| *n == name).count();
            (of("bad"), of("good"))
        };
        assert_eq!(of_good, 10);
        assert!(of_bad >= 1, "nothing was tried again");
        // One that is too large to keep is sent once, and fails where it fails.
        tries.borrow_mut().clear();
        let mut failed = 0;
        for _ in 0..10 {
            failed += usize::from(code(&client.ask(&post(body::KEPT + 1)).await) == 503);
        }
        assert!(failed >= 1);
        assert_eq!(tries.borrow().len(), 10);
    });
}

#[test]
fn tries_end_and_the_last_answer_is_passed_on() {
    on_worker(async {
        let count = Rc::new(Cell::new(0));
        let counted = count.clone();
        let web = origin(Protocol::Http1, move |_| {
            counted.set(counted.get() + 1);
            async { status(503) }
        })
        .await;
        let mut again = all_to_web();
        again.retry = retry(3, RetryOn { server_error: true, ..RetryOn::default() });
        let engine = engine(vec![again], &[("web", "http", &[web.address])]).await;
        let answer = get(engine.address, "/").await;
        assert_eq!((code(&answer), &*answer.1, count.get()), (503, "no", 4));
        let label = "response_flags=\"URX\"";
        eventually("it is on record", || metric(&engine, "istio_requests_total", &[label]) == 1.0).await;
    });
}

#[test]
fn a_connection_that_breaks_is_told_and_tried_again_where_the_rule_says() {
    on_worker(async {
        let rude = rude(|mut tcp| async move {
            hear(&mut tcp).await;
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[rude.address])]).await;
        assert_eq!(code(&get(engine.address, "/").await), 503);
        eventually("it is on record", || metric(&engine, "istio_requests_total", &["response_flags=\"UC\""]) == 1.0)
            .await;
        assert_eq!(rude.connections.get(), 1, "it may have done something");
        let web = echo("web").await;
        let mut again = all_to_web();
        again.retry = retry(1, RetryOn { reset: true, ..RetryOn::default() });
        let engine = super::engine(vec![again], &[("web", "http", &[rude.address, web.address])]).await;
        for _ in 0..6 {
            assert_eq!(code(&get(engine.address, "/").await), 200);
        }
    });
}

#[test]
fn an_answer_that_is_no_http_is_a_bad_gateway() {
    on_worker(async {
        let rude = rude(|mut tcp| async move {
            hear(&mut tcp).await;
            let _ = tcp.write_all(b"SSH-2.0-x\r\n\r\n").await;
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[rude.address])]).await;
        assert_eq!(code(&get(engine.address, "/").await), 502);
        eventually("it is on record", || metric(&engine, "istio_requests_total", &["response_flags=\"UPE\""]) == 1.0)
            .await;
    });
}

/// Servers end idle connections when they like, and do not say so before.
#[test]
fn a_kept_connection_that_ends_when_it_is_used_again_harms_nobody() {
    on_worker(async {
        let rude = rude(|mut tcp| async move {
            hear(&mut tcp).await;
            let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
            // Ends upon the next request instead of answering it: the worst moment.
            let _ = tcp.read_u8().await;
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[rude.address])]).await;
        let mut client = Raw::to(engine.address).await;
        for _ in 0..5 {
            assert_eq!(code(&client.ask("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await), 200);
        }
        // What might be done twice is not sent twice.
        let answer = client.ask("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n").await;
        assert_eq!(code(&answer), 503);
    });
}

#[test]
fn what_takes_too_long_is_given_up() {
    on_worker(async {
        let dropped = Rc::new(Cell::new(0));
        struct Given(Rc<Cell<usize>>);
        impl Drop for Given {
            fn drop(&mut self) {
                self.0.set(self.0.get() + 1);
            }
        }
        let gone = dropped.clone();
        let slow = origin(Protocol::Http1, move |request| {
            let given = Given(gone.clone());
            async move {
                if request.uri().path() == "/head" {
                    let (sender, body) = chunks();
                    sender.send(Frame::data("begun".into())).unwrap();
                    tokio::task::spawn_local(async move {
                        sender.closed().await;
                        drop(given);
                    });
                    return Response::new(body);
                }
                let _given = given;
                std::future::pending().await
            }
        })
        .await;
        let mut limited = all_to_web();
        limited.timeouts.request = Some(Duration::from_millis(200));
        let engine = engine(vec![limited], &[("web", "http", &[slow.address])]).await;
        assert_eq!(code(&get(engine.address, "/").await), 504);
        eventually("the server is told", || dropped.get() == 1).await;
        // An answer that has begun can only be broken off, which must not look like its end.
        let mut client = Raw::to(engine.address).await;
        client.say("GET /head HTTP/1.1\r\nHost: web\r\n\r\n").await;
        client.until("begun\r\n").await;
        let mut rest = Vec::new();
        let end = client.0.read_to_end(&mut rest).await;
        assert!(end.is_err() || rest.is_empty(), "{rest:?}");
        assert!(!rest.ends_with(b"0\r\n\r\n"));
        eventually("the server is told", || dropped.get() == 2).await;
        eventually("both are on record", || metric(&engine, "istio_requests_total", &["response_flags=\"UT\""]) == 2.0)
            .await;
        let mut per_try = all_to_web();
        per_try.retry = retry(2, RetryOn { reset: true, ..RetryOn::default() });
        per_try.timeouts.backend = Some(Duration::from_millis(100));
        let engine = super::engine(vec![per_try], &[("web", "http", &[slow.address])]).await;
        assert_eq!(code(&get(engine.address, "/").await), 504);
        eventually("each try is given up", || dropped.get() == 5).await;
    });
}
