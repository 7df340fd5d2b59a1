//! A program to run in a pod where a thread of the test will not do: it has a process of its own to kill, its own limit
//! of descriptors, its own cgroup. Results are one JSON object a line on standard output.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use serde_json::{Value, json};

#[derive(Parser)]
#[command(about = "Nodemesh's test peer")]
struct Arguments {
    #[command(subcommand)]
    job: Job,
}

#[derive(Subcommand)]
enum Job {
    /// Send back what comes, on every connection.
    Echo { listen: SocketAddr },
    /// Accept and keep connections, a byte to each; until a signal comes.
    Keep { listen: SocketAddr },
    /// Open `count` connections, wait for the byte on each, say so, and hold them all until a signal comes.
    Hold { count: usize, to: Vec<SocketAddr> },
    /// One connection, kept: a line every `every-ms`, each echoed; then connects again. A line of JSON for each answer.
    Chat {
        to: String,
        #[arg(long, default_value_t = 100)]
        every_ms: u64,
        #[arg(long, default_value = "hello from an unchanged program")]
        text: String,
    },
    /// A new connection for each message, as a client that knows nothing of meshes does.
    Call {
        to: String,
        #[arg(long, default_value_t = 1)]
        times: usize,
        #[arg(long, default_value_t = 0)]
        every_ms: u64,
        #[arg(long, default_value = "hello from an unchanged program")]
        text: String,
    },
    /// Connect, once, and say how it went.
    Probe { to: String },
}

fn main() -> ExitCode {
    match Arguments::parse().job {
        Job::Echo { listen } => serve(listen, |stream| {
            let mut stream = stream;
            let mut reader = stream.try_clone().expect("a socket can be duplicated");
            let _ = std::io::copy(&mut reader, &mut stream);
            let _ = stream.shutdown(Shutdown::Write);
        }),
        Job::Keep { listen } => keep(listen),
        Job::Hold { count, to } => hold(count, &to),
        Job::Chat { to, every_ms, text } => chat(&to, Duration::from_millis(every_ms), &text),
        Job::Call { to, times, every_ms, text } => call(&to, times, Duration::from_millis(every_ms), &text),
        Job::Probe { to } => probe(&to),
    }
}

fn say(value: &Value) {
    println!("{value}");
    let _ = std::io::stdout().flush();
}

fn bind(listen: SocketAddr) -> TcpListener {
    let listener = TcpListener::bind(listen).unwrap_or_else(|e| panic!("cannot listen on {listen}: {e}"));
    say(&json!({"listening": listener.local_addr().expect("a listener has an address").to_string()}));
    listener
}

fn serve(listen: SocketAddr, session: fn(TcpStream)) -> ExitCode {
    for stream in bind(listen).incoming().flatten() {
        let _ = stream.set_nodelay(true);
        thread::spawn(move || session(stream));
    }
    ExitCode::SUCCESS
}

fn keep(listen: SocketAddr) -> ExitCode {
    let mut kept = Vec::new();
    for stream in bind(listen).incoming() {
        match stream {
            Ok(mut stream) => {
                let _ = stream.write_all(b"+");
                kept.push(stream);
            }
            Err(e) => {
                say(&json!({"kept": kept.len(), "error": e.to_string()}));
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn hold(count: usize, to: &[SocketAddr]) -> ExitCode {
    let mut held = Vec::with_capacity(count);
    for at in 0..count {
        let connected =
            TcpStream::connect_timeout(&to[at % to.len()], Duration::from_secs(10)).and_then(|mut stream| {
                stream.set_read_timeout(Some(Duration::from_secs(10)))?;
                stream.read_exact(&mut [0])?;
                Ok(stream)
            });
        match connected {
            Ok(stream) => held.push(stream),
            Err(e) => {
                say(&json!({"held": held.len(), "error": e.to_string()}));
                return ExitCode::FAILURE;
            }
        }
    }
    say(&json!({"held": held.len()}));
    loop {
        thread::park();
    }
}

fn talk(stream: &mut TcpStream, text: &str) -> std::io::Result<()> {
    stream.write_all(text.as_bytes())?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    if back == text.as_bytes() { Ok(()) } else { Err(std::io::Error::other("other bytes came back")) }
}

/// `to` is an address or a name, with a port; a name is looked up each time, as most programs do.
fn open(to: &str) -> std::io::Result<TcpStream> {
    let mut failed = std::io::Error::other("the name has no address");
    for address in to.to_socket_addrs()? {
        match connect(address) {
            Ok(stream) => return Ok(stream),
            Err(e) => failed = e,
        }
    }
    Err(failed)
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn chat(to: &str, every: Duration, text: &str) -> ExitCode {
    let mut connection = 0;
    loop {
        connection += 1;
        let result = open(to).and_then(|mut stream| {
            for message in 1u64.. {
                talk(&mut stream, text)?;
                say(&json!({"connection": connection, "message": message}));
                thread::sleep(every);
            }
            Ok(())
        });
        if let Err(e) = result {
            say(&json!({"connection": connection, "error": e.to_string()}));
            thread::sleep(every);
        }
    }
}

fn call(to: &str, times: usize, every: Duration, text: &str) -> ExitCode {
    let mut failed = 0;
    for number in 1..=times {
        let start = Instant::now();
        match open(to).and_then(|mut stream| talk(&mut stream, text)) {
            Ok(()) => say(&json!({"call": number, "ok": true, "micros": start.elapsed().as_micros()})),
            Err(e) => {
                failed += 1;
                say(&json!({"call": number, "ok": false, "error": e.to_string()}));
            }
        }
        thread::sleep(every);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn probe(to: &str) -> ExitCode {
    match open(to) {
        Ok(stream) => {
            let local = stream.local_addr().map(|a| a.to_string()).unwrap_or_default();
            let peer = stream.peer_addr().map(|a| a.to_string()).unwrap_or_default();
            say(&json!({"connected": true, "local": local, "peer": peer}));
            ExitCode::SUCCESS
        }
        Err(e) => {
            say(&json!({"connected": false, "errno": e.raw_os_error(), "error": e.to_string()}));
            ExitCode::FAILURE
        }
    }
}
