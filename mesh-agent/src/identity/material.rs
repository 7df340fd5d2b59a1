//! The PEM texts of one CA under the names of Istio's `cacerts`, and where they lie: files of a directory, or keys of a
//! Secret. Whoever checks them names the place, so that a sentence says which file or key is wrong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::issuer::{CA_CERT, CA_KEY, CERT_CHAIN, IssuerError, ROOT_CERT};
use crate::lifecycle::files;

/// Texts by their names, in the order in which they are to be written.
pub(super) type Pems = Vec<(&'static str, String)>;

/// The keys of cert-manager and of `kubectl create secret tls`, by the names that we use.
const CERT_MANAGER: &[(&str, &str)] =
    &[(CA_CERT, "tls.crt"), (CERT_CHAIN, "tls.crt"), (CA_KEY, "tls.key"), (ROOT_CERT, "ca.crt")];

#[derive(Clone)]
pub(super) enum Material {
    /// Read when it is asked for.
    Directory(PathBuf),
    Secret {
        /// `Secret nodemesh-system/nodemesh-ca`
        secret: String,
        /// Before each key: a Secret can hold several generations.
        prefix: String,
        texts: BTreeMap<String, String>,
    },
}

impl Material {
    /// For sentences: `/etc/ca/ca-cert.pem`, or `Secret a/b, key ca-cert.pem`.
    pub fn place(&self, name: &str) -> String {
        match self {
            Self::Directory(dir) => dir.join(name).display().to_string(),
            Self::Secret { secret, .. } => format!("{secret}, key {}", self.key(name)),
        }
    }

    /// The text, or `None` where there is none.
    pub fn find(&self, name: &str) -> Result<Option<String>, IssuerError> {
        match self {
            Self::Directory(dir) => match files::read(&dir.join(name)) {
                Ok(text) => Ok(Some(text)),
                Err(e) if e.is_missing() => Ok(None),
                Err(e) => Err(e.into()),
            },
            Self::Secret { texts, .. } => Ok(texts.get(&self.key(name)).cloned()),
        }
    }

    pub fn read(&self, name: &str) -> Result<String, IssuerError> {
        match self {
            Self::Directory(dir) => Ok(files::read(&dir.join(name))?),
            Self::Secret { .. } => self.find(name)?.ok_or_else(|| IssuerError::NoKey(self.place(name))),
        }
    }

    /// Where all of it lies.
    pub fn home(&self) -> String {
        match self {
            Self::Directory(dir) => dir.display().to_string(),
            Self::Secret { secret, .. } => secret.clone(),
        }
    }

    fn key(&self, name: &str) -> String {
        let Self::Secret { prefix, texts, .. } = self else { return name.to_owned() };
        let own = format!("{prefix}{name}");
        // A Secret that has both speaks Istio's language: those are the fuller names.
        let other = CERT_MANAGER.iter().find(|(ours, _)| *ours == name).map(|(_, theirs)| (*theirs).to_owned());
        match other.filter(|_| texts.contains_key("tls.crt") && !texts.contains_key(CA_CERT)) {
            Some(theirs) => theirs,
            None => own,
        }
    }
}

/// Writes what was made to `dir`, readable for its owner alone.
pub(super) fn write(dir: &Path, pems: &Pems) -> Result<(), files::FileError> {
    files::create_private_dir(dir)?;
    pems.iter().try_for_each(|(name, text)| files::write_private(&dir.join(name), text.as_bytes()))
}
