//! HTTP/2, streams, tunnels, and what becomes of a request when one side leaves.

use http::HeaderMap;
use http_body_util::BodyExt;

use super::*;

fn request(method: &str, path: &str, body: AnyBody) -> Request<AnyBody> {
    Request::builder().method(method).uri(format!("http://web.shop{path}")).body(body).unwrap()
}

/// Streams as gRPC's: each message goes on as it comes, both ways at once, and trailers come last.
#[test]
fn http2_streams_both_ways_with_trailers() {
    on_worker(async {
        let web = origin(Protocol::Http2, |mut request| async move {
            assert_eq!(request.headers()["te"], "trailers");
            assert_eq!(request.uri().authority().unwrap(), "web.shop");
            let (sender, body) = chunks();
            tokio::task::spawn_local(async move {
                let mut sum = HeaderMap::new();
                while let Some(Ok(frame)) = request.body_mut().frame().await {
                    match frame.into_data() {
                        Ok(data) => sender.send(Frame::data(data)).unwrap(),
                        Err(frame) => sum = frame.into_trailers().unwrap_or_default(),
                    }
                }
                sum.insert("grpc-status", "7".parse().unwrap());
                sender.send(Frame::trailers(sum)).unwrap();
            });
            let mut answer = Response::new(body);
            answer.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            answer
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "grpc", &[web.address])]).await;
        let mut client = http2(engine.address).await;
        let (sender, body) = chunks();
        let mut call = request("POST", "/shop.Cart/Talk", body);
        call.headers_mut().insert("te", "trailers".parse().unwrap());
        call.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        let mut answer = client.send_request(call).await.unwrap();
        assert_eq!(answer.status(), 200);
        for n in 0..5 {
            let message = Bytes::from(format!("message {n}"));
            sender.send(Frame::data(message.clone())).unwrap();
            // It comes back before the next is said: nothing waits for more.
            assert_eq!(answer.body_mut().frame().await.unwrap().unwrap().into_data().unwrap(), message);
        }
        let sum = HeaderMap::from_iter([("x-sum".parse().unwrap(), "5".parse().unwrap())]);
        sender.send(Frame::trailers(sum)).unwrap();
        drop(sender);
        let trailers = answer.body_mut().frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!((&trailers["x-sum"], &trailers["grpc-status"]), (&"5".parse().unwrap(), &"7".parse().unwrap()));
        assert!(answer.body_mut().frame().await.is_none());
        let labels = ["request_protocol=\"grpc\"", "grpc_response_status=\"7\"", "response_code=\"200\""];
        eventually("it is on record", || metric(&engine, "istio_requests_total", &labels) == 1.0).await;
        // Many requests share one connection.
        let calls = (0..50).map(|_| {
            let mut client = client.clone();
            async move {
                let mut call = request("POST", "/", full("x"));
                call.headers_mut().insert("te", "trailers".parse().unwrap());
                let answer = client.send_request(call).await.unwrap();
                whole(answer.into_body()).await.unwrap()
            }
        });
        assert!(futures_util::future::join_all(calls).await.iter().all(|body| body == "x"));
        assert_eq!(web.connections.get(), 1);
    });
}

#[test]
fn a_grpc_client_is_told_in_its_own_way() {
    on_worker(async {
        let engine = engine(vec![all_to_web()], &[("web", "grpc", &[])]).await;
        let mut client = http2(engine.address).await;
        let mut call = request("POST", "/shop.Cart/Talk", full("x"));
        call.headers_mut().insert("content-type", "application/grpc+proto".parse().unwrap());
        let answer = client.send_request(call).await.unwrap();
        assert_eq!((answer.status().as_u16(), &answer.headers()["grpc-status"]), (200, &"14".parse().unwrap()));
        assert!(answer.headers()["grpc-message"].to_str().unwrap().starts_with("no healthy upstream"));
    });
}

#[test]
fn each_client_is_spoken_with_in_its_own_version() {
    on_worker(async {
        let one = echo("one").await;
        let two = origin(Protocol::Http2, |request| async move {
            text(&format!("{:?} {:?}", request.version(), request.uri().authority()))
        })
        .await;
        // Declared HTTP/2: the endpoint is asked in it, whatever the client speaks.
        let engine = engine(vec![all_to_web()], &[("web", "http2", &[two.address])]).await;
        assert_eq!(get(engine.address, "/").await.1, "HTTP/2.0 Some(web)");
        // Declared HTTP, and the client knows better.
        let engine = super::engine(vec![all_to_web()], &[("web", "http", &[two.address])]).await;
        let answer = http2(engine.address).await.send_request(request("GET", "/", full(""))).await.unwrap();
        assert_eq!(whole(answer.into_body()).await.unwrap(), "HTTP/2.0 Some(web.shop)");
        // h2c by upgrade is not offered; the answer is HTTP/1.1.
        let engine = super::engine(vec![all_to_web()], &[("web", "http", &[one.address])]).await;
        let upgrade = "GET / HTTP/1.1\r\nHost: web\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
                       HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
        let (head, body) = Raw::to(engine.address).await.ask(upgrade).await;
        assert!(head.starts_with("HTTP/1.1 200") && !body.contains("h2c"), "{head}{body}");
    });
}

#[test]
fn a_client_of_http2_is_held_to_limits() {
    on_worker(async {
        let asked = Rc::new(Cell::new(0));
        let counted = asked.clone();
        let web = origin(Protocol::Http2, move |_| {
            counted.set(counted.get() + 1);
            async { text("ok") }
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "grpc", &[web.address])]).await;
        let mut client = http2(engine.address).await;
        let mut large = request("GET", "/", full(""));
        for n in 0..100 {
            let name = http::HeaderName::try_from(format!("x-{n}")).unwrap();
            large.headers_mut().insert(name, "y".repeat(limits::HEAD / 90).parse().unwrap());
        }
        assert_eq!(client.send_request(large).await.unwrap().status(), 431);
        assert_eq!(client.send_request(request("GET", "/", full(""))).await.unwrap().status(), 200);
        assert_eq!(asked.get(), 1);
        // Streams that are opened only to be reset, before anybody has looked at them (CVE-2023-44487).
        let mut attack = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
        for stream in (1u32..1001).step_by(2) {
            // HEADERS of GET http://web/ with their end, and RST_STREAM with CANCEL.
            attack.extend_from_slice(b"\0\0\x08\x01\x05");
            attack.extend_from_slice(&stream.to_be_bytes());
            attack.extend_from_slice(b"\x82\x86\x84\x41\x03web");
            attack.extend_from_slice(b"\0\0\x04\x03\0");
            attack.extend_from_slice(&stream.to_be_bytes());
            attack.extend_from_slice(&8u32.to_be_bytes());
        }
        let mut attacker = TcpStream::connect(engine.address).await.unwrap();
        attacker.write_all(&attack).await.unwrap();
        let mut said = Vec::new();
        // To its end, or to a reset, since something of it is left unread.
        let _ = attacker.read_to_end(&mut said).await;
        assert!(asked.get() < 100, "{} of 500 were passed on", asked.get());
        let mut client = http2(engine.address).await;
        assert_eq!(client.send_request(request("GET", "/", full(""))).await.unwrap().status(), 200);
    });
}

#[test]
fn events_come_as_they_are_sent() {
    on_worker(async {
        let (sender, body) = chunks();
        let body = RefCell::new(Some(body));
        let body = Rc::new(body);
        let web = origin(Protocol::Http1, move |_| {
            let body = body.clone();
            async move { Response::new(body.borrow_mut().take().unwrap()) }
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[web.address])]).await;
        let mut client = Raw::to(engine.address).await;
        client.say("GET /events HTTP/1.1\r\nHost: web\r\n\r\n").await;
        client.until("\r\n\r\n").await;
        for n in 0..3 {
            sender.send(Frame::data(format!("data: {n}\n\n").into())).unwrap();
            client.until(&format!("data: {n}\n\n")).await;
        }
        // Of a client that leaves, the server hears.
        drop(client);
        sender.send(Frame::data("more".into())).unwrap();
        tokio::time::timeout(Duration::from_secs(30), async {
            while !sender.is_closed() {
                let _ = sender.send(Frame::data("more".into()));
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("the server goes on for nobody");
        eventually("it is on record", || metric(&engine, "istio_requests_total", &["response_flags=\"DC\""]) == 1.0)
            .await;
    });
}

#[test]
fn a_request_whose_client_leaves_is_given_up_at_the_server() {
    // By a reset, by an orderly end, and by giving up a stream.
    for (protocol, reset) in [(Protocol::Http1, true), (Protocol::Http1, false), (Protocol::Http2, false)] {
        on_worker(async move {
            struct Given(Rc<Cell<bool>>);
            impl Drop for Given {
                fn drop(&mut self) {
                    self.0.set(true);
                }
            }
            let (asked, dropped) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
            let (a, d) = (asked.clone(), dropped.clone());
            let web = origin(protocol, move |_| {
                a.set(true);
                let given = Given(d.clone());
                async move {
                    let _given = given;
                    std::future::pending().await
                }
            })
            .await;
            let engine = engine(vec![all_to_web()], &[("web", "x", &[web.address])]).await;
            match protocol {
                Protocol::Http1 => {
                    let mut client = Raw::to(engine.address).await;
                    client.say("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
                    eventually("it is asked", || asked.get()).await;
                    match reset {
                        true => crate::proxy::transport::io::reset(client.0),
                        false => drop(client),
                    }
                }
                Protocol::Http2 => {
                    let mut client = http2(engine.address).await;
                    let call = client.send_request(request("GET", "/", full("")));
                    tokio::select! {
                        _ = call => panic!("nobody answers"),
                        () = eventually("it is asked", || asked.get()) => {}
                    }
                }
            }
            eventually("the server is told", || dropped.get()).await;
            let gone = ["response_flags=\"DC\"", "response_code=\"0\""];
            eventually("it is on record", || metric(&engine, "istio_requests_total", &gone) == 1.0).await;
        });
    }
}

#[test]
fn a_client_that_has_said_all_still_gets_its_answer() {
    on_worker(async {
        let web = origin(Protocol::Http1, |request| async {
            if *request.method() == http::Method::POST {
                let _ = whole(request.into_body()).await;
                return text("whole");
            }
            // Longer than it takes to look for a client that may have left.
            tokio::time::sleep(Duration::from_millis(1500)).await;
            text("late")
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[web.address])]).await;
        let mut client = Raw::to(engine.address).await;
        client.say("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        client.0.shutdown().await.unwrap();
        assert_eq!(client.hear().await.1, "late");
        assert_eq!(client.rest().await, "", "then the connection ends");
        // Half a body is no request.
        let mut client = Raw::to(engine.address).await;
        client.say("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 10\r\n\r\nhalf").await;
        client.0.shutdown().await.unwrap();
        assert_eq!(code(&client.hear().await), 400);
        eventually("it is on record", || metric(&engine, "istio_requests_total", &["response_flags=\"DPE\""]) == 1.0)
            .await;
    });
}

/// A server that takes the upgrade and then sends back what comes.
async fn switching(answer: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(tcp.read_u8().await.unwrap());
                }
                tcp.write_all(answer.as_bytes()).await.unwrap();
                tcp.write_all(&head).await.unwrap();
                let (mut read, mut write) = tcp.split();
                tokio::io::copy(&mut read, &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            });
        }
    });
    address
}

#[test]
fn an_upgraded_connection_carries_bytes_until_both_have_ended() {
    on_worker(async {
        let answer =
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Key: 1\r\n\r\n";
        let engine = engine(vec![all_to_web()], &[("web", "http", &[switching(answer).await])]).await;
        let mut client = Raw::to(engine.address).await;
        client.say("GET /ws HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
        let head = client.until("\r\n\r\n").await.to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: websocket\r\n"), "{head}");
        assert!(head.contains("connection: upgrade\r\n") && head.contains("x-key: 1\r\n"), "{head}");
        let asked = client.until("\r\n\r\n").await.to_ascii_lowercase();
        assert!(asked.contains("connection: upgrade\r\n") && asked.contains("upgrade: websocket\r\n"), "{asked}");
        for n in 0..3 {
            client.say(&format!("frame {n}.")).await;
            client.until(&format!("frame {n}.")).await;
        }
        client.say("last").await;
        client.0.shutdown().await.unwrap();
        assert_eq!(client.rest().await, "last");
        let labels = ["response_code=\"101\"", "response_flags=\"-\""];
        eventually("it is on record", || metric(&engine, "istio_requests_total", &labels) == 1.0).await;
    });
}

#[test]
fn connect_makes_a_tunnel() {
    on_worker(async {
        let answer = "HTTP/1.1 200 OK\r\n\r\n";
        let engine = engine(vec![all_to_web()], &[("web", "http", &[switching(answer).await])]).await;
        let mut client = Raw::to(engine.address).await;
        client.say("CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n").await;
        assert!(client.until("\r\n\r\n").await.starts_with("HTTP/1.1 200"));
        let asked = client.until("\r\n\r\n").await;
        assert!(asked.starts_with("CONNECT example.com:443 HTTP/1.1\r\n"), "{asked}");
        client.say("through").await;
        client.until("through").await;
    });
}

#[test]
fn an_agent_that_drains_lets_requests_end_and_takes_no_more() {
    on_worker(async {
        let (sender, body) = chunks();
        let body = Rc::new(RefCell::new(Some(body)));
        let web = origin(Protocol::Http1, move |_| {
            let body = body.clone();
            async move { Response::new(body.borrow_mut().take().unwrap()) }
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[web.address])]).await;
        let mut idle = Raw::to(engine.address).await;
        let mut busy = Raw::to(engine.address).await;
        busy.say("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        busy.until("\r\n\r\n").await;
        engine.drain.cancel();
        assert_eq!(idle.rest().await, "");
        sender.send(Frame::data("the end".into())).unwrap();
        drop(sender);
        assert!(busy.rest().await.ends_with("0\r\n\r\n"));
    });
}

/// What has changed holds for the next request of a connection that stands.
#[test]
fn rules_are_looked_up_for_each_request() {
    on_worker(async {
        let web = echo("web").await;
        let engine = engine(vec![], &[("web", "http", &[web.address])]).await;
        let mut client = Raw::to(engine.address).await;
        let ask = "GET / HTTP/1.1\r\nHost: web\r\n\r\n";
        assert_eq!(code(&client.ask(ask).await), 404);
        let key = ServiceKey { namespace: "shop".into(), name: "web".into(), port: 80 };
        let set = |routes: Option<HttpRoutes>| {
            let mut snapshot = Snapshot::clone(&engine.world.snapshot());
            snapshot.set_http(key.clone(), routes.map(Arc::new));
            *engine.world.0.snapshot.borrow_mut() = Arc::new(snapshot);
        };
        let general = Some(Arc::new(RouteTable { rules: vec![Arc::new(all_to_web())] }));
        set(Some(HttpRoutes { general, ..HttpRoutes::default() }));
        assert_eq!(code(&client.ask(ask).await), 200);
        // Without any, it goes where the connection was made to.
        set(None);
        assert_eq!(code(&client.ask(ask).await), 200);
    });
}
