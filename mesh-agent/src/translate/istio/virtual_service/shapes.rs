//! The fields that a VirtualService may have, as Istio's CRD has them.

use crate::translate::schema::Shape::{self, Any, Fields, ListOf, MapOf};

const TEXT: Shape = Fields(&[("exact", Any), ("prefix", Any), ("regex", Any)]);
const PERCENT: Shape = Fields(&[("value", Any)]);
const EDITS: Shape = Fields(&[("set", Any), ("add", Any), ("remove", Any)]);
const HEADERS: Shape = Fields(&[("request", EDITS), ("response", EDITS)]);
const DESTINATION: Shape = Fields(&[("host", Any), ("subset", Any), ("port", Fields(&[("number", Any)]))]);

const MATCH: Shape = Fields(&[
    ("name", Any),
    ("uri", TEXT),
    ("scheme", TEXT),
    ("method", TEXT),
    ("authority", TEXT),
    ("headers", MapOf(&TEXT)),
    ("port", Any),
    ("sourceLabels", Any),
    ("gateways", Any),
    ("queryParams", MapOf(&TEXT)),
    ("ignoreUriCase", Any),
    ("withoutHeaders", MapOf(&TEXT)),
    ("sourceNamespace", Any),
    ("statPrefix", Any),
]);

const ROUTE: Shape = Fields(&[("destination", DESTINATION), ("weight", Any), ("headers", HEADERS)]);

const HTTP: Shape = Fields(&[
    ("name", Any),
    ("match", ListOf(&MATCH)),
    ("route", ListOf(&ROUTE)),
    (
        "redirect",
        Fields(&[
            ("uri", Any),
            ("authority", Any),
            ("port", Any),
            ("derivePort", Any),
            ("scheme", Any),
            ("redirectCode", Any),
        ]),
    ),
    ("directResponse", Fields(&[("status", Any), ("body", Fields(&[("string", Any), ("bytes", Any)]))])),
    ("delegate", Fields(&[("name", Any), ("namespace", Any)])),
    (
        "rewrite",
        Fields(&[("uri", Any), ("authority", Any), ("uriRegexRewrite", Fields(&[("match", Any), ("rewrite", Any)]))]),
    ),
    ("timeout", Any),
    (
        "retries",
        Fields(&[
            ("attempts", Any),
            ("perTryTimeout", Any),
            ("retryOn", Any),
            ("retryRemoteLocalities", Any),
            ("retryIgnorePreviousHosts", Any),
            ("backoff", Any),
        ]),
    ),
    (
        "fault",
        Fields(&[
            (
                "delay",
                Fields(&[("fixedDelay", Any), ("exponentialDelay", Any), ("percent", Any), ("percentage", PERCENT)]),
            ),
            (
                "abort",
                Fields(&[("httpStatus", Any), ("grpcStatus", Any), ("http2Error", Any), ("percentage", PERCENT)]),
            ),
        ]),
    ),
    ("mirror", DESTINATION),
    ("mirrorPercent", Any),
    ("mirror_percent", Any),
    ("mirrorPercentage", PERCENT),
    ("mirrors", ListOf(&Fields(&[("destination", DESTINATION), ("percentage", PERCENT)]))),
    (
        "corsPolicy",
        Fields(&[
            ("allowOrigin", Any),
            ("allowOrigins", ListOf(&TEXT)),
            ("allowMethods", Any),
            ("allowHeaders", Any),
            ("exposeHeaders", Any),
            ("maxAge", Any),
            ("allowCredentials", Any),
            ("unmatchedPreflights", Any),
        ]),
    ),
    ("headers", HEADERS),
]);

pub(super) const SPEC: Shape = Fields(&[
    ("hosts", Any),
    ("gateways", Any),
    ("http", ListOf(&HTTP)),
    ("tls", Any),
    ("tcp", Any),
    ("exportTo", Any),
]);
