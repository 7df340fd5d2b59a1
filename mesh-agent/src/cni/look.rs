//! How a node's CNI folders are, for `meshctl check`: what is there and in which order, changed by nothing.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PLUGIN;
use super::install::{configurations, is_list};
use crate::lifecycle::files;

/// What is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CniFacts {
    /// Why the folder of configurations cannot be read.
    pub problem: Option<String>,
    /// In the order in which container runtimes look for the first.
    pub configurations: Vec<Configuration>,
    /// Whether our plugin lies beside the others, and can be run.
    pub plugin: bool,
}

/// One file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Configuration {
    pub file: String,
    /// The types of its plugins, in order.
    pub plugins: Vec<String>,
    /// Why it cannot be read as one.
    pub problem: Option<String>,
}

/// Looks at both folders.
pub fn look(conf_dir: &Path, bin_dir: &Path) -> CniFacts {
    let plugin =
        std::fs::metadata(bin_dir.join(PLUGIN)).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    match configurations(conf_dir) {
        Ok(paths) => {
            CniFacts { problem: None, configurations: paths.iter().map(|path| configuration(path)).collect(), plugin }
        }
        Err(error) => CniFacts { problem: Some(error.to_string()), configurations: Vec::new(), plugin },
    }
}

fn configuration(path: &Path) -> Configuration {
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let read = files::read(path).map_err(|e| e.to_string());
    let parsed = read.and_then(|text| serde_json::from_str::<Value>(&text).map_err(|e| format!("it is no JSON: {e}")));
    let value = match parsed {
        Ok(value) => value,
        Err(problem) => return Configuration { file, plugins: Vec::new(), problem: Some(problem) },
    };
    let kind = |plugin: &Value| plugin["type"].as_str().unwrap_or("?").to_owned();
    let plugins: Vec<String> = match is_list(path) {
        true => value["plugins"].as_array().into_iter().flatten().map(kind).collect(),
        false => vec![kind(&value)],
    };
    let problem = plugins.is_empty().then(|| "it has no list `plugins`".to_owned());
    Configuration { file, plugins, problem }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn files_are_told_in_the_order_in_which_a_runtime_looks() {
        let (conf, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |name: &str, text: &str| fs::write(conf.path().join(name), text).unwrap();
        write("20-b.conflist", r#"{"plugins": [{"type": "bridge"}, {"type": "mesh-cni"}]}"#);
        write("10-a.conf", r#"{"type": "ptp"}"#);
        write("30-c.conflist", "{");
        write("readme.txt", "");
        let facts = look(conf.path(), bin.path());
        let names: Vec<&str> = facts.configurations.iter().map(|c| c.file.as_str()).collect();
        assert_eq!(names, ["10-a.conf", "20-b.conflist", "30-c.conflist"]);
        assert_eq!(facts.configurations[0].plugins, ["ptp"]);
        assert_eq!(facts.configurations[1].plugins, ["bridge", "mesh-cni"]);
        assert!(facts.configurations[2].problem.as_ref().is_some_and(|why| why.contains("no JSON")));
        assert!(!facts.plugin);
        fs::write(bin.path().join(PLUGIN), "").unwrap();
        assert!(!look(conf.path(), bin.path()).plugin, "it cannot be run");
        let gone = look(&conf.path().join("gone"), bin.path());
        assert!(gone.problem.is_some_and(|why| why.contains("gone")));
    }
}
