//! Who signs the certificates of this node, as the settings say.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};

use crate::api_server::{ApiServer, Kind};
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
            let client = CaClient::new(CaClientOptions {
                addresses: addresses.clone(),
                credential,
                state_dir: config.state_dir.join("identity"),
                deadline: CA_DEADLINE,
            })?;
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
