//! A Problem: one thing in the user's configuration that is wrong, refused or not honoured. Never silent.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Which object a Problem speaks of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectRef {
    /// The file it was read from, with the line where it is known; empty for objects of the Kubernetes API.
    pub file: String,
    pub kind: String,
    /// Empty for objects without one.
    pub namespace: String,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The object, or this version of it, is not in force.
    Error,
    /// In force, but not all of it.
    Warning,
}

/// One sentence about one field of one object, with the next step.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    pub severity: Severity,
    pub object: Arc<ObjectRef>,
    /// Path of the field, such as `spec.rules[0].from[1].source.ipBlocks[0]`; empty where the whole object is meant.
    pub field: String,
    /// One lower-case sentence without a full stop: what is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind.is_empty() {
            // The whole file is meant.
            return f.write_str(if self.file.is_empty() { "(no object)" } else { &self.file });
        }
        if !self.file.is_empty() {
            write!(f, "{}: ", self.file)?;
        }
        match (self.kind.as_str(), self.namespace.as_str(), self.name.as_str()) {
            (kind, "", name) => write!(f, "{kind} {name}"),
            (kind, namespace, name) => write!(f, "{kind} {namespace}/{name}"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field.as_str() {
            "" => write!(f, "{}: {}", self.object, self.message),
            field => write!(f, "{}: {field}: {}", self.object, self.message),
        }
    }
}
