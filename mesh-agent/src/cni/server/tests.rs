//! The real server and the real plugin's socket, with discovery and enrolment played by the test.

use serde_json::json;
use tokio::io::AsyncBufReadExt;
use tokio::sync::mpsc;

use super::*;
use crate::enrollment::Processes;

/// Nothing here takes this long, on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Agent {
    folder: tempfile::TempDir,
    pods: watch::Sender<Arc<NodePods>>,
    statuses: watch::Sender<Arc<Vec<PodStatus>>>,
    places: Arc<Places>,
    /// Pods that the API server was asked for.
    asked: mpsc::UnboundedReceiver<String>,
    /// What the pod turns out to be once its Namespace was read; nothing new where there is nothing.
    by_namespace: Arc<Mutex<Option<Standing>>>,
    serving: tokio::task::JoinHandle<()>,
    handed: (OwnedFd, KeptFile),
}

struct Plugin(BufReader<UnixStream>);

impl Plugin {
    async fn hears(&mut self) -> Said {
        let mut text = String::new();
        timeout(PATIENCE, self.0.read_line(&mut text)).await.expect("no answer").unwrap();
        serde_json::from_str::<Answer>(&text).unwrap().said
    }
}

fn known(standing: Standing) -> Arc<NodePods> {
    let pod = NodePod { namespace: "shop".into(), name: "web".into(), standing, ..NodePod::default() };
    Arc::new(NodePods { pods: [("u".into(), pod)].into(), ..NodePods::default() })
}

impl Agent {
    /// `in_api` is what the API server answers.
    fn new(in_api: Option<Value>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (pods, node_pods) = watch::channel(Arc::default());
        let (statuses, told) = watch::channel(Arc::default());
        let places = Arc::new(Places::Processes(Processes::new(folder.path(), node_pods.clone())));
        let (ask, asked) = mpsc::unbounded_channel();
        let ask_for_pod: AskForPod = Box::new(move |namespace, name| {
            ask.send(format!("{namespace}/{name}")).unwrap();
            let answer = in_api.clone();
            Box::pin(async move { Ok(answer) })
        });
        let by_namespace: Arc<Mutex<Option<Standing>>> = Arc::default();
        let (tell, standing) = (pods.clone(), by_namespace.clone());
        let ask_for_namespace: AskForNamespace = Box::new(move |_| {
            if let Some(standing) = standing.lock().unwrap().clone() {
                tell.send_replace(known(standing));
            }
            Box::pin(async { Ok(None) })
        });
        let (places_too, hints) = (places.clone(), Hints::default());
        let inputs = Inputs { node_pods, statuses: told, places: places_too, hints, ask_for_pod, ask_for_namespace };
        let server = CniServer::bind(&folder.path().join("cni.sock"), None, inputs).unwrap();
        let handed = server.to_hand_over().unwrap();
        let serving = tokio::spawn(server.run());
        for name in ["netns", "netns-2"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        Self { folder, pods, statuses, places, asked, by_namespace, serving, handed }
    }

    fn attachment(&self, container: &str, netns: &str, uid: &str) -> Attachment {
        Attachment {
            container: container.into(),
            netns: self.folder.path().join(netns),
            namespace: "shop".into(),
            name: "web".into(),
            uid: uid.into(),
            addresses: vec!["10.0.0.5".parse().unwrap()],
            wait: 60_000,
        }
    }

    fn netns(&self, name: &str) -> NetnsId {
        NetnsId::of(&self.folder.path().join(name)).unwrap()
    }

    async fn asks(&self, text: &[u8]) -> Plugin {
        let mut stream = UnixStream::connect(self.folder.path().join("cni.sock")).await.unwrap();
        stream.write_all(text).await.unwrap();
        Plugin(BufReader::new(stream))
    }

    async fn call(&self, command: Command) -> Plugin {
        self.asks(&line(&Request::new(command))).await
    }

    async fn add(&self) -> Plugin {
        self.call(Command::Add(self.attachment("c1", "netns", "u"))).await
    }

    fn knows(&self, standing: Standing) {
        self.pods.send_replace(known(standing));
    }

    fn says(&self, netns: Option<&str>, problem: Option<&str>) {
        self.statuses.send_replace(Arc::new(vec![PodStatus {
            uid: "u".into(),
            namespace: "shop".into(),
            name: "web".into(),
            addresses: Vec::new(),
            enrolled: netns.is_some(),
            problem: problem.map(str::to_owned),
            legacy_connections: 0,
            netns: netns.map(|name| self.netns(name)),
        }]));
    }
}

#[tokio::test]
async fn a_pod_outside_of_the_mesh_is_answered_at_once() {
    let agent = Agent::new(None);
    for standing in [Standing::Outside, Standing::Refused("a sandbox".into()), Standing::Unclear] {
        agent.knows(standing);
        assert_eq!(agent.add().await.hears().await, Said::Outside);
    }
    agent.pods.send_replace(Arc::default());
    assert_eq!(agent.add().await.hears().await, Said::Outside, "nobody knows it, and its namespace is not in the mesh");
}

/// Kinds are watched apart: the pod may be known while its Namespace, or the label of it, is not.
#[tokio::test]
async fn a_pod_whose_namespace_has_just_come_into_the_mesh_is_not_let_go() {
    for known_as in [Some(Standing::Outside), Some(Standing::Unclear), None] {
        let agent = Agent::new(None);
        if let Some(standing) = known_as.clone() {
            agent.knows(standing);
        }
        *agent.by_namespace.lock().unwrap() = Some(Standing::Enabled);
        assert_eq!(agent.add().await.hears().await, Said::Waiting, "known as {known_as:?}");
    }
}

#[tokio::test]
async fn a_pod_of_the_mesh_waits_until_it_is_enrolled_where_it_is_now() {
    let agent = Agent::new(None);
    agent.knows(Standing::Enabled);
    let mut plugin = agent.add().await;
    assert_eq!(plugin.hears().await, Said::Waiting);
    assert!(agent.places.has_moved("u", agent.netns("netns-2")), "enrolment knows where it is");
    // The sandbox before this one.
    agent.says(Some("netns-2"), None);
    agent.says(None, Some("no certificate: x"));
    agent.says(Some("netns"), None);
    assert_eq!(plugin.hears().await, Said::Enrolled);
    // The runtime asks again, for the same sandbox and for a new one.
    assert_eq!(agent.add().await.hears().await, Said::Enrolled);
    let mut next = agent.call(Command::Add(agent.attachment("c2", "netns-2", "u"))).await;
    assert_eq!(next.hears().await, Said::Waiting);
    // The late end of the old one takes nothing from the new one.
    assert_eq!(agent.call(Command::Del { container: "c1".into() }).await.hears().await, Said::Done);
    assert!(!agent.places.has_moved("u", agent.netns("netns-2")));
    assert!(agent.places.has_moved("u", agent.netns("netns")));
    agent.says(Some("netns-2"), None);
    assert_eq!(next.hears().await, Said::Enrolled);
    for _ in 0..2 {
        assert_eq!(agent.call(Command::Del { container: "c2".into() }).await.hears().await, Said::Done);
    }
    assert!(!agent.places.has_moved("u", agent.netns("netns")), "all is forgotten");
}

#[tokio::test]
async fn an_agent_that_hands_over_ends_its_questions_and_the_next_one_has_its_socket() {
    let agent = Agent::new(None);
    agent.knows(Standing::Enabled);
    let mut plugin = agent.add().await;
    assert_eq!(plugin.hears().await, Said::Waiting);
    let path = agent.folder.path().join("cni.sock");
    let (fd, file) = agent.handed;
    file.keep();
    agent.serving.abort();
    let mut rest = String::new();
    assert_eq!(timeout(PATIENCE, plugin.0.read_line(&mut rest)).await.unwrap().unwrap(), 0, "its deadline is 60 s");
    // Who asks now waits for the next agent, and is not refused.
    let mut asks = UnixStream::connect(&path).await.unwrap();
    asks.write_all(&line(&Request::new(Command::Del { container: "c".into() }))).await.unwrap();
    let next = Agent::new(None);
    let node_pods = next.pods.subscribe();
    let inputs = Inputs {
        node_pods,
        statuses: next.statuses.subscribe(),
        places: next.places.clone(),
        hints: Hints::default(),
        ask_for_pod: Box::new(|_, _| Box::pin(async { Ok(None) })),
        ask_for_namespace: Box::new(|_| Box::pin(async { Ok(None) })),
    };
    let handed = PrivateSocket::handed_over(&path, fd.into()).unwrap();
    tokio::spawn(CniServer::bind(&path, Some(handed), inputs).unwrap().run());
    assert_eq!(Plugin(BufReader::new(asks)).hears().await, Said::Done);
}

#[tokio::test]
async fn a_pod_that_leaves_the_mesh_while_it_waits_goes_on() {
    let agent = Agent::new(None);
    agent.knows(Standing::Enabled);
    let mut plugin = agent.add().await;
    assert_eq!(plugin.hears().await, Said::Waiting);
    agent.knows(Standing::Outside);
    assert_eq!(plugin.hears().await, Said::Outside);
}

#[tokio::test]
async fn what_hinders_a_pod_is_said_when_the_plugin_asks_for_it() {
    let agent = Agent::new(None);
    agent.knows(Standing::Enabled);
    agent.says(None, Some("no certificate: the controller is away"));
    let asked = Attachment { wait: 100, ..agent.attachment("c1", "netns", "u") };
    let mut plugin = agent.call(Command::Add(asked)).await;
    assert_eq!(plugin.hears().await, Said::Waiting);
    let Said::Failed { message } = plugin.hears().await else { panic!("no failure") };
    assert_eq!(
        message,
        "pod shop/web is in the mesh and was not taken in within 0 s: no certificate: the controller is away; kubelet \
         tries again by itself"
    );
    let missing = Attachment { netns: "/no/such/netns".into(), ..agent.attachment("c1", "netns", "u") };
    let Said::Failed { message } = agent.call(Command::Add(missing)).await.hears().await else { panic!("no failure") };
    assert!(message.contains("cannot see its network namespace /no/such/netns: "), "{message}");
}

#[tokio::test]
async fn a_pod_that_the_watch_has_not_come_to_is_waited_for_and_asked_for() {
    let found = json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u"}});
    let mut agent = Agent::new(Some(found));
    let mut plugin = agent.add().await;
    assert_eq!(timeout(PATIENCE, agent.asked.recv()).await.unwrap().as_deref(), Some("shop/web"));
    agent.knows(Standing::Enabled);
    assert!(matches!(plugin.hears().await, Said::Waiting | Said::Outside));
    // Known meanwhile, it is not asked for.
    let mut agent = Agent::new(None);
    let mut plugin = agent.add().await;
    agent.knows(Standing::Enabled);
    assert_eq!(plugin.hears().await, Said::Waiting);
    assert!(agent.asked.try_recv().is_err());
}

#[tokio::test]
async fn a_pod_that_nobody_knows_counts_as_its_namespace() {
    let agent = Agent::new(None);
    let enabled = NodePods { enabled_namespaces: ["shop".into()].into(), ..NodePods::default() };
    agent.pods.send_replace(Arc::new(enabled));
    let asked = Attachment { wait: 1000, ..agent.attachment("c1", "netns", "u") };
    let mut plugin = agent.call(Command::Add(asked)).await;
    assert_eq!(plugin.hears().await, Said::Waiting);
    let Said::Failed { message } = plugin.hears().await else { panic!("no failure") };
    assert!(message.contains("the API server has not told of it yet"), "{message}");
}

#[tokio::test]
async fn a_static_pod_that_is_known_is_not_asked_for() {
    let mut agent = Agent::new(None);
    let pod = NodePod { static_uid: Some("of-the-file".into()), ..known(Standing::Enabled).pods["u"].clone() };
    agent.pods.send_replace(Arc::new(NodePods { pods: [("u".into(), pod)].into(), ..NodePods::default() }));
    let mut plugin = agent.call(Command::Add(agent.attachment("c1", "netns", "of-the-file"))).await;
    assert_eq!(plugin.hears().await, Said::Waiting);
    agent.says(Some("netns"), None);
    assert_eq!(plugin.hears().await, Said::Enrolled, "enrolment was told of it by its uid in the API");
    assert!(agent.asked.try_recv().is_err());
}

#[tokio::test]
async fn the_api_knows_a_static_pod_by_another_uid() {
    let mirror = json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u",
        "annotations": {"kubernetes.io/config.mirror": "of-the-file"}}});
    assert_eq!(uid_if_it_is(&mirror, "of-the-file").as_deref(), Some("u"));
    assert_eq!(uid_if_it_is(&mirror, "u").as_deref(), Some("u"));
    assert_eq!(uid_if_it_is(&mirror, "").as_deref(), Some("u"), "a runtime that gives none");
    assert_eq!(uid_if_it_is(&mirror, "of-an-older-pod"), None);
}

#[tokio::test]
async fn check_and_gc_say_and_do_what_is_so() {
    let agent = Agent::new(None);
    agent.knows(Standing::Enabled);
    let check = || agent.call(Command::Check(agent.attachment("c1", "netns", "u")));
    assert!(matches!(check().await.hears().await, Said::Failed { .. }));
    agent.says(Some("netns"), None);
    assert_eq!(check().await.hears().await, Said::Enrolled);
    assert_eq!(agent.add().await.hears().await, Said::Enrolled);
    let gc = |containers: &[&str]| Command::Gc { containers: containers.iter().map(|c| (*c).to_owned()).collect() };
    assert_eq!(agent.call(gc(&["c1", "other"])).await.hears().await, Said::Done);
    assert!(agent.places.has_moved("u", agent.netns("netns-2")), "it is still there");
    assert_eq!(agent.call(gc(&["other"])).await.hears().await, Said::Done);
    assert!(!agent.places.has_moved("u", agent.netns("netns-2")));
}

#[tokio::test]
async fn what_is_no_question_is_not_understood() {
    let agent = Agent::new(None);
    for text in
        ["\n", "{}\n", r#"{"version":2,"command":"del","container":"c"}"#, "{\"version\":1,\"command\":\"fly\"}\n"]
    {
        let mut plugin = agent.asks(text.as_bytes()).await;
        plugin.0.get_mut().shutdown().await.unwrap();
        assert_eq!(plugin.hears().await, Said::Unknown, "{text}");
    }
}
