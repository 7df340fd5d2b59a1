//! Where requests go: to destinations by weight, elsewhere by a redirect, to an answer, to another VirtualService.

use std::sync::Arc;

use base64::Engine as _;
use serde::Deserialize;

use super::super::values::{SpecHeaders, is_host};
use super::{Destination, SpecRoute, To, Weighted};
use crate::model::ObjectRef;
use crate::model::http::{PathRewrite, Redirect, RedirectPort, Respond};
use crate::translate::report::{Report, nullable};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecWeighted {
    destination: SpecDestination,
    weight: Option<i64>,
    #[serde(default, deserialize_with = "nullable")]
    headers: SpecHeaders,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecDestination {
    host: String,
    #[serde(default, deserialize_with = "nullable")]
    subset: String,
    port: Option<SpecPort>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecPort {
    number: u16,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecRedirect {
    #[serde(default, deserialize_with = "nullable")]
    uri: String,
    #[serde(default, deserialize_with = "nullable")]
    authority: String,
    port: Option<u16>,
    #[serde(default, deserialize_with = "nullable")]
    derive_port: String,
    #[serde(default, deserialize_with = "nullable")]
    scheme: String,
    redirect_code: Option<u16>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecRespond {
    status: u16,
    #[serde(default, deserialize_with = "nullable")]
    body: SpecBody,
}

#[derive(Default, Deserialize)]
#[serde(expecting = "an object")]
struct SpecBody {
    string: Option<String>,
    bytes: Option<String>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecDelegate {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    namespace: String,
}

/// A larger body belongs into a server. Envoy has a limit of 4096 bytes of its own.
const MAX_BODY: usize = 1024 * 1024;

pub(super) fn read(given: &mut SpecRoute, field: &str, object: &ObjectRef, report: &mut Report) -> Option<To> {
    let route = std::mem::take(&mut given.route);
    match (route.is_empty(), given.redirect.take(), given.direct_response.take(), given.delegate.take()) {
        (false, None, None, None) => destinations(route, field, &object.namespace, report),
        (true, Some(redirect), None, None) => redirect.read(&format!("{field}.redirect"), report).map(To::Redirect),
        (true, None, Some(respond), None) => respond.read(&format!("{field}.directResponse"), report).map(To::Respond),
        (true, None, None, Some(delegate)) => {
            if delegate.name.is_empty() {
                report.error(&format!("{field}.delegate.name"), "it is empty: name a VirtualService");
                return None;
            }
            let namespace = if delegate.namespace.is_empty() { &object.namespace } else { &delegate.namespace };
            Some(To::Delegate(namespace.as_str().into(), delegate.name.into()))
        }
        (true, None, None, None) => {
            report.error(field, "the route leads nowhere: write route, redirect, directResponse or delegate");
            None
        }
        _ => {
            report.error(field, "route, redirect, directResponse and delegate exclude each other: leave only one");
            None
        }
    }
}

fn destinations(given: Vec<SpecWeighted>, field: &str, namespace: &str, report: &mut Report) -> Option<To> {
    let is_lone = given.len() == 1;
    let mut all = Vec::with_capacity(given.len());
    for (i, one) in given.into_iter().enumerate() {
        let field = format!("{field}.route[{i}]");
        let weight = match u32::try_from(one.weight.unwrap_or(0)) {
            // A lone destination gets everything, whatever its weight.
            Ok(0) if is_lone => 1,
            Ok(weight) => weight,
            Err(_) => {
                let message = format!("`{}` is no weight: use 0 or more", one.weight.unwrap_or_default());
                report.error(&format!("{field}.weight"), message);
                continue;
            }
        };
        let (request, response) = one.headers.read(&field, report);
        let destination = one.destination.read(&format!("{field}.destination"), namespace, report);
        let Some(destination) = destination else { continue };
        all.push(Weighted { weight, destination, request, response });
    }
    if !all.is_empty() && all.iter().all(|w| w.weight == 0) {
        report.error(&format!("{field}.route"), "all weights are zero: give at least one destination a weight");
    }
    let sum: u64 = all.iter().map(|w| u64::from(w.weight)).sum();
    if sum > u64::from(u32::MAX) {
        report
            .error(&format!("{field}.route"), format!("the weights add up to {sum}, more than 4294967295: lower them"));
    }
    Some(To::Destinations(all))
}

impl SpecDestination {
    pub fn read(self, field: &str, namespace: &str, report: &mut Report) -> Option<Destination> {
        if !is_host(&self.host) {
            let message = format!("`{}` is no host: write a name such as reviews.shop.svc.cluster.local", self.host);
            report.error(&format!("{field}.host"), message);
            return None;
        }
        let port = self.port.map(|p| p.number);
        if port == Some(0) {
            report.error(&format!("{field}.port.number"), "`0` is no port: use 1 to 65535");
        }
        let subset = (!self.subset.is_empty()).then(|| self.subset.into());
        Some(Destination { field: field.into(), namespace: namespace.into(), host: Arc::from(self.host), subset, port })
    }
}

impl SpecRedirect {
    fn read(self, field: &str, report: &mut Report) -> Option<Redirect> {
        let status = self.redirect_code.unwrap_or(301);
        if !matches!(status, 301 | 302 | 303 | 307 | 308) {
            let message = format!("`{status}` is no redirect: use 301, 302, 303, 307 or 308");
            report.error(&format!("{field}.redirectCode"), message);
        }
        // Host and port may stand together here.
        let (host, of_authority) = match self.authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => match port.parse::<u16>() {
                Ok(port) if port > 0 => (host, Some(port)),
                _ => {
                    report.error(&format!("{field}.authority"), format!("`{port}` is no port: use 1 to 65535"));
                    (host, None)
                }
            },
            _ => (self.authority.as_str(), None),
        };
        if !host.is_empty() && !is_host(host.trim_start_matches('[').trim_end_matches(']')) {
            report.error(&format!("{field}.authority"), format!("`{host}` is no host: write a name or an address"));
        }
        let port = match (self.port, self.derive_port.as_str()) {
            (Some(0), _) => {
                report.error(&format!("{field}.port"), "`0` is no port: use 1 to 65535");
                RedirectPort::OfRequest
            }
            (Some(port), "") => RedirectPort::Number(port),
            (None, "FROM_PROTOCOL_DEFAULT") => {
                let is_https = self.scheme == "https";
                RedirectPort::Number(if is_https { 443 } else { 80 })
            }
            (None, "FROM_REQUEST_PORT") => RedirectPort::OfRequest,
            (None, "") => match of_authority {
                Some(port) => RedirectPort::Number(port),
                // Where the host is another, its port is not the one that was asked; nor is that of another scheme.
                None if !host.is_empty() || !self.scheme.is_empty() => RedirectPort::Number(self.default_port()),
                None => RedirectPort::OfRequest,
            },
            (Some(_), _) => {
                report.error(&format!("{field}.derivePort"), "it stands beside port: leave only one of them");
                RedirectPort::OfRequest
            }
            (None, other) => {
                let message = format!("`{other}` is none: use FROM_PROTOCOL_DEFAULT or FROM_REQUEST_PORT");
                report.error(&format!("{field}.derivePort"), message);
                RedirectPort::OfRequest
            }
        };
        if !matches!(self.scheme.as_str(), "" | "http" | "https") {
            report.error(&format!("{field}.scheme"), format!("`{}` is no scheme: use http or https", self.scheme));
        }
        if !self.uri.is_empty() && !self.uri.starts_with('/') {
            report.error(&format!("{field}.uri"), format!("`{}` does not begin with a slash: write `/{0}`", self.uri));
        }
        let text = |text: &str| (!text.is_empty()).then(|| Arc::from(text));
        Some(Redirect {
            status,
            host: text(host),
            port,
            path: text(&self.uri).map(PathRewrite::Full),
            scheme: text(&self.scheme),
        })
    }

    fn default_port(&self) -> u16 {
        if self.scheme == "https" { 443 } else { 80 }
    }
}

impl SpecRespond {
    fn read(self, field: &str, report: &mut Report) -> Option<Respond> {
        if !(200..600).contains(&self.status) {
            let message = format!("`{}` is no status of an answer: use 200 to 599", self.status);
            report.error(&format!("{field}.status"), message);
        }
        let body = match (self.body.string, self.body.bytes) {
            (None, None) => bytes::Bytes::new(),
            (Some(text), None) => text.into(),
            (None, Some(text)) => match base64::engine::general_purpose::STANDARD.decode(&text) {
                Ok(bytes) => bytes.into(),
                Err(_) => {
                    report.error(&format!("{field}.body.bytes"), "it is no base64: encode the bytes so");
                    return None;
                }
            },
            (Some(_), Some(_)) => {
                report.error(&format!("{field}.body"), "string and bytes stand together: leave only one of them");
                return None;
            }
        };
        if body.len() > MAX_BODY {
            report.error(&format!("{field}.body"), "the body is larger than 1 MiB: let a server send it");
        }
        Some(Respond { status: self.status, body })
    }
}
