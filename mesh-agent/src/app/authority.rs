//! Who signs the certificates of this node, as the settings say.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use futures_util::StreamExt;

use crate::api_server::{ApiServer, Change, Kind, watch};
use crate::config::{self, CertificateAuthority, Source, Token};
use crate::identity::{
    CA_ROOT, CA_ROOT_KEY, Ca, CaClient, CaClientOptions, CaOptions, CertificateOptions, Certificates, Clock, Credential,
};

/// For one request to one controller.
const CA_DEADLINE: Duration = Duration::from_secs(10);
/// How often the agent looks for the controller's roots when it starts.
const BUNDLE_RETRY: Duration = Duration::from_secs(1);

pub(super) async fn certificates(config: &config::Node) -> anyhow::Result<Certificates> {
    let options = CertificateOptions {
        trust_domains: vec![config.trust_domain.clone()],
        lifetime: config.cert_lifetime,
        clock: Clock::system(),
    };
    match &config.ca {
        CertificateAuthority::Embedded => {
            let state = config.state_dir.join("ca");
            let ca = CaOptions { lifetime: config.cert_lifetime, ..CaOptions::new(state, config.trust_domain.clone()) };
            Ok(Certificates::embedded(Ca::open(ca)?, options))
        }
        CertificateAuthority::Remote { addresses, token } => {
            let credential = match token {
                Token::Join(file) => Credential::Join { token: read_token(file)?, node: config.node_name.clone() },
                Token::ServiceAccount(file) => Credential::ServiceAccount {
                    token_file: file.clone(),
                    roots_pem: trust_bundle(&config.source).await?,
                },
            };
            let given = match &credential {
                Credential::ServiceAccount { roots_pem, .. } => Some(roots_pem.clone()),
                Credential::Join { .. } | Credential::Istio { .. } => None,
            };
            let client = CaClient::new(CaClientOptions {
                addresses: addresses.clone(),
                credential,
                state_dir: config.state_dir.join("identity"),
                deadline: CA_DEADLINE,
            })?;
            if let (Some(given), Source::Kubernetes(kubernetes)) = (given, &config.source) {
                let server = ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?;
                tokio::spawn(follow_trust_bundle(server, kubernetes.namespace.clone(), given, client.clone()));
            }
            Ok(Certificates::remote(client, options))
        }
    }
}

/// The roots as the controller has written them into the mesh's namespace; waits for them.
async fn trust_bundle(source: &Source) -> anyhow::Result<String> {
    let Source::Kubernetes(kubernetes) = source else {
        return Err(anyhow!("--ca-token-file is for Kubernetes: give --source kubernetes, or --join-token-file"));
    };
    let server = ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?;
    let mut said = String::new();
    loop {
        let found = server.get(&Kind::CONFIG_MAP, &kubernetes.namespace, CA_ROOT).await;
        let hindrance = match found {
            Ok(map) => match map.as_ref().and_then(|m| m["data"][CA_ROOT_KEY].as_str()) {
                Some(roots) if !roots.is_empty() => return Ok(roots.to_owned()),
                _ => format!(
                    "the controller has not written ConfigMap {}/{CA_ROOT} yet: see its log",
                    kubernetes.namespace
                ),
            },
            Err(e) => e.to_string(),
        };
        if said != hindrance {
            tracing::warn!("no certificate can be asked for: {hindrance}; it is tried again each second");
            said = hindrance;
        }
        tokio::time::sleep(BUNDLE_RETRY).await;
    }
}

/// Takes the roots whenever Kubernetes has others than it had. The controller tells of a change of its own, and in steps; this
/// is for a CA that its owner has put in place of another, which no controller can tell of: who does not trust its root does
/// not hear it.
async fn follow_trust_bundle(server: ApiServer, namespace: String, mut known: String, client: Arc<CaClient>) {
    let fields = format!("metadata.name={CA_ROOT}");
    let mut changes = Box::pin(watch(&server, &Kind::CONFIG_MAP, Some(&namespace), &fields));
    while let Some(change) = changes.next().await {
        let map = match change {
            Change::Listed(map) | Change::Applied(map) => map,
            Change::Failed(e) => {
                tracing::debug!("the trust bundle cannot be followed: {e}");
                continue;
            }
            // The controller writes it anew.
            Change::Begin | Change::Complete | Change::Deleted(_) => continue,
        };
        let roots = map["data"][CA_ROOT_KEY].as_str().unwrap_or_default();
        if roots.is_empty() || roots == known {
            continue;
        }
        roots.clone_into(&mut known);
        match client.trust(roots) {
            Ok(true) => tracing::info!("the roots of ConfigMap {namespace}/{CA_ROOT} are trusted from now on"),
            Ok(false) => {}
            Err(e) => tracing::warn!("{e}; the roots that are known stay in force"),
        }
    }
}

fn read_token(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| {
        format!("cannot read the join token {}; make one with `mesh-agent controller token`", path.display())
    })?;
    Ok(text.trim().to_owned())
}

pub(super) fn authority_in_words(ca: &CertificateAuthority) -> String {
    match ca {
        CertificateAuthority::Embedded => "embedded".to_owned(),
        CertificateAuthority::Remote { addresses, .. } => addresses.join(", "),
    }
}
