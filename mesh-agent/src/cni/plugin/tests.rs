use std::io::BufRead;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;

use super::super::take_unjudged;
use super::*;
use crate::model::Unjudged;

const UID: &str = "3c1b8a52-1f0e-4a0d-9d3e-6d1f0c0a7b11";

/// A node: the agent's file, and perhaps an agent.
struct Node {
    folder: tempfile::TempDir,
}

/// What an agent does with one connection.
#[derive(Clone)]
enum Agent {
    Says(Vec<Said>),
    /// It takes the question and hangs.
    Silent,
    /// It ends after these words.
    DiesAfter(Vec<Said>),
    Babbles(&'static str),
}

impl Node {
    fn new() -> Self {
        let node = Self { folder: tempfile::tempdir().unwrap() };
        let members = r#"{"version":1,"namespaces":["shop"],"pods":{"out":false,"in":true}}"#;
        std::fs::write(node.members(), members).unwrap();
        node
    }

    fn members(&self) -> std::path::PathBuf {
        self.folder.path().join("members.json")
    }

    fn socket(&self) -> std::path::PathBuf {
        self.folder.path().join("cni.sock")
    }

    /// One agent after the other, one for each connection; the questions come out.
    fn agents(&self, agents: Vec<Agent>) -> mpsc::Receiver<Request> {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let (heard, questions) = mpsc::channel();
        std::thread::spawn(move || {
            let mut hanging = Vec::new();
            for agent in agents {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line_in = String::new();
                io::BufReader::new(stream.try_clone().unwrap()).read_line(&mut line_in).unwrap();
                let _ = heard.send(serde_json::from_str(&line_in).unwrap());
                match agent {
                    Agent::Says(words) | Agent::DiesAfter(words) => {
                        for said in words {
                            stream.write_all(&line(&Answer::new(said))).unwrap();
                        }
                    }
                    Agent::Silent => hanging.push(stream),
                    Agent::Babbles(text) => stream.write_all(text.as_bytes()).unwrap(),
                }
            }
            // Those that hang do so until the plugin has gone.
            for mut stream in hanging {
                let _ = stream.read(&mut [0]);
            }
        });
        questions
    }

    fn configuration(&self, seconds: u64) -> String {
        format!(
            r#"{{"cniVersion":"1.1.0","name":"pods","type":"mesh-cni","socket":{:?},"members":{:?},"timeoutSeconds":{seconds},
            "prevResult": {PREVIOUS} , "more":1}}"#,
            self.socket(),
            self.members()
        )
    }

    fn call(&self, command: &str, namespace: &str, uid: &str, seconds: u64) -> Result<String, Fault> {
        call(&environment(command, namespace, uid), &self.configuration(seconds), Duration::from_millis(100))
    }
}

const PREVIOUS: &str = r#"{"cniVersion":"1.1.0", "interfaces":[{"name":"eth0","sandbox":"/run/netns/x","mtu":1.5e3}],
    "ips":[{"address":"10.1.0.5/24","interface":0}], "dns":{}, "zz":"\u00e4" }"#;

fn environment(command: &str, namespace: &str, uid: &str) -> Environment {
    Environment {
        command: command.into(),
        container: "c1".into(),
        netns: "/run/netns/x".into(),
        interface: "eth0".into(),
        args: format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web;K8S_POD_UID={uid}"),
    }
}

#[test]
fn without_an_agent_only_pods_of_the_mesh_are_held_up() {
    let node = Node::new();
    for (namespace, uid) in [("other", UID), ("other", ""), ("shop", "out"), ("kube-system", UID)] {
        // A second would be enough to fail.
        let start = Instant::now();
        assert_eq!(node.call("ADD", namespace, uid, 60), Ok(PREVIOUS.to_owned()), "{namespace} {uid}");
        assert!(start.elapsed() < Duration::from_secs(30), "{namespace} {uid} was held up");
    }
    for (namespace, uid) in [("shop", UID), ("shop", ""), ("other", "in")] {
        let fault = node.call("ADD", namespace, uid, 1).unwrap_err();
        assert_eq!(fault.code, Fault::TRY_AGAIN_LATER);
        let begin =
            format!("pod {namespace}/web is in the mesh and waited 1 s for the agent of this node, which does ");
        assert!(fault.message.starts_with(&begin), "{}", fault.message);
        assert!(fault.message.ends_with("from running; kubelet tries again by itself"), "{}", fault.message);
    }
    assert!(take_unjudged(&node.members()).is_empty());
    let spoilt: [fn(&Path); 2] =
        [|path| std::fs::write(path, "{").unwrap(), |path| std::fs::remove_file(path).unwrap()];
    for spoil in spoilt {
        spoil(&node.members());
        assert_eq!(node.call("ADD", "shop", UID, 60), Ok(PREVIOUS.to_owned()), "nothing is known of any mesh");
        let noted = Unjudged { namespace: "shop".into(), name: "web".into(), uid: UID.into() };
        assert_eq!(take_unjudged(&node.members()), [noted], "and that is not silent");
    }
}

#[test]
fn an_agent_that_hands_over_ends_its_questions_and_the_next_one_is_asked() {
    let node = Node::new();
    let questions = node.agents(vec![
        Agent::DiesAfter(vec![]),
        Agent::DiesAfter(vec![]),
        Agent::Says(vec![Said::Waiting, Said::Enrolled]),
    ]);
    let text = node.configuration(60);
    // Its namespace has just come into the mesh: the file does not know it.
    let add = |patience| call(&environment("ADD", "other", UID), &text, patience);
    assert_eq!(add(Duration::from_secs(60)), Ok(PREVIOUS.to_owned()));
    assert_eq!(questions.iter().count(), 3);
    // Where no next one comes, the pod is not held up for longer than for any other agent.
    let node = Node::new();
    node.agents(vec![Agent::DiesAfter(vec![])]);
    assert_eq!(node.call("ADD", "other", UID, 600), Ok(PREVIOUS.to_owned()));
}

#[test]
fn an_agent_that_hangs_holds_up_no_pod_outside_of_the_mesh() {
    let node = Node::new();
    let questions = node.agents(vec![Agent::Silent, Agent::Silent]);
    assert_eq!(node.call("ADD", "other", UID, 60), Ok(PREVIOUS.to_owned()));
    let fault = node.call("ADD", "shop", UID, 1).unwrap_err();
    assert!(fault.message.contains("(no answer)"), "{}", fault.message);
    let Command::Add(asked) = questions.recv().unwrap().command else { panic!("no ADD") };
    assert_eq!((asked.container.as_str(), asked.uid.as_str(), asked.name.as_str()), ("c1", UID, "web"));
    assert_eq!(asked.netns, Path::new("/run/netns/x"));
    assert_eq!(asked.addresses, ["10.1.0.5".parse::<std::net::IpAddr>().unwrap()]);
}

#[test]
fn a_queue_that_is_full_is_an_agent_that_hangs() {
    let node = Node::new();
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    socket.bind(&SockAddr::unix(node.socket()).unwrap()).unwrap();
    socket.listen(0).unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = connect(&node.socket()) {
        queued.push(stream);
    }
    assert_eq!(node.call("ADD", "other", UID, 60), Ok(PREVIOUS.to_owned()));
    node.call("ADD", "shop", UID, 1).unwrap_err();
}

#[test]
fn the_agents_word_counts_more_than_its_file() {
    let node = Node::new();
    let failed = Said::Failed { message: "no certificate".into() };
    node.agents(vec![
        Agent::Says(vec![Said::Outside]),
        Agent::Says(vec![Said::Waiting, Said::Enrolled]),
        Agent::Says(vec![Said::Waiting, failed]),
    ]);
    assert_eq!(node.call("ADD", "shop", UID, 60), Ok(PREVIOUS.to_owned()), "it has just left");
    assert_eq!(node.call("ADD", "other", UID, 60), Ok(PREVIOUS.to_owned()), "it has just joined");
    let fault = node.call("ADD", "other", UID, 60).unwrap_err();
    assert_eq!(fault, Fault::new(Fault::TRY_AGAIN_LATER, "no certificate"));
}

#[test]
fn a_pod_of_the_mesh_waits_for_the_next_agent() {
    let node = Node::new();
    let questions = node.agents(vec![
        Agent::DiesAfter(vec![]),
        Agent::Babbles("what?\n"),
        Agent::Says(vec![Said::Unknown]),
        Agent::Says(vec![Said::Enrolled]),
    ]);
    assert_eq!(node.call("ADD", "shop", UID, 60), Ok(PREVIOUS.to_owned()));
    assert_eq!(questions.iter().count(), 4);
    // One of which only the agent knew that it is in the mesh waits too.
    let node = Node::new();
    let questions = node.agents(vec![Agent::DiesAfter(vec![Said::Waiting]), Agent::Says(vec![Said::Enrolled])]);
    assert_eq!(node.call("ADD", "other", UID, 60), Ok(PREVIOUS.to_owned()));
    assert_eq!(questions.iter().count(), 2);
}

#[test]
fn what_is_no_pod_or_no_call_is_answered_as_the_specification_has_it() {
    let node = Node::new();
    let text = node.configuration(60);
    let bare = Environment { args: String::new(), ..environment("ADD", "", "") };
    assert_eq!(call(&bare, &text, FIRST_WORD), Ok(PREVIOUS.to_owned()), "podman's container");
    let code = |environment: &Environment| call(environment, &text, FIRST_WORD).unwrap_err().code;
    assert_eq!(code(&Environment { netns: String::new(), ..environment("ADD", "shop", UID) }), Fault::ENVIRONMENT);
    assert_eq!(code(&environment("add", "shop", UID)), Fault::ENVIRONMENT);
    let versions: serde_json::Value =
        serde_json::from_str(&call(&environment("VERSION", "", ""), r#"{"cniVersion":"0.4.0"}"#, FIRST_WORD).unwrap())
            .unwrap();
    assert_eq!(versions["cniVersion"], "0.4.0");
    assert_eq!(versions["supportedVersions"][4], "1.1.0");
    let old = r#"{"cniVersion":"0.1.0"}"#;
    let fault = call(&environment("ADD", "shop", UID), old, FIRST_WORD).unwrap_err();
    assert_eq!(fault.in_json(old)["code"], 1);
}

#[test]
fn the_end_of_a_pod_needs_no_agent() {
    let node = Node::new();
    let gone = Environment { netns: String::new(), ..environment("DEL", "shop", UID) };
    let text = node.configuration(60);
    assert_eq!(call(&gone, &text, FIRST_WORD), Ok(String::new()));
    for command in ["DEL", "GC", "STATUS", "CHECK"] {
        assert_eq!(node.call(command, "shop", UID, 60), Ok(String::new()), "{command}");
    }
    let gc =
        r#","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"},{"containerID":"b","ifname":"eth0"}]}"#;
    let questions = node.agents(vec![Agent::Says(vec![Said::Done]), Agent::Says(vec![Said::Done])]);
    call(&gone, &text, FIRST_WORD).unwrap();
    let text = text.trim_end().trim_end_matches('}').to_owned() + gc;
    call(&environment("GC", "", ""), &text, FIRST_WORD).unwrap();
    let asked: Vec<Command> = questions.iter().map(|question| question.command).collect();
    let containers = vec!["a".to_owned(), "b".to_owned()];
    assert_eq!(asked, [Command::Del { container: "c1".into() }, Command::Gc { containers }]);
}

#[test]
fn check_fails_only_where_the_agent_says_so() {
    let node = Node::new();
    let failed = Said::Failed { message: "it is not".into() };
    node.agents(vec![Agent::Says(vec![Said::Enrolled]), Agent::Says(vec![failed])]);
    assert_eq!(node.call("CHECK", "shop", UID, 60), Ok(String::new()));
    assert_eq!(node.call("CHECK", "shop", UID, 60).unwrap_err().message, "it is not");
}
