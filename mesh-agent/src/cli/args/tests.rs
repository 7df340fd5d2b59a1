use std::path::PathBuf;

use super::super::exit::{Exit, code, sentence};
use super::*;
use crate::config::{CertificateAuthority, Logging, Source};
use crate::discovery::DiscoveryError;
use crate::identity::{CaError, TokenError};
use crate::model::{OutboundPolicy, TrustDomain};
use crate::redirect::RedirectError;
use crate::telemetry::LogFormat;

fn machine() -> Machine {
    Machine { hostname: "worker-1".to_owned(), cores: 4 }
}

/// Words of a command line, and variables.
fn wish(line: &str, variables: &[(&str, &str)]) -> anyhow::Result<Wish> {
    let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
    parse(std::iter::once("mesh-agent").chain(line.split_whitespace()).map(OsString::from), variable, &machine())
}

fn node(line: &str, variables: &[(&str, &str)]) -> Node {
    match wish(&format!("node --config-dir / {line}"), variables).unwrap() {
        Wish::Node(node, _) => *node,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(line: &str, variables: &[(&str, &str)], expected: &str) {
    let error = wish(line, variables).expect_err(line);
    assert_eq!((sentence(&error).as_str(), code(&error)), (expected, Exit::Usage), "{line}");
}

#[test]
fn the_defaults() {
    assert_eq!(
        node("--embedded-ca", &[]),
        Node {
            node_name: "worker-1".to_owned(),
            source: Source::Directory(PathBuf::from("/")),
            state_dir: PathBuf::from("/var/lib/nodemesh"),
            admin_socket: PathBuf::from("/run/nodemesh/admin.sock"),
            cni: None,
            workers: 4,
            drain_timeout: Duration::from_secs(5),
            upgrade_drain: Duration::from_secs(3600),
            ca: CertificateAuthority::Embedded,
            cert_lifetime: Duration::from_secs(24 * 3600),
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
            cluster_domain: "cluster.local".to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            root_namespace: "istio-system".to_owned(),
            istio_labels: false,
            outbound_policy: OutboundPolicy::AllowAny,
            bpffs: PathBuf::from("/sys/fs/bpf"),
            cgroup: None,
            probe_cgroup: None,
            host_proc: "/proc".into(),
            take_over: false,
            kernel_log: false,
            orig_dst_entries: 65536,
            metrics_address: "0.0.0.0:15020".parse().unwrap(),
            readiness_address: "0.0.0.0:15021".parse().unwrap(),
            access_log: Some(LogFormat::Text),
            logging: Logging { filter: "info".to_owned(), format: LogFormat::Text },
        }
    );
}

#[test]
fn a_flag_beats_a_variable_which_beats_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("nodemesh.yaml");
    std::fs::write(
        &file,
        "# comment\nembeddedCa: true\nworkers: 2\ndrainTimeout: 1m30s\nclusterId: from-file\nistioLabels: true\n\
         # Of the controller; one file serves both.\nsan: [a, b]\n",
    )
    .unwrap();
    let line = format!("--settings {} --cluster-id from-flag", file.display());
    let node = node(&line, &[("NODEMESH_CLUSTER_ID", "from-variable"), ("NODEMESH_WORKERS", "3")]);
    assert_eq!((node.cluster_id.as_str(), node.workers), ("from-flag", 3));
    assert_eq!((node.drain_timeout, node.istio_labels), (Duration::from_secs(90), true));
    let by_variable = format!("node --config-dir {}", dir.path().display());
    assert!(wish(&by_variable, &[("NODEMESH_SETTINGS", file.to_str().unwrap())]).is_ok());
}

#[test]
fn a_switch_can_be_switched_off_again() {
    let dir = tempfile::NamedTempFile::new().unwrap();
    let line = format!(
        "--ca-address [fd00::1]:15012 --ca-address ca.mesh:15012 --join-token-file {} --embedded-ca=false",
        dir.path().display()
    );
    let CertificateAuthority::Remote { addresses, .. } = node(&line, &[("NODEMESH_EMBEDDED_CA", "true")]).ca else {
        panic!("the flag did not win")
    };
    assert_eq!(addresses, ["[fd00::1]:15012", "ca.mesh:15012"]);
}

#[test]
fn every_wrong_flag_is_one_sentence_and_64() {
    let ok = "node --config-dir / --embedded-ca";
    let name = "is no name; use lower-case letters, digits, `-` and `.`, beginning and ending with the former";
    let time = "is no time; write a number with a unit, such as 90s, 5m or 24h";
    let address = "is no address; write ip:port, such as 0.0.0.0:15020 or [::]:15020";
    for (more, expected) in [
        ("--node-name Worker", format!("--node-name: `Worker` {name}")),
        ("--node-name", "--node-name needs a value; see `mesh-agent node --help`".to_owned()),
        ("--node-name=a..b", format!("--node-name: `a..b` {name}")),
        ("--node-name=", format!("--node-name: `` {name}")),
        ("--state-dir=", "--state-dir: is empty; write a path".to_owned()),
        (
            "--admin-socket /0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
            "--admin-socket: 101 bytes are too long for a Unix socket; use a path of up to 100".to_owned(),
        ),
        ("--workers many", "--workers: `many` is no number from 0 to 1024".to_owned()),
        ("--workers -1", "--workers: `-1` is no number from 0 to 1024".to_owned()),
        ("--workers 1025", "--workers: `1025` is no number from 0 to 1024".to_owned()),
        ("--drain-timeout 5", format!("--drain-timeout: `5` {time}")),
        ("--drain-timeout 5x", format!("--drain-timeout: `5x` {time}")),
        ("--drain-timeout 99999999999999999999d", format!("--drain-timeout: `99999999999999999999d` {time}")),
        ("--drain-timeout 2h", "--drain-timeout: 2h is out of range; write 0s to 1h".to_owned()),
        ("--cert-lifetime 1s", "--cert-lifetime: 1s is out of range; write 10s to 365d".to_owned()),
        (
            "--trust-domain Cluster.Local",
            "--trust-domain: `Cluster.Local` is no trust domain: use 1 to 255 lower-case letters, digits, `.`, `-` or `_`"
                .to_owned(),
        ),
        ("--cluster-domain _", format!("--cluster-domain: `_` {name}")),
        ("--cluster-id=", "--cluster-id: is empty; write the name of this cluster".to_owned()),
        (
            "--root-namespace a.b",
            "--root-namespace: `a.b` is no namespace; use up to 63 lower-case letters, digits and `-`".to_owned(),
        ),
        ("--istio-labels=maybe", "--istio-labels: `maybe` is neither true nor false".to_owned()),
        ("--kernel-log=1", "--kernel-log: `1` is neither true nor false".to_owned()),
        (
            "--outbound-policy DENY",
            "--outbound-policy: `DENY` is no policy; write ALLOW_ANY or REGISTRY_ONLY".to_owned(),
        ),
        ("--cgroup /nowhere", "--cgroup: cannot use /nowhere: no such file or directory; name a directory that is there".to_owned()),
        ("--probe-cgroup /proc/version", "--probe-cgroup: /proc/version is no directory".to_owned()),
        ("--orig-dst-entries 0", "--orig-dst-entries: `0` is no number from 1 to 16777216".to_owned()),
        ("--metrics-address 15020", format!("--metrics-address: `15020` {address}")),
        ("--readiness-address localhost:1", format!("--readiness-address: `localhost:1` {address}")),
        (
            "--metrics-address 0.0.0.0:1 --readiness-address 0.0.0.0:1",
            "--metrics-address and --readiness-address are both 0.0.0.0:1; give each a port of its own".to_owned(),
        ),
        ("--access-log xml", "--access-log: `xml` is no format; write text, json or off".to_owned()),
        ("--log-format xml", "--log-format: `xml` is no format; write text or json".to_owned()),
        (
            "--log loud",
            "--log: `loud` is no log filter; write error, warn, info, debug, trace, off or target=level,...".to_owned(),
        ),
        ("--settings /nowhere.yaml", "cannot read the settings file /nowhere.yaml: no such file or directory".to_owned()),
        (
            "--ca-address a:1",
            "--embedded-ca and --ca-address exclude each other: the CA is either in this agent or in a controller"
                .to_owned(),
        ),
        ("--nodename a", "unknown flag `--nodename`; did you mean `--node-name`?".to_owned()),
        ("--zzz", "unknown flag `--zzz`; see `mesh-agent node --help`".to_owned()),
        ("--workers 1 --workers 2", "--workers is given more than once".to_owned()),
        ("a", "`a` is one argument too many; see `mesh-agent node --help`".to_owned()),
    ] {
        refused(&format!("{ok} {more}"), &[], &expected);
    }
}

#[test]
fn who_signs_has_to_be_said() {
    let no_ca = "no certificate authority: give --ca-address HOST:PORT of a controller, or --embedded-ca for a mesh on \
                 one machine";
    refused("node --config-dir /", &[], no_ca);
    let bad = "is no host:port; write for example controller.mesh:15012 or [fd00::1]:15012";
    for address in ["ca", "ca:0", "ca:70000", ":1", "a b:1", "fd00::1:15012", "https://ca:1"] {
        let line = format!("node --config-dir / --ca-address={}", address.replace(' ', "_"));
        refused(&line, &[], &format!("--ca-address: `{}` {bad}", address.replace(' ', "_")));
    }
    let ca = "node --config-dir / --ca-address ca:15012";
    let make = "make a token with `mesh-agent controller token --node NAME` on the controller";
    refused(ca, &[], &format!("--ca-address needs --join-token-file: {make}"));
    refused(
        &format!("{ca} --join-token-file /nowhere"),
        &[],
        "--join-token-file: cannot read /nowhere: no such file or directory",
    );
    refused(&format!("{ca} --join-token-file /proc"), &[], "--join-token-file: /proc is no file");
}

#[test]
fn an_error_names_the_variable_or_the_key_that_is_wrong() {
    let ok = "node --config-dir / --embedded-ca";
    refused(ok, &[("NODEMESH_WORKERS", "x")], "NODEMESH_WORKERS: `x` is no number from 0 to 1024");
    refused(
        "node --config-dir / --embedded-ca",
        &[("NODEMESH_CA_ADDRESS", "a:1, b:2")],
        "--embedded-ca and NODEMESH_CA_ADDRESS exclude each other: the CA is either in this agent or in a controller",
    );
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("s.yaml");
    let path = file.display();
    for (text, expected) in [
        ("workers: x\n", format!("workers in {path}: `x` is no number from 0 to 1024")),
        (
            "clusterId: a\nworker: 2\n",
            format!("{path}: line 2: unknown setting `worker`; `mesh-agent node --help` lists them all"),
        ),
        ("\nnode-name: a\n", format!("{path}: line 2: unknown setting `node-name`; write `nodeName`")),
        ("workers: [1, 2]\n", format!("{path}: line 1: `workers` takes one value and not a list")),
        ("clusterId:\n", format!("clusterId in {path}: is empty; write the name of this cluster")),
    ] {
        std::fs::write(&file, text).unwrap();
        refused(&format!("{ok} --settings {path}"), &[], &expected);
    }
    for (text, line) in
        [("a: [\n", 1), ("- a\n", 1), ("workers: 1\nworkers: 2\n", 2), ("workers: {a: 1}\n", 1), ("x\n", 1)]
    {
        std::fs::write(&file, text).unwrap();
        let error = wish(&format!("{ok} --settings {path}"), &[]).expect_err(text);
        let sentence = sentence(&error);
        assert!(sentence.starts_with(&format!("{path}: line {line}: ")), "{text:?}: {sentence}");
        assert!(!sentence.contains('\n') && code(&error) == Exit::Usage, "{sentence}");
    }
}

#[test]
fn a_hostname_that_is_no_name_asks_for_one() {
    let line = ["mesh-agent", "node", "--config-dir", "/", "--embedded-ca"].map(OsString::from);
    let machine = Machine { hostname: "my_host".to_owned(), cores: 1 };
    let error = parse(line, |_| None, &machine).unwrap_err();
    assert_eq!(sentence(&error), "the hostname `my_host` cannot be a node's name; give one with --node-name");
}

#[test]
fn wrong_commands() {
    refused("", &[], "which command? there are node, controller, help; see `mesh-agent --help`");
    refused("nod", &[], "unknown command `nod`; did you mean `node`?");
    refused("serve", &[], "unknown command `serve`; see `mesh-agent --help`");
    refused("--quiet", &[], "unknown flag `--quiet`; see `mesh-agent --help`");
    refused("controller token", &[], "--node <NAME> is missing; see `mesh-agent controller --help`");
}

#[test]
fn an_agent_with_a_ca_of_its_own_takes_nothing_over() {
    let error = wish("node --take-over --embedded-ca --config-dir / --node-name a", &[]).unwrap_err().to_string();
    assert!(error.contains("--take-over and --embedded-ca exclude each other"), "{error}");
}

#[test]
fn facts_are_told_whatever_the_settings_file_says() {
    let Wish::Facts(config) = wish("node --settings /nowhere --facts --node-name b --source kubernetes", &[]).unwrap()
    else {
        panic!("facts were asked for");
    };
    assert_eq!(config.node_name, "b");
    let Wish::Cleanup(_, folders) = wish("node --cleanup --remove-folder /a --remove-folder /b", &[]).unwrap() else {
        panic!("a clean-up was asked for");
    };
    assert_eq!(folders, [PathBuf::from("/a"), PathBuf::from("/b")]);
    assert!(wish("node --remove-folder /a", &[]).is_err(), "an agent that serves removes nothing");
}

#[test]
fn cleanup_needs_neither_a_ca_nor_manifests() {
    let expected = Cleanup {
        node_name: "b".to_owned(),
        bpffs: PathBuf::from("/sys/fs/bpf"),
        cgroup: None,
        admin_socket: PathBuf::from("/run/nodemesh/admin.sock"),
        state_dir: PathBuf::from("/var/lib/nodemesh"),
        cni: None,
        logging: Logging { filter: "info".to_owned(), format: LogFormat::Text },
    };
    assert_eq!(wish("node --cleanup --node-name b", &[]).unwrap(), Wish::Cleanup(expected, Vec::new()));
}

#[test]
fn the_controller_and_its_commands() {
    let Wish::Controller(controller, _) = wish("controller --config-dir / --san ca.mesh --san 10.0.0.1", &[]).unwrap()
    else {
        panic!("no controller")
    };
    assert_eq!(controller.sans, ["ca.mesh", "10.0.0.1"]);
    assert_eq!(controller.listen, "0.0.0.0:15012".parse().unwrap());

    let Wish::Token { controller, node, ttl } =
        wish("controller --config-dir / token --node a --ttl 10m --state-dir /x", &[]).unwrap()
    else {
        panic!("no token")
    };
    assert_eq!((controller.state_dir, node.as_str(), ttl), (PathBuf::from("/x"), "a", Duration::from_secs(600)));
    let Wish::RevokeToken { controller, token } =
        wish("controller revoke-token 0123456789abcdef --state-dir /x --config-dir /nowhere", &[]).unwrap()
    else {
        panic!("no revocation")
    };
    assert_eq!((controller.state_dir, token.as_str()), (PathBuf::from("/x"), "0123456789abcdef"));
    refused("controller revoke-token", &[], "<TOKEN> is missing; see `mesh-agent controller --help`");
    assert!(matches!(wish("controller rotate-root --config-dir /nowhere", &[]).unwrap(), Wish::RotateRoot(_)));

    refused(
        "controller --config-dir /nowhere",
        &[],
        "--config-dir: cannot use /nowhere: no such file or directory; name a directory that is there",
    );
    let c = "controller --config-dir /";
    refused(&format!("{c} --san a_b"), &[], "--san: `a_b` is neither a DNS name nor an IP address");
    refused(
        &format!("{c} --ca-dir /nowhere"),
        &[],
        "--ca-dir: cannot use /nowhere: no such file or directory; name a directory that is there",
    );
    refused(
        &format!("{c} --listen x"),
        &[],
        "--listen: `x` is no address; write ip:port, such as 0.0.0.0:15020 or [::]:15020",
    );
    refused(
        &format!("{c} token --node a --ttl soon"),
        &[],
        "--ttl: `soon` is no time; write a number with a unit, such as 90s, 5m or 24h",
    );
    refused(
        &format!("{c} token --node a --ttl 0s"),
        &[],
        "--ttl: a token that ends at once is of no use; write for example 1h",
    );
    refused(&format!("{c} --workers 2"), &[], "unknown flag `--workers`; see `mesh-agent controller --help`");
}

#[test]
fn help_fits_eighty_columns_and_names_every_setting() {
    for (line, role) in [
        ("node --help", Role::Node),
        ("controller --help", Role::Controller),
        ("controller revoke-token --help", Role::Controller),
    ] {
        let Wish::Show(help) = wish(line, &[]).unwrap() else { panic!("no help") };
        for line in help.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        for setting in SETTINGS.iter().filter(|s| s.roles.contains(&role) && !s.hidden) {
            assert!(help.contains(&format!("--{}", setting.name)), "{}", setting.name);
        }
        assert!(!help.contains("orig-dst-entries"));
    }
    let Wish::Show(version) = wish("--version", &[]).unwrap() else { panic!("no version") };
    assert_eq!(version, format!("mesh-agent {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_defaults_that_help_shows_are_those_in_force() {
    // Every default of the table, given as a flag, must change nothing.
    let words = SETTINGS
        .iter()
        .filter(|s| s.roles.contains(&Role::Node) && s.kind == Kind::One && s.name != "config-dir")
        .filter(|s| !s.default.is_empty() && !s.default.contains(' '))
        .map(|s| format!("--{} {}", s.name, s.default))
        .collect::<Vec<_>>();
    assert!(words.len() > 10);
    assert_eq!(node(&format!("--embedded-ca {}", words.join(" ")), &[]), node("--embedded-ca", &[]));
}

#[test]
fn exit_codes_follow_the_cause() {
    let io = |kind: std::io::ErrorKind| anyhow::Error::from(std::io::Error::from(kind)).context("cannot load");
    assert_eq!(code(&io(std::io::ErrorKind::PermissionDenied)), Exit::NoPermission);
    assert_eq!(code(&io(std::io::ErrorKind::AddrInUse)), Exit::Unavailable);
    assert_eq!(code(&io(std::io::ErrorKind::InvalidData)), Exit::Internal);
    assert_eq!(code(&anyhow::anyhow!("a surprise")), Exit::Internal);
    let path = PathBuf::from("/x");
    let denied = || std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    for (error, exit) in [
        (RedirectError::Capability { missing: "CAP_BPF" }, Exit::NoPermission),
        (RedirectError::Bpffs { path: path.clone(), source: denied() }, Exit::NoPermission),
        (RedirectError::NotCgroup2 { path: path.clone() }, Exit::Usage),
        (RedirectError::NotInCgroup { path: path.clone() }, Exit::Usage),
        (RedirectError::NoCgroup2, Exit::Unavailable),
        (RedirectError::Running { node: "n".into() }, Exit::Unavailable),
        (RedirectError::Load { program: "p".into(), kernel: "5.4".into(), reason: "r".into() }, Exit::Unavailable),
    ] {
        assert_eq!(code(&error.into()), exit);
    }
    assert_eq!(code(&TokenError::NoSecret(path.clone()).into()), Exit::Usage);
    assert_eq!(code(&CaError::Locked(path.clone()).into()), Exit::Unavailable);
    assert_eq!(code(&DiscoveryError::Missing(path).into()), Exit::Usage);
    assert_eq!(code(&anyhow::anyhow!("low").context(Failure::no_permission("high"))), Exit::NoPermission);
    assert_eq!(sentence(&anyhow::anyhow!("low").context("middle").context("high")), "high: middle: low");
    assert_eq!(sentence(&anyhow::anyhow!("low").context("high: low")), "high: low");
}

#[test]
fn a_node_without_its_settings_file_takes_what_was_last_good() {
    let state = tempfile::tempdir().unwrap();
    let line = |source: &str| {
        let state = state.path().display();
        format!("node --embedded-ca --source {source} --config-dir / --settings /no/such/file --state-dir {state}")
    };
    let sentence_of = |line: &str| sentence(&wish(line, &[]).expect_err(line));
    let said = sentence_of(&line("kubernetes"));
    assert!(said.contains("no last good settings are on this node: put it back with `meshctl upgrade`"), "{said}");
    std::fs::write(state.path().join(crate::config::LAST_GOOD_SETTINGS), "trustDomain: example.org\n").unwrap();
    let Wish::Node(node, _) = wish(&line("kubernetes"), &[]).unwrap() else { panic!("no node") };
    assert_eq!(node.trust_domain, TrustDomain::new("example.org").unwrap());
    assert!(
        sentence_of(&line("directory")).starts_with("cannot read the settings file /no/such/file"),
        "elsewhere it is an error"
    );
}
