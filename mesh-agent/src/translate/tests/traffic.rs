//! How endpoints are shared out, as text: only what is not as without a rule.

use std::fmt::Write as _;

use serde_json::Value;

use crate::model::ServiceKey;
use crate::model::traffic::{Destination, Destinations, TrafficPolicy};

pub(super) fn render(key: &ServiceKey, all: &Destinations, out: &mut String) {
    writeln!(out, "traffic {}/{}:{}", key.namespace, key.name, key.port).unwrap();
    let own = all.by_namespace.iter().map(|(namespace, own)| (Some(namespace), own));
    for (namespace, destination) in all.general.iter().map(|one| (None, one)).chain(own) {
        if let Some(namespace) = namespace {
            writeln!(out, "  for clients of {namespace}").unwrap();
        }
        let Destination { object, policy: general, subsets } = &**destination;
        writeln!(out, "  {object}{}", policy(general)).unwrap();
        for (name, subset) in subsets {
            let endpoints: Vec<_> = subset.service.ports[0].endpoints.iter().map(|e| e.address.to_string()).collect();
            writeln!(out, "  subset {name} [{}]{}", endpoints.join(", "), policy(&subset.policy)).unwrap();
        }
    }
}

fn policy(policy: &TrafficPolicy) -> String {
    let usual = serde_json::to_value(TrafficPolicy::default()).unwrap();
    let Value::Object(mut parts) = serde_json::to_value(policy).unwrap() else { panic!("it is a struct") };
    parts.retain(|key, value| usual[key] != *value);
    parts.values_mut().for_each(without_null);
    if parts.is_empty() { String::new() } else { format!(" {}", Value::Object(parts)) }
}

fn without_null(value: &mut Value) {
    if let Value::Object(parts) = value {
        parts.retain(|_, value| !value.is_null());
        parts.values_mut().for_each(without_null);
    }
}
