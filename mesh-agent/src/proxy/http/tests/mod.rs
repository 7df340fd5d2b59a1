//! The engine over loopback: real clients and servers, rules made by hand, and endpoints that are reached by plain TCP.

mod framing;
mod lives;
mod rules;
mod tries;

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::body::BoxError;
use super::life::Life;
use super::pool::{Key, Local, Pool, Protocol};
use super::*;
use crate::model::http::{Action, Backend, HeaderEdits, HttpMatch, HttpRoutes, HttpRule, RouteTable, Target};
use crate::model::{
    Algorithm, Endpoint, MeshSettings, ObjectRef, OutboundPolicy, Scope, ServiceKey, SnapshotParts, TrustDomain,
};
use crate::proxy::transport::session::Counts;
use crate::proxy::transport::upstream::Carrier;
use crate::telemetry::fixtures::workload;
use crate::telemetry::{AccessLog, Party, Reporter, Security};

type AnyBody = Pin<Box<dyn Body<Data = Bytes, Error = BoxError>>>;

/// The worker's part: endpoints in turn, over plain TCP.
#[derive(Clone)]
struct Loopback(Rc<Inner>, Option<(SocketAddr, SocketAddr)>);

struct Inner {
    snapshot: RefCell<Arc<Snapshot>>,
    telemetry: Arc<Telemetry>,
    pool: Pool,
    turn: Cell<usize>,
}

impl World for Loopback {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.0.snapshot.borrow().clone()
    }

    fn telemetry(&self) -> &Arc<Telemetry> {
        &self.0.telemetry
    }

    fn pool(&self) -> &Pool {
        &self.0.pool
    }

    fn key(&self, _: &Snapshot, endpoint: SocketAddr, protocol: Protocol) -> Key {
        let netns = crate::redirect::NetnsCookie(1);
        Key { source: "shop/a".into(), netns, client: [127, 0, 0, 1].into(), endpoint, server: None, protocol }
    }

    fn choose(&self, service: &Service, port: usize, except: &[SocketAddr]) -> Option<SocketAddr> {
        let fit: Vec<_> = service.ports[port].endpoints.iter().filter(|e| !except.contains(&e.address)).collect();
        self.0.turn.set(self.0.turn.get() + 1);
        Some(fit.get(self.0.turn.get() % fit.len().max(1))?.address)
    }

    fn has_another(&self, service: &Service, port: usize, except: &[SocketAddr]) -> bool {
        service.ports[port].endpoints.iter().any(|e| !except.contains(&e.address))
    }

    async fn dial(
        &self,
        _: &Snapshot,
        service: &Arc<Service>,
        address: SocketAddr,
        _: bool,
    ) -> Result<(Upstream, Life, Facts), ConnError> {
        let tcp = TcpStream::connect(address).await.map_err(|source| ConnError::Connect { address, source })?;
        let upstream = Upstream::new(Carrier::Tcp(tcp), Rc::new(Counts::default()));
        Ok((upstream, Life::default(), facts(Some(address), service)))
    }

    fn load(&self, _: SocketAddr) -> Option<Load> {
        None
    }

    fn hold(&self) -> Option<Served> {
        None
    }

    async fn has_left(&self) -> bool {
        let (client, agent) = self.1.unwrap();
        crate::enrollment::has_left(client, agent).unwrap()
    }

    async fn gone(&self) {
        std::future::pending::<()>().await;
    }
}

fn facts(address: Option<SocketAddr>, service: &Arc<Service>) -> Facts {
    Facts {
        reporter: Reporter::Source,
        source: Party { workload: Some(workload("shop", "a", "10.0.0.1")), ..Party::default() },
        destination: Party { address, ..Party::default() },
        hbone_address: None,
        service: Some(service.clone()),
        security: Security::None,
    }
}

/// Runs a test on one thread, as a worker is, and fails it after a minute.
fn on_worker<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs");
    });
}

/// The engine behind a listener, and what it knows.
struct Engine {
    address: SocketAddr,
    world: Loopback,
    drain: CancellationToken,
}

/// Services of namespace shop, by name, port name and endpoints; the client asks `web` on port 80.
async fn engine(rules: Vec<HttpRule>, services: &[(&str, &str, &[SocketAddr])]) -> Engine {
    let services: Vec<_> = services.iter().map(|(name, port, endpoints)| service(name, port, endpoints)).collect();
    let web = services[0].clone();
    let key = ServiceKey { namespace: "shop".into(), name: "web".into(), port: 80 };
    let table = RouteTable { rules: rules.into_iter().map(Arc::new).collect() };
    let routes = HttpRoutes { general: Some(Arc::new(table)), ..HttpRoutes::default() };
    let parts = SnapshotParts {
        settings: MeshSettings {
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
            outbound: OutboundPolicy::AllowAny,
        },
        workloads: vec![workload("shop", "a", "10.0.0.1")],
        services,
        http: vec![(key.clone(), Arc::new(routes))],
        traffic: Vec::new(),
    };
    let world = Loopback(
        Rc::new(Inner {
            snapshot: RefCell::new(Arc::new(Snapshot::new(1, parts))),
            telemetry: Arc::new(Telemetry::new(AccessLog::off())),
            pool: Pool::default(),
            turn: Cell::new(0),
        }),
        None,
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, drain) = (listener.local_addr().unwrap(), CancellationToken::new());
    let (served, draining) = (world.clone(), drain.clone());
    tokio::task::spawn_local(async move {
        while let Ok((tcp, client)) = listener.accept().await {
            // As the agent's listeners have it: what ends unasked is a reset.
            rustix::net::sockopt::set_socket_linger(&tcp, Some(Duration::ZERO)).unwrap();
            let world = Loopback(served.0.clone(), Some((client, address)));
            let (key, host, drain) = (key.clone(), web.hostname.clone(), draining.clone());
            let facts = Rc::new(facts(None, &web));
            tokio::task::spawn_local(async move { server::serve(world, tcp, key, host, facts, &drain).await });
        }
    });
    Engine { address, world, drain }
}

fn service(name: &str, port: &str, endpoints: &[SocketAddr]) -> Arc<Service> {
    let endpoint = |address: &SocketAddr| Endpoint {
        address: *address,
        ready: true,
        serving: true,
        locality: Arc::default(),
        node: None,
    };
    Arc::new(Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local").into(),
        addresses: Vec::new(),
        ports: vec![ServicePort {
            port: 80,
            name: port.into(),
            app_protocol: None,
            endpoints: endpoints.iter().map(endpoint).collect(),
        }],
        algorithm: Algorithm::default(),
        scope: Scope::default(),
    })
}

fn to(name: &str, weight: u32) -> Backend {
    Backend {
        weight,
        target: Target::Service { namespace: "shop".into(), name: name.into(), port: 80, subset: None },
        request: HeaderEdits::default(),
        response: HeaderEdits::default(),
    }
}

fn rule(action: Action) -> HttpRule {
    let object =
        ObjectRef { file: String::new(), kind: "HTTPRoute".into(), namespace: "shop".into(), name: "web".into() };
    HttpRule {
        object: Arc::new(object),
        place: "spec.rules[0]".into(),
        name: None,
        matches: vec![HttpMatch::default()],
        action,
        rewrite: Default::default(),
        request: HeaderEdits::default(),
        response: HeaderEdits::default(),
        mirrors: Vec::new(),
        fault: None,
        cors: None,
        timeouts: Default::default(),
        retry: None,
        persistence: None,
    }
}

/// Everything goes to `web`.
fn all_to_web() -> HttpRule {
    rule(Action::Forward(vec![to("web", 1)]))
}

/// A server that answers by a function; it counts its connections.
struct Origin {
    address: SocketAddr,
    connections: Rc<Cell<usize>>,
}

async fn origin<A: Future<Output = Response<AnyBody>> + 'static>(
    protocol: Protocol,
    answer: impl Fn(Request<Incoming>) -> A + Clone + 'static,
) -> Origin {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = Origin { address: listener.local_addr().unwrap(), connections: Rc::default() };
    let connections = origin.connections.clone();
    tokio::task::spawn_local(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            connections.set(connections.get() + 1);
            let answer = answer.clone();
            let service = service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, std::convert::Infallible>(answer.await) }
            });
            tokio::task::spawn_local(async move {
                let io = TokioIo::new(tcp);
                match protocol {
                    Protocol::Http1 => {
                        hyper::server::conn::http1::Builder::new().serve_connection(io, service).await.ok()
                    }
                    Protocol::Http2 => {
                        hyper::server::conn::http2::Builder::new(Local).serve_connection(io, service).await.ok()
                    }
                }
            });
        }
    });
    origin
}

/// A server that says what it was asked.
async fn echo(name: &'static str) -> Origin {
    origin(Protocol::Http1, move |request| async move {
        let (parts, body) = request.into_parts();
        let mut headers: Vec<_> =
            parts.headers.iter().map(|(n, v)| format!("{n}: {}\n", v.to_str().unwrap_or("?"))).collect();
        headers.sort();
        let body = whole(body).await.unwrap_or_else(|e| format!("broken: {e}").into());
        let said = String::from_utf8_lossy(&body).into_owned();
        text(&format!("{name} {} {}\n{}\n{said}", parts.method, parts.uri, headers.concat()))
    })
    .await
}

fn text(text: &str) -> Response<AnyBody> {
    Response::new(full(text.to_owned()))
}

fn status(status: u16) -> Response<AnyBody> {
    let mut answer = text("no");
    *answer.status_mut() = status.try_into().unwrap();
    answer
}

fn full(body: impl Into<Bytes>) -> AnyBody {
    use http_body_util::BodyExt;
    Box::pin(http_body_util::Full::new(body.into()).map_err(|never| match never {}))
}

/// Frames as they are sent.
struct Chunks(tokio::sync::mpsc::UnboundedReceiver<Frame<Bytes>>);

impl Body for Chunks {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.0.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

fn chunks() -> (tokio::sync::mpsc::UnboundedSender<Frame<Bytes>>, AnyBody) {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    (sender, Box::pin(Chunks(receiver)))
}

async fn whole(body: Incoming) -> hyper::Result<Bytes> {
    use http_body_util::BodyExt;
    Ok(body.collect().await?.to_bytes())
}

/// A client of HTTP/1 that says exactly what it is told to.
struct Raw(TcpStream);

impl Raw {
    async fn to(address: SocketAddr) -> Self {
        Self(TcpStream::connect(address).await.unwrap())
    }

    async fn say(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    /// The next answer, head and body.
    async fn hear(&mut self) -> (String, String) {
        let head = self.until("\r\n\r\n").await;
        let lower = head.to_ascii_lowercase();
        let status: u16 = head[9..12].parse().unwrap();
        let length =
            lower.split("content-length: ").nth(1).map(|rest| rest.split("\r\n").next().unwrap().parse().unwrap());
        let body = match length {
            _ if status < 200 || status == 204 || status == 304 => String::new(),
            Some(length) => {
                let mut body = vec![0; length];
                self.0.read_exact(&mut body).await.unwrap();
                String::from_utf8(body).unwrap()
            }
            None if lower.contains("transfer-encoding: chunked") => {
                let mut body = String::new();
                loop {
                    let size = usize::from_str_radix(self.until("\r\n").await.trim(), 16).unwrap();
                    if size == 0 {
                        self.until("\r\n").await;
                        break body;
                    }
                    let mut chunk = vec![0; size + 2];
                    self.0.read_exact(&mut chunk).await.unwrap();
                    body.push_str(std::str::from_utf8(&chunk[..size]).unwrap());
                }
            }
            None => self.rest().await,
        };
        (head, body)
    }

    async fn until(&mut self, end: &str) -> String {
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            let byte = self.0.read_u8().await;
            text.push(byte.unwrap_or_else(|e| panic!("{e} after {:?}", String::from_utf8_lossy(&text))));
        }
        String::from_utf8(text).unwrap()
    }

    async fn rest(&mut self) -> String {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).await.unwrap();
        String::from_utf8(rest).unwrap()
    }

    async fn ask(&mut self, text: &str) -> (String, String) {
        self.say(text).await;
        self.hear().await
    }
}

/// GET over a connection of its own.
async fn get(address: SocketAddr, path: &str) -> (String, String) {
    Raw::to(address).await.ask(&format!("GET {path} HTTP/1.1\r\nHost: web\r\n\r\n")).await
}

fn code(answer: &(String, String)) -> u16 {
    answer.0[9..12].parse().unwrap()
}

/// The sum of a metric over its series that have all of these labels.
fn metric(engine: &Engine, name: &str, labels: &[&str]) -> f64 {
    let text = engine.world.0.telemetry.metrics.text();
    let series = text.lines().filter(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)));
    series.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// Waits for what tasks of this thread bring about.
async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

/// A client of HTTP/2.
async fn http2(address: SocketAddr) -> hyper::client::conn::http2::SendRequest<AnyBody> {
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (sender, connection) = hyper::client::conn::http2::Builder::new(Local).handshake(io).await.unwrap();
    tokio::task::spawn_local(connection);
    sender
}

#[test]
fn what_a_port_speaks_is_said_by_its_protocol_or_its_name() {
    let of = |name: &str, protocol: Option<&str>| {
        declared(&ServicePort {
            port: 80,
            name: name.into(),
            app_protocol: protocol.map(Into::into),
            endpoints: vec![],
        })
    };
    let (one, two) = (Declared::Http(Protocol::Http1), Declared::Http(Protocol::Http2));
    for (name, protocol, expected) in [
        ("http", None, one),
        ("http-web", None, one),
        ("HTTP-web", None, one),
        ("grpc-web-x", None, one),
        ("grpc-web", None, one),
        ("grpc", None, two),
        ("grpc-api", None, two),
        ("http2-api", None, two),
        ("https", None, Declared::Other),
        ("tcp-x", None, Declared::Other),
        ("mysql", None, Declared::Other),
        ("web", None, Declared::Nothing),
        ("", None, Declared::Nothing),
        ("tcp", Some("http"), one),
        ("http", Some("kubernetes.io/h2c"), two),
        ("x", Some("kubernetes.io/ws"), one),
        ("http", Some("kubernetes.io/wss"), Declared::Other),
        ("http", Some("example.com/own"), Declared::Other),
        ("x", Some("grpc"), two),
    ] {
        assert_eq!(of(name, protocol), expected, "{name} {protocol:?}");
    }
}
