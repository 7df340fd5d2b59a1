use std::io;
use std::sync::mpsc;
use std::time::UNIX_EPOCH;

use super::super::fixtures::{facts, foreign, outcome};
use super::super::{Reporter, ResponseFlag};
use super::*;

fn noon() -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(1_787_400_000_000_123)
}

fn text(facts: &Facts, outcome: &Outcome) -> String {
    let mut line = Vec::new();
    write_text(&mut line, noon(), facts, outcome);
    String::from_utf8(line).unwrap()
}

#[test]
fn a_good_connection_as_text() {
    assert_eq!(
        text(&facts(Reporter::Source), &outcome(ResponseFlag::None)),
        "2026-08-22T12:00:00.000123Z INFO access: connection complete src.addr=10.0.1.2:40000 src.workload=\"web-1\" \
         src.namespace=\"shop\" src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" dst.addr=10.0.2.3:15008 \
         dst.hbone_addr=10.0.2.3:8080 dst.service=\"cart.shop.svc.cluster.local\" dst.workload=\"cart-1\" \
         dst.namespace=\"shop\" dst.identity=\"spiffe://cluster.local/ns/shop/sa/cart\" direction=\"outbound\" \
         bytes_sent=100 bytes_recv=2000 duration=\"13ms\" response_flags=\"-\"\n"
    );
}

#[test]
fn a_denied_one_names_flag_policies_and_reason() {
    let outcome = Outcome {
        error: Some("denied by shop/only-web".to_owned()),
        audited: vec!["shop/watch".to_owned(), "mesh/all".to_owned()],
        ..outcome(ResponseFlag::Denied)
    };
    assert_eq!(
        text(&foreign(), &outcome),
        "2026-08-22T12:00:00.000123Z WARN access: connection failed src.addr=192.0.2.1:5 dst.addr=10.0.2.3:80 \
         direction=\"inbound\" bytes_sent=100 bytes_recv=2000 duration=\"13ms\" response_flags=\"DENY\" \
         audit_policies=\"shop/watch,mesh/all\" error=\"denied by shop/only-web\"\n"
    );
}

#[test]
fn json_has_the_same_fields_and_numbers_stay_numbers() {
    let mut line = Vec::new();
    write_json(&mut line, noon(), &facts(Reporter::Destination), &outcome(ResponseFlag::PolicyChanged));
    let text = String::from_utf8(line).unwrap();
    assert_eq!(
        text,
        "{\"time\":\"2026-08-22T12:00:00.000123Z\",\"level\":\"warn\",\"scope\":\"access\",\
         \"message\":\"connection complete\",\"src.addr\":\"10.0.1.2:40000\",\"src.workload\":\"web-1\",\
         \"src.namespace\":\"shop\",\"src.identity\":\"spiffe://cluster.local/ns/shop/sa/web\",\
         \"dst.addr\":\"10.0.2.3:15008\",\"dst.hbone_addr\":\"10.0.2.3:8080\",\
         \"dst.service\":\"cart.shop.svc.cluster.local\",\"dst.workload\":\"cart-1\",\"dst.namespace\":\"shop\",\
         \"dst.identity\":\"spiffe://cluster.local/ns/shop/sa/cart\",\"direction\":\"inbound\",\"bytes_sent\":100,\
         \"bytes_recv\":2000,\"duration\":\"13ms\",\"response_flags\":\"POLICY_CHANGED\"}\n"
    );
    serde_json::from_str::<serde_json::Value>(&text).unwrap();
}

#[test]
fn no_value_ends_the_line_or_forges_a_field() {
    let nasty = "a\"b\\c\nd\r\te\u{1}\u{7f}ü";
    let outcome = Outcome { error: Some(nasty.to_owned()), ..outcome(ResponseFlag::TunnelFailure) };
    assert!(text(&foreign(), &outcome).ends_with(" error=\"a\\\"b\\\\c\\nd\\r\\te\\u0001\\u007fü\"\n"));
    let mut line = Vec::new();
    write_json(&mut line, noon(), &foreign(), &outcome);
    assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
    let json: serde_json::Value = serde_json::from_slice(&line).unwrap();
    assert_eq!(json["error"], nasty);
}

/// A reader that lets one write through for each permit.
struct Gate {
    permits: mpsc::Receiver<()>,
    written: mpsc::Sender<Vec<u8>>,
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.permits.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
        self.written.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stuck_reader_costs_lines_and_never_blocks() {
    let (permit, permits) = mpsc::channel();
    let (written, out) = mpsc::channel();
    let mut line = Vec::new();
    write_text(&mut line, noon(), &foreign(), &outcome(ResponseFlag::None));
    let log = AccessLog::to(Some(LogFormat::Text), Gate { permits, written }, 10 * line.len());

    // Nothing may be written: at most ten lines lie in the queue and ten more in the writer's hands.
    for _ in 0..1000 {
        log.write(&foreign(), &outcome(ResponseFlag::None));
    }
    let dropped = log.dropped().get();
    assert!((980..=999).contains(&dropped), "{dropped} were dropped");

    // The reader comes back: everything that was not dropped arrives, whole lines only.
    for _ in 0..1000 {
        permit.send(()).unwrap();
    }
    drop(log);
    let all: Vec<u8> = out.try_iter().flatten().collect();
    assert_eq!(all.len(), (1000 - usize::try_from(dropped).unwrap()) * line.len());
    assert!(all.ends_with(b"response_flags=\"-\"\n"));
}

#[test]
fn lines_of_many_threads_stay_whole() {
    let (permit, permits) = mpsc::channel();
    let (written, out) = mpsc::channel();
    for _ in 0..4000 {
        permit.send(()).unwrap();
    }
    let log = AccessLog::to(Some(LogFormat::Json), Gate { permits, written }, QUEUE_BYTES);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..1000 {
                    log.write(&facts(Reporter::Source), &outcome(ResponseFlag::None));
                }
            });
        }
    });
    assert_eq!(log.dropped().get(), 0);
    drop(log);
    let all: Vec<u8> = out.try_iter().flatten().collect();
    let lines: Vec<_> = all.split_inclusive(|b| *b == b'\n').collect();
    assert_eq!(lines.len(), 4000);
    for line in lines {
        serde_json::from_slice::<serde_json::Value>(line).unwrap();
    }
}

#[test]
fn switched_off_it_does_nothing() {
    let log = AccessLog::off();
    log.write(&foreign(), &outcome(ResponseFlag::None));
    assert_eq!(log.dropped().get(), 0);
}
