use super::*;

fn entry() -> Entry<'static> {
    Entry { socket: Path::new("/run/nodemesh/cni.sock"), members: Path::new("/var/lib/nodemesh/cni-members.json") }
}

const OURS: &str = r#"{"members":"/var/lib/nodemesh/cni-members.json","socket":"/run/nodemesh/cni.sock","timeoutSeconds":30,"type":"mesh-cni"}"#;
const PRETTY: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "pods", "//": "a ] and a \" and \"plugins\": [",
  "plugins": [
    { "type": "bridge", "ipam": { "ranges": [[{"subnet": "10.1.0.0/24"}]] } },
    {
      "type": "portmap", "capabilities": {"portMappings": true}
    }
  ]
}
"#;

#[test]
fn an_entry_that_was_put_in_is_cut_out_without_a_trace() {
    for text in [
        PRETTY,
        r#"{"cniVersion":"0.3.1","name":"x","plugins":[{"type":"bridge"}]}"#,
        "{\"plugins\":[\r\n\t{\"type\":\"a\"} ,\r\n\t{\"type\":\"b\"}\r\n\t] , \"cniVersion\":\"1.1.0\"}",
        r#"{"plugins":[{"type":"old"}],"cniVersion":"0.4.0","plugins":[ {"type":"b"} ]}"#,
        r#"{"cniVersions":["1.0.0","1.1.0"],"plug\u0069ns":[{"type":"a"}]}"#,
    ] {
        let with = with_entry(text, entry()).unwrap().unwrap();
        let list: Value = serde_json::from_str(&with).unwrap();
        let plugins = list["plugins"].as_array().unwrap();
        assert_eq!(plugins.last().unwrap(), &serde_json::from_str::<Value>(OURS).unwrap(), "{with}");
        assert_eq!(with_entry(&with, entry()).unwrap(), None, "it is right: {with}");
        assert_eq!(without_entry(&with).as_deref(), Some(text));
        assert_eq!(without_entry(text), None);
    }
    let with = with_entry(PRETTY, entry()).unwrap().unwrap();
    assert!(with.contains(&format!("    }},\n    {OURS}\n  ]\n}}\n")), "{with}");
}

#[test]
fn an_entry_that_is_not_right_is_put_right() {
    let list = |plugins: &str| format!(r#"{{"cniVersion":"1.0.0","plugins":[{plugins}]}}"#);
    let right = list(&format!(r#"{{"type":"bridge"}}, {OURS}"#));
    for plugins in [
        format!(r#"{OURS},{{"type":"bridge"}}"#),
        format!(r#"{{"type":"bridge"}},{OURS},{OURS}"#),
        r#"{"type":"bridge"},{"type":"mesh-cni"}"#.to_owned(),
        format!(r#"{{"type":"bridge"}},{}"#, OURS.replace("30", "-3")),
        format!(r#"{{"type":"bridge"}},{}"#, OURS.replace("30", "\"soon\"")),
        format!(r#"{{"type":"bridge"}},{}"#, OURS.replace("cni.sock", "other.sock")),
    ] {
        assert_eq!(with_entry(&list(&plugins), entry()).unwrap().as_ref(), Some(&right), "{plugins}");
    }
    // What the user has said stays.
    let longer = OURS.replace("30", "60");
    let moved = list(&format!(r#"{longer},{{"type":"bridge"}}"#));
    assert!(with_entry(&moved, entry()).unwrap().unwrap().ends_with(&format!("{longer}]}}")));
    let more = OURS.replace("30", "60,\"note\":1");
    assert_eq!(with_entry(&list(&format!(r#"{{"type":"bridge"}},{more}"#)), entry()).unwrap(), None);
}

#[test]
fn what_cannot_be_understood_is_not_touched() {
    for (text, why) in [
        ("", "it is no JSON: "),
        (r#"{"cniVersion":"1.0.0","plugins":[{"type":"bridge"}"#, "it is no JSON: "),
        ("\u{feff}{}", "it is no JSON: "),
        ("[]", "it is no JSON object"),
        (r#"{"cniVersion":"1.0.0"}"#, "it has no list `plugins`"),
        (r#"{"cniVersion":"1.0.0","plugins":{}}"#, "it has no list `plugins`"),
        (r#"{"cniVersion":"1.0.0","plugins":[]}"#, "its list `plugins` has none that makes the network"),
        (r#"{"cniVersion":"1.0.0","plugins":[{"type":"mesh-cni"}]}"#, "its list `plugins` has none that makes"),
        (r#"{"plugins":[{"type":"bridge"}]}"#, "it has no cniVersion; mesh-cni knows 0.3.0, "),
        (r#"{"cniVersion":"0.2.0","plugins":[{"type":"bridge"}]}"#, "its cniVersion \"0.2.0\" is not known; "),
        (r#"{"cniVersion":"2.0.0","plugins":[{"type":"bridge"}]}"#, "its cniVersion \"2.0.0\" is not known; "),
        (r#"{"cniVersions":["1.1.0","9.0.0"],"plugins":[{"type":"b"}]}"#, "its cniVersions [\"1.1.0\",\"9.0.0\"] are"),
    ] {
        let error = with_entry(text, entry()).unwrap_err();
        assert!(error.starts_with(why), "{text}: {error}");
    }
}

#[test]
fn a_single_configuration_becomes_a_list() {
    let text = "{\"cniVersion\":\"0.3.1\",\"name\":\"a \\\"b\\\"\",\"type\":\"bridge\"}\n";
    let list = as_list(text, entry()).unwrap();
    let value: Value = serde_json::from_str(&list).unwrap();
    assert_eq!((&value["name"], &value["cniVersion"]), (&json!("a \"b\""), &json!("0.3.1")));
    assert_eq!(value["plugins"][0]["type"], "bridge");
    assert_eq!(with_entry(&list, entry()).unwrap(), None);
    for (text, why) in [
        ("{", "it is no JSON"),
        (r#"{"cniVersion":"1.0.0","name":"x","plugins":[]}"#, "it is a list of plugins"),
        (r#"{"cniVersion":"1.0.0","name":"x"}"#, "it has no `type`"),
        (r#"{"cniVersion":"1.0.0","type":"bridge"}"#, "it has no `name`"),
        (r#"{"name":"x","type":"bridge"}"#, "it has no cniVersion"),
        (r#"{"cniVersion":"1.0.0","name":"x","type":"mesh-cni"}"#, "it has mesh-cni alone"),
    ] {
        let error = as_list(text, entry()).unwrap_err();
        assert!(error.starts_with(why), "{text}: {error}");
    }
}
