//! What is done with one request: the rule is found, and its action carried out.

use std::borrow::Cow;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONNECTION, LOCATION, UPGRADE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use hyper::body::{Body, Incoming};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::sync::oneshot;
use tokio::time::Sleep;

use super::answer::{self, Answer, AnswerBody};
use super::body::{Original, RequestBody};
use super::exchange::{Ends, Exchange};
use super::forward::{Answered, Failure, Source, forward};
use super::heads::{Bad, Head, new_id, one_hop};
use super::pool::Bare;
use super::{Asking, World};
use crate::model::Labels;
use crate::model::http::{Action, Backend, HttpRule, PathRewrite, Target};
use crate::proxy::error::ConnError;
use crate::proxy::route::{self, cors, fault};
use crate::telemetry::Flags;

/// Of a client that is no pod of this node.
static NO_LABELS: LazyLock<Labels> = LazyLock::new(Labels::new);

/// What a rule makes of a head.
struct Judged {
    rule: Arc<HttpRule>,
    path: Option<String>,
    location: Option<String>,
}

pub async fn handle<W: World>(asking: Rc<Asking<W>>, mut request: Request<Incoming>) -> Answer {
    let exchange = Exchange::new(asking.world.telemetry(), &asking.facts, &request);
    let ends = Ends(exchange.clone());
    let switches = *request.method() == Method::CONNECT || request.headers().contains_key(UPGRADE);
    let upgrade = switches.then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let mut head = match Head::read(parts, &asking.host) {
        Ok(head) => head,
        Err(Bad(code, text)) => {
            let status = StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_REQUEST);
            return answer::last(ends, status, Flags::CLIENT_ERROR, text);
        }
    };
    head.describe(new_id);
    exchange.named(Some(&head.authority), head.request_id());
    let snapshot = asking.world.snapshot();
    let table = snapshot.http(&asking.key).and_then(|routes| routes.of(&asking.namespace)).cloned();
    drop(snapshot);
    let Some(table) = table else {
        // The rules are gone since the connection came: it goes where it was made to.
        let source = source(body, &exchange, false);
        let answered = forward(&asking, &exchange, &asking.target, None, head, source).await;
        return pass(&asking, ends, answered, None, None, None, upgrade);
    };
    if let Cow::Owned(normal) = route::normal_path(head.path.path())
        && let Some(path) = path_and_query(&normal, head.path.query())
    {
        head.path = path;
    }
    let Some(Judged { rule, path, location }) = judge(&asking, &table, &head) else {
        return answer::own(ends, StatusCode::NOT_FOUND, Flags::NO_ROUTE, "no route matches the request");
    };
    exchange.found(&rule);
    let mut allowed = None;
    if let Some(rules) = &rule.cors {
        match cors::judge(rules, &head.method, &head.headers) {
            cors::Judgement::Pass => {}
            cors::Judgement::Allowed(origin) => allowed = Some(origin),
            cors::Judgement::Answer(headers) => {
                return edited(&rule, answer::with(ends, StatusCode::OK, headers, Bytes::new()));
            }
        }
    }
    if let Some(wrong) = &rule.fault {
        let (delay, abort) = fault::drawn(wrong, draw);
        if let Some(delay) = delay {
            exchange.flag(Flags::DELAYED);
            tokio::time::sleep(delay).await;
        }
        if let Some(abort) = abort {
            return edited(&rule, answer::abort(ends, abort));
        }
    }
    let backend = match &rule.action {
        Action::Forward(backends) => match route::pick(backends, draw) {
            Some(backend) => backend,
            None => {
                let text = "the rule has no backend that gets requests";
                let own = answer::own(ends, StatusCode::INTERNAL_SERVER_ERROR, Flags::NO_BACKEND, text);
                return edited(&rule, own);
            }
        },
        Action::Redirect(redirect) => {
            let status = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::FOUND);
            let mut headers = HeaderMap::new();
            if let Some(location) = location.and_then(|l| HeaderValue::try_from(l).ok()) {
                headers.insert(LOCATION, location);
            }
            return edited(&rule, answer::with(ends, status, headers, Bytes::new()));
        }
        Action::Respond(respond) => {
            let status = StatusCode::from_u16(respond.status).unwrap_or(StatusCode::OK);
            return edited(&rule, answer::with(ends, status, HeaderMap::new(), respond.body.clone()));
        }
    };
    if let Some(path) = path.and_then(|path| PathAndQuery::try_from(path).ok()) {
        head.path = path;
    }
    if let Some(authority) = &rule.rewrite.authority {
        head.authority = authority.0.0.clone();
    }
    route::apply(&rule.request, &mut head.headers);
    let drawn = || rule.mirrors.iter().filter(|mirror| route::falls_in(mirror.share, draw));
    let mirrors: Vec<&Target> = match rule.mirrors.is_empty() {
        true => Vec::new(),
        false => drawn().map(|mirror| &mirror.target).collect(),
    };
    let source = source(body, &exchange, rule.retry.is_some() || !mirrors.is_empty());
    for target in mirrors {
        let body = match &source {
            Source::Kept(original) => original.copy(),
            Source::Empty | Source::Once(_) | Source::Copy(_) => RequestBody::Empty,
        };
        mirror(&asking, target.clone(), head.clone(), body);
    }
    route::apply(&backend.request, &mut head.headers);
    let until = rule.timeouts.request.map(|limit| exchange.started() + limit);
    let forwarded = forward(&asking, &exchange, &backend.target, Some(&rule), head, source);
    let answered = match until {
        Some(until) => tokio::time::timeout_at(until.into(), forwarded).await.unwrap_or(Err(Failure::TimedOut)),
        None => forwarded.await,
    };
    let mut answer = pass(&asking, ends, answered, Some(&rule), Some(backend), until, upgrade);
    if let (Some(rules), Some(origin)) = (&rule.cors, &allowed) {
        cors::allow(rules, origin, answer.headers_mut());
    }
    answer
}

fn judge<W: World>(asking: &Asking<W>, table: &crate::model::http::RouteTable, head: &Head) -> Option<Judged> {
    let client = asking.facts.source.workload.as_ref();
    let labels = client.and_then(|workload| workload.labels.as_deref()).unwrap_or(&NO_LABELS);
    let request = route::Request {
        method: &head.method,
        path: head.path.path(),
        query: head.path.query(),
        scheme: "http",
        authority: head.authority.to_str().unwrap_or_default(),
        headers: &head.headers,
        client: route::Client { namespace: &asking.namespace, labels },
    };
    let found = route::find(table, &request)?;
    let path = |rewrite: &PathRewrite| route::path_of(rewrite, found.matched, &request);
    let location = match &found.rule.action {
        Action::Redirect(redirect) => Some(route::location(redirect, found.matched, &request, asking.key.port)),
        Action::Forward(_) | Action::Respond(_) => None,
    };
    Some(Judged { rule: found.rule.clone(), path: found.rule.rewrite.path.as_ref().map(path), location })
}

fn path_and_query(path: &str, query: Option<&str>) -> Option<PathAndQuery> {
    let all = match query {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    PathAndQuery::try_from(all).ok()
}

fn draw(below: u64) -> u64 {
    rand::random_range(0..below.max(1))
}

fn source(body: Incoming, exchange: &Rc<Exchange>, kept: bool) -> Source {
    match (body.is_end_stream(), kept) {
        (true, _) => Source::Empty,
        (false, false) => Source::Once(Some(body)),
        (false, true) => Source::Kept(Original::new(body, exchange.clone())),
    }
}

/// An answer of the agent's own in a rule's name.
fn edited(rule: &HttpRule, mut answer: Answer) -> Answer {
    route::apply(&rule.response, answer.headers_mut());
    answer
}

/// The server's answer for the client, or what there is instead.
fn pass<W: World>(
    asking: &Rc<Asking<W>>,
    ends: Ends,
    answered: Result<Answered, Failure>,
    rule: Option<&Arc<HttpRule>>,
    backend: Option<&Backend>,
    until: Option<Instant>,
    upgrade: Option<OnUpgrade>,
) -> Answer {
    let exchange = ends.0.clone();
    let Answered { response, lease, load, bare, until: of_try } = match answered {
        Ok(answered) => answered,
        Err(_) if exchange.is_broken() => {
            let text = "the request ended before its body was whole";
            return answer::last(ends, StatusCode::BAD_REQUEST, Flags::CLIENT_ERROR, text);
        }
        Err(failure) => {
            let (status, flag, text) = failure.tell();
            let mut own = answer::own(ends, status, flag, &text);
            if let Some(rule) = rule {
                route::apply(&rule.response, own.headers_mut());
            }
            return own;
        }
    };
    let (mut parts, body) = response.into_parts();
    let switched = match (parts.status, exchange.is_connect()) {
        (StatusCode::SWITCHING_PROTOCOLS, _) => true,
        (status, true) => status.is_success(),
        _ => false,
    };
    let to = parts.headers.get(UPGRADE).cloned().filter(|_| parts.status == StatusCode::SWITCHING_PROTOCOLS);
    one_hop(&mut parts.headers, false);
    if let Some(to) = to {
        parts.headers.insert(UPGRADE, to);
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    if let Some(backend) = backend {
        route::apply(&backend.response, &mut parts.headers);
    }
    if let Some(rule) = rule {
        route::apply(&rule.response, &mut parts.headers);
    }
    parts.version = http::Version::HTTP_11;
    exchange.answered(parts.status.as_u16(), &parts.headers, true);
    let body = match (switched, upgrade, bare) {
        (true, Some(client), Some(server)) => {
            tokio::task::spawn_local(tunnel(asking.clone(), ends, client, server));
            drop((lease, load));
            AnswerBody::switched(exchange)
        }
        (true, _, _) => {
            return answer::last(
                ends,
                StatusCode::BAD_GATEWAY,
                Flags::PROTOCOL_ERROR,
                "the server switches protocols unasked",
            );
        }
        (false, _, _) => {
            let until = until.into_iter().chain(of_try).min();
            let deadline = until.map(|until| -> Pin<Box<Sleep>> { Box::pin(tokio::time::sleep_until(until.into())) });
            AnswerBody::passed(body, ends, Some(lease), deadline, load)
        }
    };
    http::Response::from_parts(parts, body)
}

/// Carries bytes both ways once client and server speak something else than HTTP.
async fn tunnel<W: World>(asking: Rc<Asking<W>>, ends: Ends, client: OnUpgrade, server: oneshot::Receiver<Bare>) {
    let _held = asking.world.hold();
    let exchange = &ends.0;
    let both = tokio::join!(client, server);
    let (Ok(client), Ok(Bare { mut upstream, first, life })) = both else { return };
    let mut client = TokioIo::new(client);
    let relayed = async {
        client.write_all(&first).await?;
        copy_bidirectional(&mut client, &mut upstream).await
    };
    let result = tokio::select! {
        biased;
        () = life.stopped() => Err(ConnError::PolicyChanged),
        relayed = relayed => match relayed {
            Ok((sent, received)) => {
                exchange.add_sent(sent as usize);
                exchange.add_received(received as usize + first.len());
                Ok(())
            }
            Err(e) => Err(ConnError::ServerReset(e)),
        },
    };
    exchange.end();
    match &result {
        Ok(()) => upstream.close().await,
        Err(_) => upstream.reset().await,
    }
    life.end(&result);
}

/// Sends a copy. Nobody waits for its answer, and the client never learns of it.
fn mirror<W: World>(asking: &Rc<Asking<W>>, target: Target, head: Head, body: RequestBody) {
    /// A copy that takes longer is given up.
    const LONGEST: Duration = Duration::from_secs(60);
    let asking = asking.clone();
    tokio::task::spawn_local(async move {
        let copy = async {
            let exchange = Exchange::unseen(asking.world.telemetry(), &asking.facts);
            let answered = forward(&asking, &exchange, &target, None, head, Source::Copy(Some(body))).await?;
            let mut body = answered.response.into_body();
            while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                if frame.is_err() {
                    return Ok(());
                }
            }
            answered.lease.give_back();
            Ok::<_, Failure>(())
        };
        match tokio::time::timeout(LONGEST, copy).await {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => {
                tracing::debug!(service = %asking.host, "a mirrored request failed: {}", failure.tell().2);
            }
            Err(_) => tracing::debug!(service = %asking.host, "a mirrored request took too long"),
        }
    });
}
