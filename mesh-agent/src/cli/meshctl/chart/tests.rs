use serde_json::json;

use super::*;
use crate::cli::exit::Failure;

fn given(set: &[&str]) -> Given {
    Given { set: set.iter().map(|&s| s.to_owned()).collect(), ..Given::default() }
}

fn values(set: &[&str]) -> Result<Value, Failure> {
    complete(&overrides(&given(set))?)
}

#[track_caller]
fn refused(set: &str, sentence: &str) {
    let error = values(&[set]).expect_err("it must not be taken");
    assert_eq!(error.message, sentence);
}

fn named<'a>(rendered: &'a Rendered, kind: &str, name: &str) -> Option<&'a Value> {
    let objects = rendered.objects.iter().map(|d| &d.object);
    objects.into_iter().find(|o| o["kind"] == kind && o["metadata"]["name"] == name)
}

#[test]
fn the_chart_has_the_version_of_the_program() {
    let chart = yaml::parse(file("Chart.yaml").unwrap()).unwrap();
    assert_eq!((&chart["version"], &chart["appVersion"]), (&json!(VERSION), &json!(VERSION)));
}

#[test]
fn each_profile_renders() {
    let names: Vec<&str> = profiles().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["default", "demo", "minimal", "production"]);
    for (name, about) in profiles() {
        assert!(!about.is_empty(), "{name} says nothing about itself");
        let given = Given { profile: Some(name.to_owned()), ..Given::default() };
        let rendered = render(&complete(&overrides(&given).unwrap()).unwrap(), "mesh").unwrap();
        assert_eq!(rendered.crds.len(), 4);
        let agent = named(&rendered, "DaemonSet", "nodemesh-agent").unwrap();
        assert_eq!(agent["metadata"]["namespace"], "mesh");
        let replicas = if name == "production" {
            3
        } else if name == "default" {
            2
        } else {
            1
        };
        assert_eq!(named(&rendered, "Deployment", "nodemesh-controller").unwrap()["spec"]["replicas"], replicas);
        assert_eq!(named(&rendered, "ValidatingWebhookConfiguration", "nodemesh").is_some(), name != "minimal");
    }
}

#[test]
fn every_object_is_labelled_as_ours() {
    let rendered = render(&values(&["namespace.create=true"]).unwrap(), "mesh").unwrap();
    for document in rendered.objects.iter().chain(&rendered.crds) {
        let labels = &document.object["metadata"]["labels"];
        assert_eq!(labels["app.kubernetes.io/part-of"], "nodemesh", "{}", document.text);
    }
    assert!(named(&rendered, "Namespace", "mesh").is_some());
}

#[test]
fn values_come_where_they_belong() {
    let set = ["image.tag=next", "image.pullSecrets={a,b}", "settings.certLifetime=2h", "settings.log=info\\,a=debug"];
    let rendered = render(&values(&set).unwrap(), "mesh").unwrap();
    let agent = named(&rendered, "DaemonSet", "nodemesh-agent").unwrap();
    let pod = &agent["spec"]["template"]["spec"];
    assert_eq!(pod["containers"][0]["image"], "nodemesh.invalid/nodemesh:next");
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "a"}, {"name": "b"}]));
    let settings = named(&rendered, "ConfigMap", "nodemesh").unwrap()["data"]["nodemesh.yaml"].as_str().unwrap();
    assert_eq!(yaml::parse(settings).unwrap(), json!({"certLifetime": "2h", "log": "info,a=debug"}));
}

#[test]
fn what_the_chart_does_not_know_is_refused_in_a_sentence() {
    refused("agent.resorces.limits=1", "there is no value `agent.resorces`; did you mean `agent.resources`?");
    refused("foo=1", "there is no value `foo`; `meshctl profile dump` shows them all");
    refused("controller.replicas=0", "`controller.replicas` is 0; it has to be 1 at least");
    refused("controller.replicas=two", "`controller.replicas` is \"two\"; it has to be a whole number");
    refused("cni.confDir=etc", "`cni.confDir` is \"etc\"; it has to be a path from the root");
    refused("webhook.failurePolicy=Maybe", "`webhook.failurePolicy` is \"Maybe\"; it has to be one of Ignore, Fail");
    refused("settings.cert-lifetime=1h", "settings: line 1: unknown setting `cert-lifetime`; write `certLifetime`");
    let lifetime = values(&["settings.certLifetime=1"]).expect_err("it has no unit").message;
    assert!(lifetime.starts_with("certLifetime in settings: "), "{lifetime}");
    refused("agent", "--set agent: write it as name=value");
    let unknown = overrides(&Given { profile: Some("huge".to_owned()), ..Given::default() }).unwrap_err();
    assert_eq!(unknown.message, "there is no profile `huge`; there are default, demo, minimal, production");
}

#[test]
fn set_is_helms() {
    let set = |texts: &[&str]| {
        let mut values = json!({"a": {"b": 1}, "list": [1, 2]});
        for text in texts {
            values::set(&mut values, text).unwrap();
        }
        values
    };
    assert_eq!(set(&["a.c=x,d=true"]), json!({"a": {"b": 1, "c": "x"}, "d": true, "list": [1, 2]}));
    assert_eq!(set(&["list={x,2,true}", "a=null"]), json!({"a": null, "list": ["x", 2, true]}));
    assert_eq!(set(&["list[1]=5", "a.e[0].name=n"]), json!({"a": {"b": 1, "e": [{"name": "n"}]}, "list": [1, 5]}));
    assert_eq!(set(&["a\\.b=007"])["a.b"], "007");
    assert_eq!(set(&["a.b=x=y"])["a"]["b"], "x=y");
    assert!(values::set(&mut json!({}), "a[99999999999]=1").is_err());
}

#[test]
fn maps_are_merged_and_null_takes_away() {
    let mut under = json!({"a": {"b": 1, "c": 2}, "d": [1, 2]});
    merge(&mut under, json!({"a": {"b": null, "e": 3}, "d": [3]}));
    assert_eq!(under, json!({"a": {"c": 2, "e": 3}, "d": [3]}));
}

/// A word of JSON Schema that is not judged would let through what Helm refuses.
#[test]
fn the_schema_uses_only_words_that_are_judged() {
    fn words(schema: &Value, names: bool, found: &mut Vec<String>) {
        match schema {
            Value::Object(map) => {
                for (key, value) in map {
                    if !names {
                        found.push(key.clone());
                    }
                    words(value, !names && key == "properties", found);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| words(item, false, found)),
            _ => {}
        }
    }
    let schema: Value = serde_json::from_str(file("values.schema.json").unwrap()).unwrap();
    let mut found = Vec::new();
    words(&schema, false, &mut found);
    found.retain(|word| word != "$schema" && !schema::WORDS.contains(&word.as_str()));
    assert!(found.is_empty(), "{found:?}");
    assert!(file("values.schema.json").unwrap().matches("\"pattern\"").count() == 3, "only `^/` is known");
}
