//! A pod, as it is kept: in as few bytes as will do, since a mesh has a hundred thousand.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use super::Settings;
use super::kubernetes::{self, Mode};
use super::report::Labels;
use super::texts::{Kin, Name, POD_INDEX, POD_NAME, Texts};
use crate::model::{self, Names, SpiffeId};

/// A pod, as it is kept.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pod {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    /// `namespace/name` where the manifest has none.
    pub uid: Arc<str>,
    pub created: Created,
    pub terminating: bool,
    pub ended: bool,
    pub host_network: bool,
    pub mode: Mode,
    pub node: Arc<str>,
    pub addresses: Arc<[IpAddr]>,
    pub kin: Arc<Kin>,
    /// What only its own node needs.
    pub own: Option<Box<Own>>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Own {
    pub labels: Labels,
    /// The same, for the model.
    pub told: Arc<model::Labels>,
    pub ready: bool,
    /// What its annotation `nodemesh.io/status` says.
    pub shown: Option<String>,
    pub static_uid: Option<Arc<str>>,
    pub netns: Option<Arc<Path>>,
    pub named_ports: Vec<(String, u16)>,
}

impl Pod {
    pub fn new(pod: &kubernetes::Pod, settings: &Settings, texts: &mut Texts) -> Self {
        let identity = SpiffeId::new(&settings.trust_domain, &pod.namespace, &pod.service_account)
            .expect("the names were checked when the pod was parsed");
        let names = Arc::new(names(pod, texts));
        let runtime_class = texts.text(&pod.runtime_class);
        let keep = settings.endpoints_from_pods || settings.judges(&pod.node);
        let labels = texts.labels(&pod.labels);
        let own = Own {
            labels: pod.labels.clone(),
            told: Arc::new(labels.clone()),
            ready: pod.ready,
            shown: pod.shown.clone(),
            static_uid: pod.static_uid.as_deref().map(Into::into),
            netns: pod.netns.as_deref().map(Into::into),
            named_ports: pod.named_ports.clone(),
        };
        let (labels, has_ordinal) = without_ordinal(labels, &pod.name);
        Self {
            name: pod.name.as_str().into(),
            namespace: texts.text(&pod.namespace),
            uid: match pod.uid.as_str() {
                "" => format!("{}/{}", pod.namespace, pod.name).into(),
                uid => uid.into(),
            },
            created: Created::new(pod.created.as_deref()),
            terminating: pod.terminating,
            ended: pod.ended,
            host_network: pod.host_network,
            mode: pod.mode,
            node: texts.text(&pod.node),
            addresses: pod.addresses.as_slice().into(),
            kin: texts.kin(Kin { identity, names, runtime_class, labels, has_ordinal }),
            own: keep.then(|| Box::new(own)),
        }
    }

    /// A workload goes on as it is where it can, and shares these with its pod.
    pub fn share(mut self, before: &Self) -> Self {
        for (new, old) in [(&mut self.name, &before.name), (&mut self.uid, &before.uid)] {
            if new == old {
                *new = old.clone();
            }
        }
        if self.addresses == before.addresses {
            self.addresses = before.addresses.clone();
        }
        self
    }

    pub fn key(&self) -> Name {
        (self.namespace.clone(), self.name.clone())
    }

    /// Whether it may be a workload. The others take no part: they have no address of their own.
    pub fn takes_part(&self, settings: &Settings) -> bool {
        !self.ended && !self.host_network && (settings.without_address || !self.addresses.is_empty())
    }

    pub fn netns(&self) -> Option<&Arc<Path>> {
        self.own.as_ref()?.netns.as_ref()
    }

    /// Whether it has all of these labels.
    pub fn has_labels(&self, wanted: &Labels) -> bool {
        wanted.iter().all(|(key, value)| match key.as_str() {
            POD_NAME if self.kin.has_ordinal => **value == *self.name,
            POD_INDEX if self.kin.has_ordinal => Some(value.as_str()) == ordinal(&self.name),
            key => self.kin.labels.get(key).is_some_and(|known| **known == **value),
        })
    }
}

/// A label that each pod of a StatefulSet has another of would keep its pods from sharing the others.
fn without_ordinal(mut labels: model::Labels, name: &str) -> (model::Labels, bool) {
    let is_own = |key: &str, own: Option<&str>| labels.get(key).map(|value| &**value) == own;
    let has_ordinal = is_own(POD_NAME, Some(name)) && is_own(POD_INDEX, ordinal(name));
    if has_ordinal {
        labels.remove(POD_NAME);
        labels.remove(POD_INDEX);
    }
    (labels, has_ordinal)
}

fn ordinal(name: &str) -> Option<&str> {
    name.rsplit_once('-').map(|(_, ordinal)| ordinal)
}

/// Names for metrics, from labels as Istio derives them.
fn names(pod: &kubernetes::Pod, texts: &mut Texts) -> Names {
    let first =
        |keys: &[&str]| keys.iter().find_map(|k| pod.labels.get(*k)).map(String::as_str).filter(|v| !v.is_empty());
    const REVISION: &str = "service.istio.io/canonical-revision";
    let canonical_name = first(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    Names {
        workload: texts.text(&pod.workload_name),
        app: texts.text(first(&["app", "app.kubernetes.io/name"]).unwrap_or("unknown")),
        version: texts.text(first(&["version", "app.kubernetes.io/version"]).unwrap_or("unknown")),
        canonical_name: texts.text(canonical_name.unwrap_or(&pod.workload_name)),
        canonical_revision: texts.text(first(&[REVISION, "app.kubernetes.io/version", "version"]).unwrap_or("latest")),
    }
}

/// When an object was made, in the bytes that Kubernetes writes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Created {
    Unknown,
    /// `2026-11-24T13:00:00Z`
    Second([u8; 20]),
    Otherwise(Box<str>),
}

impl Created {
    fn new(text: Option<&str>) -> Self {
        match text {
            None => Self::Unknown,
            Some(text) => match text.as_bytes().try_into() {
                Ok(second) => Self::Second(second),
                Err(_) => Self::Otherwise(text.into()),
            },
        }
    }

    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Unknown => None,
            Self::Second(second) => Some(second),
            Self::Otherwise(text) => Some(text.as_bytes()),
        }
    }
}
