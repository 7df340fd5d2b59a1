//! What a node sends to the CA: a certificate request, a join token; and the identity in a peer's name.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::identity::{Claims, VerifiedCsr};
use mesh_agent::model::SpiffeId;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = VerifiedCsr::from_pem(text);
    let _ = Claims::read(text);
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string(), text, "an identity has one spelling");
    }
});
