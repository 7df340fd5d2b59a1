//! The fields that a DestinationRule may have, as Istio's CRD has them.

use crate::translate::schema::Shape::{self, Any, Fields, ListOf};

const BALANCER: Shape = Fields(&[
    ("simple", Any),
    (
        "consistentHash",
        Fields(&[
            ("httpHeaderName", Any),
            (
                "httpCookie",
                Fields(&[
                    ("name", Any),
                    ("path", Any),
                    ("ttl", Any),
                    ("attributes", ListOf(&Fields(&[("name", Any), ("value", Any)]))),
                ]),
            ),
            ("useSourceIp", Any),
            ("httpQueryParameterName", Any),
            ("ringHash", Fields(&[("minimumRingSize", Any)])),
            ("maglev", Fields(&[("tableSize", Any)])),
            ("minimumRingSize", Any),
        ]),
    ),
    (
        "localityLbSetting",
        Fields(&[
            ("distribute", ListOf(&Fields(&[("from", Any), ("to", Any)]))),
            ("failover", ListOf(&Fields(&[("from", Any), ("to", Any)]))),
            ("failoverPriority", Any),
            ("enabled", Any),
        ]),
    ),
    ("warmupDurationSecs", Any),
    ("warmup", Fields(&[("duration", Any), ("minimumPercent", Any), ("aggression", Any)])),
    ("zoneAwareLbSetting", Any),
    ("backendUtilization", Any),
]);

const POOL: Shape = Fields(&[
    (
        "tcp",
        Fields(&[
            ("maxConnections", Any),
            ("connectTimeout", Any),
            ("tcpKeepalive", Fields(&[("probes", Any), ("time", Any), ("interval", Any)])),
            ("maxConnectionDuration", Any),
            ("idleTimeout", Any),
        ]),
    ),
    (
        "http",
        Fields(&[
            ("http1MaxPendingRequests", Any),
            ("http2MaxRequests", Any),
            ("maxRequestsPerConnection", Any),
            ("maxRetries", Any),
            ("idleTimeout", Any),
            ("h2UpgradePolicy", Any),
            ("useClientProtocol", Any),
            ("maxConcurrentStreams", Any),
            ("http2KeepAlive", Fields(&[("interval", Any), ("timeout", Any)])),
        ]),
    ),
]);

const OUTLIER: Shape = Fields(&[
    ("consecutiveErrors", Any),
    ("splitExternalLocalOriginErrors", Any),
    ("consecutiveLocalOriginFailures", Any),
    ("consecutiveGatewayErrors", Any),
    ("consecutive5xxErrors", Any),
    ("interval", Any),
    ("baseEjectionTime", Any),
    ("maxEjectionPercent", Any),
    ("minHealthPercent", Any),
    ("outlierDetectionHttpErrorCodes", Any),
]);

const TLS: Shape = Fields(&[
    ("mode", Any),
    ("clientCertificate", Any),
    ("privateKey", Any),
    ("caCertificates", Any),
    ("credentialName", Any),
    ("subjectAltNames", Any),
    ("sni", Any),
    ("insecureSkipVerify", Any),
    ("caCrl", Any),
]);

const OF_PORT: Shape = Fields(&[
    ("port", Fields(&[("number", Any)])),
    ("loadBalancer", BALANCER),
    ("connectionPool", POOL),
    ("outlierDetection", OUTLIER),
    ("tls", TLS),
]);

const POLICY: Shape = Fields(&[
    ("loadBalancer", BALANCER),
    ("connectionPool", POOL),
    ("outlierDetection", OUTLIER),
    ("tls", TLS),
    ("portLevelSettings", ListOf(&OF_PORT)),
    ("tunnel", Fields(&[("protocol", Any), ("targetHost", Any), ("targetPort", Any)])),
    ("proxyProtocol", Fields(&[("version", Any)])),
    ("retryBudget", Fields(&[("percent", Any), ("minRetryConcurrency", Any), ("budgetInterval", Any)])),
]);

pub(super) const SPEC: Shape = Fields(&[
    ("host", Any),
    ("trafficPolicy", POLICY),
    ("subsets", ListOf(&Fields(&[("name", Any), ("labels", Any), ("trafficPolicy", POLICY)]))),
    ("exportTo", Any),
    ("workloadSelector", Fields(&[("matchLabels", Any)])),
]);
