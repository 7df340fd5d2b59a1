//! The pages on the admin socket.

use std::io;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use serde::Serialize;

use super::http::{Page, long_page, not_allowed, not_found, page, serve, text};
use super::state::by_name;
use super::views::LoggingView;
use super::{AdminSocket, AdminState};

const JSON: &str = "application/json";

const PAGES: [&str; 9] = [
    "/status",
    "/workloads",
    "/services",
    "/policies",
    "/certificates",
    "/connections",
    "/problems",
    "/config_dump",
    "/logging",
];

/// Answers on `socket` until the future is dropped, which takes the socket away.
pub async fn serve_admin(socket: AdminSocket, state: Arc<AdminState>) -> io::Result<()> {
    let listener = socket.listener()?;
    serve(listener, move |request: Request<Incoming>| {
        let state = state.clone();
        async move { answer(&state, &request).await }
    })
    .await
}

async fn answer(state: &AdminState, request: &Request<Incoming>) -> Page {
    let path = request.uri().path();
    match (request.method(), path) {
        (&Method::GET, "/status") => json(&state.status().await),
        (&Method::GET, "/workloads") => long_page(JSON, line(list(state.workloads()))),
        (&Method::GET, "/services") => long_page(JSON, line(list(state.services()))),
        (&Method::GET, "/policies") => json(&state.policies()),
        (&Method::GET, "/certificates") => json(&state.certificates()),
        (&Method::GET, "/connections") => match state.connections().await {
            Ok(all) => json(&all),
            Err(problem) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
        },
        (&Method::GET, "/problems") => json(&state.problems()),
        (&Method::GET, "/config_dump") => config_dump(state),
        (&Method::GET, "/logging") => json(&LoggingView { level: state.log.get() }),
        (&Method::PUT, "/logging") => set_level(state, request.uri().query()),
        (_, "/logging") => not_allowed("GET, PUT"),
        (_, path) if PAGES.contains(&path) => not_allowed("GET"),
        (_, path) => not_found(path, &PAGES),
    }
}

/// `PUT /logging?level=info,mesh_agent=debug`
fn set_level(state: &AdminState, query: Option<&str>) -> Page {
    let Some(level) = query.and_then(|q| q.strip_prefix("level=")) else {
        return text(StatusCode::BAD_REQUEST, "which level? ask for /logging?level=debug\n");
    };
    match state.log.set(level) {
        Ok(()) => {
            tracing::info!("log level set to {level} over the admin socket");
            json(&LoggingView { level: level.to_owned() })
        }
        Err(problem) => text(StatusCode::BAD_REQUEST, format!("{problem}\n")),
    }
}

/// Everything that the data path goes by, for a bug report.
fn config_dump(state: &AdminState) -> Page {
    let snapshot = state.snapshot.load_full();
    let workloads = by_name(snapshot.workloads(), |w| (&w.namespace, &w.name));
    let services = by_name(snapshot.services(), |s| (&s.namespace, &s.name));
    let member = |name: &str, value: Vec<u8>| [b"\"", name.as_bytes(), b"\":", &value].concat();
    let head = [
        member("node", plain(&state.node)),
        member("version", plain(&env!("CARGO_PKG_VERSION"))),
        member("snapshot_generation", plain(&snapshot.generation())),
        member("settings", plain(snapshot.settings())),
        member("problems", plain(&state.problems())),
        member("pods", plain(&(state.pods)())),
        member("certificates", plain(&state.certificates())),
    ];
    let pieces = [b"{".to_vec(), head.join(&b','), b",".to_vec(), member("workloads", Vec::new())].into_iter();
    let services = [b",".to_vec(), member("services", Vec::new())].into_iter().chain(list(services.into_iter()));
    let pieces = pieces.chain(list(workloads.into_iter())).chain(services).chain([b"}".to_vec()]);
    long_page(JSON, line(pieces))
}

/// A JSON array, piece by piece.
fn list<T: Serialize>(items: impl Iterator<Item = T>) -> impl Iterator<Item = Vec<u8>> {
    let mut first = true;
    let items = items.map(move |item| {
        let mut piece = if std::mem::take(&mut first) { Vec::new() } else { vec![b','] };
        piece.extend(plain(&item));
        piece
    });
    std::iter::once(vec![b'[']).chain(items).chain([vec![b']']])
}

fn line(pieces: impl Iterator<Item = Vec<u8>>) -> impl Iterator<Item = Vec<u8>> {
    pieces.chain([vec![b'\n']])
}

fn plain(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("views and the model are plain data")
}

fn json(view: &impl Serialize) -> Page {
    match serde_json::to_vec(view) {
        Ok(mut body) => {
            body.push(b'\n');
            page(StatusCode::OK, JSON, body)
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot write this page: {error}\n")),
    }
}
