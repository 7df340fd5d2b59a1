//! What an application may expect of its bytes: none lost, none early, ends and errors as they happened.
//! Cases 1-9, 13, 16, 17 and 19 of the list that sidecarless meshes have been caught at, across nodes and on one node.

#![expect(unsafe_code, reason = "SO_RCVLOWAT has no safe interface")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use mesh_tests::ring::{Case, Mode, World, run};
use mesh_tests::traffic::{PATIENCE, Pattern, accept, expect_pattern, pair, port, readable, ready, send_pattern};
use mesh_tests::{Mesh, MeshMode, Pod, eventually, throughout};
use rustix::event::{PollFlags, epoll};
use rustix::net::{RecvFlags, recv};
use socket2::SockRef;

struct Bytes {
    world: World,
    client: Arc<Pod>,
    /// On the client's node.
    near: Arc<Pod>,
    /// On the other.
    far: Arc<Pod>,
}

fn build() -> Bytes {
    let mode = Mode::of_this_run();
    let mesh = Mesh::new().node("n1").node("n2");
    if mode.is_meshed() {
        mesh.manifests().label("bytes", MeshMode::Enabled);
    }
    let client = mesh.pod("n1", "bytes/client");
    let near = mesh.pod("n1", "bytes/near");
    let far = mesh.pod("n2", "bytes/far");
    let world = World::start(mesh, mode, &[]);
    world.wait_enrolled(&[&client, &near, &far]);
    Bytes { world, client, near, far }
}

/// Each case for both ways: to the other node, and to a pod of the same node.
macro_rules! both_ways {
    ($($case:ident),* $(,)?) => {
        &[$(
            (concat!(stringify!($case), "_across_nodes"), (|b: &Bytes| $case(b, &b.far)) as fn(&Bytes)),
            (concat!(stringify!($case), "_on_one_node"), (|b: &Bytes| $case(b, &b.near)) as fn(&Bytes)),
        )*]
    };
}

const CASES: &[Case<Bytes>] = both_ways![
    case_01_half_close_from_either_end,
    case_02_fifty_thousand_one_byte_writes,
    case_03_64_mib_both_ways_at_once,
    case_04_64_mib_both_ways_edge_triggered,
    case_05_close_with_data_on_the_way,
    case_06_reset_while_reading,
    case_07_reset_after_data,
    case_07_reset_in_a_large_upload_and_then_a_clean_connection,
    case_08_close_with_unread_data,
    case_09_a_slow_reader_stops_its_sender,
    case_10_the_reader_dies_under_a_blocked_writer,
    case_13_the_server_speaks_first,
    case_16_a_write_after_shutdown_is_epipe,
    case_17_fionread_counts_what_came,
    case_19_waitall_peek_rcvlowat_and_timeouts,
];

fn main() -> ExitCode {
    run(build, |b| &b.world, CASES)
}

fn case_01_half_close_from_either_end(b: &Bytes, server: &Pod) {
    for client_first in [true, false] {
        let (near, far) = pair(&b.client, server);
        let (first, second) = if client_first { (near, far) } else { (far, near) };
        (&first).write_all(b"a question").unwrap();
        first.shutdown(Shutdown::Write).unwrap();
        let mut question = Vec::new();
        (&second).read_to_end(&mut question).unwrap();
        assert_eq!(question, b"a question");
        // The other direction is open for as long as it likes: 1 MiB after the end of the first.
        let answer = Pattern::bytes(1, 1 << 20);
        let writer = thread::spawn({
            let answer = answer.clone();
            move || (&second).write_all(&answer)
        });
        let mut got = Vec::new();
        (&first).read_to_end(&mut got).unwrap();
        writer.join().unwrap().unwrap();
        assert!(got == answer, "{} bytes of the answer came", got.len());
    }
}

fn case_02_fifty_thousand_one_byte_writes(b: &Bytes, server: &Pod) {
    for nodelay in [true, false] {
        let (near, far) = pair(&b.client, server);
        near.set_nodelay(nodelay).unwrap();
        let sent = Pattern::bytes(2, 50_000);
        let writer = thread::spawn({
            let sent = sent.clone();
            move || {
                for byte in sent.chunks(1) {
                    (&near).write_all(byte).unwrap();
                }
            }
        });
        let mut got = Vec::new();
        (&far).read_to_end(&mut got).unwrap();
        writer.join().unwrap();
        assert!(got == sent, "TCP_NODELAY {nodelay}: {} bytes came", got.len());
    }
}

const MIB_64: usize = 64 << 20;

fn case_03_64_mib_both_ways_at_once(b: &Bytes, server: &Pod) {
    let (near, far) = pair(&b.client, server);
    thread::scope(|s| {
        let senders = [s.spawn(|| send_pattern(&near, 3, MIB_64)), s.spawn(|| send_pattern(&far, 4, MIB_64))];
        s.spawn(|| expect_pattern(&far, 3, MIB_64));
        s.spawn(|| expect_pattern(&near, 4, MIB_64));
        for sender in senders {
            sender.join().unwrap().unwrap();
        }
    });
}

fn case_04_64_mib_both_ways_edge_triggered(b: &Bytes, server: &Pod) {
    let (near, far) = pair(&b.client, server);
    let ends = [(near, 5, 6), (far, 6, 5)];
    let ends = ends.map(|(stream, own, other)| thread::spawn(move || edge_triggered(&stream, own, other)));
    for end in ends {
        end.join().unwrap();
    }
}

/// Sends and receives on one thread, woken by edges alone: a wake-up that is lost shows as a stall.
fn edge_triggered(stream: &TcpStream, own: u64, other: u64) {
    const PIECE: usize = 64 * 1024;
    stream.set_nonblocking(true).unwrap();
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    epoll::add(&poller, stream, epoll::EventData::new_u64(1), interest).unwrap();
    let (mut sending, mut expecting) = (Pattern::new(own), Pattern::new(other));
    let (mut out, mut want) = (Vec::new(), Vec::new());
    let (mut out_at, mut want_at, mut sent, mut received) = (0, 0, 0usize, 0usize);
    let mut buffer = vec![0; PIECE];
    let mut events = Vec::with_capacity(4);
    let mut end = false;
    while sent < MIB_64 || !end {
        while sent < MIB_64 {
            if out_at == out.len() {
                out = vec![0; PIECE];
                sending.fill(&mut out);
                out_at = 0;
            }
            match (&*stream).write(&out[out_at..]) {
                Ok(n) => {
                    out_at += n;
                    sent += n;
                    if sent == MIB_64 {
                        stream.shutdown(Shutdown::Write).unwrap();
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("after {sent} bytes sent: {e}"),
            }
        }
        while !end {
            match (&*stream).read(&mut buffer) {
                Ok(0) => end = true,
                Ok(n) => {
                    let mut got = &buffer[..n];
                    while !got.is_empty() {
                        if want_at == want.len() {
                            want = vec![0; PIECE];
                            expecting.fill(&mut want);
                            want_at = 0;
                        }
                        let length = got.len().min(want.len() - want_at);
                        assert!(got[..length] == want[want_at..want_at + length], "other bytes near {received}");
                        (got, want_at, received) = (&got[length..], want_at + length, received + length);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("after {received} bytes received: {e}"),
            }
        }
        if sent < MIB_64 || !end {
            events.clear();
            let patience = rustix::event::Timespec::try_from(PATIENCE).unwrap();
            epoll::wait(&poller, rustix::buffer::spare_capacity(&mut events), Some(&patience)).unwrap();
            assert!(!events.is_empty(), "stalled: {sent} bytes sent, {received} received, end of stream {end}");
        }
    }
    assert_eq!(received, MIB_64);
}

fn case_05_close_with_data_on_the_way(b: &Bytes, server: &Pod) {
    for client_writes in [true, false] {
        let (near, far) = pair(&b.client, server);
        let (writer, reader) = if client_writes { (near, far) } else { (far, near) };
        let sent = Pattern::bytes(5, 100_000);
        (&writer).write_all(&sent).unwrap();
        drop(writer);
        let mut got = Vec::new();
        (&reader).read_to_end(&mut got).unwrap();
        assert!(got == sent, "{} of 100000 bytes came", got.len());
    }
}

/// Closes by a reset in place of an orderly end.
fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

fn case_06_reset_while_reading(b: &Bytes, server: &Pod) {
    for client_reads in [true, false] {
        let (near, far) = pair(&b.client, server);
        let (reader, other) = if client_reads { (near, far) } else { (far, near) };
        let reading = thread::spawn(move || (&reader).read(&mut [0; 16]).map_err(|e| e.kind()));
        // The reader is inside recv() when its task sleeps there; that it is needs no proof for the result to hold.
        reset(other);
        assert_eq!(reading.join().unwrap(), Err(ErrorKind::ConnectionReset));
    }
}

fn case_07_reset_after_data(b: &Bytes, server: &Pod) {
    for client_reads in [true, false] {
        let (near, far) = pair(&b.client, server);
        let (reader, other) = if client_reads { (near, far) } else { (far, near) };
        (&other).write_all(&[7; 100]).unwrap();
        (&reader).read_exact(&mut [0; 100]).unwrap();
        reset(other);
        assert_eq!((&reader).read(&mut [0; 16]).map_err(|e| e.kind()), Err(ErrorKind::ConnectionReset));

        // Without the pause for reading: what came before may be lost, but the end is a reset, never an orderly one.
        let (near, far) = pair(&b.client, server);
        let (reader, other) = if client_reads { (near, far) } else { (far, near) };
        (&other).write_all(&[7; 100]).unwrap();
        reset(other);
        let end = (&reader).read_to_end(&mut Vec::new()).map_err(|e| e.kind());
        assert_eq!(end, Err(ErrorKind::ConnectionReset));
    }
}

fn case_07_reset_in_a_large_upload_and_then_a_clean_connection(b: &Bytes, server: &Pod) {
    const WHOLE: usize = 1 << 20;
    for round in 0..6 {
        let (near, far) = pair(&b.client, server);
        let (writer, reader) = if round % 2 == 0 { (near, far) } else { (far, near) };
        writer.set_nonblocking(true).unwrap();
        // Until all buffers on the way are full, so that the tunnel stands in the middle of a record.
        let mut held = false;
        eventually(PATIENCE, "the upload is held back", || {
            let mut moved = 0;
            while let Ok(n) = (&writer).write(&[0xaa; 65536]) {
                moved += n;
            }
            std::mem::replace(&mut held, moved == 0) && moved == 0
        });
        // Some rounds move on by a part of a record.
        (&reader).read_exact(&mut vec![0; 1000 * round]).unwrap();
        if round < 4 {
            reset(writer);
            let end = (&reader).read_to_end(&mut Vec::new()).map_err(|e| e.kind());
            assert_eq!(end, Err(ErrorKind::ConnectionReset), "round {round}");
        } else {
            reset(reader);
            eventually(PATIENCE, "the writer hears of it", || {
                let end = (&writer).write(&[0; 1]).map_err(|e| e.kind());
                matches!(end, Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe))
            });
        }
        // Whatever tunnel it gets, not a byte of what was broken off is in it.
        let (near, far) = pair(&b.client, server);
        let seed = 70 + round as u64;
        thread::scope(|s| {
            s.spawn(|| send_pattern(&near, seed, WHOLE).unwrap());
            s.spawn(|| send_pattern(&far, seed + 100, WHOLE).unwrap());
            s.spawn(|| expect_pattern(&near, seed + 100, WHOLE));
            expect_pattern(&far, seed, WHOLE);
        });
    }
}

fn case_08_close_with_unread_data(b: &Bytes, server: &Pod) {
    for client_closes in [true, false] {
        let (near, far) = pair(&b.client, server);
        let (closer, other) = if client_closes { (near, far) } else { (far, near) };
        (&other).write_all(b"never read").unwrap();
        assert!(readable(&closer, PATIENCE), "the bytes came");
        drop(closer);
        assert_eq!((&other).read(&mut [0; 16]).map_err(|e| e.kind()), Err(ErrorKind::ConnectionReset));
    }
}

/// What may be on the way when nobody reads: two sockets' buffers without a mesh, six with it.
const IN_FLIGHT: usize = 8 << 20;

fn case_09_a_slow_reader_stops_its_sender(b: &Bytes, server: &Pod) {
    const GIB: usize = 1 << 30;
    const PIECE: usize = 64 * 1024;
    let nodes = if b.world.mode.is_meshed() { vec!["n1", "n2"] } else { Vec::new() };
    let rss = || nodes.iter().map(|node| b.world.agent(node).process().rss_kib()).max().unwrap_or(0);
    let before = rss();
    let (near, far) = pair(&b.client, server);
    near.set_nonblocking(true).unwrap();
    let mut sending = Pattern::new(9);
    let (mut piece, mut at, mut sent) = (vec![0; PIECE], PIECE, 0);
    let mut push = || {
        while sent < GIB {
            if at == PIECE {
                sending.fill(&mut piece);
                at = 0;
            }
            match (&near).write(&piece[at..]) {
                Ok(n) => (at, sent) = (at + n, sent + n),
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::WouldBlock, "after {sent} bytes");
                    break;
                }
            }
        }
        sent
    };
    let mut most = 0;
    throughout(Duration::from_secs(5), "the sender is held back at all", || {
        most = push();
        most < GIB / 4
    });
    assert!(most < IN_FLIGHT, "{most} bytes were taken from the sender though nobody reads, more than {IN_FLIGHT}");
    let grown = rss().saturating_sub(before);
    assert!(grown < 16 * 1024, "an agent has grown by {grown} KiB for one slow reader");

    let sent = push();
    near.set_nonblocking(false).unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    let mut got = vec![0; sent];
    (&far).read_exact(&mut got).unwrap();
    assert!(got == Pattern::bytes(9, sent.next_multiple_of(PIECE))[..sent], "the bytes that waited came as sent");
    assert_eq!((&far).read(&mut [0; 1]).unwrap(), 0);
}

fn case_10_the_reader_dies_under_a_blocked_writer(b: &Bytes, server: &Pod) {
    let (near, far) = pair(&b.client, server);
    let writer = thread::spawn(move || {
        let piece = [0; 64 * 1024];
        loop {
            if let Err(e) = (&near).write_all(&piece) {
                return e.kind();
            }
        }
    });
    // Once it has sent more than the reader's own buffer holds, it is about to be stopped, or is.
    eventually(PATIENCE, "bytes come to the reader", || readable(&far, Duration::ZERO));
    reset(far);
    let end = writer.join().unwrap();
    assert!(matches!(end, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{end:?}");
}

fn case_13_the_server_speaks_first(b: &Bytes, server: &Pod) {
    let listener = server.listen();
    let client = b.client.connect((server.v4(), port(&listener)).into()).unwrap();
    // The client says nothing, as with SMTP and MySQL: who waits for its first bytes waits for ever.
    let (session, _) = accept(&listener);
    (&session).write_all(b"220 mail.example ESMTP\r\n").unwrap();
    let mut greeting = [0; 24];
    (&client).read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"220 mail.example ESMTP\r\n");
    (&client).write_all(b"QUIT\r\n").unwrap();
    (&session).read_exact(&mut [0; 6]).unwrap();
}

fn case_16_a_write_after_shutdown_is_epipe(b: &Bytes, server: &Pod) {
    let (near, far) = pair(&b.client, server);
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&near).write(b"late").map_err(|e| e.kind()), Err(ErrorKind::BrokenPipe));
    assert_eq!((&far).read(&mut [0; 16]).unwrap(), 0, "nothing came after the end");
}

fn case_17_fionread_counts_what_came(b: &Bytes, server: &Pod) {
    for client_reads in [true, false] {
        let (near, far) = pair(&b.client, server);
        let (reader, writer) = if client_reads { (near, far) } else { (far, near) };
        (&writer).write_all(&[1; 100]).unwrap();
        eventually(PATIENCE, "FIONREAD says 100", || rustix::io::ioctl_fionread(&reader).unwrap() == 100);
    }
}

fn case_19_waitall_peek_rcvlowat_and_timeouts(b: &Bytes, server: &Pod) {
    for client_reads in [true, false] {
        let (near, far) = pair(&b.client, server);
        let (reader, writer) = if client_reads { (near, far) } else { (far, near) };

        // MSG_WAITALL waits over several writes.
        let sending = writer.try_clone().unwrap();
        let parts = thread::spawn(move || {
            for part in 0..3u8 {
                (&sending).write_all(&[part; 50]).unwrap();
                thread::yield_now();
            }
        });
        let mut all = [9; 150];
        let (_, got) = recv(reader.as_fd(), &mut all, RecvFlags::WAITALL).unwrap();
        parts.join().unwrap();
        assert_eq!(got, 150);
        assert!(all.chunks(50).zip(0..).all(|(part, n)| part.iter().all(|byte| *byte == n)));

        // MSG_PEEK leaves the bytes where they are.
        (&writer).write_all(b"peek").unwrap();
        let mut seen = [0; 4];
        let (_, peeked) = recv(reader.as_fd(), &mut seen, RecvFlags::PEEK | RecvFlags::WAITALL).unwrap();
        assert_eq!((peeked, &seen), (4, b"peek"));
        (&reader).read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"peek");

        // SO_RCVLOWAT: poll wakes when there is that much, not before.
        set_rcvlowat(&reader, 100);
        (&writer).write_all(&[1; 99]).unwrap();
        eventually(PATIENCE, "99 bytes are there", || rustix::io::ioctl_fionread(&reader).unwrap() == 99);
        assert!(!ready(&reader, PollFlags::IN, Duration::from_millis(200)), "99 bytes are below the mark of 100");
        (&writer).write_all(&[1]).unwrap();
        assert!(ready(&reader, PollFlags::IN, PATIENCE));
        set_rcvlowat(&reader, 1);
        (&reader).read_exact(&mut [0; 100]).unwrap();

        // SO_RCVTIMEO.
        reader.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert_eq!((&reader).read(&mut [0; 1]).map_err(|e| e.kind()), Err(ErrorKind::WouldBlock));
    }
}

fn set_rcvlowat(stream: &TcpStream, bytes: libc::c_int) {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open, the value is a c_int and its size is passed.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            std::ptr::from_ref(&bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
}
