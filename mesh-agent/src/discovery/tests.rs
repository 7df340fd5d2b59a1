//! Real files, real watches. Whoever waits, waits for the mark that something changed, with a bound far above what is
//! promised; the promise itself (500 ms) has a test of its own.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Instant;

use super::*;
use crate::model::TrustDomain;

const BOUND: Duration = Duration::from_secs(20);

struct Mesh {
    folder: tempfile::TempDir,
    sources: Sources,
}

impl Mesh {
    fn with(files: &[(&str, &str)]) -> Self {
        Self::rescanned_every(files, Duration::from_secs(3))
    }

    fn rescanned_every(files: &[(&str, &str)], rescan: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            write(&folder.path().join("mesh").join(name), text);
        }
        let options = Options { rescan, ..Options::new(folder.path().join("mesh"), settings()) };
        let sources = start(options).unwrap();
        Self { folder, sources }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("mesh").join(name)
    }

    fn pods(&self) -> Vec<String> {
        let snapshot = self.sources.snapshot.load();
        {
            let mut pods: Vec<_> = snapshot.workloads().map(|w| format!("{} {}", w.name, w.addresses[0])).collect();
            pods.sort();
            pods
        }
    }

    fn problems(&self) -> Vec<String> {
        self.sources.problems.borrow().iter().map(ToString::to_string).collect()
    }

    /// Waits until the pods are these.
    async fn until(&mut self, pods: &[&str]) {
        let waited = tokio::time::timeout(BOUND, async {
            while self.pods() != pods {
                self.sources.changed.changed().await.unwrap();
            }
        });
        assert!(waited.await.is_ok(), "expected {pods:?}, found {:?} and {:?}", self.pods(), self.problems());
    }

    /// Waits until there is a Problem with this text, or with none until there is no Problem.
    async fn until_problem(&mut self, text: Option<&str>) {
        let there = |m: &Self| match text {
            Some(text) => m.problems().iter().any(|p| p.contains(text)),
            None => m.problems().is_empty(),
        };
        let waited = tokio::time::timeout(BOUND, async {
            while !there(self) {
                self.sources.problems.changed().await.unwrap();
            }
        });
        assert!(waited.await.is_ok(), "expected {text:?}, found {:?}", self.problems());
    }
}

fn settings() -> Settings {
    Settings::new(TrustDomain::new("cluster.local").unwrap())
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn pod(name: &str, ip: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nstatus: {{ podIP: {ip} }}\n")
}

#[test]
fn a_directory_that_is_not_there_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let error = |path: &Path| start(Options::new(path, settings())).err().unwrap().to_string();
    let missing = folder.path().join("mesh");
    assert_eq!(
        error(&missing),
        format!("there is no directory {}: create it, or name the one with your manifests", missing.display())
    );
    let file = folder.path().join("file");
    write(&file, "");
    assert_eq!(error(&file), format!("{} is no directory: name the one with your manifests", file.display()));
    assert!(load_once(&missing, settings()).is_err());
}

#[tokio::test]
async fn the_first_state_is_there_at_once_and_changes_follow() {
    let mut mesh = Mesh::with(&[("a.yaml", &pod("a", "10.0.0.1")), ("sub/b.yml", &pod("b", "10.0.0.2"))]);
    assert_eq!(mesh.pods(), ["a 10.0.0.1", "b 10.0.0.2"]);
    assert_eq!(*mesh.sources.changed.borrow(), 1);
    // New, in a new folder, of another kind.
    write(
        &mesh.path("new/deep/c.json"),
        r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"c"},"status":{"podIP":"10.0.0.3"}}"#,
    );
    mesh.until(&["a 10.0.0.1", "b 10.0.0.2", "c 10.0.0.3"]).await;
    // Written in place.
    write(&mesh.path("a.yaml"), &pod("a", "10.0.0.9"));
    mesh.until(&["a 10.0.0.9", "b 10.0.0.2", "c 10.0.0.3"]).await;
    // Replaced, as editors and `sed -i` do.
    write(&mesh.path(".b.yml.tmp"), &pod("b", "10.0.0.8"));
    fs::rename(mesh.path(".b.yml.tmp"), mesh.path("sub/b.yml")).unwrap();
    mesh.until(&["a 10.0.0.9", "b 10.0.0.8", "c 10.0.0.3"]).await;
    // Removed.
    fs::remove_dir_all(mesh.path("new")).unwrap();
    mesh.until(&["a 10.0.0.9", "b 10.0.0.8"]).await;
    assert_eq!(*mesh.sources.changed.borrow(), mesh.sources.snapshot.load().generation());
    assert!(mesh.problems().is_empty(), "{:?}", mesh.problems());
}

#[tokio::test]
async fn a_change_is_in_force_within_half_a_second() {
    // No rescan in the way: the kernel must tell of it.
    let mut mesh = Mesh::rescanned_every(&[("a.yaml", &pod("a", "10.0.0.1"))], Duration::from_secs(3600));
    let mut times = Vec::new();
    for i in 2..12 {
        let ip = format!("10.0.0.{i}");
        let start = Instant::now();
        write(&mesh.path("a.yaml"), &pod("a", &ip));
        mesh.until(&[&format!("a {ip}")]).await;
        times.push(start.elapsed());
    }
    times.sort();
    // The median, since a test shares its machine; the debounce alone takes 50 ms.
    assert!(times[5] < Duration::from_millis(500), "{times:?}");
}

#[tokio::test]
async fn what_means_the_same_counts_no_generation() {
    let mut mesh = Mesh::with(&[("a.yaml", &pod("a", "10.0.0.1"))]);
    write(&mesh.path("a.yaml"), &format!("# a comment\n{}", pod("a", "10.0.0.1")));
    write(&mesh.path("b.yaml"), "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: x }\n");
    write(&mesh.path("c.yaml"), "apiVersion: [");
    mesh.until_problem(Some("c.yaml:1")).await;
    assert_eq!(*mesh.sources.changed.borrow(), 1);
    fs::remove_file(mesh.path("c.yaml")).unwrap();
    write(&mesh.path("a.yaml"), &pod("a", "10.0.0.2"));
    mesh.until(&["a 10.0.0.2"]).await;
    assert_eq!(*mesh.sources.changed.borrow(), 2);
}

#[tokio::test]
async fn a_broken_file_keeps_its_last_good_state() {
    let two = format!("{}---\n{}", pod("a", "10.0.0.1"), pod("b", "10.0.0.2"));
    let mut mesh = Mesh::with(&[("mesh.yaml", &two), ("other.yaml", &pod("c", "10.0.0.3"))]);
    let all = ["a 10.0.0.1", "b 10.0.0.2", "c 10.0.0.3"];
    // Half of the second document is there.
    write(&mesh.path("mesh.yaml"), &two[..two.len() - 8]);
    mesh.until_problem(Some("the last good state of the file stays in force")).await;
    assert!(mesh.problems()[0].starts_with("mesh.yaml:"), "{:?}", mesh.problems());
    assert_eq!(mesh.pods(), all);
    // Nothing is there: an editor has just cut it.
    write(&mesh.path("mesh.yaml"), "");
    mesh.until_problem(Some("the file is empty: delete it if its objects are to go")).await;
    assert_eq!(mesh.pods(), all);
    // The file is well formed but holds no object; others go on.
    write(&mesh.path("mesh.yaml"), "kind: Pod\n");
    write(&mesh.path("other.yaml"), &pod("c", "10.0.0.4"));
    mesh.until(&["a 10.0.0.1", "b 10.0.0.2", "c 10.0.0.4"]).await;
    mesh.until_problem(Some("the object has no apiVersion")).await;
    // Mended.
    write(&mesh.path("mesh.yaml"), &pod("a", "10.0.0.7"));
    mesh.until(&["a 10.0.0.7", "c 10.0.0.4"]).await;
    mesh.until_problem(None).await;
}

#[tokio::test]
async fn a_policy_file_that_was_never_readable_closes_what_it_speaks_of() {
    let policy = |namespace: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{ name: p{namespace} }}\nspec: {{ rules: [{{}}] }}\n"
        )
    };
    let pods =
        format!("{}---\n{}", pod("a", "10.0.0.1"), pod("b", "10.0.0.2").replace("name: b", "name: b, namespace: shop"));
    let denied = |mesh: &Mesh| -> Vec<String> {
        let snapshot = mesh.sources.snapshot.load();
        let of = |w: &Arc<crate::model::Workload>| {
            w.rules.as_ref().unwrap().policies.iter().map(|p| format!("{} {:?}", w.name, p.action)).collect::<Vec<_>>()
        };
        let mut denied: Vec<_> = snapshot.workloads().flat_map(of).collect();
        denied.sort();
        denied
    };
    for (namespace, closed, outcome) in [
        (", namespace: shop", &["b Deny"][..], "the pods of shop are closed"),
        ("", &["a Deny", "b Deny"], "the whole mesh is closed"),
    ] {
        let broken = format!("{}---\na: [", policy(namespace));
        let mut mesh = Mesh::with(&[("pods.yaml", &pods), ("policies.yaml", &broken)]);
        assert_eq!(denied(&mesh), closed);
        assert!(
            mesh.problems()[0].ends_with(&format!("since it holds policies, {outcome} until it is mended")),
            "{:?}",
            mesh.problems()
        );
        // Broken in another way: still never read.
        write(&mesh.path("policies.yaml"), &format!("{broken} ["));
        mesh.sources.problems.mark_unchanged();
        write(&mesh.path("policies.yaml"), &policy(", namespace: shop"));
        mesh.until_problem(None).await;
        assert_eq!(denied(&mesh), ["b Allow"]);
        // Now that it was read, breaking it closes no more than it did.
        write(&mesh.path("policies.yaml"), &broken);
        mesh.until_problem(Some("the last good state of the file stays in force")).await;
        assert_eq!(denied(&mesh), ["b Allow"]);
    }
}

#[tokio::test]
async fn a_broken_object_keeps_its_last_good_version() {
    let two = |ip: &str| format!("{}---\n{}", pod("a", ip), pod("b", ip.strip_suffix('x').unwrap_or("10.0.0.2")));
    let mut mesh = Mesh::with(&[("mesh.yaml", &two("10.0.0.1"))]);
    write(&mesh.path("mesh.yaml"), &two("10.0.0.3x"));
    mesh.until(&["a 10.0.0.1", "b 10.0.0.3"]).await;
    mesh.until_problem(Some("status.podIP: `10.0.0.3x` is no IP address")).await;
}

#[tokio::test]
async fn what_was_last_good_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (mesh, state) = (folder.path().join("mesh"), folder.path().join("state/last-good.json"));
    let start = || {
        let options = Options { last_good: Some(state.clone()), ..Options::new(&mesh, settings()) };
        Mesh { sources: start(options).unwrap(), folder: tempfile::tempdir().unwrap() }
    };
    let closing = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: { name: p }\nspec: 7\n";
    let closed =
        |m: &Mesh| m.sources.snapshot.load().workloads().all(|w| w.rules.as_ref().unwrap().policies.len() == 1);
    write(&mesh.join("file.yaml"), &format!("{}---\n{closing}", pod("file", "10.0.0.1")));
    write(&mesh.join("object.yaml"), &pod("object", "10.0.0.2"));
    write(&mesh.join("gone.yaml"), &pod("gone", "10.0.0.3"));
    write(&mesh.join("good.yaml"), &pod("good", "10.0.0.4"));
    let first = start();
    assert_eq!(first.pods(), ["file 10.0.0.1", "gone 10.0.0.3", "good 10.0.0.4", "object 10.0.0.2"]);
    assert!(closed(&first), "an object that was never good closes");
    drop(first);
    // While nobody looks, one file breaks as a whole, one in its object; one goes, and one changes.
    write(&mesh.join("file.yaml"), "kind: [");
    write(&mesh.join("object.yaml"), &pod("object", "nonsense"));
    fs::remove_file(mesh.join("gone.yaml")).unwrap();
    write(&mesh.join("good.yaml"), &pod("good", "10.0.0.5"));
    // The second restart reads what the first has kept of what it read.
    for _ in 0..2 {
        let again = start();
        assert_eq!(again.pods(), ["file 10.0.0.1", "good 10.0.0.5", "object 10.0.0.2"]);
        assert!(closed(&again), "what closed before still does");
        let problems = again.problems().join("\n");
        assert!(problems.contains("file.yaml:1: ") && problems.contains("state of the file stays"), "{problems}");
        assert!(problems.contains("`nonsense` is no IP address") && problems.contains("version stays"), "{problems}");
    }
    // A file of another version is said and ignored; and what is broken was never good.
    write(&state, "nodemesh last good 2\n");
    let foreign = start();
    assert_eq!(foreign.pods(), ["good 10.0.0.5"]);
    assert!(foreign.problems().iter().any(|p| p.contains("by another version of the agent")));
}

#[tokio::test]
async fn the_links_of_a_config_map_are_turned_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let mesh_path = folder.path().join("mesh");
    write(&mesh_path.join("..2026_1/a.yaml"), &pod("a", "10.0.0.1"));
    symlink("..2026_1", mesh_path.join("..data")).unwrap();
    symlink("..data/a.yaml", mesh_path.join("a.yaml")).unwrap();
    let options = Options { rescan: Duration::from_secs(3600), ..Options::new(&mesh_path, settings()) };
    let mut mesh = Mesh { sources: start(options).unwrap(), folder };
    assert_eq!(mesh.pods(), ["a 10.0.0.1"]);
    // What the kubelet does at an update.
    write(&mesh.path("..2026_2/a.yaml"), &pod("a", "10.0.0.2"));
    symlink("..2026_2", mesh.path("..data_tmp")).unwrap();
    fs::rename(mesh.path("..data_tmp"), mesh.path("..data")).unwrap();
    fs::remove_dir_all(mesh.path("..2026_1")).unwrap();
    mesh.until(&["a 10.0.0.2"]).await;
    mesh.until_problem(None).await;
}

#[tokio::test]
async fn the_directory_itself_may_be_a_link_that_is_turned() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("v1/a.yaml"), &pod("a", "10.0.0.1"));
    write(&folder.path().join("v2/a.yaml"), &pod("a", "10.0.0.2"));
    symlink("v1", folder.path().join("mesh")).unwrap();
    let options = Options { rescan: Duration::from_secs(3600), ..Options::new(folder.path().join("mesh"), settings()) };
    let mut mesh = Mesh { sources: start(options).unwrap(), folder };
    assert_eq!(mesh.pods(), ["a 10.0.0.1"]);
    symlink("v2", mesh.folder.path().join("next")).unwrap();
    fs::rename(mesh.folder.path().join("next"), mesh.folder.path().join("mesh")).unwrap();
    mesh.until(&["a 10.0.0.2"]).await;
    // It is the new one that is watched now.
    write(&mesh.folder.path().join("v2/a.yaml"), &pod("a", "10.0.0.3"));
    mesh.until(&["a 10.0.0.3"]).await;
}

#[tokio::test]
async fn a_directory_that_vanishes_leaves_everything_in_force() {
    let mut mesh = Mesh::rescanned_every(&[("a.yaml", &pod("a", "10.0.0.1"))], Duration::from_millis(200));
    // Moved away as one: files that are deleted before their directory are deleted files.
    fs::rename(mesh.path(""), mesh.folder.path().join("away")).unwrap();
    mesh.until_problem(Some("cannot be read: No such file or directory")).await;
    assert_eq!(mesh.pods(), ["a 10.0.0.1"]);
    assert_eq!(*mesh.sources.changed.borrow(), 1);
    write(&mesh.path("a.yaml"), &pod("a", "10.0.0.2"));
    mesh.until(&["a 10.0.0.2"]).await;
    mesh.until_problem(None).await;
}

#[test]
fn only_manifests_count() {
    let folder = tempfile::tempdir().unwrap();
    let mesh = folder.path();
    for name in [".hidden.yaml", "a.yaml~", ".a.yaml.swp", "#a.yaml#", "README.md", ".git/x.yaml", "a.yaml.bak", "4913"]
    {
        write(&mesh.join(name), "kind: [");
    }
    let (snapshot, problems) = load_once(mesh, settings()).unwrap();
    assert_eq!(snapshot.workloads().count(), 0);
    let texts: Vec<_> = problems.iter().map(|p| p.message.as_str()).collect();
    assert_eq!(texts, ["the directory holds no manifest: write files that end with .yaml, .yml or .json"]);
}

#[test]
fn files_that_cannot_be_read_are_reported_and_the_others_hold() {
    let folder = tempfile::tempdir().unwrap();
    let mesh = folder.path();
    write(&mesh.join("good.yaml"), &pod("a", "10.0.0.1"));
    write(&mesh.join("bytes.yaml"), "x: 1\n");
    fs::write(mesh.join("bytes.yaml"), b"x: 1\ny: \xff\n").unwrap();
    fs::File::create(mesh.join("large.yaml")).unwrap().set_len(11 * 1024 * 1024).unwrap();
    symlink("nowhere.yaml", mesh.join("link.yaml")).unwrap();
    symlink(".", mesh.join("circle")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, mesh.join("pipe.yaml"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let (snapshot, problems) = load_once(mesh, settings()).unwrap();
    assert_eq!(snapshot.workloads().count(), 1);
    let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "bytes.yaml:2: the text is not UTF-8: correct it; nothing of the file is in force",
            "large.yaml: is larger than 10 MiB: split it; nothing of the file is in force",
            "link.yaml: cannot be read: No such file or directory (os error 2); the last good state of what is in it stays in force",
            "pipe.yaml: is no file: put a file with manifests here; nothing of the file is in force",
        ]
    );
}

#[tokio::test]
async fn the_watch_ends_with_its_last_reader() {
    let mesh = Mesh::with(&[("a.yaml", &pod("a", "10.0.0.1"))]);
    let Sources { mut changed, _watching: watching, .. } = mesh.sources.clone();
    let Mesh { folder, sources } = mesh;
    drop((sources, watching));
    // The thread holds the sending end: it is gone when the thread is.
    assert!(tokio::time::timeout(BOUND, async { while changed.changed().await.is_ok() {} }).await.is_ok());
    drop(folder);
}
