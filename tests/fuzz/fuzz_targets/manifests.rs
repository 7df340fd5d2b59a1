//! Bytes of a manifest file: parsed, translated, translated again with the memory of the first time. Nothing may panic,
//! nothing may take long (libFuzzer's -timeout), and twice the same must mean the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::model::{Snapshot, TrustDomain};
use mesh_agent::translate::{Memory, Settings, closed, parse, translate};

fuzz_target!(|bytes: &[u8]| {
    closed("fuzz.yaml", bytes, "nodemesh-system");
    let Ok(objects) = parse("fuzz.yaml", bytes) else { return };
    let mut settings = Settings::new(TrustDomain::new("cluster.local").expect("a trust domain"));
    settings.istio_labels = true;
    settings.endpoints_from_pods = true;
    settings.standalone_node = Some("n1".into());
    let first = translate(&settings, &objects, &Memory::default());
    let again = translate(&settings, &objects, &first.memory);
    assert_eq!(first.problems, again.problems);
    assert!(Snapshot::new(1, first.parts) == Snapshot::new(2, again.parts));
});
