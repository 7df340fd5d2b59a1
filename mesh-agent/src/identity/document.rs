//! A CA as one Secret holds it, so that several controllers can share it. Pure: keys and texts come in, and the next
//! version goes out; who may write it, and when, is the business of the caller.
//!
//! The generation that signs has the plain names (`ca-cert.pem`); others that are trusted have theirs behind `ca-N.`.
//! `state.json` has the phases of a root's change; a Secret without it was brought by the user, and is never changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::PublicKeyData;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authority::{CaError, Generations};
use super::issuer::{
    self, CA_CERT, CA_KEY, CERT_CHAIN, INTERMEDIATE_LIFE, IssuerError, ROOT_CERT, ROOT_KEY, ROOT_LIFE, SigningCa,
};
use super::material::{Material, Pems};
use super::root_rotation::{Pace, Phases};
use crate::model::TrustDomain;

const STATE: &str = "state.json";
const NAMES: [&str; 5] = [ROOT_KEY, ROOT_CERT, CA_KEY, CA_CERT, CERT_CHAIN];
/// Stands for all nodes: each controller hears only from some of them, so a new root is waited for as long as a certificate
/// lives. By then every node has had new certificates, which come with both roots.
const EVERY_NODE: &str = "(every node)";

/// What is due.
pub struct Next {
    pub document: Document,
    /// What has been done, for the log.
    pub done: String,
}

#[derive(Clone, PartialEq, Eq)]
pub struct Document {
    /// `Secret nodemesh-system/nodemesh-ca`
    secret: String,
    keys: BTreeMap<String, String>,
}

impl Document {
    /// `secret` names it in sentences; `keys` are all that it has.
    pub fn new(secret: &str, keys: BTreeMap<String, String>) -> Self {
        Self { secret: secret.to_owned(), keys }
    }

    /// The first CA of a mesh.
    pub fn first(secret: &str, trust_domain: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        let first = texts(issuer::new_root(trust_domain, now)?);
        Ok(Self::new(secret, BTreeMap::new()).with(&Phases::first(), &BTreeMap::from([(1, first)])))
    }

    pub fn keys(&self) -> &BTreeMap<String, String> {
        &self.keys
    }

    /// Made, but not filled: as if it were not there.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether the user has put a CA of his own here.
    pub fn is_brought(&self) -> bool {
        !self.keys.contains_key(STATE)
    }

    /// Everything checked.
    pub(super) fn open(&self, trust_domain: &TrustDomain, now: SystemTime) -> Result<(Phases, Generations), CaError> {
        let phases = self.phases()?;
        let mut generations = BTreeMap::new();
        for number in phases.trusted() {
            let ca = SigningCa::of(self.material(&phases, number), trust_domain, now)?;
            generations.insert(number, Arc::new(ca));
        }
        if !self.is_brought() {
            self.check_root_key(&phases)?;
        }
        Ok((phases, generations))
    }

    /// When the certificate that signs expires; `None` where it cannot be read.
    pub fn not_after(&self, trust_domain: &TrustDomain, now: SystemTime) -> Option<SystemTime> {
        let phases = self.phases().ok()?;
        SigningCa::of(self.material(&phases, phases.active), trust_domain, now).ok().map(|ca| ca.not_after())
    }

    /// Does what is due, as `Ca::advance` for a directory; `rotate` asks for a new root. `None`: nothing is.
    pub fn next(
        &self,
        trust_domain: &TrustDomain,
        lifetime: Duration,
        announce: Duration,
        rotate: bool,
        now: SystemTime,
    ) -> Result<Option<Next>, CaError> {
        if self.is_brought() {
            return if rotate { Err(CaError::Brought) } else { Ok(None) };
        }
        let mut phases = self.phases()?;
        let mut generations: BTreeMap<u64, BTreeMap<&'static str, String>> =
            phases.trusted().into_iter().map(|number| (number, self.texts(&phases, number))).collect();
        let mut done = Vec::new();
        let before = phases.clone();
        if phases.advance(now, Pace { announce, give_up: lifetime, retire: lifetime }) {
            done.push("the change of the root goes on".to_owned());
        }
        let active = self.material(&before, phases.active);
        let root_not_after = match SigningCa::of(active.clone(), trust_domain, now) {
            Ok(ca) if now + INTERMEDIATE_LIFE / 3 < ca.chain_not_after => Some(ca.root_not_after),
            // Nothing ran for so long that the intermediate has expired; the root can sign another.
            Err(IssuerError::Expired { path, .. }) if path.ends_with(CA_CERT) => None,
            Ok(_) => None,
            Err(e) => return Err(e.into()),
        };
        if root_not_after.is_none() {
            let number = phases.next_number();
            generations.insert(number, texts(issuer::new_intermediate(&active, trust_domain, now)?));
            phases.active = number;
            done.push("the intermediate has been renewed".to_owned());
        }
        let ends = root_not_after.is_some_and(|end| now + ROOT_LIFE / 10 >= end);
        match &phases.announced {
            Some(next) if rotate => return Err(CaError::UnderWay(next.generation)),
            None if rotate || ends => {
                let number = phases.next_number();
                generations.insert(number, texts(issuer::new_root(trust_domain, now)?));
                phases.announce(number, BTreeSet::from([EVERY_NODE.to_owned()]), now);
                let wait = lifetime.max(announce).as_secs();
                done.push(format!("a new root is announced; it signs in {wait} s, when every node trusts it"));
            }
            Some(_) | None => {}
        }
        if done.is_empty() {
            return Ok(None);
        }
        let trusted = phases.trusted();
        generations.retain(|number, _| trusted.contains(number));
        Ok(Some(Next { document: self.with(&phases, &generations), done: done.join("; ") }))
    }

    fn phases(&self) -> Result<Phases, CaError> {
        let Some(text) = self.keys.get(STATE) else { return Ok(Phases::first()) };
        let broken = |problem: String| CaError::SecretState { place: format!("{}, key {STATE}", self.secret), problem };
        let phases: Phases = serde_json::from_str(text).map_err(|e| broken(e.to_string()))?;
        if phases.is_known_version() {
            Ok(phases)
        } else {
            Err(broken("it was written by another version of the controller".to_owned()))
        }
    }

    fn material(&self, phases: &Phases, number: u64) -> Material {
        Material::Secret { secret: self.secret.clone(), prefix: prefix(phases, number), texts: self.keys.clone() }
    }

    fn texts(&self, phases: &Phases, number: u64) -> BTreeMap<&'static str, String> {
        let prefix = prefix(phases, number);
        let text = |name: &&'static str| Some((*name, self.keys.get(&format!("{prefix}{name}"))?.clone()));
        NAMES.iter().filter_map(text).collect()
    }

    /// The same Secret with other generations; keys of others stay.
    fn with(&self, phases: &Phases, generations: &BTreeMap<u64, BTreeMap<&'static str, String>>) -> Self {
        let ours = |key: &str| {
            let of_generation = key.strip_prefix("ca-").and_then(|rest| rest.split_once('.'));
            let numbered = of_generation
                .is_some_and(|(number, name)| number.bytes().all(|b| b.is_ascii_digit()) && NAMES.contains(&name));
            key == STATE || NAMES.contains(&key) || numbered
        };
        let mut keys: BTreeMap<String, String> =
            self.keys.iter().filter(|(key, _)| !ours(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
        for (number, texts) in generations {
            let prefix = prefix(phases, *number);
            keys.extend(texts.iter().map(|(name, text)| (format!("{prefix}{name}"), text.clone())));
        }
        keys.insert(STATE.to_owned(), serde_json::to_string(phases).expect("phases are plain data"));
        Self { secret: self.secret.clone(), keys }
    }

    /// A CA of the user's that was laid over ours: its root would be "renewed" with a key that is not its own.
    fn check_root_key(&self, phases: &Phases) -> Result<(), CaError> {
        let material = self.material(phases, phases.active);
        let key = issuer::read_key(&material, ROOT_KEY)?;
        let root = issuer::read_certificates(&material, ROOT_CERT)?.swap_remove(0);
        let belongs = X509Certificate::from_der(&root)
            .is_ok_and(|(_, parsed)| parsed.public_key().subject_public_key.data.as_ref() == key.der_bytes());
        if belongs { Ok(()) } else { Err(CaError::LaidOver(self.secret.clone())) }
    }
}

impl std::fmt::Debug for Document {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the keys' texts.
        write!(f, "{} with {:?}", self.secret, self.keys.keys())
    }
}

fn prefix(phases: &Phases, number: u64) -> String {
    if number == phases.active { String::new() } else { format!("ca-{number}.") }
}

fn texts(pems: Pems) -> BTreeMap<&'static str, String> {
    pems.into_iter().collect()
}

#[cfg(test)]
mod tests;
