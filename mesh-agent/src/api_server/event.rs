//! An Event of type Warning on an object: where users look with `kubectl describe`.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::{Value, json};

use super::{ApiError, ApiServer, Kind};

/// The API takes no more than 1024 bytes.
const LONGEST: usize = 1000;

/// What is wrong with an object, and who says so.
pub struct Warning<'a> {
    pub kind: &'static str,
    pub object: &'a Value,
    pub reason: &'static str,
    pub message: &'a str,
    pub component: &'static str,
    /// As RFC 3339 has it, in whole seconds.
    pub time: &'a str,
}

impl ApiServer {
    /// Writes the Event, once for each version of the object and each message, whichever process is the first: its name says
    /// which.
    pub async fn warn(&self, warning: Warning<'_>) -> Result<(), ApiError> {
        let namespace = warning.object["metadata"]["namespace"].as_str().unwrap_or_default();
        match self.create(&Kind::EVENT, namespace, &event(&warning)).await {
            Ok(_) | Err(ApiError::Conflict { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

fn event(warning: &Warning<'_>) -> Value {
    let Warning { kind, object, reason, message, component, time } = warning;
    let about = &object["metadata"];
    let (name, version) = (about["name"].as_str().unwrap_or_default(), &about["resourceVersion"]);
    let mut hasher = DefaultHasher::new();
    (version.as_str(), reason, message).hash(&mut hasher);
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": format!("{name}.{:016x}", hasher.finish()), "namespace": about["namespace"]},
        "involvedObject": {
            "apiVersion": "v1", "kind": kind, "namespace": about["namespace"], "name": name, "uid": about["uid"],
            "resourceVersion": version,
        },
        "type": "Warning",
        "reason": reason,
        "message": &message[..message.floor_char_boundary(LONGEST)],
        "source": {"component": component},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_has_one_name_for_each_version_and_message() {
        let name = |version: &str, message: &str, component, time: &str| {
            let metadata = json!({"name": "nodemesh", "namespace": "m", "uid": "u", "resourceVersion": version});
            let object = json!({"metadata": metadata});
            let kind = "ConfigMap";
            let event = event(&Warning { kind, object: &object, reason: "Refused", message, component, time });
            assert_eq!((&event["involvedObject"]["uid"], &event["metadata"]["namespace"]), (&json!("u"), &json!("m")));
            event["metadata"]["name"].clone()
        };
        let first = name("1", "no", "agent", "2026-01-01T00:00:00Z");
        assert_eq!(first, name("1", "no", "controller", "2026-01-01T00:00:01Z"));
        assert_ne!(first, name("2", "no", "agent", "2026-01-01T00:00:00Z"));
        assert_ne!(first, name("1", "never", "agent", "2026-01-01T00:00:00Z"));
    }
}
