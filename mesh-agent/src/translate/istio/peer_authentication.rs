//! PeerAuthentication: who must come with mutual TLS.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::schema::{self, Shape};
use super::{Metadata, Selector, readable_selector};
use crate::model::MtlsMode;
use crate::translate::report::{Labels, Report, nullable};
use crate::translate::{Broken, Object, Parsed};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct PeerAuthentication {
    pub name: String,
    pub namespace: String,
    pub created: Option<String>,
    /// `None`: all pods of the namespace, or of the mesh in the root namespace.
    pub selector: Option<Labels>,
    /// `None` inherits.
    pub mode: Option<MtlsMode>,
    pub ports: BTreeMap<u16, MtlsMode>,
    pub closing: Closing,
}

/// Whether it stands in for an object that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::translate) enum Closing {
    No,
    /// STRICT for all in its scope, whatever the others say.
    Strict,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Manifest {
    metadata: Metadata,
    #[serde(default, deserialize_with = "nullable")]
    spec: Spec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Spec {
    #[serde(default, deserialize_with = "nullable")]
    selector: Selector,
    #[serde(default, deserialize_with = "nullable")]
    mtls: Mtls,
    #[serde(default, deserialize_with = "nullable")]
    port_level_mtls: BTreeMap<String, Mtls>,
}

#[derive(Default, Deserialize)]
#[serde(expecting = "an object")]
struct Mtls {
    #[serde(default, deserialize_with = "nullable")]
    mode: String,
}

const MTLS: Shape = Shape::Fields(&[("mode", Shape::Any)]);
const SPEC: Shape = Shape::Fields(&[
    ("selector", Shape::Fields(&[("matchLabels", Shape::Any)])),
    ("mtls", MTLS),
    ("portLevelMtls", Shape::MapOf(&MTLS)),
]);

pub(in crate::translate) fn peer_authentication(object: &Object, report: &mut Report) -> Option<PeerAuthentication> {
    if !schema::check(object, &SPEC, report) {
        return None;
    }
    let Manifest { metadata, spec } = report.read(object)?;
    let selector = spec.selector.labels(report);
    let mode = mode("spec.mtls.mode", &spec.mtls.mode, report);
    if selector.is_none() && !spec.port_level_mtls.is_empty() {
        report.error("spec.portLevelMtls", "modes by port need a selector: add spec.selector.matchLabels");
    }
    let mut ports = BTreeMap::new();
    for (key, mtls) in &spec.port_level_mtls {
        match key.parse::<u16>() {
            Ok(port) if port > 0 => {
                // UNSET inherits, as if it did not stand there.
                if let Some(mode) = self::mode(&format!("spec.portLevelMtls.{key}.mode"), &mtls.mode, report) {
                    ports.insert(port, mode);
                }
            }
            _ => report.error(&format!("spec.portLevelMtls.{key}"), format!("`{key}` is no port: use 1 to 65535")),
        }
    }
    report.unless_broken(PeerAuthentication {
        name: metadata.name,
        namespace: object.reference().namespace.clone(),
        created: metadata.creation_timestamp,
        selector,
        mode,
        ports,
        closing: Closing::No,
    })
}

fn mode(field: &str, text: &str, report: &mut Report) -> Option<MtlsMode> {
    match text {
        "" | "UNSET" => None,
        "STRICT" => Some(MtlsMode::Strict),
        "PERMISSIVE" => Some(MtlsMode::Permissive),
        "DISABLE" => Some(MtlsMode::Disable),
        other => {
            report.error(field, format!("`{other}` is no mode: use STRICT, PERMISSIVE, DISABLE or UNSET"));
            None
        }
    }
}

/// It may have been meant to close: until it can be read, its scope takes mutual TLS only.
pub(in crate::translate) fn closed_peer_authentication(object: &Object) -> Broken {
    let stand_in = PeerAuthentication {
        name: object.reference().name.clone(),
        namespace: object.reference().namespace.clone(),
        created: None,
        selector: readable_selector(object).unwrap_or(None),
        mode: Some(MtlsMode::Strict),
        ports: BTreeMap::new(),
        closing: Closing::Strict,
    };
    Broken {
        outcome: "until it is mended the pods it holds for take mutual TLS only",
        stand_in: Some(Parsed::PeerAuthentication(stand_in)),
    }
}
