//! Policies judged, as data: `tests/translate/verdicts/*.yaml`. A file holds cases, each begun by `#=== its name`: the
//! policies, and lines `#> who address port: verdict` for connections to the pod shop/app at 10.0.0.9.

use std::net::SocketAddr;

use super::*;
use crate::model::SpiffeId;
use crate::proxy::policy::{Connection, Denied, authorize};

const POD: &str = "
---
apiVersion: v1
kind: Pod
metadata: { name: app, namespace: shop, labels: { app: app } }
status: { podIPs: [{ ip: 10.0.0.9 }, { ip: 'fd00::9' }] }
";

#[test]
fn every_connection_gets_its_verdict() {
    let (mut judged, mut wrong) = (0, Vec::new());
    for file in cases(&data().join("verdicts")) {
        let text = std::fs::read_to_string(&file).unwrap();
        for case in text.split("#=== ").skip(1) {
            let (name, _) = case.split_once('\n').unwrap();
            let objects = parse("policies.yaml", format!("# {case}{POD}").as_bytes())
                .unwrap_or_else(|e| panic!("{}: {name}: {e}", file.display()));
            let translation = translate(&settings(), &objects, &Memory::default());
            let app = &translation.parts.workloads[0];
            for line in case.lines().filter_map(|l| l.trim().strip_prefix("#> ")) {
                let (connection, expected) = line.split_once(": ").unwrap_or_else(|| panic!("{name}: {line}"));
                let found = judge(app, connection);
                judged += 1;
                if found != expected {
                    wrong.push(format!("{}: {name}: {line}\n    but found: {found}", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(judged >= 80, "only {judged} connections are judged");
}

fn judge(app: &Workload, connection: &str) -> String {
    let [who, address, port] = connection.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("`{connection}` is not `who address port`")
    };
    let identity = match who.split_once('/') {
        None if who == "plain" => None,
        Some((namespace, account)) => {
            // `other-domain:ns/account` is of another mesh.
            let (domain, namespace) = namespace.split_once(':').unwrap_or(("cluster.local", namespace));
            Some(SpiffeId::new(&TrustDomain::new(domain).unwrap(), namespace, account).unwrap())
        }
        None => panic!("{who} is nobody"),
    };
    let source = SocketAddr::new(address.parse().unwrap(), 40000);
    let destination = app.address_like(source.ip()).unwrap();
    let destination = SocketAddr::new(destination, port.parse().unwrap());
    let verdict = authorize(app, &Connection { identity: identity.as_ref(), source, destination });
    let mut text = match verdict.result {
        Ok(_) => "allow".to_owned(),
        Err(Denied::Plaintext) => "plaintext".to_owned(),
        Err(Denied::ByPolicy(name)) => format!("deny {name}"),
        Err(Denied::Elsewhere) => "elsewhere".to_owned(),
        Err(Denied::NotAllowed) => "not allowed".to_owned(),
    };
    if !verdict.audited.is_empty() {
        write!(text, " audit {}", verdict.audited.join(",")).unwrap();
    }
    text
}
