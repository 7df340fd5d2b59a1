//! Objects of the Istio API. Every field is honoured or is a Problem: nothing is ignored in silence, and what cannot be
//! judged closes.

mod authorization_policy;
mod destination_rule;
mod peer_authentication;
mod rules;
mod values;
mod virtual_service;
mod visible;

pub(super) use authorization_policy::{AuthorizationPolicy, Scope, authorization_policy, closed_authorization_policy};
pub(super) use destination_rule::{DestinationRule, Policy, destination_rule};
pub(super) use peer_authentication::{Closing, PeerAuthentication, closed_peer_authentication, peer_authentication};
pub(super) use virtual_service::{Destination, Route, To, VirtualService, virtual_service};

use serde::Deserialize;

use super::report::{Labels, Report, nullable};
use super::{Broken, Object, schema};

/// What only says where traffic goes restricts nobody: who may speak to whom, policies say. So an object that could never be
/// read closes nothing: a slip of the pen in a split of one percent must not take the service down.
pub(super) const GO_ON: Broken =
    Broken { outcome: "until it is mended, traffic goes on as without it", stand_in: None };

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
