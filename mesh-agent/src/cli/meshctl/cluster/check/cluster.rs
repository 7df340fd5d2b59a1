//! What a cluster is without the mesh: its version, our rights, its nodes as it knows them, and who else wants pods' traffic.

use serde_json::{Value, json};

use super::finding::{Finding, fine, warning, wrong};
use crate::api_server::{ApiServer, Kind};
use crate::cli::meshctl::cluster::Access;
use crate::cli::meshctl::cluster::objects::{KINDS, MODE, is_ours, kind, name};

/// Admission policies that know on which node a token's pod runs.
const OLDEST: (u64, u64) = (1, 30);
/// The first kernel on which every hook is there; from 6.1 on all is tested.
const OLDEST_KERNEL: (u64, u64) = (5, 15);
const TESTED_KERNEL: (u64, u64) = (6, 1);

pub(super) fn elsewhere(mesh: &str) -> Finding {
    wrong(format!(
        "Nodemesh is installed in namespace {mesh}; a cluster has one mesh: give --namespace {mesh}, or uninstall it"
    ))
}

pub(super) async fn version(server: &ApiServer) -> anyhow::Result<Finding> {
    let said = server.request("GET", "/version", None, None).await?;
    Ok(of_version(&said, server.url()))
}

fn of_version(said: &Value, url: &str) -> Finding {
    let full = said["gitVersion"].as_str().unwrap_or("of unknown version");
    let number = |key: &str| {
        let digits: String = said[key].as_str().unwrap_or_default().chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or_default()
    };
    let (major, minor) = OLDEST;
    match (number("major"), number("minor")) >= OLDEST {
        true => fine(format!("Kubernetes {full} at {url}")),
        false => wrong(format!(
            "Kubernetes {full} is too old: Nodemesh needs {major}.{minor} or newer; upgrade the cluster first"
        )),
    }
}

/// Whether we may make each kind of object. What the API server refuses beyond that shows when it is applied.
pub(super) async fn rights(server: &ApiServer, access: &Access, verb: &str) -> anyhow::Result<Finding> {
    let mut missing = Vec::new();
    for kind in &KINDS {
        let mut wanted = json!({"verb": verb, "group": kind.group, "resource": kind.plural});
        if kind.namespaced {
            wanted["namespace"] = access.namespace.as_str().into();
        }
        let review = json!({
            "apiVersion": Kind::SUBJECT_ACCESS_REVIEW.api_version(),
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": wanted},
        });
        let answer = server.create(&Kind::SUBJECT_ACCESS_REVIEW, "", &review).await?;
        if answer["status"]["allowed"] != true {
            missing.push(kind.plural.as_ref());
        }
    }
    Ok(of_rights(&missing))
}

fn of_rights(missing: &[&str]) -> Finding {
    match missing {
        [] => fine("you may install, upgrade and remove it"),
        all if all.len() == KINDS.len() => {
            wrong("you may change nothing that an installation is made of; ask an administrator of the cluster")
        }
        some => wrong(format!("you may not change {}; ask an administrator of the cluster", some.join(", "))),
    }
}

pub(super) fn of_nodes(nodes: &[Value]) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut fit = 0;
    let (major, minor) = OLDEST_KERNEL;
    for node in nodes {
        let info = &node["status"]["nodeInfo"];
        let text = |key: &str| info[key].as_str().unwrap_or_default();
        let (system, release) = (text("operatingSystem"), text("kernelVersion"));
        let kernel = two_numbers(release);
        if system != "linux" {
            found.push(warning(format!("it runs {system}, and stays outside the mesh")).on(name(node)));
        } else if kernel < OLDEST_KERNEL {
            let text = format!("its kernel {release} is too old; upgrade it to {major}.{minor} or newer");
            found.push(wrong(text).on(name(node)));
        } else {
            fit += 1;
            if kernel < TESTED_KERNEL {
                let (major, minor) = TESTED_KERNEL;
                let text = format!("its kernel is {release}; the mesh is tested with {major}.{minor} and newer");
                found.push(warning(text).on(name(node)));
            }
        }
        let conditions = node["status"]["conditions"].as_array();
        let ready = conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True");
        if !ready {
            found.push(warning("it is not Ready: its pods are not in the mesh until it is").on(name(node)));
        }
    }
    found.insert(0, fine(format!("{fit} of {} nodes can run an agent", nodes.len())));
    found
}

/// `6.1.0-18-amd64`
fn two_numbers(release: &str) -> (u64, u64) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or_default());
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}

/// By what a mesh is known: a label or annotation on namespaces with its value (none: any), and its webhook's name.
struct Mesh {
    name: &'static str,
    namespace: &'static [(&'static str, Option<&'static str>)],
    webhook: &'static str,
}

const MESHES: [Mesh; 3] = [
    Mesh {
        name: "Istio",
        namespace: &[
            ("istio-injection", Some("enabled")),
            ("istio.io/rev", None),
            ("istio.io/dataplane-mode", Some("ambient")),
        ],
        webhook: "istio-",
    },
    Mesh { name: "Linkerd", namespace: &[("linkerd.io/inject", Some("enabled"))], webhook: "linkerd-" },
    Mesh { name: "Kuma", namespace: &[("kuma.io/sidecar-injection", Some("enabled"))], webhook: "kuma-" },
];

const MUTATING_WEBHOOK: Kind =
    kind("admissionregistration.k8s.io", "mutatingwebhookconfigurations", "MutatingWebhookConfiguration", false);
/// Kinds of Istio's that the mesh does not read.
const ISTIO_KIND: &str = "virtualservices.networking.istio.io";
/// So many namespaces are named.
const FEW: usize = 5;

/// What else may want pods' traffic.
pub(super) async fn neighbours(server: &ApiServer, istio_labels: bool) -> anyhow::Result<Vec<Finding>> {
    let spaces = server.list(&Kind::NAMESPACE, None, "").await?;
    let webhooks = server.list(&MUTATING_WEBHOOK, None, "").await?;
    let mut found = of_namespaces(&spaces, &webhooks, istio_labels);
    found.extend(of_labels(&spaces));
    let definition = server.get(&Kind::CUSTOM_RESOURCE_DEFINITION, "", ISTIO_KIND).await?;
    if definition.is_some_and(|definition| !is_ours(&definition)) {
        found.push(warning(
            "Istio's kinds are in the cluster; the mesh reads those of security.istio.io, and no VirtualService or \
             DestinationRule yet",
        ));
    }
    let cilium = server.get(&Kind::CONFIG_MAP, "kube-system", "cilium-config").await?;
    found.extend(cilium.and_then(|config| of_cilium(&config)));
    if found.is_empty() {
        found.push(fine("no other mesh and no socket balancing is in the way"));
    }
    Ok(found)
}

fn of_namespaces(spaces: &[Value], webhooks: &[Value], istio_labels: bool) -> Vec<Finding> {
    let mut found = Vec::new();
    for mesh in &MESHES {
        let mark = |space: &Value| {
            let meta = &space["metadata"];
            let has = |key: &str, value: Option<&str>| {
                [&meta["labels"][key], &meta["annotations"][key]]
                    .iter()
                    .any(|there| there.as_str().is_some_and(|there| value.is_none_or(|value| there == value)))
            };
            mesh.namespace.iter().find(|(key, value)| has(key, *value)).map(|(key, _)| *key)
        };
        let mut theirs = Vec::new();
        for space in spaces {
            let Some(key) = mark(space) else { continue };
            // By the setting of that name it is how one says that it is ours.
            if istio_labels && key == "istio.io/dataplane-mode" {
                continue;
            }
            if space["metadata"]["labels"][MODE] == "enabled" {
                found.push(wrong(format!(
                    "namespace {} is in two meshes, {}'s and this; take {key} or {MODE} away",
                    name(space),
                    mesh.name
                )));
            } else {
                theirs.push(name(space));
            }
        }
        let hook = webhooks.iter().map(name).find(|name| name.starts_with(mesh.webhook));
        let place = match (&theirs[..], hook) {
            ([], None) => continue,
            ([], Some(hook)) => format!("its webhook {hook} is there, no namespace is marked for it"),
            (few, _) if few.len() <= FEW => format!("in {}", few.join(", ")),
            (many, _) => format!("in {} and {} more", many[..FEW].join(", "), many.len() - FEW),
        };
        found.push(warning(format!("{} is a mesh too ({place}); keep each namespace in one of both", mesh.name)));
    }
    found
}

/// A label that means nothing closes the namespace's pods, where an agent had them before, and is most likely a slip.
fn of_labels(spaces: &[Value]) -> Vec<Finding> {
    let wrong_one = |space: &Value| {
        let mode = space["metadata"]["labels"][MODE].as_str()?;
        (!["enabled", "disabled"].contains(&mode)).then(|| {
            wrong(format!(
                "namespace {0} has {MODE}={mode}, which means nothing; say what is meant with `meshctl namespace enable \
                 {0}` or `disable`",
                name(space)
            ))
        })
    };
    spaces.iter().filter_map(wrong_one).collect()
}

fn of_cilium(config: &Value) -> Option<Finding> {
    let is = |key: &str| config["data"][key] == "true";
    ((is("kube-proxy-replacement") || is("bpf-lb-sock")) && !is("bpf-lb-sock-hostns-only")).then(|| {
        wrong(
            "Cilium balances Services in pods' sockets, before the mesh sees whom they call; set its \
             socketLB.hostNamespaceOnly to true",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        assert_eq!(two_numbers("6.1.0-18-amd64"), (6, 1));
        assert!(two_numbers("5.4.0") < OLDEST_KERNEL && two_numbers("5.15.1-x") >= OLDEST_KERNEL);
        assert!(two_numbers("10.0") > TESTED_KERNEL);
        assert_eq!(two_numbers(""), (0, 0));
    }

    #[test]
    fn an_api_server_that_is_too_old_is_told_in_a_sentence() {
        let of = |minor: &str| {
            of_version(&json!({"major": "1", "minor": minor, "gitVersion": format!("v1.{minor}.3")}), "https://x")
        };
        let old = of("29+");
        assert_eq!(old.level, Level::Wrong);
        assert_eq!(old.text, "Kubernetes v1.29+.3 is too old: Nodemesh needs 1.30 or newer; upgrade the cluster first");
        assert_eq!((of("30").level, of("36").level), (Level::Fine, Level::Fine));
        assert_eq!(of_version(&json!({}), "https://x").level, Level::Wrong, "what is no Kubernetes is none");
    }

    #[test]
    fn rights_that_are_missing_are_named() {
        assert_eq!(of_rights(&[]).level, Level::Fine);
        let some = of_rights(&["daemonsets", "roles"]);
        assert!(some.level == Level::Wrong && some.text.contains("daemonsets, roles"), "{some:?}");
        let all: Vec<&str> = KINDS.iter().map(|kind| kind.plural.as_ref()).collect();
        assert!(of_rights(&all).text.contains("change nothing"), "sixteen names tell less");
    }

    #[test]
    fn a_namespace_of_two_meshes_is_wrong_and_one_of_another_is_told() {
        let space = |name: &str, labels: Value, notes: Value| json!({"metadata": {"name": name, "labels": labels, "annotations": notes}});
        let both = space("shop", json!({"istio-injection": "enabled", MODE: "enabled"}), Value::Null);
        let found = of_namespaces(&[both], &[], false);
        assert!(found.len() == 1 && found[0].level == Level::Wrong && found[0].text.contains("shop"), "{found:?}");
        let theirs = space("old", Value::Null, json!({"linkerd.io/inject": "enabled"}));
        let found = of_namespaces(&[theirs], &[], false);
        assert!(found.len() == 1 && found[0].level == Level::Warning && found[0].text.contains("Linkerd"), "{found:?}");
        let ambient = [space("amb", json!({"istio.io/dataplane-mode": "ambient"}), Value::Null)];
        assert_eq!((of_namespaces(&ambient, &[], false).len(), of_namespaces(&ambient, &[], true).len()), (1, 0));
        let hook = json!({"metadata": {"name": "istio-sidecar-injector"}});
        let found = of_namespaces(&[], &[hook], false);
        assert!(found.len() == 1 && found[0].text.contains("istio-sidecar-injector"), "{found:?}");
        assert_eq!(of_namespaces(&[space("plain", Value::Null, Value::Null)], &[], false), []);
    }

    #[test]
    fn a_label_that_means_nothing_is_named() {
        let space = |mode: Value| json!({"metadata": {"name": "shop", "labels": {MODE: mode}}});
        let found = of_labels(&[space(json!("on")), space(json!("enabled")), space(Value::Null)]);
        assert_eq!(found.len(), 1);
        assert!(found[0].text.contains("namespace shop has nodemesh.io/mode=on"), "{found:?}");
    }

    #[test]
    fn cilium_is_in_the_way_only_where_it_balances_pods() {
        let config = |data: Value| of_cilium(&json!({"data": data}));
        assert!(config(json!({"kube-proxy-replacement": "true"})).is_some());
        assert_eq!(config(json!({"kube-proxy-replacement": "true", "bpf-lb-sock-hostns-only": "true"})), None);
        assert_eq!(config(json!({"kube-proxy-replacement": "false"})), None);
    }

    #[test]
    fn nodes_that_do_not_fit_are_named() {
        let node = |name: &str, kernel: &str, ready: &str| {
            json!({"metadata": {"name": name}, "status": {
                "nodeInfo": {"operatingSystem": "linux", "kernelVersion": kernel},
                "conditions": [{"type": "Ready", "status": ready}],
            }})
        };
        let found = of_nodes(&[node("a", "6.1.0", "True"), node("b", "4.19", "True"), node("c", "6.8", "False")]);
        assert_eq!(found[0].text, "2 of 3 nodes can run an agent");
        assert!(found[1].level == Level::Wrong && found[1].nodes == ["b"], "{found:?}");
        assert!(found[2].level == Level::Warning && found[2].nodes == ["c"], "{found:?}");
        assert_eq!(found.len(), 3);
    }
}
