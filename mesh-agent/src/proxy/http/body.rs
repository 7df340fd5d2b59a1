//! Bodies of requests on their way: passed on as they come; kept up to a cap where a rule may try again; copied for
//! mirrors, which are left behind where they are too slow.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::exchange::Exchange;

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body of more than this is sent once.
pub const KEPT: usize = 64 * 1024;
/// A mirror that is so far behind gets no more.
const BEHIND: usize = 1024 * 1024;

pub enum RequestBody {
    Empty,
    Passed(Incoming, Rc<Exchange>),
    Replayed(Replay),
    Copied(Copied),
}

/// One sending of a body that may be sent again.
pub struct Replay {
    shared: Rc<Original>,
    /// Chunks that this one has had.
    at: usize,
    /// Only the newest reads on: the server before may still ask for more.
    turn: u32,
    trailers_sent: bool,
}

/// A body that may be sent several times.
pub struct Original {
    state: RefCell<State>,
    turn: Cell<u32>,
    exchange: Rc<Exchange>,
}

struct State {
    incoming: Incoming,
    /// `None`: there was too much of it.
    kept: Option<Vec<Bytes>>,
    size: usize,
    ended: bool,
    trailers: Option<HeaderMap>,
    hint: SizeHint,
    taps: Vec<Rc<Tap>>,
}

/// What a mirror has still to send.
#[derive(Default)]
struct Tap {
    queue: RefCell<VecDeque<Bytes>>,
    queued: Cell<usize>,
    end: Cell<TapEnd>,
    reader: RefCell<Option<Waker>>,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum TapEnd {
    #[default]
    Open,
    Ended,
    Broken,
}

/// A copy of a body, for a mirror.
pub struct Copied {
    tap: Rc<Tap>,
    hint: SizeHint,
}

impl Original {
    pub fn new(incoming: Incoming, exchange: Rc<Exchange>) -> Rc<Self> {
        let (hint, ended) = (incoming.size_hint(), incoming.is_end_stream());
        let state = State { incoming, kept: Some(Vec::new()), size: 0, ended, trailers: None, hint, taps: Vec::new() };
        Rc::new(Self { state: RefCell::new(state), turn: Cell::new(0), exchange })
    }

    /// From its begin; whoever has sent it before is cut off.
    pub fn send(self: &Rc<Self>) -> RequestBody {
        self.turn.set(self.turn.get() + 1);
        RequestBody::Replayed(Replay { shared: self.clone(), at: 0, turn: self.turn.get(), trailers_sent: false })
    }

    /// Whether all that was read of it is still here.
    pub fn is_kept(&self) -> bool {
        self.state.borrow().kept.is_some()
    }

    /// A copy of it; to be asked for before anything is sent.
    pub fn copy(&self) -> RequestBody {
        let tap = Rc::new(Tap::default());
        let mut state = self.state.borrow_mut();
        if state.ended {
            tap.end.set(TapEnd::Ended);
        }
        state.taps.push(tap.clone());
        RequestBody::Copied(Copied { tap, hint: state.hint })
    }
}

impl Drop for Original {
    fn drop(&mut self) {
        self.state.borrow().taps.iter().for_each(|tap| tap.end(TapEnd::Broken));
    }
}

impl Tap {
    fn push(&self, chunk: &Bytes) {
        if self.end.get() != TapEnd::Open {
            return;
        }
        self.queued.set(self.queued.get() + chunk.len());
        if self.queued.get() > BEHIND {
            self.queue.borrow_mut().clear();
            return self.end(TapEnd::Broken);
        }
        self.queue.borrow_mut().push_back(chunk.clone());
        self.wake();
    }

    fn end(&self, how: TapEnd) {
        if self.end.get() == TapEnd::Open {
            self.end.set(how);
        }
        self.wake();
    }

    fn wake(&self) {
        if let Some(reader) = self.reader.borrow_mut().take() {
            reader.wake();
        }
    }
}

impl Replay {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.turn != self.shared.turn.get() {
            return Poll::Ready(Some(Err("the request is sent to another endpoint".into())));
        }
        let mut state = self.shared.state.borrow_mut();
        let state = &mut *state;
        if let Some(chunk) = state.kept.as_ref().and_then(|kept| kept.get(self.at)) {
            self.at += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        if state.ended {
            let trailers = state.trailers.clone().filter(|_| !self.trailers_sent);
            self.trailers_sent = true;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = match ready!(Pin::new(&mut state.incoming).poll_frame(cx)) {
            Some(frame) => frame.inspect_err(|_| self.shared.exchange.client_broke())?,
            None => {
                state.ended = true;
                state.taps.iter().for_each(|tap| tap.end(TapEnd::Ended));
                return Poll::Ready(None);
            }
        };
        let frame = match frame.into_data() {
            Ok(chunk) => {
                self.shared.exchange.add_sent(chunk.len());
                state.size += chunk.len();
                match &mut state.kept {
                    Some(kept) if state.size <= KEPT => kept.push(chunk.clone()),
                    kept => *kept = None,
                }
                self.at += 1;
                state.taps.iter().for_each(|tap| tap.push(&chunk));
                Frame::data(chunk)
            }
            Err(frame) => {
                if let Some(trailers) = frame.trailers_ref() {
                    state.trailers = Some(trailers.clone());
                    state.ended = true;
                    self.trailers_sent = true;
                    state.taps.iter().for_each(|tap| tap.end(TapEnd::Ended));
                }
                frame
            }
        };
        if state.incoming.is_end_stream() {
            state.ended = true;
            state.taps.iter().for_each(|tap| tap.end(TapEnd::Ended));
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end(&self) -> bool {
        let state = self.shared.state.borrow();
        let all = state.kept.as_ref().is_none_or(|kept| self.at >= kept.len());
        state.ended && all && (state.trailers.is_none() || self.trailers_sent)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Passed(incoming, exchange) => {
                let frame = ready!(Pin::new(incoming).poll_frame(cx)).transpose();
                let frame = frame.inspect_err(|_| exchange.client_broke())?;
                if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
                    exchange.add_sent(data.len());
                }
                Poll::Ready(frame.map(Ok))
            }
            Self::Replayed(replay) => replay.poll(cx),
            Self::Copied(Copied { tap, .. }) => {
                if let Some(chunk) = tap.queue.borrow_mut().pop_front() {
                    tap.queued.set(tap.queued.get() - chunk.len());
                    return Poll::Ready(Some(Ok(Frame::data(chunk))));
                }
                match tap.end.get() {
                    TapEnd::Ended => Poll::Ready(None),
                    TapEnd::Broken => Poll::Ready(Some(Err("the request it mirrors was broken off".into()))),
                    TapEnd::Open => {
                        *tap.reader.borrow_mut() = Some(cx.waker().clone());
                        Poll::Pending
                    }
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Passed(incoming, _) => incoming.is_end_stream(),
            Self::Replayed(replay) => replay.is_end(),
            Self::Copied(Copied { tap, .. }) => tap.end.get() == TapEnd::Ended && tap.queue.borrow().is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Passed(incoming, _) => incoming.size_hint(),
            Self::Replayed(Replay { shared, .. }) => shared.state.borrow().hint,
            Self::Copied(Copied { hint, .. }) => *hint,
        }
    }
}
