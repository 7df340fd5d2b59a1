//! What rules do to requests and answers.

use super::*;
use crate::model::http::{
    Abort, Authority, Fault, Fraction, Mirror, Name, PathMatch, PathRewrite, Redirect, RedirectPort, Respond, Value,
};

fn edits(remove: &str, set: (&str, &str)) -> HeaderEdits {
    HeaderEdits {
        remove: vec![Name::new(remove).unwrap()],
        set: vec![(Name::new(set.0).unwrap(), Value::new(set.1).unwrap())],
        add: Vec::new(),
    }
}

fn at(path: &str, rule: HttpRule) -> HttpRule {
    HttpRule { matches: vec![HttpMatch { path: Some(PathMatch::elements(path)), ..HttpMatch::default() }], ..rule }
}

#[test]
fn each_action_is_carried_out() {
    on_worker(async {
        let (web, old) = (echo("web").await, echo("old").await);
        let redirect = Redirect {
            status: 301,
            scheme: Some("https".into()),
            host: Some("new.example".into()),
            port: RedirectPort::OfScheme,
            path: None,
        };
        let mut rewritten = at("/old", rule(Action::Forward(vec![to("old", 1)])));
        rewritten.rewrite.path = Some(PathRewrite::Elements("/new".into()));
        rewritten.rewrite.authority = Value::new("old.example").map(Authority);
        rewritten.request = edits("x-gone", ("x-set", "1"));
        rewritten.response = edits("date", ("x-by", "rule"));
        let mut respond = at("/respond", rule(Action::Respond(Respond { status: 418, body: "short".into() })));
        respond.response = edits("x", ("x-by", "rule"));
        let broken = Backend { target: Target::Broken { reason: "no ReferenceGrant".into() }, ..to("web", 1) };
        let mut version = to("web", 1);
        let Target::Service { subset, .. } = &mut version.target else { unreachable!() };
        *subset = Some("v2".into());
        let rules = vec![
            at("/redirect", rule(Action::Redirect(redirect))),
            respond,
            rewritten,
            at("/broken", rule(Action::Forward(vec![broken]))),
            at("/none", rule(Action::Forward(vec![to("web", 0)]))),
            at("/nowhere", rule(Action::Forward(vec![to("nowhere", 1)]))),
            at("/empty", rule(Action::Forward(vec![to("empty", 1)]))),
            at("/subset", rule(Action::Forward(vec![version]))),
            at("/web", all_to_web()),
        ];
        let services: [(&str, &str, &[SocketAddr]); 3] =
            [("web", "http", &[web.address]), ("old", "http", &[old.address]), ("empty", "http", &[])];
        let engine = engine(rules, &services).await;
        for (path, status, flag) in [
            ("/web", 200, "-"),
            ("/other", 404, "NR"),
            ("/broken", 500, "NC"),
            ("/none", 500, "NC"),
            ("/nowhere", 500, "NC"),
            ("/subset", 500, "NC"),
            ("/empty", 503, "UH"),
            ("/respond", 418, "-"),
            ("/redirect", 301, "-"),
            // What is judged is what goes on.
            ("/x/../web/%2e%2e/other", 404, "NR"),
        ] {
            assert_eq!(code(&get(engine.address, path).await), status, "{path}");
            let labels = [&*format!("response_code=\"{status}\""), &*format!("response_flags=\"{flag}\"")];
            eventually(path, || metric(&engine, "istio_requests_total", &labels) >= 1.0).await;
        }
        let (head, body) = get(engine.address, "/redirect/a?b=c").await;
        assert!(head.contains("location: https://new.example/redirect/a?b=c\r\n"), "{head}");
        assert_eq!(body, "");
        let (head, body) = get(engine.address, "/respond").await;
        assert!(head.contains("x-by: rule\r\n") && body == "short", "{head}{body}");
        let request = "GET /old/x?q HTTP/1.1\r\nHost: web\r\nX-Gone: 1\r\nX-Request-Id: mine\r\n\r\n";
        let (head, body) = Raw::to(engine.address).await.ask(request).await;
        assert!(head.contains("x-by: rule\r\n"), "{head}");
        let expected = "old GET /new/x?q\nhost: old.example\nx-forwarded-proto: http\nx-request-id: mine\nx-set: 1\n\n";
        assert_eq!(body, expected);
    });
}

#[test]
fn shares_and_faults_are_drawn() {
    on_worker(async {
        let (web, new) = (echo("web").await, echo("new").await);
        let split = rule(Action::Forward(vec![to("web", 9), to("new", 1)]));
        let mut slow = at("/slow", split.clone());
        slow.fault = Some(Fault { delay: Some((Fraction::ALL, Duration::from_millis(300))), abort: None });
        let mut abort = at("/abort", split.clone());
        abort.fault = Some(Fault { delay: None, abort: Some((Fraction::ALL, Abort::Status(555))) });
        let mut grpc = at("/grpc", split.clone());
        grpc.fault = Some(Fault { delay: None, abort: Some((Fraction::ALL, Abort::Grpc(14))) });
        let services: [(&str, &str, &[SocketAddr]); 2] =
            [("web", "http", &[web.address]), ("new", "http", &[new.address])];
        let engine = engine(vec![slow, abort, grpc, split], &services).await;
        let mut client = Raw::to(engine.address).await;
        let mut to_new = 0;
        for _ in 0..400 {
            let (_, body) = client.ask("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
            to_new += usize::from(body.starts_with("new "));
        }
        // 40 are expected; six standard deviations away on either side is not chance.
        assert!((4..=76).contains(&to_new), "{to_new}");
        let start = std::time::Instant::now();
        assert_eq!(code(&get(engine.address, "/slow").await), 200);
        assert!(start.elapsed() >= Duration::from_millis(300));
        assert_eq!(code(&get(engine.address, "/abort").await), 555);
        let (head, _) = get(engine.address, "/grpc").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("grpc-status: 14\r\n"), "{head}");
        for flag in ["DI", "FI"] {
            let label = format!("response_flags=\"{flag}\"");
            eventually(flag, || metric(&engine, "istio_requests_total", &[&label]) >= 1.0).await;
        }
    });
}

#[test]
fn a_mirror_gets_a_copy_and_slows_nothing() {
    on_worker(async {
        let web = echo("web").await;
        let copies = Rc::new(RefCell::new(Vec::new()));
        let kept = copies.clone();
        let copy = origin(Protocol::Http1, move |request| {
            let kept = kept.clone();
            async move {
                let path = request.uri().path().to_owned();
                let body = whole(request.into_body()).await.unwrap();
                kept.borrow_mut().push((path, body.len()));
                std::future::pending().await
            }
        })
        .await;
        let mut mirrored = all_to_web();
        let mirror = |name: &str| Mirror { target: to(name, 1).target, share: Fraction::ALL };
        mirrored.mirrors = vec![mirror("copy"), mirror("nowhere")];
        let services: [(&str, &str, &[SocketAddr]); 2] =
            [("web", "http", &[web.address]), ("copy", "http", &[copy.address])];
        let engine = engine(vec![mirrored], &services).await;
        let mut client = Raw::to(engine.address).await;
        let large = "x".repeat(300_000);
        for body in ["", "small", &large] {
            let request = format!("POST /m HTTP/1.1\r\nHost: web\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            let (_, answer) = client.ask(&request).await;
            assert!(answer.ends_with(&format!("\n{body}")));
        }
        eventually("the copies arrive", || copies.borrow().len() == 3).await;
        let mut copies = copies.borrow().clone();
        copies.sort();
        assert_eq!(copies, [("/m".to_owned(), 0), ("/m".to_owned(), 5), ("/m".to_owned(), 300_000)]);
        assert_eq!(metric(&engine, "istio_requests_total", &[]), 3.0, "copies are nobody's requests");
    });
}

#[test]
fn another_origin_is_let_in_by_the_rule() {
    on_worker(async {
        let web = echo("web").await;
        let mut shared = all_to_web();
        shared.cors = Some(crate::model::http::Cors {
            origins: vec![crate::model::http::ValueMatch::Exact("https://a.example".into())],
            methods: Value::new("GET"),
            headers: None,
            max_age: None,
            expose: Value::new("x-total"),
            credentials: false,
            unmatched: crate::model::http::Preflight::Forward,
        });
        let engine = engine(vec![shared], &[("web", "http", &[web.address])]).await;
        let ask = async |method: &str, headers: &str| {
            let request = format!("{method} / HTTP/1.1\r\nHost: web\r\nOrigin: https://a.example\r\n{headers}\r\n");
            Raw::to(engine.address).await.ask(&request).await
        };
        let (head, body) = ask("OPTIONS", "Access-Control-Request-Method: GET\r\n").await;
        assert!(head.contains("access-control-allow-methods: GET\r\n") && body.is_empty(), "{head}{body}");
        let (head, body) = ask("GET", "").await;
        assert!(head.contains("access-control-allow-origin: https://a.example\r\n"), "{head}");
        assert!(body.starts_with("web GET"), "{body}");
    });
}
