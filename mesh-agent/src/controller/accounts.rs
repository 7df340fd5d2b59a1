//! Tokens of service accounts, judged by the API server. In: a token and who has shown it. Out: the node on which the agent
//! runs whose token it is, or a sentence.
//!
//! A good answer is kept for a moment, since an agent that starts asks for all its certificates at once; a bad one is not,
//! but each peer may cause only so many questions.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::api_server::{ApiServer, Kind};
use crate::identity::{Refusal, sha256_hex};

/// For whom a token has to be made.
pub const AUDIENCE: &str = "nodemesh-ca";
/// The agents' service account in the mesh's namespace.
pub const AGENT: &str = "nodemesh-agent";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// A pod that is deleted loses its token with the API server at once; this is how much later it does here.
const REMEMBERED: Duration = Duration::from_secs(10);
const DEADLINE: Duration = Duration::from_secs(5);
/// Longer than any that a cluster makes.
const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// Bad tokens that one address may show at once, and how fast it may show others.
const BAD_BURST: f64 = 20.0;
const BAD_PER_SECOND: f64 = 0.5;
/// Addresses that are remembered for bad tokens; beyond it those that have been quiet are forgotten.
const MAX_PEERS: usize = 4096;

pub struct AgentTokens {
    server: ApiServer,
    namespace: String,
    /// By the hash of the token. Who asks about the same one waits for the first answer.
    known: Mutex<HashMap<String, Place>>,
    peers: Mutex<HashMap<IpAddr, Budget>>,
}

type Place = Arc<tokio::sync::Mutex<Option<Known>>>;

struct Known {
    node: String,
    until: Instant,
    /// As the token itself says.
    expires: SystemTime,
}

impl Known {
    fn is_good(&self) -> bool {
        Instant::now() < self.until && SystemTime::now() < self.expires
    }
}

impl AgentTokens {
    /// `namespace` is the mesh's own.
    pub fn new(server: ApiServer, namespace: &str) -> Arc<Self> {
        let (known, peers) = (Mutex::default(), Mutex::default());
        Arc::new(Self { server, namespace: namespace.to_owned(), known, peers })
    }

    /// The node whose agent has this token.
    pub async fn node_of(&self, token: &str, peer: IpAddr) -> Result<String, Refusal> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Refusal::Denied(format!("the token has {} bytes; that is none of a cluster", token.len())));
        }
        let hash = sha256_hex(token.as_bytes());
        let place = self.known.lock().unwrap_or_else(PoisonError::into_inner).entry(hash).or_default().clone();
        let mut place = place.lock().await;
        if let Some(known) = place.as_ref().filter(|known| known.is_good()) {
            return Ok(known.node.clone());
        }
        let judged = match self.take(peer) {
            true => self.judge(token).await,
            false => Err(Refusal::TooOften(format!(
                "{peer} has shown too many tokens that are not good; see the log of the agent there, and try again later"
            ))),
        };
        if !matches!(judged, Err(Refusal::Denied(_) | Refusal::TooOften(_))) {
            self.give_back(peer);
        }
        *place = judged.as_ref().ok().map(|node| Known {
            node: node.clone(),
            until: Instant::now() + REMEMBERED,
            expires: expiry(token).unwrap_or(UNIX_EPOCH),
        });
        drop(place);
        // What is not good is not kept; those who wait have their own hold on it.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, place| place.try_lock().map_or(true, |p| p.as_ref().is_some_and(Known::is_good)));
        judged
    }

    async fn judge(&self, token: &str) -> Result<String, Refusal> {
        let review = json!({
            "apiVersion": Kind::TOKEN_REVIEW.api_version(),
            "kind": Kind::TOKEN_REVIEW.kind,
            "spec": {"token": token, "audiences": [AUDIENCE]},
        });
        let unavailable =
            |why: String| Refusal::Unavailable(format!("the controller cannot have the token judged: {why}"));
        let asked = self.server.create(&Kind::TOKEN_REVIEW, "", &review);
        let review = match tokio::time::timeout(DEADLINE, asked).await {
            Ok(answer) => answer.map_err(|e| unavailable(e.to_string()))?,
            Err(_) => {
                let (url, seconds) = (self.server.url(), DEADLINE.as_secs());
                return Err(unavailable(format!("the API server {url} has not answered within {seconds} s")));
            }
        };
        let agent = judge(&review["status"], &self.namespace)?;
        if let Some(node) = agent.node {
            return Ok(node);
        }
        // An API server before 1.30 does not say the node; the pod does.
        let pod = match tokio::time::timeout(DEADLINE, self.server.get(&Kind::POD, &self.namespace, &agent.pod)).await {
            Ok(pod) => pod.map_err(|e| unavailable(e.to_string()))?.unwrap_or_default(),
            Err(_) => return Err(unavailable("the API server has not answered".to_owned())),
        };
        let text = |path| pod.pointer(path).and_then(Value::as_str).unwrap_or_default();
        match (text("/metadata/uid") == agent.uid, text("/spec/nodeName")) {
            (true, node) if !node.is_empty() => Ok(node.to_owned()),
            _ => Err(Refusal::Denied(format!(
                "the token is of pod {}/{}, which is no longer there; the agent has to read its token anew",
                self.namespace, agent.pod
            ))),
        }
    }

    /// Before the question, so that many at once cannot all be asked.
    fn take(&self, peer: IpAddr) -> bool {
        let now = Instant::now();
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.len() >= MAX_PEERS && !peers.contains_key(&peer) {
            peers.retain(|_, budget| budget.left(now) < BAD_BURST);
        }
        let budget = peers.entry(peer).or_insert(Budget { tokens: BAD_BURST, at: now });
        let enough = budget.left(now) >= 1.0;
        if enough {
            budget.tokens -= 1.0;
        }
        enough
    }

    fn give_back(&self, peer: IpAddr) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(budget) = peers.get_mut(&peer) {
            budget.tokens = (budget.tokens + 1.0).min(BAD_BURST);
        }
    }
}

struct Budget {
    tokens: f64,
    at: Instant,
}

impl Budget {
    fn left(&mut self, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + since * BAD_PER_SECOND).min(BAD_BURST);
        self.at = now;
        self.tokens
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Agent {
    pod: String,
    uid: String,
    node: Option<String>,
}

/// What the API server has said of a token: `status` of a TokenReview.
fn judge(status: &Value, namespace: &str) -> Result<Agent, Refusal> {
    let denied = |why: String| Err(Refusal::Denied(why));
    if status["authenticated"] != true {
        let why = status["error"].as_str().unwrap_or("it says no more");
        return denied(format!(
            "the API server does not take the token ({why}); it has to be a projected one of this cluster, with the \
             audience {AUDIENCE}, that has not expired"
        ));
    }
    // A server that does not know audiences leaves them out, and has not looked at them.
    let audiences = status["audiences"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !audiences.iter().any(|audience| audience == AUDIENCE) {
        return denied(format!("the token is not made for the audience {AUDIENCE}; project one that is"));
    }
    let (user, agent) = (status["user"]["username"].as_str().unwrap_or_default(), account(namespace));
    if user != agent {
        return denied(format!("the token is of `{user}`, and only agents get certificates here: `{agent}`"));
    }
    let extra = |key: &str| status["user"]["extra"][key][0].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    match (extra(POD_NAME), extra(POD_UID)) {
        (Some(pod), Some(uid)) => Ok(Agent { pod, uid, node: extra(NODE_NAME) }),
        _ => denied(format!(
            "the token of `{user}` is bound to no pod, so nobody knows of which node it is; project one into the agent's pod"
        )),
    }
}

fn account(namespace: &str) -> String {
    format!("system:serviceaccount:{namespace}:{AGENT}")
}

/// When the token expires, as it says itself; it is believed once the API server has taken it.
fn expiry(token: &str) -> Option<SystemTime> {
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: Value = serde_json::from_slice(&claims).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(claims["exp"].as_u64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Value {
        json!({
            "authenticated": true,
            "audiences": [AUDIENCE],
            "user": {
                "username": "system:serviceaccount:nodemesh-system:nodemesh-agent",
                "extra": {(POD_NAME): ["nodemesh-agent-x"], (POD_UID): ["1-2"], (NODE_NAME): ["n1"]},
            },
        })
    }

    #[test]
    fn an_agents_token_names_its_node() {
        let agent = judge(&status(), "nodemesh-system").unwrap();
        assert_eq!(agent, Agent { pod: "nodemesh-agent-x".into(), uid: "1-2".into(), node: Some("n1".into()) });
        let mut older = status();
        older["user"]["extra"][NODE_NAME].take();
        assert_eq!(judge(&older, "nodemesh-system").unwrap().node, None);
    }

    #[test]
    fn each_other_token_is_refused_with_its_reason() {
        type Change = fn(&mut Value);
        let table: [(Change, &str); 7] = [
            (|s| s["authenticated"] = false.into(), "does not take the token"),
            (|s| *s = json!({"error": "token has expired"}), "(token has expired)"),
            (|s| s["audiences"] = json!(["https://kubernetes.default.svc"]), "not made for the audience nodemesh-ca"),
            (|s| drop(s.as_object_mut().unwrap().remove("audiences")), "not made for the audience nodemesh-ca"),
            (|s| s["user"]["username"] = "system:serviceaccount:shop:nodemesh-agent".into(), "only agents"),
            (|s| s["user"]["extra"] = json!({(NODE_NAME): ["n1"]}), "bound to no pod"),
            (|s| s["user"]["extra"][POD_UID] = json!([]), "bound to no pod"),
        ];
        for (change, words) in table {
            let mut changed = status();
            change(&mut changed);
            let Err(Refusal::Denied(why)) = judge(&changed, "nodemesh-system") else { panic!("taken: {words}") };
            assert!(why.contains(words), "{words}: {why}");
        }
    }

    #[test]
    fn a_token_says_when_it_expires() {
        let token = format!("h.{}.s", URL_SAFE_NO_PAD.encode(r#"{"exp":1700000000}"#));
        assert_eq!(expiry(&token), Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)));
        for junk in ["", "a.b.c", "h.e30.s"] {
            assert_eq!(expiry(junk), None, "{junk}");
        }
    }

    #[test]
    fn a_budget_is_spent_and_comes_back() {
        let start = Instant::now();
        let mut budget = Budget { tokens: 0.0, at: start };
        assert!(budget.left(start + Duration::from_secs(1)) < 1.0);
        assert!(budget.left(start + Duration::from_secs(2)) >= 1.0);
        assert!(budget.left(start + Duration::from_secs(9999)) <= BAD_BURST);
    }
}
