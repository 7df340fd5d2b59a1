//! The bill of materials of the image, as SPDX 2.3 JSON: every crate that is compiled in, and every library beside it.
//!
//! The same image gives the same bytes: its date is that of the commit, its name that of what is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::VERSION;
use super::oci::{File, sha256};
use crate::run::{cargo, root};

/// The bill of an image with these files; `libraries` are those of the distribution.
pub fn bill(image: &str, files: &[File], libraries: &BTreeMap<String, PathBuf>) -> Result<String> {
    let mut packages = vec![json!({
        "SPDXID": "SPDXRef-image",
        "name": image.rsplit_once(':').map_or(image, |(name, _)| name),
        "versionInfo": VERSION,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseDeclared": "Apache-2.0",
        "primaryPackagePurpose": "CONTAINER",
    })];
    let mut crates = crates(&root(), "mesh-agent")?;
    // What runs in the kernel is embedded in the agent and built apart.
    crates.append(&mut self::crates(&root().join("mesh-ebpf"), "mesh-ebpf")?);
    packages.extend(crates.into_values());
    packages.extend(distribution(libraries)?);
    let mut listed = Vec::new();
    for file in files {
        listed.push(json!({
            "SPDXID": format!("SPDXRef-file-{}", id(&file.path)),
            "fileName": format!("./{}", file.path),
            "checksums": [{"algorithm": "SHA256", "checksumValue": sha256(&file.content)?.replace("sha256:", "")}],
            "licenseConcluded": "NOASSERTION",
            "copyrightText": "NOASSERTION",
        }));
    }
    listed.sort_by_key(|file| file["fileName"].to_string());
    let contained = packages.iter().skip(1).chain(&listed).map(|part| {
        json!({"spdxElementId": "SPDXRef-image", "relationshipType": "CONTAINS", "relatedSpdxElement": part["SPDXID"]})
    });
    let mut relationships = vec![json!({
        "spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": "SPDXRef-image",
    })];
    relationships.extend(contained);
    let digest = sha256(Value::from(listed.clone()).to_string().as_bytes())?.replace("sha256:", "");
    let document = json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": image,
        "documentNamespace": format!("https://nodemesh.invalid/spdx/{digest}"),
        "creationInfo": {"created": date(), "creators": ["Tool: cargo-xtask-image"]},
        "packages": packages,
        "files": listed,
        "relationships": relationships,
    });
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

/// The crates that are compiled into `package`, by their identifiers.
fn crates(folder: &Path, package: &str) -> Result<BTreeMap<String, Value>> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let args = ["metadata", "--format-version=1", "--locked", "--filter-platform", &platform];
    let mut command = cargo(&args);
    command.current_dir(folder);
    let output = command.output().context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata = serde_json::from_slice(&output.stdout).context("cannot read what cargo metadata says")?;
    compiled_in(&metadata, package)
}

/// Along dependencies of the normal kind: what only builds or tests is not in the program.
fn compiled_in(metadata: &Value, package: &str) -> Result<BTreeMap<String, Value>> {
    let packages: BTreeMap<&str, &Value> = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|package| Some((package["id"].as_str()?, package)))
        .collect();
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|node| Some((node["id"].as_str()?, node)))
        .collect();
    let first = packages.iter().find(|(_, p)| p["name"] == package).map(|(id, _)| *id);
    let mut next = vec![first.with_context(|| format!("cargo metadata does not know {package}"))?];
    let mut seen = BTreeSet::new();
    let mut found = BTreeMap::new();
    while let Some(id) = next.pop() {
        if !seen.insert(id) {
            continue;
        }
        let of = packages.get(id).with_context(|| format!("cargo metadata does not describe {id}"))?;
        let (key, value) = of_crate(of);
        found.insert(key, value);
        let Some(node) = nodes.get(id) else { continue };
        for dependency in node["deps"].as_array().into_iter().flatten() {
            let kinds = dependency["dep_kinds"].as_array();
            if kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null())) {
                next.extend(dependency["pkg"].as_str());
            }
        }
    }
    Ok(found)
}

fn of_crate(package: &Value) -> (String, Value) {
    let text = |key: &str| package[key].as_str().unwrap_or_default();
    let (name, version) = (text("name"), text("version"));
    // Crates from before SPDX's expressions write a slash for `OR`.
    let licence = match text("license") {
        "" => "NOASSERTION".to_owned(),
        licence if licence.contains(" OR ") => licence.to_owned(),
        licence => licence.replace('/', " OR "),
    };
    let spdx = format!("SPDXRef-crate-{}-{}", id(name), id(version));
    let mut value = json!({
        "SPDXID": spdx,
        "name": name,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseDeclared": licence,
    });
    if package["source"].is_string() {
        value["externalRefs"] = purl(&format!("pkg:cargo/{name}@{version}"));
    }
    (spdx, value)
}

fn purl(locator: &str) -> Value {
    json!([{
        "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": locator,
    }])
}

/// The packages that the libraries come from, where dpkg knows them; elsewhere the files are listed alone.
fn distribution(libraries: &BTreeMap<String, PathBuf>) -> Result<Vec<Value>> {
    let mut found = BTreeMap::new();
    for (path, real) in libraries {
        // Since /lib became a link to /usr/lib, dpkg knows a file by one of its names.
        let real = real.to_string_lossy();
        let names = [real.as_ref(), path.as_str(), real.trim_start_matches("/usr")];
        let Some(package) = names.iter().find_map(|name| owner(name)) else { continue };
        let format = "-f=${source:Package} ${source:Version} ${Version} ${Architecture}";
        let output = Command::new("dpkg-query").args(["-W", format, &package]).output()?;
        let said = String::from_utf8(output.stdout)?;
        let [source, source_version, version, architecture] = said.split(' ').collect::<Vec<_>>()[..] else {
            bail!("dpkg-query does not say what {package} is: {said}");
        };
        let name = package.split(':').next().unwrap_or(&package);
        let spdx = format!("SPDXRef-deb-{}", id(name));
        let value = json!({
            "SPDXID": spdx,
            "name": name,
            "versionInfo": version,
            "sourceInfo": format!("built from {source} {source_version}"),
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": false,
            "licenseDeclared": "NOASSERTION",
            "externalRefs": purl(&format!("pkg:deb/debian/{name}@{version}?arch={architecture}")),
        });
        found.insert(spdx, value);
    }
    Ok(found.into_values().collect())
}

/// `libc6:amd64`
fn owner(path: &str) -> Option<String> {
    let output = Command::new("dpkg").args(["-S", path]).output().ok().filter(|o| o.status.success())?;
    let said = String::from_utf8(output.stdout).ok()?;
    said.lines().find_map(|line| line.strip_suffix(&format!(": {path}"))).map(str::to_owned)
}

/// Of the commit; without git that of the epoch, as reproducible builds have it.
fn date() -> String {
    let mut git = Command::new("git");
    git.current_dir(root()).env("TZ", "UTC");
    git.args(["log", "-1", "--format=%cd", "--date=format-local:%Y-%m-%dT%H:%M:%SZ"]);
    let said = git.output().ok().filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    said.map(|said| said.trim().to_owned())
        .filter(|said| !said.is_empty())
        .unwrap_or_else(|| "1970-01-01T00:00:00Z".to_owned())
}

/// What SPDX allows in an identifier.
fn id(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_compiled_in_is_listed() {
        let package = |id: &str, licence: &str| json!({"id": id, "name": id, "version": "1.0.0", "license": licence});
        let dependency = |pkg: &str, kind: Value| json!({"pkg": pkg, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [package("a", "Apache-2.0"), package("b", "MIT/Apache-2.0"), package("c", ""),
                         package("d", "MIT")],
            "resolve": {"nodes": [
                {"id": "a", "deps": [dependency("b", Value::Null), dependency("d", json!("build"))]},
                {"id": "b", "deps": [dependency("c", Value::Null), dependency("a", Value::Null)]},
                {"id": "c", "deps": []},
                {"id": "d", "deps": []},
            ]},
        });
        let found = compiled_in(&metadata, "a").unwrap();
        let licences: Vec<_> = found.values().map(|p| p["licenseDeclared"].as_str().unwrap()).collect();
        assert_eq!(licences, ["Apache-2.0", "MIT OR Apache-2.0", "NOASSERTION"]);
        assert!(compiled_in(&metadata, "x").is_err());
    }
}
