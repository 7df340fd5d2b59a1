//! What matches, as tables.

use super::*;
use crate::model::ObjectRef;
use crate::model::http::{Action, HeaderEdits, Name, Pattern, Rewrite, Timeouts};

fn rule(name: &str, matches: Vec<HttpMatch>) -> Arc<HttpRule> {
    let object = ObjectRef { file: String::new(), kind: "HTTPRoute".into(), namespace: "a".into(), name: name.into() };
    Arc::new(HttpRule {
        object: Arc::new(object),
        place: "spec.rules[0]".into(),
        name: None,
        matches,
        action: Action::Forward(Vec::new()),
        rewrite: Rewrite::default(),
        request: HeaderEdits::default(),
        response: HeaderEdits::default(),
        mirrors: Vec::new(),
        fault: None,
        cors: None,
        timeouts: Timeouts::default(),
        retry: None,
        persistence: None,
    })
}

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
}

/// `METHOD http://authority/path?query` with these headers, from namespace `shop`, label `app: web`.
fn is_match(wanted: HttpMatch, line: &str, headers: &HeaderMap) -> bool {
    let (method, url) = line.split_once(' ').unwrap();
    let url: http::Uri = url.parse().unwrap();
    let labels = BTreeMap::from([("app".into(), "web".into())]);
    let request = Request {
        method: &method.parse().unwrap(),
        path: url.path(),
        query: url.query(),
        scheme: url.scheme_str().unwrap(),
        authority: url.authority().unwrap().as_str(),
        headers,
        client: Client { namespace: "shop", labels: &labels },
    };
    matches(&wanted, &request)
}

fn path(path: PathMatch) -> HttpMatch {
    HttpMatch { path: Some(path), ..HttpMatch::default() }
}

fn exact(text: &str) -> ValueMatch {
    ValueMatch::Exact(text.into())
}

#[test]
fn paths() {
    let pattern = |text| PathMatch::Pattern(Pattern::new(text).unwrap());
    for (wanted, url_path, expected) in [
        (PathMatch::Exact("/shop".into()), "/shop", true),
        (PathMatch::Exact("/shop".into()), "/shop?a", true),
        (PathMatch::Exact("/shop".into()), "/shop/", false),
        (PathMatch::Exact("/shop".into()), "/Shop", false),
        (PathMatch::Prefix("/sh".into()), "/shop", true),
        (PathMatch::Prefix("/shop".into()), "/sh", false),
        (PathMatch::elements("/shop"), "/shop", true),
        (PathMatch::elements("/shop"), "/shop/", true),
        (PathMatch::elements("/shop"), "/shop/cart", true),
        (PathMatch::elements("/shop"), "/shopping", false),
        (PathMatch::elements("/shop/"), "/shop", true),
        (PathMatch::elements("/shop/"), "/shop/cart", true),
        (PathMatch::elements("/"), "/", true),
        (PathMatch::elements("/"), "/any/thing", true),
        (pattern("/v[0-9]+/.*"), "/v12/x", true),
        (pattern("/v[0-9]+"), "/v12/x", false),
    ] {
        let line = format!("GET http://web{url_path}");
        assert_eq!(is_match(path(wanted.clone()), &line, &HeaderMap::new()), expected, "{wanted:?} {url_path}");
    }
    for wanted in [PathMatch::Exact("/Shop".into()), PathMatch::Prefix("/sHO".into())] {
        let wanted = HttpMatch { ignore_path_case: true, ..path(wanted) };
        assert!(is_match(wanted.clone(), "GET http://web/SHOP", &HeaderMap::new()), "{wanted:?}");
        assert!(!is_match(wanted, "GET http://web/sh", &HeaderMap::new()));
    }
    // A letter of several bytes where the prefix ends: no slice in its middle.
    assert!(!path_matches(&PathMatch::Elements("/a".into()), "/\u{e4}", true));
}

#[test]
fn headers_are_joined_and_may_be_absent() {
    let sent = headers(&[("x-env", "a"), ("x-env", "b"), ("cookie", "user=jason; x=1"), ("x-empty", "")]);
    let name = |text: &str| Name::new(text).unwrap();
    let pattern = |text| ValueMatch::Pattern(Pattern::new(text).unwrap());
    for (header, wanted, expected) in [
        ("x-env", exact("a,b"), true),
        ("X-Env", exact("a,b"), true),
        ("x-env", exact("a"), false),
        ("x-env", ValueMatch::Prefix("a,".into()), true),
        ("cookie", pattern("^(.*?;)?(user=jason)(;.*)?$"), true),
        ("cookie", pattern("user=jason"), false),
        ("x-empty", ValueMatch::Present, true),
        ("x-none", ValueMatch::Present, false),
        ("x-none", exact(""), false),
        ("x-empty", exact(""), true),
    ] {
        let with = HttpMatch { headers: vec![(name(header), wanted.clone())], ..HttpMatch::default() };
        let without = HttpMatch { without_headers: vec![(name(header), wanted)], ..HttpMatch::default() };
        assert_eq!(is_match(with.clone(), "GET http://web/", &sent), expected, "{with:?}");
        assert_eq!(is_match(without, "GET http://web/", &sent), !expected, "without {with:?}");
    }
    let mut odd = HeaderMap::new();
    odd.insert("x-odd", http::HeaderValue::from_bytes(b"\xff").unwrap());
    let asks = |wanted| HttpMatch { headers: vec![(name("x-odd"), wanted)], ..HttpMatch::default() };
    assert!(is_match(asks(ValueMatch::Present), "GET http://web/", &odd));
    assert!(!is_match(asks(pattern(".*")), "GET http://web/", &odd));
}

#[test]
fn the_first_of_a_querys_names_counts() {
    for (query, wanted, expected) in [
        ("a=1&b=2", exact("2"), true),
        ("b=1&b=2", exact("2"), false),
        ("b=1&b=2", exact("1"), true),
        ("b", exact(""), true),
        ("b=", exact(""), true),
        ("bb=2", exact("2"), false),
        ("b=a=c", exact("a=c"), true),
        ("b=%61", exact("a"), false),
        ("", ValueMatch::Present, false),
    ] {
        let wanted = HttpMatch { query: vec![("b".into(), wanted)], ..HttpMatch::default() };
        assert_eq!(
            is_match(wanted.clone(), &format!("GET http://web/?{query}"), &HeaderMap::new()),
            expected,
            "{query}"
        );
    }
}

#[test]
fn method_scheme_authority_and_source() {
    let some = |text: &str| Some(exact(text));
    let source = |namespace: Option<&str>, labels: &[(&str, &str)]| HttpMatch {
        source: SourceMatch {
            namespace: namespace.map(Into::into),
            labels: labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        },
        ..HttpMatch::default()
    };
    let nothing = HttpMatch::default;
    for (wanted, expected) in [
        (nothing(), true),
        (HttpMatch { method: some("POST"), ..nothing() }, true),
        (HttpMatch { method: some("GET"), ..nothing() }, false),
        (HttpMatch { scheme: some("http"), ..nothing() }, true),
        (HttpMatch { scheme: some("https"), ..nothing() }, false),
        (HttpMatch { authority: some("web:8080"), ..nothing() }, true),
        (HttpMatch { authority: some("web"), ..nothing() }, false),
        (HttpMatch { authority: Some(ValueMatch::ExactIgnoringCase("WEB:8080".into())), ..nothing() }, true),
        (source(Some("shop"), &[]), true),
        (source(Some("bank"), &[]), false),
        (source(None, &[("app", "web")]), true),
        (source(None, &[("app", "web"), ("tier", "1")]), false),
        (source(Some("bank"), &[("app", "web")]), false),
    ] {
        assert_eq!(is_match(wanted.clone(), "POST http://web:8080/", &HeaderMap::new()), expected, "{wanted:?}");
    }
}

#[test]
fn the_first_rule_counts_and_any_of_its_matches() {
    let at = |text: &str| path(PathMatch::Exact(text.into()));
    let table = RouteTable {
        rules: vec![rule("one", vec![at("/a"), at("/b")]), rule("two", vec![at("/b"), HttpMatch::default()])],
    };
    let labels = BTreeMap::new();
    let find = |path: &str| {
        let request = Request {
            method: &Method::GET,
            path,
            query: None,
            scheme: "http",
            authority: "web",
            headers: &HeaderMap::new(),
            client: Client { namespace: "shop", labels: &labels },
        };
        find(&table, &request).map(|f| (f.rule.object.name.clone(), f.matched.clone()))
    };
    assert_eq!(find("/b"), Some(("one".into(), at("/b"))));
    assert_eq!(find("/c"), Some(("two".into(), HttpMatch::default())));
    assert!(
        super::find(
            &RouteTable::default(),
            &Request {
                method: &Method::GET,
                path: "/",
                query: None,
                scheme: "http",
                authority: "web",
                headers: &HeaderMap::new(),
                client: Client { namespace: "shop", labels: &labels },
            }
        )
        .is_none()
    );
}

#[test]
fn no_path_walks_around_a_rule() {
    for (path, expected) in [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/a//b", "/a//b"),
        ("/a/./b", "/a/b"),
        ("/a/../b", "/b"),
        ("/a/%2e%2E/b", "/b"),
        ("/a/.%2e/b", "/b"),
        ("/public\\..\\admin", "/admin"),
        ("/../../etc", "/etc"),
        ("/a/..", "/"),
        ("/a/b/..", "/a/"),
        ("/a/.", "/a/"),
        ("/a/...", "/a/..."),
        ("/a/.b/..c", "/a/.b/..c"),
        ("/a/b/", "/a/b/"),
        ("/%2f..", "/%2f.."),
        ("*", "*"),
    ] {
        assert_eq!(normal_path(path), expected, "{path}");
        assert_eq!(normal_path(&normal_path(path)), expected, "{path} twice");
    }
}
