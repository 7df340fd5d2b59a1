//! How requests and answers are framed: what is refused, what passes unchanged.

use super::*;

/// RFC 9112, section 6.3 and what attackers make of it: each is refused, and nothing behind it is taken for a request.
#[test]
fn what_two_parsers_could_read_in_two_ways_is_refused() {
    const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: web\r\n\r\n";
    on_worker(async {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let paths = seen.clone();
        let web = origin(Protocol::Http1, move |request| {
            paths.borrow_mut().push(request.uri().to_string());
            async move {
                let _ = whole(request.into_body()).await;
                text("ok")
            }
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[web.address])]).await;
        for (what, head) in [
            ("two lengths", "Content-Length: 1\r\nContent-Length: 2\r\n"),
            ("a list of lengths", "Content-Length: 1, 2\r\n"),
            ("a list of one length", "Content-Length: 1, 1\r\n"),
            ("a signed length", "Content-Length: +1\r\n"),
            ("a negative length", "Content-Length: -1\r\n"),
            ("a length in hexadecimal", "Content-Length: 0x1\r\n"),
            ("an empty length", "Content-Length: \r\n"),
            ("a length too large", "Content-Length: 99999999999999999999999\r\n"),
            ("chunked is not last", "Transfer-Encoding: chunked, gzip\r\n"),
            ("no chunked", "Transfer-Encoding: gzip\r\n"),
            ("identity", "Transfer-Encoding: identity\r\n"),
            ("a coding that is none", "Transfer-Encoding: xchunked\r\n"),
            ("a coding before chunked", "Transfer-Encoding: gzip, chunked\r\n"),
            ("chunked twice", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
            ("obs-fold", "X-A: b\r\n c\r\n"),
            ("obs-fold of a coding", "Transfer-Encoding:\r\n chunked\r\n"),
            ("a space before the colon", "Transfer-Encoding : chunked\r\n"),
            ("a tab before the colon", "Content-Length\t: 1\r\n"),
            ("a bare CR", "X-A: b\rTransfer-Encoding: chunked\r\n"),
            ("a bare CR in a name", "X\rA: b\r\n"),
            ("a NUL", "X-A: b\0c\r\n"),
            ("a line without a colon", "Transfer-Encoding\r\n"),
            ("an empty name", ": chunked\r\n"),
            ("a second host", "Host: other\r\n"),
        ] {
            let mut client = Raw::to(engine.address).await;
            client.say(&format!("POST /first HTTP/1.1\r\nHost: web\r\n{head}\r\n{SMUGGLED}")).await;
            let (answer, _) = client.hear().await;
            assert!(answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.1 501"), "{what}: {answer}");
            let mut rest = Vec::new();
            // In order, or by a reset since something was left unread.
            let _ = client.0.read_to_end(&mut rest).await;
            assert!(rest.is_empty(), "{what}: {:?}", String::from_utf8_lossy(&rest));
        }
        for first_line in [
            "GET /first HTTP/1.1\r\nX: y\r\n\r\n",
            "GET /first HTTP/1.0\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET  /first HTTP/1.1\r\nHost: web\r\n\r\n",
            "GET /fi rst HTTP/1.1\r\nHost: web\r\n\r\n",
            "GET /first HTTP/1.2\r\nHost: web\r\n\r\n",
            "GET /first\r\n\r\n",
            " GET /first HTTP/1.1\r\nHost: web\r\n\r\n",
            "G(T /first HTTP/1.1\r\nHost: web\r\n\r\n",
        ] {
            let mut client = Raw::to(engine.address).await;
            let (answer, _) = client.ask(first_line).await;
            assert!(
                answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.0 400"),
                "{first_line:?}: {answer}"
            );
        }
        assert_eq!(*seen.borrow(), Vec::<String>::new(), "nothing was passed on");
    });
}

/// As RFC 9112 (6.1) lets a server do: by the coding alone, without the length, and nothing more is taken after it.
#[test]
fn a_length_beside_chunked_is_taken_off_and_the_connection_ends() {
    on_worker(async {
        let web = echo("web").await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[web.address])]).await;
        for head in
            ["Content-Length: 3\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 3"]
        {
            let mut client = Raw::to(engine.address).await;
            let smuggled = "GET /smuggled HTTP/1.1\r\nHost: web\r\n\r\n";
            client
                .say(&format!("POST /first HTTP/1.1\r\nHost: web\r\n{head}\r\n\r\n2\r\nhi\r\n0\r\n\r\n{smuggled}"))
                .await;
            let (answer, body) = client.hear().await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            assert!(body.ends_with("\nhi") && !body.contains("content-length"), "{body}");
            let mut rest = Vec::new();
            let _ = client.0.read_to_end(&mut rest).await;
            assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
        }
    });
}

#[test]
fn heads_that_are_too_large_are_refused() {
    on_worker(async {
        let web = echo("web").await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[web.address])]).await;
        let many: String = (0..limits::HEADERS + 1).map(|n| format!("x-{n}: 1\r\n")).collect();
        let long = format!("x: {}\r\n", "y".repeat(limits::HEAD + 10_000));
        for head in [many, long] {
            let mut client = Raw::to(engine.address).await;
            let (answer, _) = client.ask(&format!("GET / HTTP/1.1\r\nHost: web\r\n{head}\r\n")).await;
            assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
        }
        let fits = format!("x: {}\r\n", "y".repeat(limits::HEAD - 1_000));
        let answer = Raw::to(engine.address).await.ask(&format!("GET / HTTP/1.1\r\nHost: web\r\n{fits}\r\n")).await;
        assert_eq!(code(&answer), 200);
    });
}

#[test]
fn a_request_passes_and_its_connection_is_used_again() {
    on_worker(async {
        let web = echo("web").await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[web.address])]).await;
        let mut client = Raw::to(engine.address).await;
        for n in 0..3 {
            let request = format!(
                "POST /a/b?c={n} HTTP/1.1\r\nHost: web:80\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\nX-Kept: yes\r\n\
                 Content-Length: 5\r\n\r\nhello"
            );
            let (head, body) = client.ask(&request).await;
            assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
            let id = body.split("x-request-id: ").nth(1).expect("an id was given").split('\n').next().unwrap();
            let expected = format!(
                "web POST /a/b?c={n}\ncontent-length: 5\nhost: web:80\nx-forwarded-proto: http\nx-kept: yes\n\
                 x-request-id: {id}\n\nhello"
            );
            assert_eq!(body, expected);
        }
        // Another client's requests take the same connection.
        assert_eq!(code(&get(engine.address, "/").await), 200);
        assert_eq!(web.connections.get(), 1);
        let ok = ["response_code=\"200\"", "response_flags=\"-\"", "destination_service_name=\"web\""];
        eventually("all are counted", || metric(&engine, "istio_requests_total", &ok) == 4.0).await;
        assert!(metric(&engine, "istio_request_bytes_sum", &ok) > 15.0);
    });
}

#[test]
fn requests_that_come_together_are_answered_in_order() {
    on_worker(async {
        let web = echo("web").await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[web.address])]).await;
        let mut client = Raw::to(engine.address).await;
        let all: String = (0..20).map(|n| format!("GET /{n} HTTP/1.1\r\nHost: web\r\n\r\n")).collect();
        client.say(&all).await;
        for n in 0..20 {
            let (_, body) = client.hear().await;
            assert!(body.starts_with(&format!("web GET /{n}\n")), "{body}");
        }
    });
}

#[test]
fn answers_without_a_body_and_old_clients() {
    on_worker(async {
        let web = origin(Protocol::Http1, |request| async move {
            match request.uri().path() {
                "/204" => {
                    let mut answer = Response::new(full(""));
                    *answer.status_mut() = 204.try_into().unwrap();
                    answer
                }
                "/304" => {
                    let mut answer = Response::new(full(""));
                    *answer.status_mut() = 304.try_into().unwrap();
                    answer.headers_mut().insert("etag", "x".parse().unwrap());
                    answer
                }
                "/chunked" => {
                    let (sender, body) = chunks();
                    sender.send(Frame::data("in ".into())).unwrap();
                    sender.send(Frame::data("chunks".into())).unwrap();
                    Response::new(body)
                }
                _ => text("twelve bytes"),
            }
        })
        .await;
        let engine = engine(vec![all_to_web()], &[("web", "http", &[web.address])]).await;
        let mut client = Raw::to(engine.address).await;
        client.say("HEAD / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        let head = client.until("\r\n\r\n").await.to_ascii_lowercase();
        assert!(head.contains("content-length: 12\r\n"), "{head}");
        for path in ["/204", "/304", "/chunked", "/"] {
            let (head, body) = client.ask(&format!("GET {path} HTTP/1.1\r\nHost: web\r\n\r\n")).await;
            let expected = match path {
                "/chunked" => "in chunks",
                "/" => "twelve bytes",
                _ => "",
            };
            assert_eq!(body, expected, "{path} {head}");
        }
        // HTTP/1.0 knows no chunks, and needs no host.
        let mut old = Raw::to(engine.address).await;
        old.say("GET /chunked HTTP/1.0\r\n\r\n").await;
        let answer = old.rest().await;
        assert!(answer.starts_with("HTTP/1.0 200") && !answer.contains("chunked\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\nin chunks"), "{answer}");
    });
}

#[test]
fn a_client_that_waits_for_100_gets_it_only_where_its_body_is_wanted() {
    on_worker(async {
        let web = echo("web").await;
        let mut wanted = all_to_web();
        wanted.matches[0].path = Some(crate::model::http::PathMatch::elements("/yes"));
        let engine = engine(vec![wanted], &[("web", "http", &[web.address])]).await;
        let ask = |path: &str| {
            format!("PUT {path} HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        };
        let mut client = Raw::to(engine.address).await;
        client.say(&ask("/yes")).await;
        assert!(client.until("\r\n\r\n").await.starts_with("HTTP/1.1 100"));
        let (head, body) = client.ask("body").await;
        assert!(head.starts_with("HTTP/1.1 200") && body.ends_with("\nbody") && !body.contains("expect"), "{body}");
        let mut client = Raw::to(engine.address).await;
        assert_eq!(code(&client.ask(&ask("/no")).await), 404);
    });
}
