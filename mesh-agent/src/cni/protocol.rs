//! What plugin and agent say to each other on `cni.sock`.
//!
//! One connection is one question. The plugin writes a `Request`, the agent one `Answer` or two, each a line of JSON. The
//! first answer comes at once, or as soon as the agent has heard of the pod; `waiting` is followed by another when the pod
//! is in the mesh, or cannot be taken in. `version` is that of this protocol; an agent answers a version that it does not
//! know with `unknown`, and the plugin then judges as if there were no agent. Fields that are not known are passed over, so
//! that a field may be added without a new version.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The version of this protocol.
pub(super) const VERSION: u32 = 1;
/// A line may be this long. The attachments of a node are some kilobytes.
pub(super) const MAX_LINE: u64 = 1024 * 1024;

/// What the plugin asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    pub version: u32,
    #[serde(flatten)]
    pub command: Command,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub(super) enum Command {
    Add(Attachment),
    /// Whether the pod is as ADD left it.
    Check(Attachment),
    #[serde(rename_all = "camelCase")]
    Del {
        container: String,
    },
    /// All other containers are gone.
    Gc {
        containers: Vec<String>,
    },
}

/// A pod's sandbox as the container runtime knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Attachment {
    pub container: String,
    /// The path of its network namespace, as the node has it.
    pub netns: PathBuf,
    pub namespace: String,
    pub name: String,
    /// Empty where the runtime does not give it.
    #[serde(default)]
    pub uid: String,
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// After how many milliseconds the plugin wants to know why it still waits.
    pub wait: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answer {
    pub version: u32,
    #[serde(flatten)]
    pub said: Said,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "lowercase")]
pub(super) enum Said {
    /// The pod is not in the mesh.
    Outside,
    /// The pod is in the mesh, and ready.
    Enrolled,
    /// It is in the mesh and not ready yet; another answer follows.
    Waiting,
    /// It is in the mesh and cannot be taken in: one sentence.
    Failed { message: String },
    /// DEL and GC are done.
    Done,
    /// The agent does not understand the question.
    Unknown,
}

impl Request {
    pub fn new(command: Command) -> Self {
        Self { version: VERSION, command }
    }
}

impl Answer {
    pub fn new(said: Said) -> Self {
        Self { version: VERSION, said }
    }
}

/// One line, with its end.
pub(super) fn line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("plain data");
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_on_the_wire_are_these() {
        let attachment = Attachment {
            container: "c1".into(),
            netns: "/run/netns/x".into(),
            namespace: "shop".into(),
            name: "web".into(),
            uid: "u".into(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            wait: 100,
        };
        for (request, text) in [
            (
                Command::Add(attachment),
                r#"{"version":1,"command":"add","container":"c1","netns":"/run/netns/x","namespace":"shop","name":"web","uid":"u","addresses":["10.0.0.1"],"wait":100}"#,
            ),
            (Command::Del { container: "c1".into() }, r#"{"version":1,"command":"del","container":"c1"}"#),
            (Command::Gc { containers: vec![] }, r#"{"version":1,"command":"gc","containers":[]}"#),
        ] {
            let request = Request::new(request);
            assert_eq!(String::from_utf8(line(&request)).unwrap().trim_end(), text);
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        }
        for (said, text) in [
            (Said::Outside, r#"{"version":1,"answer":"outside"}"#),
            (Said::Failed { message: "no".into() }, r#"{"version":1,"answer":"failed","message":"no"}"#),
        ] {
            assert_eq!(serde_json::from_str::<Answer>(text).unwrap(), Answer::new(said.clone()));
            assert_eq!(String::from_utf8(line(&Answer::new(said))).unwrap().trim_end(), text);
        }
    }
}
