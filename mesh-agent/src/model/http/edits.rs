//! What is changed in a request or a response.

use std::fmt;
use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use serde::{Serialize, Serializer};

use super::Pattern;

/// The name of a header, in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name(pub HeaderName);

/// The value of a header.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Value(pub HeaderValue);

/// In this order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct HeaderEdits {
    pub remove: Vec<Name>,
    /// In place of whatever there is of the name.
    pub set: Vec<(Name, Value)>,
    /// Beside whatever there is of the name.
    pub add: Vec<(Name, Value)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Rewrite {
    pub path: Option<PathRewrite>,
    /// `Host`, `:authority`.
    pub authority: Option<Authority>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PathRewrite {
    /// The whole path; the query stays.
    Full(Arc<str>),
    /// In place of what the rule's own prefix has matched, or of the whole path where it has matched all. By whole elements:
    /// no double slash comes about, and none is lost. The Gateway API's.
    Elements(Arc<str>),
    /// The same by letters. Istio's.
    Prefix(Arc<str>),
    /// All places of the path that match; the query stays.
    Pattern { pattern: Pattern, substitution: Arc<str> },
}

/// Host and port as a client would write them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Authority(pub Value);

impl HeaderEdits {
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty()
    }
}

impl Name {
    /// `None` for what can be no name.
    pub fn new(text: &str) -> Option<Self> {
        HeaderName::from_bytes(text.as_bytes()).ok().map(Self)
    }
}

impl Value {
    /// `None` for what can be no value.
    pub fn new(text: &str) -> Option<Self> {
        HeaderValue::from_str(text).ok().map(Self)
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_str())
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.0.as_bytes()))
    }
}
