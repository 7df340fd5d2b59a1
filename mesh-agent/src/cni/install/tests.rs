use super::*;

struct Node {
    folder: tempfile::TempDir,
    installer: Installer,
}

const LIST_TEXT: &str = "{ \"cniVersion\": \"1.0.0\", \"name\": \"x\",\n \"plugins\": [ {\"type\":\"bridge\"} ] }\n";
const SINGLE_TEXT: &str = "{\"cniVersion\":\"0.4.0\",\"name\":\"y\",\"type\":\"bridge\"}";

impl Node {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["conf", "bin"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        fs::write(folder.path().join("plugin"), "binary").unwrap();
        let layout = Layout {
            conf_dir: folder.path().join("conf"),
            bin_dir: folder.path().join("bin"),
            plugin: folder.path().join("plugin"),
            socket: "/run/nodemesh/cni.sock".into(),
            members: "/var/lib/nodemesh/cni-members.json".into(),
        };
        Self { folder, installer: Installer::new(layout) }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join("conf").join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.at(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap()
    }

    /// All of the folder, to be compared.
    fn files(&self) -> Vec<(String, String)> {
        let entries = fs::read_dir(self.folder.path().join("conf")).unwrap();
        let mut files: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .map(|name| (name.clone(), self.read(&name)))
            .collect();
        files.sort();
        files
    }

    fn uninstall(&self) -> Vec<String> {
        uninstall(&self.folder.path().join("conf"), &self.folder.path().join("bin")).unwrap()
    }
}

#[test]
fn the_first_list_gets_the_entry_and_gives_it_back() {
    let mut node = Node::new();
    node.write("10-x.conflist", LIST_TEXT);
    node.write("20-y.conflist", LIST_TEXT);
    node.write("05-note.txt", "no configuration");
    fs::set_permissions(node.at("10-x.conflist"), Permissions::from_mode(0o640)).unwrap();
    let before = node.files();
    assert_eq!(node.installer.install().unwrap().len(), 2);
    assert!(node.read("10-x.conflist").contains("mesh-cni"));
    assert_eq!(node.read("20-y.conflist"), LIST_TEXT);
    assert_eq!(fs::metadata(node.at("10-x.conflist")).unwrap().permissions().mode() & 0o777, 0o640);
    let plugin = node.folder.path().join("bin/mesh-cni");
    assert_eq!(fs::metadata(&plugin).unwrap().permissions().mode() & 0o777, 0o755);
    // What is right is not touched.
    let inode = fs::metadata(node.at("10-x.conflist")).unwrap().ino();
    assert!(node.installer.install().unwrap().is_empty());
    assert_eq!(fs::metadata(node.at("10-x.conflist")).unwrap().ino(), inode);
    // An agent of another build brings its own plugin.
    fs::write(&node.installer.layout.plugin, "newer").unwrap();
    assert_eq!(Installer::new(node.installer.layout.clone()).install().unwrap().len(), 1);
    assert_eq!(fs::read_to_string(&plugin).unwrap(), "newer");
    assert_eq!(node.uninstall().len(), 2);
    assert_eq!(node.files(), before);
    assert!(!plugin.exists());
    assert!(node.uninstall().is_empty());
}

#[test]
fn a_file_that_is_written_anew_or_comes_first_gets_the_entry_again() {
    let mut node = Node::new();
    node.write("10-x.conflist", LIST_TEXT);
    node.installer.install().unwrap();
    node.write("10-x.conflist", LIST_TEXT);
    assert_eq!(node.installer.install().unwrap().len(), 1);
    node.write("05-first.conflist", LIST_TEXT);
    assert_eq!(node.installer.install().unwrap().len(), 1);
    assert!(node.read("05-first.conflist").contains("mesh-cni"));
    fs::remove_file(node.folder.path().join("bin/mesh-cni")).unwrap();
    assert_eq!(node.installer.install().unwrap().len(), 1, "a plugin that was taken away comes back");
    node.uninstall();
    assert_eq!(node.read("05-first.conflist"), LIST_TEXT);
    assert_eq!(node.read("10-x.conflist"), LIST_TEXT, "also where it is not the first any more");
}

#[test]
fn a_single_configuration_steps_aside_and_comes_back() {
    let mut node = Node::new();
    node.write("10-y.conf", SINGLE_TEXT);
    node.write("10-y.conflist", LIST_TEXT);
    let before = node.files();
    node.installer.install().unwrap();
    let names: Vec<String> = node.files().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["10-y.conf.conflist", "10-y.conf.nodemesh", "10-y.conflist"], "the first is ours");
    assert!(node.installer.install().unwrap().is_empty());
    // The cluster's network writes its file again.
    node.write("10-y.conf", &SINGLE_TEXT.replace("bridge", "ptp"));
    node.installer.install().unwrap();
    assert!(node.read("10-y.conf.conflist").contains("ptp"));
    node.write("10-y.conf", SINGLE_TEXT);
    node.installer.install().unwrap();
    node.uninstall();
    assert_eq!(node.files(), before);
}

#[test]
fn what_cannot_be_done_is_one_sentence_and_leaves_all_as_it_was() {
    let mut node = Node::new();
    let error = node.installer.install().unwrap_err().to_string();
    assert!(error.starts_with("there is no CNI configuration in "), "{error}");
    node.write("10-x.conflist", "{ half");
    let error = node.installer.install().unwrap_err().to_string();
    assert!(error.contains("10-x.conflist cannot take the entry mesh-cni: it is no JSON: "), "{error}");
    assert_eq!(node.files(), [("10-x.conflist".to_owned(), "{ half".to_owned())]);
    // A draft that cannot be made, as on a full disk or in a folder that cannot be written.
    node.write("10-x.conflist", LIST_TEXT);
    fs::create_dir_all(node.at(".10-x.conflist.tmp/in-the-way")).unwrap();
    let error = node.installer.install().unwrap_err().to_string();
    assert!(error.contains("; what was there has not changed: make room, or mount "), "{error}");
    assert_eq!(node.read("10-x.conflist"), LIST_TEXT);
    let gone = Layout { plugin: "/no/such/mesh-cni".into(), ..node.installer.layout.clone() };
    let error = Installer::new(gone).install().unwrap_err().to_string();
    assert!(error.starts_with("the plugin /no/such/mesh-cni cannot be read: "), "{error}");
}

#[test]
fn a_link_stays_a_link() {
    let mut node = Node::new();
    let target = node.folder.path().join("elsewhere");
    fs::write(&target, LIST_TEXT).unwrap();
    std::os::unix::fs::symlink(&target, node.at("10-x.conflist")).unwrap();
    node.installer.install().unwrap();
    assert!(fs::symlink_metadata(node.at("10-x.conflist")).unwrap().is_symlink());
    assert!(fs::read_to_string(&target).unwrap().contains("mesh-cni"));
    node.uninstall();
    assert_eq!(fs::read_to_string(&target).unwrap(), LIST_TEXT);
}

#[tokio::test]
async fn what_others_change_is_put_right_for_as_long_as_the_agent_runs() {
    let Node { folder, installer } = Node::new();
    let list = folder.path().join("conf/10-x.conflist");
    let (tell, installed) = tokio::sync::oneshot::channel();
    let running = tokio::spawn(installer.run(move || {
        let _ = tell.send(());
    }));
    fs::write(&list, LIST_TEXT).unwrap();
    tokio::time::timeout(Duration::from_secs(60), installed).await.unwrap().unwrap();
    for _ in 0..2 {
        fs::write(&list, LIST_TEXT).unwrap();
        let again = async {
            while !fs::read_to_string(&list).unwrap().contains("mesh-cni") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), again).await.unwrap();
    }
    running.abort();
    let _ = running.await;
    assert!(fs::read_to_string(&list).unwrap().contains("mesh-cni"), "a restart takes nothing away");
}
