//! One line for each connection, when it has ended, in ztunnel's field names. In come facts and outcome, out go bytes on
//! stdout.
//!
//! The data path formats into a buffer of its own thread and appends that to one queue; a thread of its own writes the
//! queue out, many lines in one call. A slow or stuck stdout therefore costs lines, which are counted, and never a
//! connection. tracing was refused here: it costs a virtual call and an allocation for each of twenty fields.

use std::cell::RefCell;
use std::io::Write;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use prometheus::IntCounter;

use super::access_line::{write_json, write_text};
use super::{Facts, Outcome, RequestLine};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Writes access-log lines; shared by all workers.
pub struct AccessLog {
    /// One of `OFF`, `TEXT`, `JSON`.
    form: AtomicU8,
    /// `None`: there is nothing to write to.
    queue: Option<Arc<Queue>>,
    dropped: IntCounter,
}

const OFF: u8 = 0;
const TEXT: u8 = 1;
const JSON: u8 = 2;

/// About ten thousand lines: a second of the busiest node. More would hide that stdout does not keep up.
const QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// So long lines gather before the writer takes them: to wake it for each would cost the data path a system call a line,
/// and a tenth of the time that a short connection takes.
const GATHER: Duration = Duration::from_millis(10);
/// How long the last lines may take at the end of the process.
const LAST_LINES: Duration = Duration::from_secs(1);

struct Queue {
    state: Mutex<State>,
    /// To the writer: there are lines, or the end has come.
    filled: Condvar,
    /// From the writer: all is written.
    drained: Condvar,
    limit: usize,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    /// Dropped since the writer last said so.
    dropped: u64,
    /// The writer sleeps until it is woken.
    asleep: bool,
    writing: bool,
    closed: bool,
}

impl AccessLog {
    /// To stdout; `None` writes nothing until `set` says otherwise.
    pub fn new(format: Option<LogFormat>) -> Self {
        // Not `io::stdout()`: its line buffer would cut the batch into a system call a line.
        match rustix::io::dup(rustix::stdio::stdout()) {
            Ok(stdout) => Self::to(format, std::fs::File::from(stdout), QUEUE_BYTES),
            Err(error) => {
                tracing::warn!("no access log: stdout is closed ({error})");
                Self::off()
            }
        }
    }

    /// Writes nothing.
    pub fn off() -> Self {
        Self { form: AtomicU8::new(OFF), queue: None, dropped: dropped_counter() }
    }

    /// Changes the form of the lines from the next on; `None` writes none.
    pub fn set(&self, format: Option<LogFormat>) {
        self.form.store(form(format), Ordering::Relaxed);
    }

    fn to(format: Option<LogFormat>, out: impl Write + Send + 'static, limit: usize) -> Self {
        let queue = Arc::new(Queue { state: Mutex::default(), filled: Condvar::new(), drained: Condvar::new(), limit });
        let for_writer = queue.clone();
        let writer = thread::Builder::new().name("access-log".to_owned()).spawn(move || for_writer.write_out(out));
        if let Err(error) = writer {
            tracing::warn!("no access log: cannot start its thread ({error})");
            return Self::off();
        }
        Self { form: AtomicU8::new(form(format)), queue: Some(queue), dropped: dropped_counter() }
    }

    /// Writes the line of a connection that has ended, or never began. Does not block.
    pub fn write(&self, facts: &Facts, outcome: &Outcome) {
        self.line(|line, form| match form {
            JSON => write_json(line, SystemTime::now(), facts, outcome),
            _ => write_text(line, SystemTime::now(), facts, outcome),
        });
    }

    /// The same of an HTTP request.
    pub fn write_request(&self, request: &RequestLine<'_>) {
        self.line(|line, form| match form {
            JSON => request.write_json(line, SystemTime::now()),
            _ => request.write_text(line, SystemTime::now()),
        });
    }

    fn line(&self, write: impl FnOnce(&mut Vec<u8>, u8)) {
        let Some(queue) = &self.queue else { return };
        let form = self.form.load(Ordering::Relaxed);
        if form == OFF {
            return;
        }
        thread_local!(static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
        LINE.with_borrow_mut(|line| {
            line.clear();
            write(line, form);
            if !queue.push(line) {
                self.dropped.inc();
            }
        });
    }

    /// Whether lines are wanted.
    pub fn is_on(&self) -> bool {
        self.queue.is_some() && self.form.load(Ordering::Relaxed) != OFF
    }

    /// Lines that were dropped because stdout was too slow, for `Metrics::adopt`.
    pub fn dropped(&self) -> &IntCounter {
        &self.dropped
    }
}

fn form(format: Option<LogFormat>) -> u8 {
    match format {
        None => OFF,
        Some(LogFormat::Text) => TEXT,
        Some(LogFormat::Json) => JSON,
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        let Some(queue) = &self.queue else { return };
        let mut state = queue.lock();
        state.closed = true;
        queue.filled.notify_one();
        let busy = |s: &mut State| s.writing || !s.lines.is_empty();
        drop(queue.drained.wait_timeout_while(state, LAST_LINES, busy));
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False: there is no room.
    fn push(&self, line: &[u8]) -> bool {
        let mut state = self.lock();
        if state.lines.len() + line.len() > self.limit {
            state.dropped += 1;
            return false;
        }
        state.lines.extend_from_slice(line);
        let asleep = std::mem::take(&mut state.asleep);
        drop(state);
        if asleep {
            self.filled.notify_one();
        }
        true
    }

    /// The writer's life. Two buffers change places, so that nothing is allocated once they have grown.
    fn write_out(&self, mut out: impl Write) {
        let mut batch = Vec::new();
        loop {
            let mut state = self.lock();
            state.writing = false;
            if state.lines.is_empty() {
                self.drained.notify_all();
            }
            let waiting = |s: &mut State| {
                s.asleep = s.lines.is_empty() && !s.closed;
                s.asleep
            };
            let mut state = self.filled.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner);
            if state.lines.is_empty() {
                return;
            }
            if !state.closed {
                drop(state);
                thread::sleep(GATHER);
                state = self.lock();
            }
            std::mem::swap(&mut state.lines, &mut batch);
            state.writing = true;
            let dropped = std::mem::take(&mut state.dropped);
            drop(state);
            if dropped > 0 {
                tracing::warn!("access log: {dropped} lines dropped, since whatever reads stdout is too slow");
            }
            if let Err(error) = out.write_all(&batch).and_then(|()| out.flush()) {
                // Said once for each batch that fails; the lines of the next may come through again.
                tracing::warn!("access log: cannot write to stdout: {error}");
            }
            batch.clear();
        }
    }
}

fn dropped_counter() -> IntCounter {
    IntCounter::new(
        "nodemesh_access_log_dropped_total",
        "Access-log lines dropped because whatever reads stdout is too slow.",
    )
    .expect("the name is valid")
}

#[cfg(test)]
mod tests;
