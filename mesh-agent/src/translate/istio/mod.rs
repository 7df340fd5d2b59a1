//! Objects of the Istio API. Every field is honoured or is a Problem: nothing is ignored in silence, and what cannot be
//! judged closes.

mod authorization_policy;
mod peer_authentication;
mod rules;

pub(super) use authorization_policy::{AuthorizationPolicy, Scope, authorization_policy, closed_authorization_policy};
pub(super) use peer_authentication::{Closing, PeerAuthentication, closed_peer_authentication, peer_authentication};

use serde::Deserialize;

use super::report::{Labels, Report, nullable};
use super::{Object, schema};

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Metadata {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    annotations: Labels,
    creation_timestamp: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Selector {
    #[serde(default, deserialize_with = "nullable")]
    match_labels: Labels,
}

impl Selector {
    /// The labels asked for; `None` means all pods. Istio knows no wildcard here.
    fn labels(self, report: &mut Report) -> Option<Labels> {
        for (key, value) in &self.match_labels {
            if key.is_empty() || key.contains('*') || value.contains('*') {
                let field = format!("spec.selector.matchLabels[{key}]");
                report.error(&field, "a label is compared as it stands: write it without `*`, and with a name");
            }
        }
        Some(self.match_labels).filter(|l| !l.is_empty())
    }
}

/// The selector of an object that is broken, if at least that can be read: `Ok(None)` means it has none.
fn readable_selector(object: &Object) -> Result<Option<Labels>, ()> {
    let Some(selector) = object.value().pointer("/spec/selector").filter(|s| !s.is_null()) else { return Ok(None) };
    let Some(map) = selector.as_object() else { return Err(()) };
    if map.keys().any(|k| k != "matchLabels") {
        return Err(());
    }
    let labels = Labels::deserialize(map.get("matchLabels").ok_or(())?).map_err(|_| ())?;
    Ok(Some(labels).filter(|l| !l.is_empty()))
}
