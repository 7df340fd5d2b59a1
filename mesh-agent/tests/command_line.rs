//! The real binaries: exit code, and one sentence on stderr.

use std::process::{Command, Output};

fn run(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    // A variable of whoever runs the tests must not decide them.
    for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("NODEMESH_")) {
        command.env_remove(name);
    }
    command.args(args).output().unwrap()
}

const AGENT: &str = env!("CARGO_BIN_EXE_mesh-agent");
const CTL: &str = env!("CARGO_BIN_EXE_meshctl");

#[test]
fn a_failure_is_one_sentence_and_its_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none").display().to_string();
    for (program, args, code, expected) in [
        (
            AGENT,
            &["node", "--config-dir", "/", "--embedded-ca", "--workers", "x"][..],
            64,
            "mesh-agent: --workers: `x` is no number from 0 to 1024\n".to_owned(),
        ),
        (AGENT, &["serve"], 64, "mesh-agent: unknown command `serve`; see `mesh-agent --help`\n".to_owned()),
        (
            CTL,
            &["status", "--socket", &socket],
            69,
            format!(
                "meshctl: no agent on {socket}; start one with `mesh-agent node`, or name its socket with --socket\n"
            ),
        ),
        (CTL, &["status", "-o", "xml"], 64, "meshctl: --output: `xml` is none of table, wide, json\n".to_owned()),
    ] {
        let output = run(program, args);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), expected);
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn help_and_version_go_to_stdout_and_are_no_failure() {
    for (program, name) in [(AGENT, "mesh-agent"), (CTL, "meshctl")] {
        let help = run(program, &["--help"]);
        assert!(help.status.success() && help.stderr.is_empty());
        assert!(String::from_utf8(help.stdout).unwrap().contains(&format!("Usage: {name}")));
        let version = run(program, &["--version"]);
        assert_eq!(String::from_utf8(version.stdout).unwrap(), format!("{name} {}\n", env!("CARGO_PKG_VERSION")));
    }
}
