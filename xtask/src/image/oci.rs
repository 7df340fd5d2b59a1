//! OCI archives without a container engine: files with their paths and modes come in, the bytes of a tar file go out.
//!
//! The same files give the same bytes: no time, no user, no order that could differ.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{fs, thread};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// One file of an image or archive, with its path from the root, without a slash in front.
pub struct File {
    pub path: String,
    pub mode: u32,
    pub content: Vec<u8>,
}

impl File {
    pub fn new(path: impl Into<String>, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        Self { path: path.into(), mode, content: content.into() }
    }
}

/// An image of one layer.
pub struct Image<'a> {
    /// With its tag, as pods name it.
    pub name: &'a str,
    pub files: Vec<File>,
    /// What a container runs that says nothing else.
    pub entrypoint: &'a str,
}

/// The archive of an image `name` whose only file, `/program`, is also its entry point.
pub fn of_program(name: &str, program: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    archive(Image { name, files: vec![File::new("program", 0o755, bytes)], entrypoint: "/program" })
}

/// The archive of an image for this machine's kind of processor.
pub fn archive(image: Image<'_>) -> Result<Vec<u8>> {
    pack(image, architecture())
}

fn pack(image: Image<'_>, architecture: &str) -> Result<Vec<u8>> {
    let Image { name, mut files, entrypoint } = image;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let layer = tar(&files)?;
    let config = bytes(&json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": [entrypoint], "Env": ["PATH=/usr/bin"], "WorkingDir": "/"},
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
    let blob = |content: Vec<u8>| -> Result<File> {
        Ok(File::new(format!("blobs/{}", sha256(&content)?.replace(':', "/")), 0o644, content))
    };
    tar(&[
        File::new("oci-layout", 0o644, *br#"{"imageLayoutVersion":"1.0.0"}"#),
        File::new("index.json", 0o644, index),
        blob(manifest)?,
        blob(config)?,
        blob(layer)?,
    ])
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

/// `sha256:` and the digest. By coreutils: a library for it would have to be compiled before anything of xtask runs.
pub fn sha256(content: &[u8]) -> Result<String> {
    let said = String::from_utf8(through(Command::new("sha256sum"), content)?)?;
    let hex = said.split(' ').next().filter(|hex| hex.len() == 64).context("sha256sum printed no digest")?;
    Ok(format!("sha256:{hex}"))
}

/// What `command` makes of `content`, from its standard input to its output.
fn through(mut command: Command, content: &[u8]) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut program = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}: `cargo xtask setup` installs it"))?;
    // Taken, so that its input ends.
    let mut input = program.stdin.take().context("the pipe was asked for")?;
    let output = thread::scope(|scope| {
        scope.spawn(move || input.write_all(content));
        program.wait_with_output()
    })?;
    if !output.status.success() {
        bail!("{name} ended with {}", output.status);
    }
    Ok(output.stdout)
}

/// Plain files in ustar: a header of 512 bytes, the content filled up to 512, two empty blocks at the end.
fn tar(files: &[File]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(files.iter().map(|f| f.content.len() + 1024).sum::<usize>() + 1024);
    for File { path, mode, content } in files {
        if path.len() > 100 {
            bail!("{path}: a path of an image has 100 bytes at most");
        }
        let mut header = [0_u8; 512];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, path);
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
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(files: Vec<File>) -> Vec<u8> {
        pack(Image { name: "example.invalid/web:1", files, entrypoint: "/program" }, "amd64").unwrap()
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let one = |content: &[u8]| File::new("program", 0o755, content);
        let two = || File::new("lib/x.so", 0o644, *b"library");
        assert_eq!(image(vec![one(b"program"), two()]), image(vec![two(), one(b"program")]), "whatever their order");
        assert_ne!(image(vec![one(b"program"), two()]), image(vec![one(b"another"), two()]));
        assert_ne!(image(vec![one(b"program")]), image(vec![File::new("program", 0o644, *b"program")]));
    }

    #[test]
    fn tar_reads_it_and_digests_are_the_names_of_their_blobs() {
        let folder = std::env::temp_dir().join(format!("nm-image-test-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let files = vec![File::new("usr/bin/a", 0o755, [7; 1000]), File::new("lib/b", 0o644, [8; 3])];
        fs::write(folder.join("image.tar"), image(files)).unwrap();
        let untar = |file: &str| {
            let status = Command::new("tar").args(["-xf", file]).current_dir(&folder).status().unwrap();
            assert!(status.success());
        };
        untar("image.tar");
        let blobs: Vec<_> = fs::read_dir(folder.join("blobs/sha256")).unwrap().flatten().collect();
        assert_eq!(blobs.len(), 3);
        for blob in &blobs {
            let content = fs::read(blob.path()).unwrap();
            assert_eq!(sha256(&content).unwrap(), format!("sha256:{}", blob.file_name().to_str().unwrap()));
        }
        let layer = blobs.iter().max_by_key(|blob| blob.metadata().unwrap().len()).unwrap();
        untar(layer.path().to_str().unwrap());
        assert_eq!(fs::read(folder.join("usr/bin/a")).unwrap(), [7; 1000]);
        assert_eq!(fs::read(folder.join("lib/b")).unwrap(), [8; 3]);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_path_that_does_not_fit_is_refused() {
        assert!(tar(&[File::new("a".repeat(101), 0o644, [])]).is_err(), "it would be cut off");
    }

    #[test]
    fn a_program_that_answers_while_it_reads_stops_nobody() {
        let content = vec![7; 1 << 20];
        assert_eq!(through(Command::new("cat"), &content).unwrap(), content);
    }
}
