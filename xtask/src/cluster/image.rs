//! An OCI archive with one static program in it: what a node runs where there is no registry.
//!
//! The same program gives the same bytes: no time, no user, no order that could differ.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// The archive of an image `name` whose only file, `/program`, is also its entry point.
pub fn archive(name: &str, program: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    pack(name, &bytes, architecture())
}

fn pack(name: &str, program: &[u8], architecture: &str) -> Result<Vec<u8>> {
    let layer = tar(&[("program".to_owned(), 0o755, program)]);
    let config = bytes(&json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": ["/program"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [sha256(&layer)?]},
    }));
    let manifest = bytes(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", &config)?,
        "layers": [descriptor("layer.v1.tar", &layer)?],
    }));
    let mut entry = descriptor("manifest.v1+json", &manifest)?;
    entry["platform"] = json!({"architecture": architecture, "os": "linux"});
    entry["annotations"] = json!({"io.containerd.image.name": name});
    let index = bytes(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    }));
    let blob = |content: &[u8]| sha256(content).map(|digest| format!("blobs/{}", digest.replace(':', "/")));
    Ok(tar(&[
        ("oci-layout".to_owned(), 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json".to_owned(), 0o644, &index),
        (blob(&manifest)?, 0o644, &manifest),
        (blob(&config)?, 0o644, &config),
        (blob(&layer)?, 0o644, &layer),
    ]))
}

/// This machine's, in Go's words.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn descriptor(kind: &str, content: &[u8]) -> Result<Value> {
    Ok(json!({
        "mediaType": format!("application/vnd.oci.image.{kind}"),
        "digest": sha256(content)?,
        "size": content.len(),
    }))
}

fn bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// By coreutils: a library for it would have to be compiled before anything of xtask runs.
fn sha256(content: &[u8]) -> Result<String> {
    let mut program = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    // It writes nothing before it has read all. Taken, so that its input ends.
    program.stdin.take().context("the pipe was asked for")?.write_all(content)?;
    let output = program.wait_with_output()?;
    let said = String::from_utf8(output.stdout)?;
    let hex = said.split(' ').next().filter(|hex| hex.len() == 64).context("sha256sum printed no digest")?;
    Ok(format!("sha256:{hex}"))
}

/// Plain files in ustar: a header of 512 bytes, the content filled up to 512, two empty blocks at the end.
fn tar(files: &[(String, u32, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, mode, content) in files {
        let mut header = [0_u8; 512];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{:011o}", content.len()));
        put(136, "00000000000");
        // The checksum is taken with its own field full of spaces.
        put(148, "        ");
        put(156, "0");
        put(257, "ustar");
        put(263, "00");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_program_gives_the_same_bytes() {
        let pack = |program| pack("example.invalid/web:1", program, "amd64").unwrap();
        let image = pack(b"program");
        assert_eq!(image, pack(b"program"));
        assert_ne!(image, pack(b"another"));
    }

    #[test]
    fn tar_reads_it_and_digests_are_the_names_of_their_blobs() {
        let folder = std::env::temp_dir().join(format!("nm-image-test-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("image.tar"), pack("example.invalid/web:1", &[7; 1000], "amd64").unwrap()).unwrap();
        let status = Command::new("tar").args(["-xf", "image.tar"]).current_dir(&folder).status().unwrap();
        assert!(status.success());
        let blobs: Vec<_> = fs::read_dir(folder.join("blobs/sha256")).unwrap().flatten().collect();
        assert_eq!(blobs.len(), 3);
        for blob in blobs {
            let content = fs::read(blob.path()).unwrap();
            assert_eq!(sha256(&content).unwrap(), format!("sha256:{}", blob.file_name().to_str().unwrap()));
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
