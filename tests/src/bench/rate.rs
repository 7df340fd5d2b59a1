//! A load generator of constant rate: requests go out at fixed moments whether or not earlier ones have come back.
//!
//! A request's latency counts from the moment it was due, not from the moment a connection was free for it: a server that
//! stalls is charged for all that waited meanwhile (what is called coordinated omission otherwise hides it).

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::args::Rate;

/// Not counted: connections come about, caches fill.
const WARM_UP: Duration = Duration::from_millis(500);
/// How long the last answers may take after the last request was due.
const GRACE: Duration = Duration::from_secs(10);

struct Connection {
    stream: TcpStream,
    /// When the request under way was due.
    due: Option<Instant>,
    answer: Vec<u8>,
}

/// The hidden subcommand: prints one line of JSON.
pub fn run(options: &Rate) -> Result<()> {
    ensure!(
        options.rate > 0 && options.connections > 0 && options.seconds > 0,
        "rate, connections and seconds are above zero"
    );
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", options.to);
    let mut connections = Vec::new();
    for _ in 0..options.connections {
        let stream = TcpStream::connect_timeout(&options.to, Duration::from_secs(5));
        let stream = stream.with_context(|| format!("cannot connect to {}", options.to))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        connections.push(Connection { stream, due: None, answer: Vec::new() });
    }
    // The default slack of 50 us would be in every latency.
    rustix::thread::set_current_timer_slack(std::num::NonZero::new(1)).context("cannot set the timer slack")?;
    let mut latencies = drive(&mut connections, request.as_bytes(), options)?;
    latencies.sort_unstable();
    let total = requests(options, Duration::from_secs(options.seconds.into()));
    let us = |q| percentile(&latencies, q).as_secs_f64() * 1e6;
    let done = latencies.len();
    println!(
        "{{\"done\":{done},\"failed\":{},\"per_second\":{:.1},\"p50\":{:.1},\"p99\":{:.1},\"p999\":{:.1}}}",
        total.saturating_sub(u64::try_from(done)?),
        f64::from(u32::try_from(done)?) / f64::from(options.seconds),
        us(0.5),
        us(0.99),
        us(0.999),
    );
    Ok(())
}

fn requests(options: &Rate, span: Duration) -> u64 {
    u64::from(options.rate) * u64::try_from(span.as_millis()).expect("a span of minutes") / 1000
}

fn drive(connections: &mut [Connection], request: &[u8], options: &Rate) -> Result<Vec<Duration>> {
    let interval = Duration::from_secs(1) / options.rate;
    let warm_up = requests(options, WARM_UP);
    let total = warm_up + requests(options, Duration::from_secs(options.seconds.into()));
    let start = Instant::now();
    let due_at = |n: u64| start + Duration::from_nanos(u64::try_from(interval.as_nanos()).expect("under a second") * n);
    let counts_from = due_at(warm_up);
    let end = due_at(total) + GRACE;
    let mut free: VecDeque<usize> = (0..connections.len()).collect();
    let mut waiting: VecDeque<Instant> = VecDeque::new();
    let mut latencies = Vec::with_capacity(usize::try_from(total)?);
    let mut next = 0;
    loop {
        let now = Instant::now();
        while next < total && due_at(next) <= now {
            waiting.push_back(due_at(next));
            next += 1;
        }
        while let (Some(&due), Some(&index)) = (waiting.front(), free.front()) {
            waiting.pop_front();
            free.pop_front();
            connections[index].send(request, due)?;
        }
        let all_back = free.len() == connections.len();
        if (next == total && waiting.is_empty() && all_back) || now > end {
            return Ok(latencies);
        }
        // With a request due next and a connection free, that is when to wake; else when an answer is there.
        let until = if next < total { due_at(next) } else { end };
        for index in readable(connections, until.saturating_duration_since(Instant::now()))? {
            if let Some(due) = connections[index].receive()? {
                if due >= counts_from {
                    latencies.push(due.elapsed());
                }
                free.push_back(index);
            }
        }
    }
}

fn readable(connections: &[Connection], timeout: Duration) -> Result<Vec<usize>> {
    let mut fds: Vec<PollFd<'_>> = connections.iter().map(|c| PollFd::new(&c.stream, PollFlags::IN)).collect();
    let timeout = Timespec::try_from(timeout).context("a timeout of minutes")?;
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).context("cannot wait for answers"),
    }
    Ok(fds.iter().enumerate().filter(|(_, fd)| !fd.revents().is_empty()).map(|(index, _)| index).collect())
}

impl Connection {
    fn send(&mut self, request: &[u8], due: Instant) -> Result<()> {
        self.due = Some(due);
        self.answer.clear();
        // A request is smaller than any send buffer, and the last one was answered: this cannot be partial.
        self.stream.write_all(request).context("the server closed a connection")
    }

    /// When the request was due, once its answer is whole.
    fn receive(&mut self) -> Result<Option<Instant>> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => Err(io::Error::from(io::ErrorKind::UnexpectedEof)).context("the server closed a connection"),
            Ok(n) => {
                self.answer.extend_from_slice(&buffer[..n]);
                Ok(if whole(&self.answer)? { self.due.take() } else { None })
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).context("a connection broke"),
        }
    }
}

/// Whether an answer of HTTP/1.1 with a Content-Length is whole.
fn whole(answer: &[u8]) -> Result<bool> {
    let Some(head) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(false) };
    let text = std::str::from_utf8(&answer[..head]).context("the answer's head is not text")?;
    ensure!(text.starts_with("HTTP/1.1 200"), "the server answered {:?}", text.lines().next().unwrap_or_default());
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") { value.trim().parse::<usize>().ok() } else { None }
    });
    Ok(answer.len() >= head + 4 + length.context("the answer has no Content-Length")?)
}

fn percentile(sorted: &[Duration], q: f64) -> Duration {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index"
    )]
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn knows_a_whole_answer() {
        assert!(!whole(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n").unwrap());
        assert!(!whole(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab").unwrap());
        assert!(whole(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc").unwrap());
        assert!(whole(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n").is_err());
        assert!(whole(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }

    #[test]
    fn percentiles_are_ranks() {
        let sorted: Vec<Duration> = (1..=1000).map(Duration::from_micros).collect();
        assert_eq!(percentile(&sorted, 0.5), Duration::from_micros(500));
        assert_eq!(percentile(&sorted, 0.999), Duration::from_micros(999));
        assert_eq!(percentile(&[], 0.5), Duration::ZERO);
    }

    /// A server that stalls once: the requests that were due meanwhile have waited, though none was on the wire.
    #[test]
    fn a_stall_is_charged_to_all_that_were_due() {
        const STALL: Duration = Duration::from_millis(400);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut answered = 0;
            while let Some(Ok(line)) = lines.next() {
                if line.is_empty() {
                    answered += 1;
                    if answered == 100 {
                        thread::sleep(STALL);
                    }
                    (&stream).write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
                }
            }
        });
        let stream = TcpStream::connect(to).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut connections = [Connection { stream, due: None, answer: Vec::new() }];
        let options = Rate { to, rate: 100, connections: 1, seconds: 1 };
        let latencies = drive(&mut connections, b"GET / HTTP/1.1\r\n\r\n", &options).unwrap();
        drop(connections);
        server.join().unwrap();
        assert_eq!(latencies.len(), 100, "every request after the warm-up is counted");
        let waited = latencies.iter().filter(|latency| **latency > STALL / 4).count();
        assert!(waited >= 20, "only {waited} requests waited, of the 30 that were due in the stall");
    }
}
