//! Bytes that another agent sends: the target of a CONNECT, the payload of an OPEN frame, the header of a TLS record.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::proxy::transport::frame::{Kind, OPEN_MAX, Refusal, read_open, write_open};
use mesh_agent::proxy::transport::hbone::read_authority;
use mesh_agent::proxy::transport::record::{MAX_RECORD, Opener};

fuzz_target!(|bytes: &[u8]| {
    if let Some(open) = read_open(bytes) {
        let destination = open.destination;
        assert!(destination.port() != 0 && !open.wait.is_zero());
        // What is read is what is written, but for v4-mapped addresses, which are written as IPv4.
        let mut payload = [0; OPEN_MAX];
        let len = write_open(open, &mut payload);
        let again = read_open(&payload[..len]).expect("what was written can be read");
        let canonical = (destination.ip().to_canonical(), destination.port(), open.wait);
        assert_eq!((again.destination.ip(), again.destination.port(), again.wait), canonical);
    }
    if let Ok(Some(len)) = Opener::record_len(bytes) {
        assert!(len <= MAX_RECORD, "a record that does not fit the buffer");
    }
    if let Some(byte) = bytes.first() {
        let _ = (Kind::from_byte(*byte), Refusal::from_byte(*byte));
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(uri) = http::Uri::builder().authority(text).build()
        && let Some(target) = read_authority(&uri)
    {
        assert!(target.port() != 0 && target.ip() == target.ip().to_canonical());
    }
});
