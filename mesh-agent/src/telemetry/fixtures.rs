//! Connections for tests of metrics and access log.

use std::sync::Arc;
use std::time::Duration;

use super::{Facts, Outcome, Party, Reporter, ResponseFlag, Security};
use crate::model::{
    Algorithm, MeshSettings, Names, OutboundPolicy, Scope, Service, Snapshot, SnapshotParts, Transport, TrustDomain,
    Workload,
};

pub(crate) fn workload(namespace: &str, name: &str, address: &str) -> Arc<Workload> {
    let domain = TrustDomain::new("cluster.local").unwrap();
    Arc::new(Workload {
        uid: format!("{namespace}/{name}-1").into(),
        name: format!("{name}-1").into(),
        namespace: namespace.into(),
        identity: crate::model::SpiffeId::new(&domain, namespace, name).unwrap(),
        addresses: [address.parse().unwrap()].into(),
        node: "a".into(),
        locality: Arc::default(),
        transport: Transport::Hbone,
        mode_is_said: true,
        netns: None,
        rules: Some(Arc::default()),
        labels: None,
        names: Arc::new(Names {
            workload: name.into(),
            app: format!("{name}-app").into(),
            version: "v1".into(),
            canonical_name: name.into(),
            canonical_revision: "v1".into(),
        }),
        cluster: "Kubernetes".into(),
    })
}

pub(crate) fn service(namespace: &str, name: &str) -> Arc<Service> {
    Arc::new(Service {
        name: name.into(),
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
        addresses: vec!["10.96.0.10".parse().unwrap()],
        ports: Vec::new(),
        algorithm: Algorithm::default(),
        scope: Scope::default(),
    })
}

/// From shop/web to the service shop/cart, by HBONE.
pub(crate) fn facts(reporter: Reporter) -> Facts {
    let party = |workload: Arc<Workload>, address: &str| Party {
        address: Some(address.parse().unwrap()),
        identity: Some(workload.identity.clone()),
        workload: Some(workload),
    };
    Facts {
        reporter,
        source: party(workload("shop", "web", "10.0.1.2"), "10.0.1.2:40000"),
        destination: party(workload("shop", "cart", "10.0.2.3"), "10.0.2.3:15008"),
        hbone_address: Some("10.0.2.3:8080".parse().unwrap()),
        service: Some(service("shop", "cart")),
        security: Security::MutualTls,
    }
}

/// Of a connection of which the mesh knows nothing but the addresses.
pub(crate) fn foreign() -> Facts {
    let party = |address: &str| Party { address: Some(address.parse().unwrap()), ..Party::default() };
    Facts {
        reporter: Reporter::Destination,
        source: party("192.0.2.1:5"),
        destination: party("10.0.2.3:80"),
        hbone_address: None,
        service: None,
        security: Security::None,
    }
}

pub(crate) fn outcome(flag: ResponseFlag) -> Outcome {
    Outcome {
        flag,
        bytes_sent: 100,
        bytes_received: 2000,
        duration: Duration::from_micros(13_500),
        error: None,
        audited: Vec::new(),
    }
}

pub(crate) fn snapshot(workloads: Vec<Arc<Workload>>, services: Vec<Arc<Service>>) -> Snapshot {
    let settings =
        MeshSettings { trust_domain: TrustDomain::new("cluster.local").unwrap(), outbound: OutboundPolicy::AllowAny };
    Snapshot::new(7, SnapshotParts { settings, workloads, services, http: Vec::new(), traffic: Vec::new() })
}
