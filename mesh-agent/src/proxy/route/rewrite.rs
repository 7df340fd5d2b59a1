//! What becomes of a request's path, and where a redirect leads.

use super::Request;
use crate::model::http::{HttpMatch, PathMatch, PathRewrite, Redirect, RedirectPort};

/// The new path with the query of the request, to be written into its first line.
pub fn path_of(rewrite: &PathRewrite, matched: &HttpMatch, request: &Request<'_>) -> String {
    let mut path = new_path(rewrite, matched, request.path);
    if let Some(query) = request.query {
        path.push('?');
        path.push_str(query);
    }
    path
}

fn new_path(rewrite: &PathRewrite, matched: &HttpMatch, path: &str) -> String {
    let new = match rewrite {
        PathRewrite::Full(new) => new.to_string(),
        PathRewrite::Pattern { pattern, substitution } => pattern.replace_all(path, substitution),
        PathRewrite::Elements(by) | PathRewrite::Prefix(by) => {
            let rest = match &matched.path {
                Some(PathMatch::Elements(prefix) | PathMatch::Prefix(prefix)) => &path[prefix.len()..],
                // What matched was the whole.
                Some(PathMatch::Exact(_) | PathMatch::Pattern(_)) => "",
                // As if `/` had been asked for, by elements or by letters.
                None => match rewrite {
                    PathRewrite::Prefix(_) => path.strip_prefix('/').unwrap_or(path),
                    _ => path,
                },
            };
            let by = match rewrite {
                PathRewrite::Elements(_) => by.trim_end_matches('/'),
                _ if rest.starts_with('/') => by.strip_suffix('/').unwrap_or(by),
                _ => by,
            };
            format!("{by}{rest}")
        }
    };
    if new.starts_with('/') { new } else { format!("/{new}") }
}

/// `Location` of a redirect. `port` is the one that the client asked.
pub fn location(redirect: &Redirect, matched: &HttpMatch, request: &Request<'_>, port: u16) -> String {
    let scheme = redirect.scheme.as_deref().unwrap_or(request.scheme);
    let (own_host, own_port) = split_authority(request.authority);
    let host = redirect.host.as_deref().unwrap_or(own_host);
    let port = match redirect.port {
        RedirectPort::Number(number) => Some(number),
        RedirectPort::OfScheme if redirect.scheme.is_some() => None,
        RedirectPort::OfScheme => Some(port),
        RedirectPort::OfRequest => own_port,
    };
    let port = match port {
        Some(port) if Some(port) != well_known(scheme) => format!(":{port}"),
        _ => String::new(),
    };
    let path = match &redirect.path {
        Some(rewrite) => path_of(rewrite, matched, request),
        None => match request.query {
            Some(query) => format!("{}?{query}", request.path),
            None => request.path.to_owned(),
        },
    };
    format!("{scheme}://{host}{port}{path}")
}

fn well_known(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// Host and port; an IPv6 address keeps its brackets.
fn split_authority(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (authority, None),
        },
        _ => (authority, None),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use http::{HeaderMap, Method};

    use super::*;
    use crate::model::http::Pattern;
    use crate::proxy::route::Client;

    fn ask<T>(authority: &str, path: &str, answer: impl FnOnce(&Request<'_>) -> T) -> T {
        let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
        let (headers, labels) = (HeaderMap::new(), BTreeMap::new());
        let client = Client { namespace: "shop", labels: &labels };
        let method = &Method::GET;
        answer(&Request { method, path, query, scheme: "http", authority, headers: &headers, client })
    }

    fn matched(path: Option<PathMatch>) -> HttpMatch {
        HttpMatch { path, ..HttpMatch::default() }
    }

    /// The table in the Gateway API's description of ReplacePrefixMatch.
    #[test]
    fn a_prefix_of_elements_is_replaced_as_the_gateway_api_says() {
        for (path, prefix, by, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo?a=b", "/foo", "/", "/?a=b"),
            ("/foo/bar", "/", "/xyz", "/xyz/foo/bar"),
        ] {
            let matched = matched(Some(PathMatch::elements(prefix)));
            let found = ask("web", path, |r| path_of(&PathRewrite::Elements(by.into()), &matched, r));
            assert_eq!(found, expected, "{path} {prefix} {by}");
        }
    }

    #[test]
    fn a_prefix_of_letters_is_replaced_as_istio_does() {
        let prefix = |text: &str| Some(PathMatch::Prefix(text.into()));
        for (path, wanted, by, expected) in [
            ("/ratings/7", prefix("/ratings"), "/v1/bookRatings", "/v1/bookRatings/7"),
            ("/api/v1", prefix("/api/"), "/", "/v1"),
            ("/api/v1", prefix("/api"), "/", "/v1"),
            ("/api", prefix("/api"), "/", "/"),
            ("/shopping", prefix("/shop"), "/mall", "/mallping"),
            ("/exact?x", Some(PathMatch::Exact("/exact".into())), "/new", "/new?x"),
            ("/a/b", Some(PathMatch::Pattern(Pattern::new("/a/.*").unwrap())), "/new", "/new"),
            ("/foo", None, "/x/", "/x/foo"),
        ] {
            let found = ask("web", path, |r| path_of(&PathRewrite::Prefix(by.into()), &matched(wanted), r));
            assert_eq!(found, expected, "{path} {by}");
        }
    }

    #[test]
    fn whole_paths_and_patterns() {
        let full = PathRewrite::Full("/one".into());
        assert_eq!(ask("web", "/a/b?c=d", |r| path_of(&full, &matched(None), r)), "/one?c=d");
        let pattern = Pattern::new("/service/([^/]+)(/.*)?").unwrap();
        let rewrite = PathRewrite::Pattern { pattern, substitution: r"\2/instance/\1".into() };
        let found = ask("web", "/service/foo/v1?q", |r| path_of(&rewrite, &matched(None), r));
        assert_eq!(found, "/v1/instance/foo?q");
        let emptied = PathRewrite::Pattern { pattern: Pattern::new(".*").unwrap(), substitution: "".into() };
        assert_eq!(ask("web", "/x", |r| path_of(&emptied, &matched(None), r)), "/");
    }

    #[test]
    fn a_redirect_changes_what_it_names() {
        let none = Redirect { status: 302, scheme: None, host: None, port: RedirectPort::OfScheme, path: None };
        let https = Redirect { scheme: Some("https".into()), ..none.clone() };
        let host = Redirect { host: Some("new.example".into()), ..none.clone() };
        let number = |n| Redirect { port: RedirectPort::Number(n), ..none.clone() };
        let of_request = Redirect { port: RedirectPort::OfRequest, ..none.clone() };
        let path = Redirect { path: Some(PathRewrite::Full("/login".into())), ..none.clone() };
        for (redirect, authority, port, expected) in [
            (&none, "web", 80, "http://web/a?b"),
            (&none, "web:8080", 8080, "http://web:8080/a?b"),
            (&https, "web:8080", 8080, "https://web/a?b"),
            (&host, "web", 80, "http://new.example/a?b"),
            (&host, "web", 8080, "http://new.example:8080/a?b"),
            (&number(8443), "web", 80, "http://web:8443/a?b"),
            (&number(80), "web:8080", 8080, "http://web/a?b"),
            (&of_request, "web:9", 80, "http://web:9/a?b"),
            (&of_request, "web", 8080, "http://web/a?b"),
            (&path, "[2001:db8::1]:80", 80, "http://[2001:db8::1]/login?b"),
            (&none, "[2001:db8::1]", 80, "http://[2001:db8::1]/a?b"),
        ] {
            let found = ask(authority, "/a?b", |r| location(redirect, &matched(None), r, port));
            assert_eq!(found, expected, "{redirect:?} {authority}");
        }
    }
}
