//! May this object be written? Pure: an AdmissionReview with a request comes in, one with the answer goes out. The object is
//! judged by the very translation that the agents use, so that what `meshctl analyze` calls an error does not get in.
//!
//! `failurePolicy` is `Ignore`, on purpose: a mesh whose controllers are down must not keep anybody from deploying, and
//! namespaces could not even be made. What slips through meanwhile opens nothing: an agent that cannot read a policy closes
//! what it speaks of, and says so.

use serde_json::{Value, json};

use crate::model::{Problem, Severity};
use crate::translate::{Object, judge};

/// Nobody reads more of them; the API server cuts all warnings together at 4096 bytes.
const MAX_PROBLEMS: usize = 10;

/// The answer, or why the text is no question: a sentence.
pub fn answer(review: &Value) -> Result<Value, String> {
    let request = &review["request"];
    let Some(uid) = request["uid"].as_str().filter(|_| review["kind"] == "AdmissionReview") else {
        return Err("this is no AdmissionReview with a request; only the Kubernetes API asks here".to_owned());
    };
    let Verdict { refusal, warnings } = verdict(request);
    let mut response = json!({"uid": uid, "allowed": refusal.is_none()});
    if let Some(message) = refusal {
        response["status"] = json!({"code": 422, "reason": "Invalid", "message": message});
    }
    if !warnings.is_empty() {
        response["warnings"] = warnings.into();
    }
    Ok(json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}))
}

struct Verdict {
    /// A sentence.
    refusal: Option<String>,
    warnings: Vec<String>,
}

fn verdict(request: &Value) -> Verdict {
    let object = &request["object"];
    let going = !object["metadata"]["deletionTimestamp"].is_null();
    if !matches!(request["operation"].as_str(), Some("CREATE" | "UPDATE")) || going {
        return Verdict { refusal: None, warnings: Vec::new() };
    }
    let (errors, mut warnings) = problems(request, object);
    let (old_errors, _) = problems(request, &request["oldObject"]);
    // What was wrong before this change can be mended later: a finalizer, an annotation, another field may be set meanwhile.
    let (old, new): (Vec<String>, Vec<String>) = errors.into_iter().partition(|error| old_errors.contains(error));
    if new.is_empty() {
        warnings.splice(0..0, old);
        warnings.truncate(MAX_PROBLEMS);
        return Verdict { refusal: None, warnings };
    }
    let more = new.len().saturating_sub(MAX_PROBLEMS);
    let mut refusal = new.into_iter().take(MAX_PROBLEMS).collect::<Vec<_>>().join("; ");
    if more > 0 {
        refusal += &format!("; and {more} more");
    }
    Verdict { refusal: Some(refusal), warnings: Vec::new() }
}

/// Errors and warnings, a sentence each.
fn problems(request: &Value, object: &Value) -> (Vec<String>, Vec<String>) {
    if object.is_null() {
        return (Vec::new(), Vec::new());
    }
    let found = match Object::from_value("", named(request, object)) {
        Ok(objects) => objects.iter().flat_map(judge).collect(),
        Err(problem) => vec![problem],
    };
    let (errors, warnings): (Vec<Problem>, Vec<Problem>) =
        found.into_iter().partition(|p| p.severity == Severity::Error);
    let sentences = |all: Vec<Problem>| all.iter().map(sentence).collect();
    (sentences(errors), sentences(warnings))
}

/// An object that is about to be made may not have its name yet, nor its namespace.
fn named(request: &Value, object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        let missing = |metadata: &serde_json::Map<String, Value>, key| {
            metadata.get(key).and_then(Value::as_str).is_none_or(str::is_empty)
        };
        if missing(metadata, "name") {
            let name = metadata.get("generateName").and_then(Value::as_str).unwrap_or_default();
            metadata.insert("name".to_owned(), format!("{name}x").into());
        }
        if let Some(namespace) = request["namespace"].as_str().filter(|_| missing(metadata, "namespace")) {
            metadata.insert("namespace".to_owned(), namespace.into());
        }
    }
    object
}

/// A Problem to somebody who knows which object is meant.
pub fn sentence(problem: &Problem) -> String {
    match problem.field.as_str() {
        "" => problem.message.clone(),
        field => format!("{field}: {}", problem.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(spec: Value) -> Value {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "a", "namespace": "shop"}, "spec": spec,
        })
    }

    fn ask(operation: &str, object: Value, old: Value) -> Value {
        let request = json!({
            "uid": "7", "operation": operation, "namespace": "shop", "object": object, "oldObject": old,
        });
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request});
        let answer = answer(&review).unwrap();
        assert_eq!(answer["response"]["uid"], "7");
        answer["response"].clone()
    }

    #[test]
    fn an_error_refuses_and_a_warning_warns() {
        let refused = ask("CREATE", policy(json!({"action": "ALOW"})), Value::Null);
        assert_eq!(refused["allowed"], false);
        let message = &refused["status"]["message"];
        assert_eq!(message, "spec.action: `ALOW` is no action: use ALLOW, DENY, AUDIT or CUSTOM");
        let warned = ask("CREATE", policy(json!({"action": "DENY"})), Value::Null);
        assert_eq!(warned["allowed"], true);
        assert!(warned["warnings"][0].as_str().unwrap().contains("matches nobody"), "{warned}");
        let good = ask("UPDATE", policy(json!({})), policy(json!({})));
        assert_eq!((&good["allowed"], good.get("warnings")), (&json!(true), None));
    }

    #[test]
    fn a_wrong_mode_of_a_namespace_is_refused_but_what_was_wrong_already_does_not_bind_it() {
        let namespace = |mode: &str, more: Value| {
            json!({
                "apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": "shop", "labels": {"nodemesh.io/mode": mode}, "annotations": more},
            })
        };
        let wrong = ask("UPDATE", namespace("on", json!({})), namespace("enabled", json!({})));
        assert_eq!(wrong["allowed"], false);
        assert!(wrong["status"]["message"].as_str().unwrap().contains("`on` is no mode: use enabled or disabled"));
        let other_field = ask("UPDATE", namespace("on", json!({"a": "b"})), namespace("on", json!({})));
        assert_eq!(other_field["allowed"], true);
        assert!(other_field["warnings"][0].as_str().unwrap().contains("is no mode"));
        let mut going = namespace("on", json!({}));
        going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        assert_eq!(ask("UPDATE", going, namespace("enabled", json!({})))["allowed"], true);
        assert_eq!(ask("DELETE", Value::Null, namespace("on", json!({})))["allowed"], true);
    }

    #[test]
    fn an_object_without_a_name_yet_and_one_of_another_kind_are_let_through() {
        let mut unnamed = policy(json!({}));
        unnamed["metadata"] = json!({"generateName": "a-"});
        assert_eq!(ask("CREATE", unnamed, Value::Null)["allowed"], true);
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}});
        assert_eq!(ask("CREATE", map, Value::Null)["allowed"], true);
    }

    #[test]
    fn a_route_is_judged_where_it_is_for_a_service_and_left_alone_where_it_is_a_gateways() {
        let route = |parent: Value| {
            json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "a", "namespace": "shop"},
                "spec": {"parentRefs": [parent], "rules": [{"matches": [{"path": {"type": "RegularExpression", "value": "("}}]}]},
            })
        };
        let of_mesh = ask("CREATE", route(json!({"group": "", "kind": "Service", "name": "web"})), Value::Null);
        assert_eq!(of_mesh["allowed"], false);
        let message = of_mesh["status"]["message"].as_str().unwrap();
        assert!(message.starts_with("spec.rules[0].matches[0].path.value: `(` is no regular expression"), "{message}");
        assert_eq!(ask("CREATE", route(json!({"name": "front"})), Value::Null)["allowed"], true);
    }

    #[test]
    fn what_is_no_question_is_a_sentence() {
        for text in [json!({}), json!([]), json!({"kind": "AdmissionReview"}), json!({"request": {"uid": "1"}})] {
            assert!(answer(&text).unwrap_err().contains("no AdmissionReview"), "{text}");
        }
    }
}
