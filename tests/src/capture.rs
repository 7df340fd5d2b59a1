//! What passes on the link between the nodes: tcpdump writes it, a small reader of its own looks through it.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use crate::mesh::{Mesh, fresh_log};
use crate::netns::Netns;
use crate::process::Process;
use crate::wait::eventually;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Process,
    file: PathBuf,
    sender: UdpSocket,
}

/// A TCP segment with payload.
#[derive(Debug, Clone)]
pub struct Segment {
    pub source: (IpAddr, u16),
    pub destination: (IpAddr, u16),
    pub payload: Vec<u8>,
}

/// All segments of a finished capture.
#[derive(Debug)]
pub struct Recording {
    pub segments: Vec<Segment>,
}

/// TCP_PORT of no service: the datagram that marks the end of a capture goes to discard.
pub(crate) const DISCARD: u16 = 9;
const END_MARK: &[u8] = b"nodemesh: the capture ends here";

impl Capture {
    pub(crate) fn start(mesh: &Mesh, node: &str) -> Self {
        let sender = mesh.get_node(node).netns().run(|| UdpSocket::bind(("0.0.0.0", 0)).expect("a UDP socket"));
        sender.connect((mesh.control_v4(), DISCARD)).expect("a UDP socket connects to anything");
        Self::on(mesh.fabric(), node, &fresh_log(&mesh.logs(), "tcpdump"), sender)
    }

    /// Of what passes `interface` of `netns`; what `sender` sends must pass there too.
    pub(crate) fn on(netns: &Netns, interface: &str, log: &Path, sender: UdpSocket) -> Self {
        let file = log.with_extension("pcap");
        let mut command = netns.command("tcpdump");
        // -Z root: Debian's tcpdump otherwise drops to a user that may not write into our folder.
        command
            .args(["-i", interface, "-n", "-U", "-s", "0", "--immediate-mode", "-B", "16384", "-Z", "root", "-w"])
            .arg(&file);
        let mut tcpdump = Process::start("tcpdump", command, log);
        tcpdump.wait_for("listening on", Duration::from_secs(10));
        Self { tcpdump, file, sender }
    }

    /// Ends the capture with all that was sent before this call in it.
    pub fn stop(mut self) -> Recording {
        eventually(Duration::from_secs(10), "the capture has its end mark", || {
            // Nobody listens there; the refusal comes back as an error of a later send.
            let _ = self.sender.send(END_MARK);
            fs::read(&self.file).is_ok_and(|bytes| find(&bytes, END_MARK).is_some())
        });
        self.tcpdump.signal(Signal::INT);
        self.tcpdump.wait(Duration::from_secs(10));
        Recording { segments: segments(&fs::read(&self.file).expect("tcpdump has written its file")) }
    }
}

impl Recording {
    /// Whether `needle` passed in the clear, within a segment or across two that follow each other.
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.flows().iter().any(|bytes| find(bytes, needle).is_some())
    }

    /// Segments that begin with a TLS record of `content` type (22 handshake, 23 application data), version as in TLS 1.3.
    pub fn tls_records(&self, content: u8) -> usize {
        let starts = |s: &&Segment| matches!(s.payload.as_slice(), [c, 3, 1 | 3, ..] if *c == content);
        self.segments.iter().filter(starts).count()
    }

    /// Segments to or from a port.
    pub fn on_port(&self, port: u16) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(move |s| s.source.1 == port || s.destination.1 == port)
    }

    /// Payload of each direction of each connection, in the order of the wire.
    fn flows(&self) -> Vec<Vec<u8>> {
        let mut flows: HashMap<_, Vec<u8>> = HashMap::new();
        for s in &self.segments {
            flows.entry((s.source, s.destination)).or_default().extend_from_slice(&s.payload);
        }
        flows.into_values().collect()
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// The TCP segments with payload of a pcap file of Ethernet frames, as tcpdump writes it on this machine.
fn segments(pcap: &[u8]) -> Vec<Segment> {
    const HEADER: usize = 24;
    const RECORD: usize = 16;
    assert!(pcap.get(..4) == Some(&0xa1b2_c3d4_u32.to_ne_bytes()), "the capture is not a pcap file of this machine");
    let mut found = Vec::new();
    let mut rest = &pcap[HEADER..];
    while let Some((record, after)) = rest.split_at_checked(RECORD) {
        let length = u32::from_ne_bytes(record[8..12].try_into().expect("four bytes")) as usize;
        let Some((frame, next)) = after.split_at_checked(length) else { break };
        found.extend(segment(frame));
        rest = next;
    }
    found
}

fn segment(frame: &[u8]) -> Option<Segment> {
    const TCP: u8 = 6;
    let (source, destination, tcp) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let ip = frame.get(14..)?;
            if *ip.get(9)? != TCP {
                return None;
            }
            let header = usize::from(ip[0] & 0x0f) * 4;
            // Small frames are padded: the IP header knows where the packet ends. Zero: segmentation offload.
            let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            let end = if total == 0 { ip.len() } else { total.min(ip.len()) };
            let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
            (address(12)?, address(16)?, ip.get(header..end)?)
        }
        [0x86, 0xdd] => {
            let ip = frame.get(14..)?;
            if *ip.get(6)? != TCP {
                return None;
            }
            let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
            (address(8)?, address(24)?, ip.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
    let header = usize::from(tcp.get(12)? >> 4) * 4;
    let payload = tcp.get(header..)?.to_vec();
    if payload.is_empty() {
        return None;
    }
    Some(Segment { source: (source, port(0)?), destination: (destination, port(2)?), payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_segment_of_each_family() {
        let mut v4 = vec![0; 12];
        v4.extend([0x08, 0x00, 0x45, 0, 0, 44, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let tcp = [0x12, 0x34, 0x3a, 0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0];
        v4.extend(tcp);
        v4.extend(b"abcd");
        v4.extend([0, 0]);
        let got = segment(&v4).expect("a TCP segment");
        assert_eq!(got.source, ("10.0.0.1".parse().unwrap(), 0x1234));
        assert_eq!(got.destination, ("10.0.0.2".parse().unwrap(), 15008));
        assert_eq!(got.payload, b"abcd", "padding is not payload");

        let mut v6 = vec![0; 12];
        v6.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, 6, 64]);
        v6.extend([0; 32]);
        v6.extend(tcp);
        v6.extend(b"efgh");
        assert_eq!(segment(&v6).expect("a TCP segment").payload, b"efgh");
    }

    #[test]
    fn finds_a_needle_across_segments_of_one_flow_only() {
        let part = |port, payload: &[u8]| Segment {
            source: ("10.0.0.1".parse().unwrap(), port),
            destination: ("10.0.0.2".parse().unwrap(), 80),
            payload: payload.to_vec(),
        };
        let recording = Recording { segments: vec![part(1, b"sec"), part(2, b"noise"), part(1, b"ret")] };
        assert!(recording.contains(b"secret"));
        assert!(!recording.contains(b"secnoise"));
    }

    #[test]
    fn counts_tls_records_by_type() {
        let record = |kind: u8| Segment {
            source: ("10.0.0.1".parse().unwrap(), 1),
            destination: ("10.0.0.2".parse().unwrap(), 15008),
            payload: vec![kind, 3, 3, 0, 1, 0],
        };
        let recording = Recording { segments: vec![record(22), record(23), record(23)] };
        assert_eq!((recording.tls_records(22), recording.tls_records(23)), (1, 2));
    }
}
