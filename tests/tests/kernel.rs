//! The kernel programs on real sockets: each hook, each way it can fail. Needs root, on any kernel from 6.1.

use std::io::ErrorKind;

use mesh_tests::kernel_fixture::*;

const PORT: u16 = 8080;

#[test]
fn every_program_loads_and_attaches() {
    let node = Node::new();
    assert!(node.redirect().enrolled().unwrap().is_empty());
}

#[test]
fn v4_connections_reach_the_agent_and_look_direct() {
    let mut node = Node::new();
    let (client, server) = (node.enrolled_pod(), node.pod());
    let _app = server.serve(PORT);
    let to = server.v4_port(PORT);
    let reply = client.call(to).unwrap();
    assert_eq!(reply.text, format!("agent {to} {}", reply.local));
    assert_eq!(reply.peer, to);
    assert_eq!(reply.local.ip(), client.v4);
    assert_eq!(node.counter("redirected", "v4"), 1);
}

#[test]
fn v6_connections_reach_the_agent_and_look_direct() {
    let mut node = Node::new();
    let (client, server) = (node.enrolled_pod(), node.pod());
    let _app = server.serve(PORT);
    let to = server.v6_port(PORT);
    let reply = client.call(to).unwrap();
    assert_eq!(reply.text, format!("agent {to} {}", reply.local));
    assert_eq!(reply.peer, to);
    assert_eq!(reply.local.ip(), client.v6);
    assert_eq!(node.counter("redirected", "v6"), 1);
}

#[test]
fn a_pod_that_is_not_enrolled_is_untouched() {
    let mut node = Node::new();
    let (client, server) = (node.pod(), node.pod());
    let _app = server.serve(PORT);
    let to = server.v4_port(PORT);
    let reply = client.call(to).unwrap();
    assert_eq!(reply.text, format!("app {to} {}", reply.local));
}

#[test]
fn connections_from_outside_are_steered_by_port() {
    let mut node = Node::new();
    let (client, server) = (node.pod(), node.enrolled_pod());
    let _app = server.serve(PORT);
    for (to, which) in [
        (server.v4_port(PORT), "plain"),
        (server.v6_port(PORT), "plain"),
        (server.v4_port(15008), "hbone"),
        (server.v6_port(15008), "hbone"),
    ] {
        let reply = client.call(to).unwrap();
        assert_eq!(reply.text, format!("{which} {to} {}", reply.local));
    }
}

#[test]
fn without_a_listener_connections_from_outside_are_refused() {
    let mut node = Node::new();
    let (client, mut server) = (node.pod(), node.enrolled_pod());
    let _app = server.serve(PORT);
    server.agent = None;
    for to in [server.v4_port(PORT), server.v6_port(PORT), server.v4_port(15008)] {
        let error = client.call(to).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
    }
    assert!(node.counter("dropped", "no_listener") >= 3);
}
