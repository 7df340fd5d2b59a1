//! Collects the Problems of one object while it is parsed.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use super::{Object, problem};
use crate::model::{ObjectRef, Problem, Severity};

pub(super) struct Report {
    object: Arc<ObjectRef>,
    problems: Vec<Problem>,
}

impl Report {
    pub fn of(object: &Object) -> Self {
        Self { object: object.reference().clone(), problems: Vec::new() }
    }

    /// This version of the object is broken.
    pub fn error(&mut self, field: &str, message: impl Into<String>) {
        self.problems.push(problem(Severity::Error, &self.object, field, message));
    }

    /// The object holds, but not all of it.
    pub fn warning(&mut self, field: &str, message: impl Into<String>) {
        self.problems.push(problem(Severity::Warning, &self.object, field, message));
    }

    pub fn is_broken(&self) -> bool {
        self.problems.iter().any(|p| p.severity == Severity::Error)
    }

    /// `value` if nothing was found that breaks the object.
    pub fn unless_broken<T>(&self, value: T) -> Option<T> {
        (!self.is_broken()).then_some(value)
    }

    pub fn into_problems(self) -> Vec<Problem> {
        self.problems
    }

    /// Reads the whole object; a wrong type is an error with the exact path of the field.
    pub fn read<T: DeserializeOwned>(&mut self, object: &Object) -> Option<T> {
        match serde_path_to_error::deserialize(object.value()) {
            Ok(value) => Some(value),
            Err(error) => {
                let path = error.path().to_string();
                let path = if path == "." { "" } else { &path };
                self.error(path, plain_words(&error.inner().to_string()));
                None
            }
        }
    }

    /// An address that a pod or service can have.
    pub fn address(&mut self, field: &str, text: &str) -> Option<IpAddr> {
        let Ok(ip) = text.parse::<IpAddr>().map(|ip| ip.to_canonical()) else {
            self.error(field, format!("`{text}` is no IP address, such as 10.244.1.7"));
            return None;
        };
        let link_local = match ip {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || link_local {
            self.error(
                field,
                format!("`{text}` is an address that no other host can reach: write the one of the network"),
            );
            return None;
        }
        Some(ip)
    }
}

/// serde's words, for people who write YAML.
fn plain_words(message: &str) -> String {
    let message = message
        .replace("expected u16", "expected a port number, 1 to 65535")
        .replace("expected i64", "expected a whole number")
        .replace("expected u32", "expected a whole number, 0 or more")
        .replace("expected f64", "expected a number")
        .replace("expected a sequence", "expected a list")
        .replace("expected a map", "expected an object")
        .replace("invalid type: map", "invalid type: object")
        .replace("invalid type: sequence", "invalid type: list");
    if message.starts_with("missing field") { format!("{message}: write it") } else { message }
}

/// `field:` with nothing behind it is as good as no field, as for Kubernetes.
pub(super) fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

pub(super) type Labels = BTreeMap<String, String>;

/// Whether all of `selector` is among `labels`.
pub(super) fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}
