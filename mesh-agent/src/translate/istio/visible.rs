//! `exportTo`: for the clients of which namespaces an object counts.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::values::is_host;
use crate::translate::report::Report;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) enum Visible {
    ToAll,
    To(BTreeSet<Arc<str>>),
}

impl Visible {
    /// `field` is the place of the list. Nothing said means all.
    pub fn read(export_to: &[String], own: &Arc<str>, field: &str, report: &mut Report) -> Self {
        if export_to.is_empty() || export_to.iter().any(|e| e == "*") {
            return Self::ToAll;
        }
        let mut to = BTreeSet::new();
        for (i, entry) in export_to.iter().enumerate() {
            match entry.as_str() {
                "." => _ = to.insert(own.clone()),
                // Nobody.
                "~" => {}
                name if is_host(name) => _ = to.insert(name.into()),
                other => {
                    let message =
                        format!("`{other}` is no namespace: write its name, `.` for this one, or `*` for all");
                    report.error(&format!("{field}[{i}]"), message);
                }
            }
        }
        Self::To(to)
    }

    pub fn to(&self, namespace: &str) -> bool {
        match self {
            Self::ToAll => true,
            Self::To(namespaces) => namespaces.contains(namespace),
        }
    }

    pub fn is_to_all(&self) -> bool {
        *self == Self::ToAll
    }

    /// Those that are named.
    pub fn named(&self) -> impl Iterator<Item = &Arc<str>> {
        match self {
            Self::ToAll => None,
            Self::To(namespaces) => Some(namespaces),
        }
        .into_iter()
        .flatten()
    }
}
