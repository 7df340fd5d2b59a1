//! Heads of requests and answers: what holds for one hop is taken off, what the next one needs is put on.

use http::header::{CONNECTION, COOKIE, EXPECT, HOST, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Uri, Version};

use super::body::RequestBody;
use super::pool::Protocol;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// A request's head, free of what held for the client's connection alone.
#[derive(Clone)]
pub struct Head {
    pub method: Method,
    /// `*` and the empty path of CONNECT too.
    pub path: PathAndQuery,
    pub authority: HeaderValue,
    pub headers: HeaderMap,
    /// What the client would like to speak instead.
    pub upgrade: Option<HeaderValue>,
}

/// Why a request is not one that may be passed on. The connection ends with the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bad(pub u16, pub &'static str);

impl Head {
    /// `host` is for those of HTTP/1.0, who need name none.
    pub fn read(parts: http::request::Parts, host: &str) -> Result<Self, Bad> {
        let http::request::Parts { method, uri, version, mut headers, .. } = parts;
        // How the body is framed must be beyond doubt (RFC 9112, 6.1): hyper has refused what is ambiguous, and has
        // taken off the length where both are there; a coding beside `chunked` would be lost on the next hop.
        if let Some(coding) = headers.get(TRANSFER_ENCODING)
            && (!coding.as_bytes().eq_ignore_ascii_case(b"chunked")
                || headers.get_all(TRANSFER_ENCODING).iter().count() > 1)
        {
            return Err(Bad(501, "only the transfer coding chunked is spoken here"));
        }
        let authority = authority(&uri, &headers, version, host)?;
        let upgrade = match version {
            Version::HTTP_11 if has_token(&headers, "upgrade") => headers.get(UPGRADE).cloned(),
            _ => None,
        };
        // HTTP/2 over the same connection is ours to offer, and is not offered: the answer then is HTTP/1.1.
        let upgrade = upgrade.filter(|to| !to.as_bytes().to_ascii_lowercase().starts_with(b"h2c"));
        one_hop(&mut headers, true);
        headers.remove(HOST);
        headers.remove(EXPECT);
        headers.remove(HTTP2_SETTINGS);
        let path = uri.into_parts().path_and_query.unwrap_or(PathAndQuery::from_static("/"));
        Ok(Self { method, path, authority, headers, upgrade })
    }

    /// What the agent adds. Not more than the server needs to follow a request and to know how it was asked:
    /// `x-forwarded-for` stays as it came, since the server sees the client's own address.
    pub fn describe(&mut self, id: impl FnOnce() -> HeaderValue) {
        if !self.headers.contains_key(REQUEST_ID) {
            self.headers.insert(REQUEST_ID, id());
        }
        if !self.headers.contains_key(FORWARDED_PROTO) {
            self.headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
        }
    }

    pub fn request_id(&self) -> Option<&HeaderValue> {
        self.headers.get(REQUEST_ID)
    }

    /// The request as it is sent over a connection of this protocol.
    pub fn into_request(self, protocol: Protocol, body: RequestBody) -> Request<RequestBody> {
        let Self { method, path, authority, mut headers, upgrade } = self;
        let authority_of = |value: &HeaderValue| Authority::try_from(value.as_bytes()).ok();
        let mut uri = http::uri::Parts::default();
        let version = match protocol {
            Protocol::Http1 if method == Method::CONNECT => {
                uri.authority = authority_of(&authority);
                headers.insert(HOST, authority);
                Version::HTTP_11
            }
            Protocol::Http1 => {
                one_cookie(&mut headers);
                headers.insert(HOST, authority);
                if let Some(to) = upgrade {
                    headers.insert(UPGRADE, to);
                    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
                }
                uri.path_and_query = Some(path);
                Version::HTTP_11
            }
            Protocol::Http2 if method == Method::CONNECT => {
                uri.authority = authority_of(&authority);
                Version::HTTP_2
            }
            Protocol::Http2 => {
                uri.scheme = Some(Scheme::HTTP);
                uri.authority = authority_of(&authority);
                uri.path_and_query = Some(path);
                Version::HTTP_2
            }
        };
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.version_mut() = version;
        *request.headers_mut() = headers;
        if let Ok(uri) = Uri::from_parts(uri) {
            *request.uri_mut() = uri;
        }
        request
    }
}

/// Whom the client asks: one name, and no doubt about it (RFC 9112, 3.2).
fn authority(uri: &Uri, headers: &HeaderMap, version: Version, host: &str) -> Result<HeaderValue, Bad> {
    let mut hosts = headers.get_all(HOST).iter();
    let (first, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err(Bad(400, "there are several host headers"));
    }
    let value = match (uri.authority(), first) {
        (Some(authority), _) => HeaderValue::from_str(authority.as_str()).ok(),
        (None, Some(host)) => Some(host.clone()),
        (None, None) if version == Version::HTTP_10 => HeaderValue::from_str(host).ok(),
        (None, None) => return Err(Bad(400, "there is no host header")),
    };
    let valid = value.filter(|value| {
        let parsed = Authority::try_from(value.as_bytes());
        parsed.is_ok_and(|authority| !authority.as_str().contains('@') && !authority.host().is_empty())
    });
    valid.ok_or(Bad(400, "the host header is no host"))
}

/// Takes off what holds for one hop (RFC 9110, 7.6.1). `TE: trailers` is kept in requests: gRPC asks it of all on the way.
pub fn one_hop(headers: &mut HeaderMap, is_request: bool) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
            .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
            .filter(|name| *name != HOST && *name != TE)
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(TRANSFER_ENCODING);
    headers.remove(UPGRADE);
    if is_request && headers.contains_key(TE) {
        let trailers = tokens(headers, &TE).any(|t| t.eq_ignore_ascii_case("trailers"));
        match trailers {
            true => drop(headers.insert(TE, HeaderValue::from_static("trailers"))),
            false => drop(headers.remove(TE)),
        }
    }
}

/// HTTP/2 may send a cookie in pieces, which HTTP/1 does not know (RFC 9113, 8.2.3).
fn one_cookie(headers: &mut HeaderMap) {
    let mut pieces = headers.get_all(COOKIE).iter();
    if let (Some(first), Some(second)) = (pieces.next(), pieces.next()) {
        let mut whole = first.as_bytes().to_vec();
        for piece in [second].into_iter().chain(pieces) {
            whole.extend_from_slice(b"; ");
            whole.extend_from_slice(piece.as_bytes());
        }
        if let Ok(whole) = HeaderValue::from_bytes(&whole) {
            headers.insert(COOKIE, whole);
        }
    }
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

/// Whether `Connection` names it.
fn has_token(headers: &HeaderMap, token: &str) -> bool {
    tokens(headers, &CONNECTION).any(|found| found.eq_ignore_ascii_case(token))
}

/// A version 4 UUID, as Envoy makes them.
pub fn new_id() -> HeaderValue {
    let random: u128 = rand::random();
    let id = random & !(0xf << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let text = format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        id >> 96,
        id >> 80 & 0xffff,
        id >> 64 & 0xffff,
        id >> 48 & 0xffff,
        id & 0xffff_ffff_ffff
    );
    HeaderValue::from_str(&text).expect("hexadecimal digits are a value")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(request: http::request::Builder) -> Result<Head, Bad> {
        Head::read(request.body(()).unwrap().into_parts().0, "web.shop.svc")
    }

    #[test]
    fn what_holds_for_one_hop_is_taken_off() {
        let request = Request::get("/a?b")
            .header("host", "web")
            .header("connection", "keep-alive, X-Secret")
            .header("connection", "host, te")
            .header("x-secret", "1")
            .header("keep-alive", "timeout=5")
            .header("proxy-connection", "close")
            .header("te", "gzip;q=0.5, Trailers")
            .header("transfer-encoding", "chunked")
            .header("upgrade", "h2c")
            .header("http2-settings", "AAMAAABk")
            .header("expect", "100-continue")
            .header("trailer", "x-sum")
            .header("x-kept", "1");
        let head = read(request).unwrap();
        let mut left: Vec<_> = head.headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
        left.sort();
        assert_eq!(left, ["te: trailers", "trailer: x-sum", "x-kept: 1"]);
        assert_eq!((head.authority, head.path.as_str(), head.upgrade), ("web".parse().unwrap(), "/a?b", None));
    }

    #[test]
    fn an_upgrade_is_asked_for_where_the_client_has_asked_for_it() {
        let with = |connection: &str, version| {
            let request = Request::get("/").version(version).header("host", "web").header("upgrade", "websocket");
            read(request.header("connection", connection)).unwrap().upgrade
        };
        assert_eq!(with("Upgrade", Version::HTTP_11).unwrap(), "websocket");
        assert_eq!(with("keep-alive", Version::HTTP_11), None);
        assert_eq!(with("Upgrade", Version::HTTP_10), None);
        let request = Request::get("/").header("host", "web").header("upgrade", "websocket");
        let head = read(request.header("connection", "upgrade")).unwrap();
        let sent = head.into_request(Protocol::Http1, RequestBody::Empty);
        assert_eq!(
            (&sent.headers()["upgrade"], &sent.headers()["connection"]),
            (&"websocket".parse().unwrap(), &"upgrade".parse().unwrap())
        );
    }

    #[test]
    fn there_is_one_host_and_it_is_one() {
        let hosts = |hosts: &[&str], version| {
            let request = Request::get("/").version(version);
            read(hosts.iter().fold(request, |r, host| r.header("host", *host))).map(|head| head.authority)
        };
        assert_eq!(hosts(&["web:80"], Version::HTTP_11).unwrap(), "web:80");
        assert_eq!(hosts(&[], Version::HTTP_10).unwrap(), "web.shop.svc");
        for bad in [&[][..], &["a", "a"], &["a b"], &["user@a"], &[""], &["a/b"], &["a,b c"]] {
            assert_eq!(hosts(bad, Version::HTTP_11).unwrap_err().0, 400, "{bad:?}");
        }
        // The request line's own counts (RFC 9112, 3.2.2).
        let absolute = read(Request::get("http://real/x").header("host", "other")).unwrap();
        assert_eq!((absolute.authority, absolute.path.as_str()), ("real".parse().unwrap(), "/x"));
    }

    #[test]
    fn no_other_coding_is_passed_on() {
        let coded = |coding: &str| read(Request::post("/").header("host", "a").header("transfer-encoding", coding));
        assert!(coded("Chunked").is_ok());
        for coding in ["gzip, chunked", "identity", "chunked, chunked"] {
            assert_eq!(
                coded(coding).err(),
                Some(Bad(501, "only the transfer coding chunked is spoken here")),
                "{coding}"
            );
        }
    }

    #[test]
    fn a_cookie_in_pieces_is_put_together_for_http1() {
        let pieces = Request::get("/").header("host", "a").header("cookie", "a=1").header("cookie", "b=2");
        let head = read(pieces).unwrap();
        let cookies = |protocol| {
            let request = head.clone().into_request(protocol, RequestBody::Empty);
            request.headers().get_all("cookie").iter().map(|c| c.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(cookies(Protocol::Http1), ["a=1; b=2"]);
        assert_eq!(cookies(Protocol::Http2), ["a=1", "b=2"]);
    }

    #[test]
    fn ids_are_uuids_of_version_4() {
        let ids: Vec<_> = (0..50).map(|_| new_id().to_str().unwrap().to_owned()).collect();
        for id in &ids {
            assert_eq!((id.len(), &id[14..15]), (36, "4"), "{id}");
            assert!(matches!(&id[19..20], "8" | "9" | "a" | "b"), "{id}");
        }
        assert_ne!(ids[0], ids[1]);
    }
}
