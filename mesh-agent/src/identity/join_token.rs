//! Join tokens: what a node shows the controller, and by which it knows the controller.
//! `nm1.<claims>.<HMAC-SHA-256>`, both base64url: the claims are JSON with the node's name, the end of its validity, and
//! the SHA-256 of the mesh's roots, so that an address and a token are all that a node needs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use crate::lifecycle::files::{self, FileError};

const VERSION: &str = "nm1";
const SECRET: &str = "join-token.key";
/// One token id a line; `#` begins a comment. Read at each request, so a revocation holds at once.
pub const REVOKED: &str = "revoked-tokens";
/// A node shows its token at each renewal, so the token has to last as long as the node should.
pub const DEFAULT_TOKEN_LIFE: Duration = Duration::from_secs(365 * 86_400);
const MAX_TOKEN_BYTES: usize = 2048;

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error(
        "the join token is no token of this version (`{VERSION}.…`); copy it whole, or make one with `mesh-agent controller token`"
    )]
    Shape,
    #[error("the join token was not made by this controller; make one here with `mesh-agent controller token`")]
    Foreign,
    #[error(
        "the join token `{id}` of node `{node}` has expired at {at}; make a new one with `mesh-agent controller token --node {node}`"
    )]
    Expired { id: String, node: String, at: String },
    #[error(
        "the join token `{id}` of node `{node}` has been revoked; make a new one with `mesh-agent controller token --node {node}`"
    )]
    Revoked { id: String, node: String },
    #[error(
        "the join token is for node `{token}`, and this is node `{here}`; make one with `mesh-agent controller token --node {here}`"
    )]
    OtherNode { token: String, here: String },
    #[error("`{0}` is no join token and no id of one: give the token, or the 16 hex digits that errors name it by")]
    Id(String),
    #[error("{} is not there, so no token was made from it; name the controller's state with --state-dir", .0.display())]
    NoSecret(PathBuf),
    #[error("`{0}` is no name of a node: use 1 to 253 lower-case letters, digits, `.` or `-`")]
    NodeName(String),
    #[error("{}: it is no secret of 32 bytes; restore it, or remove it and give every node a new token", .0.display())]
    Secret(PathBuf),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("the random number generator of this machine fails; no token can be made")]
    Random,
}

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    pub id: String,
    pub node: String,
    /// Seconds since 1970.
    pub exp: u64,
    /// SHA-256 of each root that was trusted when the token was made, in hex: two during a change of the root, so that the
    /// token outlives it.
    pub roots: Vec<String>,
}

impl Claims {
    /// Reads a token without the secret: the node does so, to know the root. Only the controller can judge it.
    pub fn read(token: &str) -> Result<Self, TokenError> {
        split(token).map(|(claims, _, _)| claims)
    }
}

/// Makes tokens and judges them.
pub struct JoinTokens {
    key: hmac::Key,
    revoked: PathBuf,
}

impl JoinTokens {
    /// Reads the secret in `state_dir`, or makes it.
    pub fn open(state_dir: &Path) -> Result<Self, TokenError> {
        let path = state_dir.join(SECRET);
        let text = match files::read(&path) {
            Ok(text) => text,
            Err(e) if e.is_missing() => {
                let mut secret = [0; 32];
                aws_lc_rs::rand::fill(&mut secret).map_err(|_| TokenError::Random)?;
                files::create_private_dir(state_dir)?;
                let text = URL_SAFE_NO_PAD.encode(secret);
                // `controller token` may run while the controller starts: the first secret is everyone's.
                if files::create_private(&path, text.as_bytes())? { text } else { files::read(&path)? }
            }
            Err(e) => return Err(e.into()),
        };
        let secret = URL_SAFE_NO_PAD.decode(text.trim()).ok().filter(|secret| secret.len() == 32);
        let secret = secret.ok_or(TokenError::Secret(path))?;
        Ok(Self { key: hmac::Key::new(hmac::HMAC_SHA256, &secret), revoked: state_dir.join(REVOKED) })
    }

    /// The same where a secret has to be there: what is revoked in the wrong place is not revoked.
    pub fn existing(state_dir: &Path) -> Result<Self, TokenError> {
        let path = state_dir.join(SECRET);
        if !path.exists() {
            return Err(TokenError::NoSecret(path));
        }
        Self::open(state_dir)
    }

    /// A token for `node`, good until `expires`, that pins the roots with these fingerprints.
    pub fn issue(&self, node: &str, roots: &[String], expires: SystemTime) -> Result<String, TokenError> {
        let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
        if node.is_empty() || node.len() > 253 || !node.bytes().all(good) {
            return Err(TokenError::NodeName(node.to_owned()));
        }
        let mut id = [0; 8];
        aws_lc_rs::rand::fill(&mut id).map_err(|_| TokenError::Random)?;
        let claims = Claims {
            id: id.iter().map(|byte| format!("{byte:02x}")).collect(),
            node: node.to_owned(),
            exp: expires.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
            roots: roots.to_vec(),
        };
        let claims = serde_json::to_vec(&claims).expect("claims are plain data");
        let signed = format!("{VERSION}.{}", URL_SAFE_NO_PAD.encode(claims));
        let tag = hmac::sign(&self.key, signed.as_bytes());
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag)))
    }

    /// Judges `token` at `now`.
    pub fn verify(&self, token: &str, now: SystemTime) -> Result<Claims, TokenError> {
        let (claims, signed, tag) = split(token)?;
        hmac::verify(&self.key, signed.as_bytes(), &tag).map_err(|_| TokenError::Foreign)?;
        let Claims { id, node, exp, roots: _ } = &claims;
        let expires = SystemTime::UNIX_EPOCH + Duration::from_secs(*exp);
        if expires <= now {
            return Err(TokenError::Expired { id: id.clone(), node: node.clone(), at: super::rfc3339(expires) });
        }
        if self.is_revoked(id)? {
            return Err(TokenError::Revoked { id: id.clone(), node: node.clone() });
        }
        Ok(claims)
    }

    /// Adds a token, given whole or by its id, to the list of revoked ones, and returns its id. A controller that runs
    /// sees it with the next request.
    pub fn revoke(&self, token_or_id: &str) -> Result<String, TokenError> {
        let id = match split(token_or_id) {
            Ok((claims, signed, tag)) => {
                hmac::verify(&self.key, signed.as_bytes(), &tag).map_err(|_| TokenError::Foreign)?;
                claims.id
            }
            Err(_) if is_id(token_or_id) => token_or_id.to_owned(),
            Err(_) => return Err(TokenError::Id(token_or_id.to_owned())),
        };
        if self.is_revoked(&id)? {
            return Ok(id);
        }
        let mut list = match files::read(&self.revoked) {
            Ok(list) => list,
            Err(e) if e.is_missing() => String::new(),
            Err(e) => return Err(e.into()),
        };
        if !list.is_empty() && !list.ends_with('\n') {
            list.push('\n');
        }
        list.push_str(&id);
        list.push('\n');
        files::write_private(&self.revoked, list.as_bytes())?;
        Ok(id)
    }

    fn is_revoked(&self, id: &str) -> Result<bool, TokenError> {
        match files::read(&self.revoked) {
            Ok(text) => Ok(text.lines().any(|line| line.split('#').next().unwrap_or_default().trim() == id)),
            Err(e) if e.is_missing() => Ok(false),
            // A list that can't be read may name any token, so none is good.
            Err(e) => Err(e.into()),
        }
    }
}

/// As `issue` makes them.
fn is_id(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The claims, the part that is signed, and the tag. Nothing here is to be believed yet.
fn split(token: &str) -> Result<(Claims, &str, Vec<u8>), TokenError> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(TokenError::Shape);
    }
    let (signed, tag) = token.rsplit_once('.').ok_or(TokenError::Shape)?;
    let (version, claims) = signed.split_once('.').ok_or(TokenError::Shape)?;
    if version != VERSION {
        return Err(TokenError::Shape);
    }
    let claims = URL_SAFE_NO_PAD.decode(claims).map_err(|_| TokenError::Shape)?;
    let claims: Claims = serde_json::from_slice(&claims).map_err(|_| TokenError::Shape)?;
    let tag = URL_SAFE_NO_PAD.decode(tag).map_err(|_| TokenError::Shape)?;
    // Else adding an absurd time to 1970 would overflow.
    if claims.exp > u64::from(u32::MAX) * 2 {
        return Err(TokenError::Shape);
    }
    Ok((claims, signed, tag))
}

impl fmt::Debug for JoinTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinTokens").field("revoked", &self.revoked).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn roots() -> Vec<String> {
        vec!["ab".to_owned()]
    }

    fn soon() -> SystemTime {
        SystemTime::now() + Duration::from_secs(60)
    }

    #[test]
    fn a_token_is_good_until_it_expires_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let token = JoinTokens::open(dir.path()).unwrap().issue("node-a", &roots(), soon()).unwrap();
        let again = JoinTokens::open(dir.path()).unwrap();
        let claims = again.verify(&token, SystemTime::now()).unwrap();
        assert_eq!((claims.node.as_str(), &claims.roots), ("node-a", &roots()));
        assert_eq!(Claims::read(&token).unwrap(), claims);
        let late = again.verify(&token, SystemTime::now() + Duration::from_secs(61)).unwrap_err();
        assert!(matches!(&late, TokenError::Expired { node, .. } if node == "node-a"), "{late}");
    }

    #[test]
    fn a_foreign_or_changed_token_is_refused() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tokens = JoinTokens::open(dir.path()).unwrap();
        let foreign = JoinTokens::open(other.path()).unwrap().issue("node-a", &roots(), soon()).unwrap();
        assert!(matches!(tokens.verify(&foreign, SystemTime::now()), Err(TokenError::Foreign)));

        // The claims of one token with the tag of another.
        let [a, b] = ["node-a", "node-b"].map(|node| tokens.issue(node, &roots(), soon()).unwrap());
        let mixed = format!("{}.{}", a.rsplit_once('.').unwrap().0, b.rsplit_once('.').unwrap().1);
        assert!(matches!(tokens.verify(&mixed, SystemTime::now()), Err(TokenError::Foreign)));

        for text in ["", "nm1", "nm1..", "nm2.e30.AA", "nm1.e30.AA", "nm1.%%.AA", &"x".repeat(5000)] {
            assert!(matches!(tokens.verify(text, SystemTime::now()), Err(TokenError::Shape)), "{text}");
        }
    }

    #[test]
    fn a_revoked_token_is_refused_at_once_and_a_broken_list_refuses_all() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = JoinTokens::open(dir.path()).unwrap();
        let [lost, kept] = ["node-a", "node-a"].map(|node| tokens.issue(node, &roots(), soon()).unwrap());
        let id = tokens.verify(&lost, SystemTime::now()).unwrap().id;
        fs::write(dir.path().join(REVOKED), format!("# lost laptop\n {id}  # node-a\n")).unwrap();
        assert!(matches!(tokens.verify(&lost, SystemTime::now()), Err(TokenError::Revoked { .. })));
        let other = tokens.verify(&kept, SystemTime::now()).unwrap().id;
        tokens.revoke("0123456789abcdef").unwrap();
        // By the token as by its id, and once is as good as twice.
        assert_eq!(tokens.revoke(&kept).unwrap(), other);
        assert_eq!(tokens.revoke(&other).unwrap(), other);
        let list = fs::read_to_string(dir.path().join(REVOKED)).unwrap();
        assert_eq!(list.matches(&other).count(), 1, "{list}");
        assert!(matches!(tokens.revoke("node-a"), Err(TokenError::Id(_))));
        let elsewhere = tempfile::tempdir().unwrap();
        assert!(matches!(JoinTokens::existing(elsewhere.path()), Err(TokenError::NoSecret(_))));
        assert!(matches!(JoinTokens::open(elsewhere.path()).unwrap().revoke(&kept), Err(TokenError::Foreign)));
        for token in [&lost, &kept] {
            assert!(matches!(tokens.verify(token, SystemTime::now()), Err(TokenError::Revoked { .. })));
        }
        let kept = tokens.issue("node-a", &roots(), soon()).unwrap();
        tokens.verify(&kept, SystemTime::now()).unwrap();

        fs::write(dir.path().join(REVOKED), [0xff, 0xfe]).unwrap();
        assert!(matches!(tokens.verify(&kept, SystemTime::now()), Err(TokenError::File(_))));
    }

    #[test]
    fn a_broken_secret_and_a_wrong_name_are_sentences() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = JoinTokens::open(dir.path()).unwrap();
        for name in ["", "Node", "a b", "a/b"] {
            assert!(matches!(tokens.issue(name, &roots(), soon()), Err(TokenError::NodeName(_))), "{name}");
        }
        fs::write(dir.path().join(SECRET), "short").unwrap();
        let error = JoinTokens::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(SECRET), "{error}");
    }
}
