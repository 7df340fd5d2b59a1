//! The messages of the CA's gRPC services, written by hand: they are small and have been frozen for years, and protoc is
//! not needed to build the mesh. Field numbers are those of Istio's security/v1alpha1/ca.proto and protobuf's struct.proto.

use std::collections::HashMap;

/// Istio's service and method, so that its clients can use our controller, and we its istiod.
pub const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// Our own: which roots are trusted. Istio has no such question; its clients learn roots with each certificate.
pub const GET_BUNDLE: &str = "/nodemesh.ca.v1.TrustBundleService/GetBundle";

/// The key of the metadata that names for whom a node asks.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// More than any request has; a bundle of roots stays below the second one.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;
pub const MAX_RESPONSE_BYTES: usize = 1024 * 1024;

#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateRequest {
    #[prost(string, tag = "1")]
    pub csr: String,
    /// In seconds; nothing or less is the CA's own choice.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateResponse {
    /// PEM: the leaf, what signed it, and last, in one text, all roots.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

/// google.protobuf.Struct.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Struct {
    #[prost(map = "string, message", tag = "1")]
    pub fields: HashMap<String, Value>,
}

/// google.protobuf.Value, of which only strings concern us: any other kind reads as none.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Value {
    #[prost(string, optional, tag = "3")]
    pub string: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct BundleRequest {
    /// SHA-256 in hex of each root that the node trusts now: a new root signs only when all nodes trust it.
    #[prost(string, repeated, tag = "1")]
    pub trusted: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct BundleResponse {
    #[prost(string, tag = "1")]
    pub roots_pem: String,
    /// When to ask again.
    #[prost(uint32, tag = "2")]
    pub poll_seconds: u32,
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// The bytes that Istio's own client sends, field by field.
    #[test]
    fn a_request_has_istios_wire_format() {
        let fields = HashMap::from([(IMPERSONATED_IDENTITY.to_owned(), Value { string: Some("x".to_owned()) })]);
        let request =
            CertificateRequest { csr: "c".to_owned(), validity_duration: 60, metadata: Some(Struct { fields }) };
        let mut wire = vec![0x0a, 1, b'c', 0x18, 60, 0x22, 29, 0x0a, 27, 0x0a, 20];
        wire.extend(IMPERSONATED_IDENTITY.as_bytes());
        wire.extend([0x12, 3, 0x1a, 1, b'x']);
        assert_eq!(request.encode_to_vec(), wire);
        assert_eq!(CertificateRequest::decode(wire.as_slice()).unwrap(), request);
    }

    #[test]
    fn a_value_that_is_no_text_reads_as_none() {
        // bool_value = 4.
        assert_eq!(Value::decode([0x20, 1].as_slice()).unwrap(), Value { string: None });
    }
}
