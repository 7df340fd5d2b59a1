//! What was last good, in a file of the state directory, for the agent that comes next: without it a manifest that is
//! broken when an agent starts would close its pods, though the agent before knew what it had said.
//!
//! Comes in: the objects of the files as they were last read, and the last good version of each. Goes out: the same,
//! after a restart. Objects are kept as written and judged anew when read, so that no version of the agent is bound to
//! the model of another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::lifecycle::{Pen, files};
use crate::model::{ObjectRef, Problem, Severity};
use crate::translate::Object;

/// Raised with any change of `Content`.
const VERSION: u32 = 1;
/// No honest mesh in files is larger.
const MAX_BYTES: u64 = 256 * 1024 * 1024;

/// What another process knew.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The objects of each file when it could last be read.
    pub read: Vec<Object>,
    /// The last good version of each object.
    pub good: Vec<Object>,
}

/// Keeps the file up to date.
pub(super) struct LastGood {
    path: Option<PathBuf>,
    pen: Pen,
    directory: String,
    /// What the file holds; `None` where that is not known.
    kept: Option<(Vec<Object>, Vec<Object>)>,
    /// Why nothing came of the file of the process before. It stays: what that closed is not opened by a new file.
    unread: Option<Problem>,
    unwritten: Option<Problem>,
}

#[derive(Serialize, Deserialize)]
struct Content {
    /// The directory of manifests: those of another say nothing of this one's.
    directory: String,
    read: Vec<Entry>,
    /// Good versions of objects whose present version in `read` is broken.
    good: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    /// `path:line`
    at: String,
    value: Arc<Value>,
}

impl LastGood {
    /// Reads the file. One that is missing is none; one that is of no use is a Problem.
    pub fn open(path: Option<PathBuf>, pen: Pen, directory: &Path) -> (Self, Known) {
        let directory = directory.display().to_string();
        let (known, unread) = match path.as_deref().map(|path| (path, read(path, &directory))) {
            None => (Known::default(), None),
            Some((_, Ok(known))) => (known, None),
            Some((path, Err(why))) => {
                let message = format!(
                    "{why}; what was last good before the start is not known: mend the manifests that are broken, then restart the agent"
                );
                (Known::default(), Some(problem(path, message)))
            }
        };
        (Self { path, pen, directory, kept: None, unread, unwritten: None }, known)
    }

    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        self.unread.iter().chain(&self.unwritten).cloned()
    }

    /// Writes the file if anything is not as it holds it. Where it cannot be written, the old one goes: the next agent
    /// would take it for the last word, and it may say less than the policies that are in force. Nothing is done where another
    /// agent keeps it.
    pub fn keep<'a>(&mut self, read: &[Object], good: impl Iterator<Item = &'a Object>) {
        let Some(path) = &self.path else { return };
        let present: BTreeMap<_, _> = read.iter().rev().map(|object| (object.key(), object)).collect();
        let older = |object: &&Object| !present.get(&object.key()).is_some_and(|present| present.is_same(object));
        let good: Vec<Object> = good.filter(older).cloned().collect();
        if self.kept.as_ref().is_some_and(|(r, g)| same(r, read) && same(g, &good)) {
            return;
        }
        let written = self.pen.write(|| {
            let written = write(path, &self.directory, read, &good);
            if written.is_err() {
                // It may be missing already.
                let _ = std::fs::remove_file(path);
            }
            written
        });
        match written {
            None => {}
            Some(Ok(())) => (self.kept, self.unwritten) = (Some((read.to_vec(), good)), None),
            Some(Err(why)) => {
                let message = format!("{why}; until then a restart forgets what was last good");
                (self.kept, self.unwritten) = (None, Some(problem(path, message)));
            }
        }
    }
}

fn same(one: &[Object], other: &[Object]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| a.is_same(b))
}

fn read(path: &Path, directory: &str) -> Result<Known, String> {
    match files::read_up_to(path, MAX_BYTES) {
        Ok(text) => decode(&text, directory),
        Err(e) if e.is_missing() => Ok(Known::default()),
        Err(e) => Err(e.to_string()),
    }
}

fn write(path: &Path, directory: &str, read: &[Object], good: &[Object]) -> Result<(), String> {
    let text = encode(directory, read, good);
    if text.len() as u64 > MAX_BYTES {
        return Err(format!("the manifests are larger than {MAX_BYTES} bytes: split the mesh"));
    }
    files::create_private_dir(path.parent().unwrap_or(Path::new("."))).map_err(|e| e.to_string())?;
    files::write_private(path, text.as_bytes()).map_err(|e| e.to_string())
}

/// A first line `nodemesh last good N`, so that a foreign version is told before anything of it is read.
fn encode(directory: &str, read: &[Object], good: &[Object]) -> String {
    let entries = |objects: &[Object]| {
        let entry = |o: &Object| Entry { at: o.reference().file.clone(), value: o.shared_value() };
        objects.iter().map(entry).collect()
    };
    let content = Content { directory: directory.to_owned(), read: entries(read), good: entries(good) };
    let content = serde_json::to_string(&content).expect("objects are plain data");
    format!("nodemesh last good {VERSION}\n{content}\n")
}

fn decode(text: &str, directory: &str) -> Result<Known, String> {
    let (first, content) = text.split_once('\n').unwrap_or((text, ""));
    match first.strip_prefix("nodemesh last good ") {
        Some(version) if version == VERSION.to_string() => {}
        Some(_) => return Err("it was written by another version of the agent".to_owned()),
        None => return Err("it is no file of the agent".to_owned()),
    }
    let content: Content = serde_json::from_str(content).map_err(|e| format!("it is damaged: {e}"))?;
    if content.directory != directory {
        return Ok(Known::default());
    }
    let objects = |entries: Vec<Entry>| -> Result<Vec<Object>, String> {
        let mut objects = Vec::new();
        for Entry { at, value } in entries {
            let value = Arc::unwrap_or_clone(value);
            objects.extend(Object::from_value(&at, value).map_err(|p| format!("it is damaged: {p}"))?);
        }
        Ok(objects)
    };
    let (read, older) = (objects(content.read)?, objects(content.good)?);
    // The older version first: of two objects with one name the first counts.
    let good = older.into_iter().chain(read.iter().cloned()).collect();
    Ok(Known { read, good })
}

fn problem(path: &Path, message: String) -> Problem {
    let file = path.display().to_string();
    let object = ObjectRef { file, kind: String::new(), namespace: String::new(), name: String::new() };
    Problem { severity: Severity::Warning, object: Arc::new(object), field: String::new(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}"#;

    fn pod() -> Vec<Object> {
        Object::from_value("sub/a.yaml:7", serde_json::from_str(POD).unwrap()).unwrap()
    }

    #[test]
    fn what_was_written_is_read_with_its_place() {
        let known = decode(&encode("/mesh", &pod(), &[]), "/mesh").unwrap();
        assert_eq!(known.read[0].reference(), pod()[0].reference());
        assert_eq!(known.read[0].value(), pod()[0].value());
        assert!(known.read[0].is_same(&known.good[0]), "a good object is not parsed a second time");
        assert!(decode(&encode("/mesh", &pod(), &[]), "/other").unwrap().good.is_empty());
    }

    #[test]
    fn what_is_foreign_or_damaged_is_one_sentence() {
        let text = encode("/mesh", &pod(), &pod());
        let why = |text: &str| decode(text, "/mesh").unwrap_err();
        assert_eq!(why(&text.replacen("good 1", "good 2", 1)), "it was written by another version of the agent");
        assert_eq!(why("\u{0}"), "it is no file of the agent");
        for end in "nodemesh last good 1".len()..text.len() - 2 {
            assert!(why(&text[..end]).starts_with("it is damaged: "), "{end}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_a_problem_and_leaves_no_older_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/good.json");
        let (mut last_good, _) = LastGood::open(Some(path.clone()), Pen::default(), Path::new("/mesh"));
        last_good.keep(&pod(), std::iter::empty());
        assert!(path.exists());
        assert_eq!(last_good.problems().count(), 0);
        // Not to be removed, so that nothing can be written either, not even by root.
        std::fs::create_dir(path.with_file_name("good.json.tmp")).unwrap();
        last_good.keep(&[], std::iter::empty());
        assert!(!path.exists());
        let text = last_good.problems().next().unwrap().to_string();
        assert!(text.contains("can't write") && text.ends_with("a restart forgets what was last good"), "{text}");
        std::fs::remove_dir(path.with_file_name("good.json.tmp")).unwrap();
        last_good.keep(&[], std::iter::empty());
        assert_eq!(last_good.problems().count(), 0);
    }
}
