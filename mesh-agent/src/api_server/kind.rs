//! Kinds of objects: where the API server keeps them.

use std::borrow::Cow;

/// A kind with its place in the API. The constants are those that the mesh itself works with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    /// Empty for the core.
    pub group: Cow<'static, str>,
    pub version: Cow<'static, str>,
    /// As paths name it: `pods`.
    pub plural: Cow<'static, str>,
    pub kind: Cow<'static, str>,
    pub namespaced: bool,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $group:literal $version:literal $plural:literal $kind:literal $namespaced:literal;)*) => {
        impl Kind {
            $($(#[$doc])* pub const $name: Self = Self {
                group: Cow::Borrowed($group),
                version: Cow::Borrowed($version),
                plural: Cow::Borrowed($plural),
                kind: Cow::Borrowed($kind),
                namespaced: $namespaced,
            };)*
        }
    };
}

kinds! {
    NAMESPACE = "" "v1" "namespaces" "Namespace" false;
    NODE = "" "v1" "nodes" "Node" false;
    POD = "" "v1" "pods" "Pod" true;
    SERVICE = "" "v1" "services" "Service" true;
    SERVICE_ACCOUNT = "" "v1" "serviceaccounts" "ServiceAccount" true;
    CONFIG_MAP = "" "v1" "configmaps" "ConfigMap" true;
    SECRET = "" "v1" "secrets" "Secret" true;
    EVENT = "" "v1" "events" "Event" true;
    RUNTIME_CLASS = "node.k8s.io" "v1" "runtimeclasses" "RuntimeClass" false;
    ENDPOINT_SLICE = "discovery.k8s.io" "v1" "endpointslices" "EndpointSlice" true;
    DAEMON_SET = "apps" "v1" "daemonsets" "DaemonSet" true;
    DEPLOYMENT = "apps" "v1" "deployments" "Deployment" true;
    CONTROLLER_REVISION = "apps" "v1" "controllerrevisions" "ControllerRevision" true;
    LEASE = "coordination.k8s.io" "v1" "leases" "Lease" true;
    TOKEN_REVIEW = "authentication.k8s.io" "v1" "tokenreviews" "TokenReview" false;
    SUBJECT_ACCESS_REVIEW = "authorization.k8s.io" "v1" "selfsubjectaccessreviews" "SelfSubjectAccessReview" false;
    CUSTOM_RESOURCE_DEFINITION = "apiextensions.k8s.io" "v1" "customresourcedefinitions" "CustomResourceDefinition" false;
    VALIDATING_WEBHOOK =
        "admissionregistration.k8s.io" "v1" "validatingwebhookconfigurations" "ValidatingWebhookConfiguration" false;
    PEER_AUTHENTICATION = "security.istio.io" "v1" "peerauthentications" "PeerAuthentication" true;
    AUTHORIZATION_POLICY = "security.istio.io" "v1" "authorizationpolicies" "AuthorizationPolicy" true;
    VIRTUAL_SERVICE = "networking.istio.io" "v1" "virtualservices" "VirtualService" true;
    DESTINATION_RULE = "networking.istio.io" "v1" "destinationrules" "DestinationRule" true;
    HTTP_ROUTE = "gateway.networking.k8s.io" "v1" "httproutes" "HTTPRoute" true;
    GRPC_ROUTE = "gateway.networking.k8s.io" "v1" "grpcroutes" "GRPCRoute" true;
    /// `v1` came with v1.5 of the API.
    REFERENCE_GRANT = "gateway.networking.k8s.io" "v1beta1" "referencegrants" "ReferenceGrant" true;
}

impl Kind {
    /// `v1`, or `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_string() } else { format!("{}/{}", self.group, self.version) }
    }

    /// Where the API server has them: all (an empty namespace means all of them), or the one called `name`.
    pub fn path(&self, namespace: &str, name: Option<&str>) -> String {
        let root = if self.group.is_empty() { "/api" } else { "/apis" };
        let mut path = format!("{root}/{}", self.api_version());
        if self.namespaced && !namespace.is_empty() {
            path += &format!("/namespaces/{namespace}");
        }
        path += &format!("/{}", self.plural);
        if let Some(name) = name {
            path += &format!("/{name}");
        }
        path
    }

    pub(super) fn resource(&self) -> kube::core::ApiResource {
        kube::core::ApiResource {
            group: self.group.to_string(),
            version: self.version.to_string(),
            api_version: self.api_version(),
            kind: self.kind.to_string(),
            plural: self.plural.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_the_api() {
        assert_eq!(Kind::POD.path("", None), "/api/v1/pods");
        assert_eq!(Kind::POD.path("shop", Some("a")), "/api/v1/namespaces/shop/pods/a");
        assert_eq!(Kind::NODE.path("ignored", Some("n1")), "/api/v1/nodes/n1");
        assert_eq!(Kind::LEASE.path("x", None), "/apis/coordination.k8s.io/v1/namespaces/x/leases");
    }
}
