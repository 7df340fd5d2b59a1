//! What is known of a pod before the watch says it: its addresses, by the CNI plugin; that it is there at all, and what its
//! namespace is, by a request of its own.
//!
//! A pod's status has addresses only when kubelet has started it; its first packet may come before. A hint counts until
//! the API server has addresses of its own. Those of a sandbox before this one do not count as such: a pod whose sandbox is
//! made anew keeps its uid, and for a moment its old status.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::kubernetes::Word;

/// A pod that the API server has not given for this long will not come.
const LONGEST: Duration = Duration::from_secs(600);

/// Where hints are told. Those of a source that is no API server are passed over.
#[derive(Clone, Default)]
pub struct Hints {
    tell: Option<mpsc::UnboundedSender<Word>>,
}

#[derive(Debug)]
pub(super) enum Hint {
    Addresses {
        namespace: String,
        name: String,
        uid: String,
        addresses: Vec<IpAddr>,
    },
    Withdrawn {
        namespace: String,
        name: String,
        uid: String,
        addresses: Vec<IpAddr>,
    },
    /// The pod as the API server gave it when asked for it alone; who told it waits for the end of the sender.
    Found(Value, oneshot::Sender<()>),
    /// The same of a Namespace.
    Namespace(Value, oneshot::Sender<()>),
}

impl Hints {
    pub(super) fn new(tell: mpsc::UnboundedSender<Word>) -> Self {
        Self { tell: Some(tell) }
    }

    fn send(&self, hint: Hint) {
        if let Some(tell) = &self.tell {
            // A source that has ended needs no hints.
            let _ = tell.send(Word::Hint(hint));
        }
    }

    /// The pod has these addresses, or will have them as soon as it is known.
    pub fn addresses(&self, namespace: &str, name: &str, uid: &str, addresses: &[IpAddr]) {
        let (namespace, name, uid) = (namespace.to_owned(), name.to_owned(), uid.to_owned());
        self.send(Hint::Addresses { namespace, name, uid, addresses: addresses.to_vec() });
    }

    /// The sandbox that had them is gone.
    pub fn withdraw(&self, namespace: &str, name: &str, uid: &str, addresses: &[IpAddr]) {
        let (namespace, name, uid) = (namespace.to_owned(), name.to_owned(), uid.to_owned());
        self.send(Hint::Withdrawn { namespace, name, uid, addresses: addresses.to_vec() });
    }

    /// The API server has this pod, whatever the watch says; it counts where the watch has not come to it yet. When this
    /// returns, it is known.
    pub async fn found(&self, pod: Value) {
        self.wait(|done| Hint::Found(pod, done)).await;
    }

    /// The API server has this Namespace; it counts where the watch has not come to it yet. When this returns, it is known.
    pub async fn namespace(&self, namespace: Value) {
        self.wait(|done| Hint::Namespace(namespace, done)).await;
    }

    async fn wait(&self, hint: impl FnOnce(oneshot::Sender<()>) -> Hint) {
        let (done, ended) = oneshot::channel();
        self.send(hint(done));
        // Nothing is ever sent: it ends when all is published, or with the source.
        let _ = ended.await;
    }
}

/// The hints in force, by the pod's uid.
#[derive(Debug, Default)]
pub(super) struct Held(HashMap<String, Addresses>);

#[derive(Debug)]
struct Addresses {
    now: Vec<String>,
    /// What the API server said when the hint came: of an earlier sandbox.
    before: Vec<String>,
    since: Instant,
}

impl Held {
    /// Takes a hint for the pod `known`, if it is known; says whether that must be put in again by `adorn`.
    pub fn add(&mut self, uid: String, addresses: &[IpAddr], known: Option<&Value>) -> bool {
        let now: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        let before = known.map(said).unwrap_or_default();
        if now.is_empty() || before == now {
            return false;
        }
        self.0.retain(|_, held| held.since.elapsed() < LONGEST);
        self.0.insert(uid, Addresses { now, before, since: Instant::now() });
        true
    }

    pub fn has(&self, uid: &str) -> bool {
        self.0.contains_key(uid)
    }

    pub fn forget(&mut self, uid: &str) {
        self.0.remove(uid);
    }

    /// Takes a hint back; says what the pod's addresses are again, where it was in force.
    pub fn withdraw(&mut self, uid: &str, addresses: &[IpAddr]) -> Option<Vec<String>> {
        let withdrawn: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        let in_force = self.0.get(uid).is_some_and(|held| held.now == withdrawn);
        if in_force { self.0.remove(uid).map(|held| held.before) } else { None }
    }

    /// Puts the hint for `pod`, which is as the API server gave it, in; or drops it, where the API server knows better.
    pub fn adorn(&mut self, pod: &mut Value) {
        let uid = uid(pod).to_owned();
        let Some(held) = self.0.get(&uid) else { return };
        let by_api = said(pod);
        if !by_api.is_empty() && by_api != held.before {
            self.0.remove(&uid);
            return;
        }
        set(pod, &held.now);
    }
}

pub(super) fn uid(pod: &Value) -> &str {
    pod.pointer("/metadata/uid").and_then(Value::as_str).unwrap_or_default()
}

fn said(pod: &Value) -> Vec<String> {
    let all = pod.pointer("/status/podIPs").and_then(Value::as_array);
    let mut all: Vec<String> =
        all.into_iter().flatten().filter_map(|ip| ip["ip"].as_str()).map(str::to_owned).collect();
    if all.is_empty() {
        all.extend(pod.pointer("/status/podIP").and_then(Value::as_str).filter(|ip| !ip.is_empty()).map(str::to_owned));
    }
    all
}

/// Makes `addresses` those of the pod's status.
pub(super) fn set(pod: &mut Value, addresses: &[String]) {
    let Value::Object(pod) = pod else { return };
    let status = pod.entry("status").or_insert_with(|| json!({}));
    let Value::Object(status) = status else { return };
    status.remove("podIP");
    status.insert("podIPs".to_owned(), addresses.iter().map(|ip| json!({"ip": ip})).collect());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(addresses: &[&str]) -> Value {
        let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        json!({"metadata": {"uid": "u"}, "status": {"podIPs": ips}})
    }

    fn ip(text: &str) -> Vec<IpAddr> {
        vec![text.parse().unwrap()]
    }

    #[test]
    fn a_hint_counts_until_the_api_server_has_addresses() {
        let mut held = Held::default();
        assert!(held.add("u".into(), &ip("10.0.0.1"), None));
        for _ in 0..2 {
            let mut new = pod(&[]);
            held.adorn(&mut new);
            assert_eq!(said(&new), ["10.0.0.1"]);
        }
        let mut started = pod(&["10.0.0.2"]);
        held.adorn(&mut started);
        assert_eq!(said(&started), ["10.0.0.2"]);
        let mut later = pod(&[]);
        held.adorn(&mut later);
        assert!(said(&later).is_empty(), "the hint is gone");
    }

    #[test]
    fn the_status_of_an_earlier_sandbox_does_not_count() {
        let mut held = Held::default();
        assert!(held.add("u".into(), &ip("10.0.0.2"), Some(&pod(&["10.0.0.1"]))));
        let mut stale = pod(&["10.0.0.1"]);
        held.adorn(&mut stale);
        assert_eq!(said(&stale), ["10.0.0.2"]);
        let mut fresh = pod(&["10.0.0.2"]);
        held.adorn(&mut fresh);
        assert!(!held.has("u"));
        assert!(!held.add("u".into(), &ip("10.0.0.2"), Some(&fresh)), "what is known needs no hint");
    }

    #[test]
    fn what_is_withdrawn_leaves_what_was_before() {
        let mut held = Held::default();
        held.add("u".into(), &ip("10.0.0.2"), Some(&pod(&["10.0.0.1"])));
        assert_eq!(held.withdraw("u", &ip("10.0.0.9")), None, "another sandbox has come since");
        assert_eq!(held.withdraw("u", &ip("10.0.0.2")), Some(vec!["10.0.0.1".to_owned()]));
        assert_eq!(held.withdraw("u", &ip("10.0.0.2")), None);
    }
}
