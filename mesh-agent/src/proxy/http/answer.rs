//! Answers on their way to the client: the server's, passed on as they come, and the agent's own.

use std::fmt::Write;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Response, StatusCode, Version};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::Sleep;

use super::body::BoxError;
use super::exchange::{Ends, Exchange};
use super::pool::Lease;
use crate::model::http::Abort;
use crate::proxy::worker::Load;
use crate::telemetry::Flags;

/// The body that the client gets, and what lives as long as it does.
pub struct AnswerBody {
    body: Kind,
    exchange: Rc<Exchange>,
    /// `None`: somebody else says the last word.
    ends: Option<Ends>,
    lease: Option<Lease>,
    /// When all of it must have come.
    deadline: Option<Pin<Box<Sleep>>>,
    _load: Option<Load>,
}

enum Kind {
    Passed(Incoming),
    Own(Option<Bytes>),
}

pub type Answer = Response<AnswerBody>;

impl AnswerBody {
    pub fn passed(
        body: Incoming,
        ends: Ends,
        lease: Option<Lease>,
        deadline: Option<Pin<Box<Sleep>>>,
        load: Option<Load>,
    ) -> Self {
        Self { body: Kind::Passed(body), exchange: ends.0.clone(), ends: Some(ends), lease, deadline, _load: load }
    }

    fn own(body: Bytes, ends: Ends) -> Self {
        let body = Some(body).filter(|b| !b.is_empty());
        Self {
            body: Kind::Own(body),
            exchange: ends.0.clone(),
            ends: Some(ends),
            lease: None,
            deadline: None,
            _load: None,
        }
    }

    /// Of an answer behind which the connection is something else, whose end is the exchange's.
    pub fn switched(exchange: Rc<Exchange>) -> Self {
        Self { body: Kind::Own(None), exchange, ends: None, lease: None, deadline: None, _load: None }
    }

    fn done(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.give_back();
        }
        if self.ends.is_some() {
            self.exchange.end();
        }
    }

    fn broken(&mut self, flag: Flags, text: &str) -> BoxError {
        self.lease = None;
        self.exchange.flag(flag);
        self.exchange.error(text.to_owned());
        self.exchange.end();
        text.into()
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let incoming = match &mut this.body {
            Kind::Passed(incoming) => incoming,
            Kind::Own(bytes) => {
                let bytes = bytes.take();
                match &bytes {
                    Some(bytes) => this.exchange.add_received(bytes.len()),
                    None => this.done(),
                }
                return Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))));
            }
        };
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(this.broken(Flags::TIMEOUT, "the answer took too long"))));
        }
        match ready!(Pin::new(incoming).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.exchange.add_received(data.len());
                } else if let Some(trailers) = frame.trailers_ref() {
                    this.exchange.grpc_status(trailers);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(e)) => {
                let text = format!("the server's answer broke off: {e}");
                Poll::Ready(Some(Err(this.broken(Flags::UPSTREAM_ENDED, &text))))
            }
            None => {
                this.done();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.body {
            Kind::Passed(incoming) => incoming.is_end_stream(),
            Kind::Own(bytes) => bytes.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            Kind::Passed(incoming) => incoming.size_hint(),
            Kind::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
        }
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        // Whoever knows the length does not ask for what comes after the last byte; of our own, HEAD asks for nothing.
        if self.is_end_stream() || matches!(self.body, Kind::Own(_)) {
            self.done();
        }
    }
}

/// What the agent itself answers: a status, and a sentence for whoever reads it. A gRPC client gets it in gRPC's way.
pub fn own(ends: Ends, status: StatusCode, flag: Flags, text: &str) -> Answer {
    ends.0.flag(flag);
    if flag != Flags::NONE {
        ends.0.error(text.to_owned());
    }
    if ends.0.is_grpc() {
        return grpc(ends, grpc_code(status), text);
    }
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    with(ends, status, headers, Bytes::from(format!("{text}\n")))
}

/// The same, and nothing more is read from the client.
pub fn last(ends: Ends, status: StatusCode, flag: Flags, text: &str) -> Answer {
    let mut answer = own(ends, status, flag, text);
    if answer.version() != Version::HTTP_2 {
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

pub fn with(ends: Ends, status: StatusCode, headers: HeaderMap, body: Bytes) -> Answer {
    ends.0.answered(status.as_u16(), &headers, false);
    let mut answer = Response::new(AnswerBody::own(body, ends));
    *answer.status_mut() = status;
    *answer.headers_mut() = headers;
    answer
}

/// An abort on purpose.
pub fn abort(ends: Ends, abort: Abort) -> Answer {
    match abort {
        Abort::Status(status) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            own(ends, status, Flags::ABORTED, "fault filter abort")
        }
        Abort::Grpc(status) => {
            ends.0.flag(Flags::ABORTED);
            grpc(ends, status, "fault filter abort")
        }
    }
}

fn grpc(ends: Ends, code: u16, text: &str) -> Answer {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(code));
    if let Ok(message) = HeaderValue::from_str(&percent(text)) {
        headers.insert("grpc-message", message);
    }
    with(ends, StatusCode::OK, headers, Bytes::new())
}

/// As gRPC maps HTTP's statuses.
fn grpc_code(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

/// As `grpc-message` is written.
fn percent(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b' '..=b'~' if byte != b'%' => out.push(byte.into()),
            _ => write!(out, "%{byte:02X}").expect("writing to memory does not fail"),
        }
        out
    })
}
