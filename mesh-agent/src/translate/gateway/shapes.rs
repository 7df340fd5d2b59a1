//! All fields of both routes, experimental ones included.

use super::schema::Shape;

type Fields = &'static [(&'static str, Shape)];

const ANY: Shape = Shape::Any;
const LIST: Shape = Shape::ListOf(&Shape::Any);

const PARENT: Shape = Shape::Fields(&[
    ("group", ANY),
    ("kind", ANY),
    ("name", ANY),
    ("namespace", ANY),
    ("sectionName", ANY),
    ("port", ANY),
]);

const REFERENCE: Shape =
    Shape::Fields(&[("group", ANY), ("kind", ANY), ("name", ANY), ("namespace", ANY), ("port", ANY)]);

const NAME_AND_VALUE: Shape = Shape::Fields(&[("name", ANY), ("value", ANY)]);
const MATCH_OF_VALUE: Shape = Shape::Fields(&[("type", ANY), ("name", ANY), ("value", ANY)]);

const HEADERS: Shape = Shape::Fields(&[
    ("set", Shape::ListOf(&NAME_AND_VALUE)),
    ("add", Shape::ListOf(&NAME_AND_VALUE)),
    ("remove", LIST),
]);

const MIRROR: Shape = Shape::Fields(&[
    ("backendRef", REFERENCE),
    ("percent", ANY),
    ("fraction", Shape::Fields(&[("numerator", ANY), ("denominator", ANY)])),
]);

const PATH: Shape = Shape::Fields(&[("type", ANY), ("replaceFullPath", ANY), ("replacePrefixMatch", ANY)]);
const EXTENSION: Shape = Shape::Fields(&[("group", ANY), ("kind", ANY), ("name", ANY)]);

const HTTP_FILTER: Shape = Shape::Fields(&[
    ("type", ANY),
    ("requestHeaderModifier", HEADERS),
    ("responseHeaderModifier", HEADERS),
    ("requestMirror", MIRROR),
    (
        "requestRedirect",
        Shape::Fields(&[("scheme", ANY), ("hostname", ANY), ("path", PATH), ("port", ANY), ("statusCode", ANY)]),
    ),
    ("urlRewrite", Shape::Fields(&[("hostname", ANY), ("path", PATH)])),
    (
        "cors",
        Shape::Fields(&[
            ("allowOrigins", LIST),
            ("allowCredentials", ANY),
            ("allowMethods", LIST),
            ("allowHeaders", LIST),
            ("exposeHeaders", LIST),
            ("maxAge", ANY),
        ]),
    ),
    (
        "externalAuth",
        Shape::Fields(&[
            ("protocol", ANY),
            ("backendRef", REFERENCE),
            ("grpc", Shape::Fields(&[("allowedHeaders", LIST)])),
            ("http", Shape::Fields(&[("path", ANY), ("allowedHeaders", LIST), ("allowedResponseHeaders", LIST)])),
            ("forwardBody", Shape::Fields(&[("maxSize", ANY)])),
        ]),
    ),
    ("extensionRef", EXTENSION),
]);

const GRPC_FILTER: Shape = Shape::Fields(&[
    ("type", ANY),
    ("requestHeaderModifier", HEADERS),
    ("responseHeaderModifier", HEADERS),
    ("requestMirror", MIRROR),
    ("extensionRef", EXTENSION),
]);

/// `cookie` and `header` are to take the place of `cookieConfig` and `sessionName` after v1.6; `idleTimeout` went with v1.6.
const PERSISTENCE: Shape = Shape::Fields(&[
    ("sessionName", ANY),
    ("absoluteTimeout", ANY),
    ("idleTimeout", ANY),
    ("type", ANY),
    ("cookieConfig", Shape::Fields(&[("lifetimeType", ANY)])),
    ("cookie", Shape::Fields(&[("lifetimeType", ANY), ("name", ANY), ("path", ANY)])),
    ("header", Shape::Fields(&[("name", ANY)])),
]);

const HTTP_BACKEND: Shape = Shape::Fields(&[
    ("group", ANY),
    ("kind", ANY),
    ("name", ANY),
    ("namespace", ANY),
    ("port", ANY),
    ("weight", ANY),
    ("filters", Shape::ListOf(&HTTP_FILTER)),
]);

const GRPC_BACKEND: Shape = Shape::Fields(&[
    ("group", ANY),
    ("kind", ANY),
    ("name", ANY),
    ("namespace", ANY),
    ("port", ANY),
    ("weight", ANY),
    ("filters", Shape::ListOf(&GRPC_FILTER)),
]);

const HTTP_MATCH: Shape = Shape::Fields(&[
    ("path", Shape::Fields(&[("type", ANY), ("value", ANY)])),
    ("method", ANY),
    ("headers", Shape::ListOf(&MATCH_OF_VALUE)),
    ("queryParams", Shape::ListOf(&MATCH_OF_VALUE)),
]);

const GRPC_MATCH: Shape = Shape::Fields(&[
    ("method", Shape::Fields(&[("type", ANY), ("service", ANY), ("method", ANY)])),
    ("headers", Shape::ListOf(&MATCH_OF_VALUE)),
]);

const HTTP_RULE: Shape = Shape::Fields(&[
    ("name", ANY),
    ("matches", Shape::ListOf(&HTTP_MATCH)),
    ("filters", Shape::ListOf(&HTTP_FILTER)),
    ("backendRefs", Shape::ListOf(&HTTP_BACKEND)),
    ("timeouts", Shape::Fields(&[("request", ANY), ("backendRequest", ANY)])),
    ("retry", Shape::Fields(&[("codes", LIST), ("attempts", ANY), ("backoff", ANY)])),
    ("sessionPersistence", PERSISTENCE),
]);

const GRPC_RULE: Shape = Shape::Fields(&[
    ("name", ANY),
    ("matches", Shape::ListOf(&GRPC_MATCH)),
    ("filters", Shape::ListOf(&GRPC_FILTER)),
    ("backendRefs", Shape::ListOf(&GRPC_BACKEND)),
    ("sessionPersistence", PERSISTENCE),
]);

/// `useDefaultGateways` is about gateways, and says nothing to a Service.
const HTTP_ROUTE_FIELDS: Fields = &[
    ("parentRefs", Shape::ListOf(&PARENT)),
    ("useDefaultGateways", ANY),
    ("hostnames", LIST),
    ("rules", Shape::ListOf(&HTTP_RULE)),
];
const GRPC_ROUTE_FIELDS: Fields = &[
    ("parentRefs", Shape::ListOf(&PARENT)),
    ("useDefaultGateways", ANY),
    ("hostnames", LIST),
    ("rules", Shape::ListOf(&GRPC_RULE)),
];

pub(super) const HTTP_ROUTE: Shape = Shape::Fields(HTTP_ROUTE_FIELDS);
pub(super) const GRPC_ROUTE: Shape = Shape::Fields(GRPC_ROUTE_FIELDS);

pub(super) const REFERENCE_GRANT: Shape = Shape::Fields(&[
    ("from", Shape::ListOf(&Shape::Fields(&[("group", ANY), ("kind", ANY), ("namespace", ANY)]))),
    ("to", Shape::ListOf(&Shape::Fields(&[("group", ANY), ("kind", ANY), ("name", ANY)]))),
]);
