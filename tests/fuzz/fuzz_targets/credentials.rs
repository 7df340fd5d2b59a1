//! What a node sends to the CA: a certificate request, a join token. What comes back: roots. And the identity in a
//! peer's name.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::identity::{Bundle, Claims, VerifiedCsr};
use mesh_agent::model::SpiffeId;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = VerifiedCsr::from_pem(text);
    let _ = Claims::read(text);
    if let Ok(bundle) = Bundle::from_pem(text) {
        let again = Bundle::from_pem(&bundle.pem()).expect("what was written can be read");
        assert_eq!(again.fingerprints(), bundle.fingerprints());
    }
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string(), text, "an identity has one spelling");
    }
});
