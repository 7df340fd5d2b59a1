//! The pages on the admin socket.

use std::io;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use serde::Serialize;

use super::http::{Page, not_allowed, not_found, page, serve, text};
use super::views::LoggingView;
use super::{AdminSocket, AdminState};

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
        (&Method::GET, "/workloads") => json(&state.workloads()),
        (&Method::GET, "/services") => json(&state.services()),
        (&Method::GET, "/policies") => json(&state.policies()),
        (&Method::GET, "/certificates") => json(&state.certificates()),
        (&Method::GET, "/connections") => match state.connections().await {
            Ok(all) => json(&all),
            Err(problem) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
        },
        (&Method::GET, "/problems") => json(&state.problems()),
        (&Method::GET, "/config_dump") => json(&state.config_dump()),
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

fn json(view: &impl Serialize) -> Page {
    match serde_json::to_vec(view) {
        Ok(mut body) => {
            body.push(b'\n');
            page(StatusCode::OK, "application/json", body)
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot write this page: {error}\n")),
    }
}
