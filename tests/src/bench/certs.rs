//! Keys and certificates for the Envoy sidecars, made by openssl: ECDSA P-256, the identity as a SPIFFE URI.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::run::output;

/// A CA of one run.
#[derive(Debug)]
pub struct Ca {
    folder: PathBuf,
    name: String,
}

/// A workload's key and certificate as files, beside their texts.
#[derive(Debug)]
pub struct Certificate {
    pub key: PathBuf,
    pub chain: PathBuf,
}

fn request() -> Command {
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-sha256", "-nodes"]);
    command.args(["-days", "2"]);
    command
}

impl Ca {
    pub fn make(folder: &Path, name: &str) -> Result<Self> {
        let ca = Self { folder: folder.to_owned(), name: name.to_owned() };
        let mut command = request();
        command.args(["-subj", &format!("/CN={name}")]).arg("-keyout").arg(ca.key()).arg("-out").arg(ca.root());
        command.args(["-addext", "keyUsage=critical,keyCertSign"]);
        output(&mut command).with_context(|| format!("cannot make the CA {name}"))?;
        Ok(ca)
    }

    pub fn root(&self) -> PathBuf {
        self.folder.join(format!("{}.pem", self.name))
    }

    fn key(&self) -> PathBuf {
        self.folder.join(format!("{}.key", self.name))
    }

    /// A certificate for `spiffe`, in files called after the CA and `file`.
    pub fn issue(&self, file: &str, spiffe: &str) -> Result<Certificate> {
        let path = |extension: &str| self.folder.join(format!("{}-{file}.{extension}", self.name));
        let certificate = Certificate { key: path("key"), chain: path("pem") };
        let mut command = request();
        command.args(["-subj", "/", "-addext", &format!("subjectAltName=critical,URI:{spiffe}")]);
        command.args([
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            "keyUsage=critical,digitalSignature",
        ]);
        command.args(["-addext", "extendedKeyUsage=serverAuth,clientAuth"]);
        command.arg("-CA").arg(self.root()).arg("-CAkey").arg(self.key());
        command.arg("-keyout").arg(&certificate.key).arg("-out").arg(&certificate.chain);
        output(&mut command).with_context(|| format!("cannot make a certificate for {spiffe}"))?;
        Ok(certificate)
    }
}

pub fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
