//! Pods that started while neither an agent nor its file could say whether they are in the mesh: noted by the plugin, told
//! by the agent that comes next.
//!
//! They are let start, though one of them may be in the mesh. To hold them up would stop the node: without its DNS and its
//! controller the agent itself does not come back, and a pod that has nothing to do with the mesh must never wait for it. So
//! the one thing that cannot be had is said instead: in the agent's log, and in an Event for each that is in the mesh.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::spec::Pod;
use crate::lifecycle::files;
use crate::model::Unjudged;

/// Of a node on which nothing else happens any more.
const MAX_BYTES: u64 = 256 * 1024;

/// Beside the file that is missing.
fn beside(members: &Path) -> PathBuf {
    members.with_extension("unjudged")
}

/// For the agent that comes next.
pub(super) fn note(members: &Path, pod: &Pod) -> io::Result<()> {
    let path = beside(members);
    // The folder may be what is missing.
    files::create_private_dir(path.parent().unwrap_or(Path::new("/"))).map_err(io::Error::other)?;
    let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    if file.metadata()?.len() > MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let noted = Unjudged { namespace: pod.namespace.clone(), name: pod.name.clone(), uid: pod.uid.clone() };
    // In one write: several pods may start at once.
    file.write_all(&super::protocol::line(&noted))
}

/// What was noted, each once; it is then forgotten.
pub fn take_unjudged(members: &Path) -> Vec<Unjudged> {
    let path = beside(members);
    let text = files::read_up_to(&path, MAX_BYTES * 2).unwrap_or_default();
    let _ = fs::remove_file(&path);
    let mut noted: Vec<Unjudged> = Vec::new();
    for pod in text.lines().filter_map(|line| serde_json::from_str(line).ok()) {
        if !noted.contains(&pod) {
            noted.push(pod);
        }
    }
    noted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_told_once_also_where_the_folder_was_gone() {
        let folder = tempfile::tempdir().unwrap();
        let members = folder.path().join("state/cni-members.json");
        assert!(take_unjudged(&members).is_empty());
        let pod = |name: &str| Pod { namespace: "shop".into(), name: name.into(), uid: "u".into() };
        for name in ["a", "b", "a"] {
            note(&members, &pod(name)).unwrap();
        }
        let names: Vec<String> = take_unjudged(&members).into_iter().map(|pod| pod.name).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(take_unjudged(&members).is_empty());
        fs::write(beside(&members), vec![b'x'; MAX_BYTES as usize + 1]).unwrap();
        note(&members, &pod("a")).unwrap_err();
        assert!(take_unjudged(&members).is_empty());
        note(&members, &pod("a")).unwrap();
    }
}
