//! Bytes of a settings file, and texts as variables give them: read and checked, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::config::{Analysis, Cleanup, Controller, Machine, Node, Origin, SETTINGS, Written};

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let machine = Machine { hostname: "n1".to_owned(), cores: 2 };
    let check = |written: &Written| {
        let _ = Node::check(written, &machine);
        let _ = Controller::check_for_tools(written);
        let _ = Cleanup::check(written, &machine);
        let _ = Analysis::check(written);
    };
    let mut file = Written::default();
    if file.parse("fuzz.yaml", text).is_ok() {
        check(&file);
    }
    for setting in SETTINGS {
        let mut variable = Written::default();
        variable.set(setting, Origin::Variable, vec![text.to_owned()]);
        check(&variable);
    }
});
