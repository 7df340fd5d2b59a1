//! The kernel programs on real sockets: each hook, each way it can fail. Needs root, on any kernel from 6.1.

mod fixture;

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Instant;

use fixture::*;
use mesh_agent::redirect::{PodEntry, Redirect, RedirectError, v6_redirect_prefix};

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
    // A listener that is just closing refuses by itself, uncounted: a few more are tried.
    for _ in 0..10 {
        if node.counter("dropped", "no_listener") >= 3 {
            return;
        }
        let error = client.call(server.v4_port(PORT)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
    panic!("refused connections are not counted");
}

#[test]
fn a_v4_destination_of_a_v6_socket_is_redirected() {
    let mut node = Node::new();
    let (client, server) = (node.enrolled_pod(), node.pod());
    let to = server.v4_port(PORT);
    let mapped = mapped(to);
    let reply = client.call(mapped).unwrap();
    assert_eq!(reply.text, format!("agent {to} {}", canonical(reply.local)));
    assert_eq!(reply.peer, mapped);
    assert_eq!(reply.local.ip().to_canonical(), client.v4);
    assert!(reply.local.is_ipv6());
    assert_eq!(node.counter("redirected", "v4"), 1);
}

#[test]
fn a_socket_that_the_app_has_bound_keeps_its_port() {
    let mut node = Node::new();
    let (client, server) = (node.enrolled_pod(), node.pod());
    let to = server.v4_port(PORT);
    for (bound, port) in [("0.0.0.0", 40_001), (&client.v4.to_string(), 40_002), (&client.v4.to_string(), 0)] {
        let bound: SocketAddr = format!("{bound}:{port}").parse().unwrap();
        let reply = client.netns.run(|| {
            let socket = socket_for(to);
            socket.bind(&bound.into()).unwrap();
            call(socket, to).unwrap()
        });
        assert!(reply.text.starts_with(&format!("agent {to} ")), "{reply:?}");
        assert_eq!(reply.peer, to);
        assert_eq!(reply.local.ip(), client.v4, "bound to {bound}");
        assert!(port == 0 || reply.local.port() == port, "{reply:?}");
    }
}

#[test]
fn loopback_and_own_address_stay_in_the_pod() {
    let mut node = Node::new();
    let pod = node.enrolled_pod();
    let _app = pod.serve(PORT);
    let loopback = ["127.0.0.1:8080", "[::1]:8080", "0.0.0.0:8080", "[::ffff:127.0.0.1]:8080"];
    let own = [pod.v4_port(PORT), pod.v6_port(PORT), mapped(pod.v4_port(PORT))];
    for to in loopback.map(|to| to.parse().unwrap()).into_iter().chain(own) {
        let reply = pod.call(to).unwrap_or_else(|error| panic!("{to}: {error}"));
        assert_eq!(reply.text, format!("app {} {}", canonical(reply.peer), canonical(reply.local)));
    }
    assert_eq!(node.counter("left_alone", "local"), 7);
    assert_eq!(node.counter("redirected", "v4"), 0);
}

#[test]
fn a_pod_may_not_call_its_agent() {
    let mut node = Node::new();
    let pod = node.enrolled_pod();
    let (prefix, _) = v6_redirect_prefix();
    let mut targets: Vec<SocketAddr> = ["127.64.0.1:15001", "127.127.255.254:80", "127.0.0.1:15001", "[::1]:15006"]
        .map(|to| to.parse().unwrap())
        .to_vec();
    targets.push(format!("[{prefix}]:15001").parse().unwrap());
    for port in [15001, 15006, 15008] {
        targets.extend([pod.v4_port(port), pod.v6_port(port), mapped(pod.v4_port(port))]);
    }
    for to in &targets {
        let error = pod.call(*to).expect_err(&to.to_string());
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
    }
    assert_eq!(node.counter("denied", "agent_port"), targets.len() as u64);
}

#[test]
fn udp_is_untouched() {
    let mut node = Node::new();
    let (client, server) = (node.enrolled_pod(), node.pod());
    let echo = server.netns.run(|| UdpSocket::bind("0.0.0.0:5353").unwrap());
    let to = server.v4_port(5353);
    let sent_from = client.netns.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(to).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), to);
        socket.send(b"x").unwrap();
        socket.local_addr().unwrap()
    });
    echo.set_read_timeout(Some(PATIENCE)).unwrap();
    let (_, from) = echo.recv_from(&mut [0; 8]).unwrap();
    assert_eq!(from, sent_from);
}

#[test]
fn a_socket_that_is_bound_to_a_device_is_redirected_all_the_same() {
    let mut node = Node::new();
    let (client, server) = (node.enrolled_pod(), node.pod());
    for to in [server.v4_port(PORT), server.v6_port(PORT)] {
        let reply = client.netns.run(|| {
            let socket = socket_for(to);
            socket.bind_device(Some(b"eth0")).unwrap();
            call(socket, to).unwrap()
        });
        assert_eq!(reply.text, format!("agent {to} {}", reply.local));
    }
    assert_eq!(node.counter("device_cleared", "bindtodevice"), 2);
}

#[test]
fn the_agents_tag_passes_and_a_mark_does_not() {
    let mut node = Node::new();
    let (client, server) = (node.enrolled_pod(), node.pod());
    let _app = server.serve(PORT);
    for to in [server.v4_port(PORT), server.v6_port(PORT)] {
        let tagged = client.netns.run(|| {
            let socket = socket_for(to);
            node.redirect().tag_own(socket.as_fd()).unwrap();
            call(socket, to).unwrap()
        });
        assert_eq!(tagged.text, format!("app {to} {}", tagged.local));
        for mark in [0x539, 0x111, 1337] {
            let marked = client.netns.run(|| {
                let socket = socket_for(to);
                socket.set_mark(mark).unwrap();
                call(socket, to).unwrap()
            });
            assert_eq!(marked.text, format!("agent {to} {}", marked.local));
        }
    }
    assert_eq!(node.counter("left_alone", "agent"), 2);
}

#[test]
fn a_socket_can_be_connected_again() {
    let mut node = Node::new();
    let (client, first, second) = (node.enrolled_pod(), node.pod(), node.pod());
    let _local = client.serve(PORT);
    let reply = client.netns.run(|| {
        let socket = socket_for(first.v4_port(PORT));
        socket.connect(&first.v4_port(PORT).into()).unwrap();
        disconnect(&socket);
        call(socket, second.v4_port(PORT)).unwrap()
    });
    assert!(reply.text.starts_with(&format!("agent {} ", second.v4_port(PORT))), "{reply:?}");
    assert_eq!(reply.peer, second.v4_port(PORT));
    // And back to what is left alone: nothing of the redirected connection may stick to it.
    let local: SocketAddr = format!("127.0.0.1:{PORT}").parse().unwrap();
    let reply = client.netns.run(|| {
        let socket = socket_for(local);
        socket.connect(&first.v4_port(PORT).into()).unwrap();
        disconnect(&socket);
        call(socket, local).unwrap()
    });
    assert!(reply.text.starts_with("app "), "{reply:?}");
    assert_eq!(reply.peer, local);
}

#[test]
fn fast_open_is_redirected() {
    let mut node = Node::new();
    let (mut client, server) = (node.enrolled_pod(), node.pod());
    let to = server.v4_port(PORT);
    let (redirect, cookie) = (node.redirect().clone(), client.netns.cookie);
    let (sender, found) = std::sync::mpsc::channel();
    client.agent.as_mut().unwrap().outbound.keep(1, 1, move |local, peer| {
        sender.send(redirect.original_dst(cookie, local, peer)).unwrap();
    });
    let socket = client.netns.run(|| {
        let socket = socket_for(to);
        connect_with_fast_open(&socket, to);
        socket
    });
    assert_eq!(found.recv_timeout(PATIENCE).unwrap(), Some(to));
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(to));
    assert_eq!(node.counter("redirected", "v4"), 1);
}

#[test]
fn a_full_map_resets_the_connection_and_counts() {
    let mut node = Node::without_programs();
    node.options.original_dst_entries = 1;
    node.start();
    let (mut client, server) = (node.enrolled_pod(), node.pod());
    let _app = server.serve(PORT);
    let to = server.v4_port(PORT);
    let connect = |client: &Pod| {
        client.netns.run(|| {
            let socket = socket_for(to);
            socket.connect(&to.into()).unwrap();
            socket
        })
    };
    // While nobody accepts, nobody takes the entry out.
    client.agent.as_mut().unwrap().outbound.pause();
    let (first, second) = (connect(&client), connect(&client));
    assert_eq!(node.counter("map_full", "orig_dst"), 1);
    client.agent.as_mut().unwrap().outbound.resume();
    assert!(read_reply(first.into()).unwrap().text.starts_with(&format!("agent {to} ")));
    // NotConnected where the reset was there before the socket was asked for its peer.
    let error = read_reply(second.into()).unwrap_err().kind();
    assert!(matches!(error, ErrorKind::ConnectionReset | ErrorKind::NotConnected), "{error}");
    assert_eq!(node.counter("orig_dst_missing", "agent"), 1);
}

#[test]
fn a_client_that_gives_up_takes_its_entry_along() {
    let mut node = Node::new();
    let (mut client, server) = (node.enrolled_pod(), node.pod());
    let to = server.v4_port(PORT);
    client.agent.as_mut().unwrap().outbound.pause();
    let socket = client.netns.run(|| {
        let socket = socket_for(to);
        socket.connect(&to.into()).unwrap();
        socket
    });
    assert_eq!(map_keys(&node, mesh_common::map::ORIG_DST), 1);
    socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(socket);
    // Not at once: a process that another test starts in this moment holds the socket until it has become its program.
    wait_for("the entry to go with its socket", || map_keys(&node, mesh_common::map::ORIG_DST) == 0);
}

#[test]
fn two_agents_on_one_machine_do_not_meet() {
    let (mut left, mut right) = (Node::new(), Node::new());
    let (left_pod, right_pod) = (left.enrolled_pod(), right.enrolled_pod());
    let (left_app, right_app) = (left.pod(), right.pod());
    for (pod, app) in [(&left_pod, &left_app), (&right_pod, &right_app)] {
        let to = app.v4_port(PORT);
        let reply = pod.call(to).unwrap();
        assert_eq!(reply.text, format!("agent {to} {}", reply.local));
    }
    for node in [&left, &right] {
        assert_eq!(node.counter("redirected", "v4"), 1);
        assert_eq!(node.redirect().enrolled().unwrap().len(), 1);
    }
    left.redirect().unenroll(left_pod.netns.cookie).unwrap();
    let to = right_app.v4_port(PORT);
    assert!(right_pod.call(to).unwrap().text.starts_with("agent "));
}

#[test]
fn a_pod_that_leaves_is_untouched_again() {
    let mut node = Node::new();
    let (pod, other) = (node.enrolled_pod(), node.pod());
    let (_app, _other_app) = (pod.serve(PORT), other.serve(PORT));
    node.redirect().unenroll(pod.netns.cookie).unwrap();
    assert!(pod.call(other.v4_port(PORT)).unwrap().text.starts_with("app "));
    assert!(other.call(pod.v4_port(PORT)).unwrap().text.starts_with("app "));
    assert!(node.redirect().enrolled().unwrap().is_empty());
    // Once more is no error.
    node.redirect().unenroll(pod.netns.cookie).unwrap();
}

#[test]
fn a_restart_takes_over_and_the_gap_is_closed() {
    let mut node = Node::new();
    let (mut pod, other) = (node.enrolled_pod(), node.pod());
    let (_app, _other_app) = (pod.serve(PORT), other.serve(PORT));
    let links = link_ids(&node);
    pod.agent = None;
    node.crash();
    for _ in 0..3 {
        assert_eq!(pod.call(other.v4_port(PORT)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(pod.call(other.v6_port(PORT)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(other.call(pod.v4_port(PORT)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    node.start();
    assert_eq!(node.redirect().enrolled().unwrap(), [pod.netns.cookie]);
    assert_eq!(pod.call(other.v4_port(PORT)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    node.enroll(&mut pod);
    assert_eq!(link_ids(&node), links, "the links are the same");
    assert!(pod.call(other.v4_port(PORT)).unwrap().text.starts_with("agent "));
    assert!(other.call(pod.v4_port(PORT)).unwrap().text.starts_with("plain "));
}

#[test]
fn other_programs_take_over_without_a_gap() {
    let mut node = Node::new();
    let (mut pod, other) = (node.enrolled_pod(), node.pod());
    let _app = other.serve(PORT);
    let links = link_ids(&node);
    let to = other.v4_port(PORT);
    let stop = AtomicBool::new(false);
    // Another global is another object, as after an upgrade.
    let answers = thread::scope(|scope| {
        let client = scope.spawn(|| {
            pod.netns.run(|| {
                let mut answers = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    answers.push(call(socket_for(to), to));
                }
                answers
            })
        });
        let mut options = node.options.clone();
        let started = [true, false, true].map(|kernel_log| {
            options.kernel_log = kernel_log;
            node.netns.run(|| Redirect::start(&options).map(drop))
        });
        node.options = options;
        stop.store(true, Ordering::Relaxed);
        started.into_iter().for_each(|started| started.unwrap_or_else(|error| panic!("{error}")));
        client.join().unwrap()
    });
    assert!(!answers.is_empty());
    for answer in answers {
        assert!(answer.unwrap().text.starts_with("agent "));
    }
    node.start();
    node.enroll(&mut pod);
    let now = link_ids(&node);
    assert_eq!(now.len(), links.len());
    assert!(now.iter().all(|id| !links.contains(id)), "every link is new: {now:?} {links:?}");
    assert!(pod.call(to).unwrap().text.starts_with("agent "));
    assert!(other.call(pod.v4_port(PORT)).unwrap().text.starts_with("plain "));
}

#[test]
fn cleanup_leaves_nothing() {
    let mut node = Node::new();
    let (mut pod, other) = (node.enrolled_pod(), node.pod());
    let _app = other.serve(PORT);
    let (links, maps, programs) = (link_ids(&node), map_ids(&node), program_ids(&node));
    assert_eq!((links.len(), maps.len()), (8, mesh_common::map::ALL.len()));
    pod.agent = None;
    node.crash();
    let removed = Redirect::cleanup(&node.options).unwrap();
    assert_eq!(removed.len(), links.len() + maps.len(), "{removed:?}");
    assert!(!node.options.bpffs.join("nodemesh").exists());
    wait_for("the kernel to free links, maps and programs", || {
        let links_left = aya::programs::loaded_links().filter_map(Result::ok).any(|link| links.contains(&link.id()));
        let maps_left = aya::maps::loaded_maps().filter_map(Result::ok).any(|map| maps.contains(&map.id()));
        let programs_left = aya::programs::loaded_programs().filter_map(Result::ok).any(|p| programs.contains(&p.id()));
        !links_left && !maps_left && !programs_left
    });
    assert!(pod.call(other.v4_port(PORT)).unwrap().text.starts_with("app "));
    assert!(Redirect::cleanup(&node.options).unwrap().is_empty(), "once more is no error");
}

#[test]
fn only_probes_of_the_probe_cgroup_reach_the_app() {
    let cgroup = Cgroup::new();
    let mut node = Node::without_programs();
    node.options.probe_cgroup = Some(cgroup.path.clone());
    node.start();
    let (pod, outside) = (node.enrolled_pod(), node.pod());
    let _app = pod.serve(PORT);
    for to in [pod.v4_port(PORT), pod.v6_port(PORT)] {
        let probe = call_in_cgroup(&cgroup.path, &node.netns, to);
        assert!(probe.starts_with(&format!("app {to} ")), "{probe}");
        let host = node.netns.run(|| call(socket_for(to), to)).unwrap();
        assert!(host.text.starts_with("plain "), "another process of the node: {host:?}");
        let pod_in_cgroup = call_in_cgroup(&cgroup.path, &outside.netns, to);
        assert!(pod_in_cgroup.starts_with("plain "), "the cgroup in another netns: {pod_in_cgroup}");
    }
    assert_eq!(node.counter("attested", "probe"), 2);
    assert_eq!(node.counter("passed", "attested"), 2);
    wait_for("the entries to go with their sockets", || map_keys(&node, mesh_common::map::ATTESTED) == 0);
    assert_eq!(node.redirect().sweep().unwrap(), 0);
    // kubelet has been restarted, and its cgroup is another now.
    let to = pod.v4_port(PORT);
    let next = Cgroup::new();
    node.redirect().let_probe(Some(&next.path)).unwrap();
    assert!(call_in_cgroup(&next.path, &node.netns, to).starts_with("app "));
    assert!(call_in_cgroup(&cgroup.path, &node.netns, to).starts_with("plain "));
    node.redirect().let_probe(None).unwrap();
    assert!(call_in_cgroup(&next.path, &node.netns, to).starts_with("plain "));
}

#[test]
fn a_foreign_exclusive_program_is_named() {
    let cgroup = Cgroup::new();
    mesh_tests::attach_foreign(&cgroup.path, mesh_tests::Attachment::Exclusive, 1).unwrap();
    let mut node = Node::without_programs();
    node.options.cgroup = Some(cgroup.path.clone());
    let error = node.netns.run(|| Redirect::start(&node.options)).unwrap_err();
    assert!(matches!(error, RedirectError::ForeignExclusive { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("the program foreign_conn (id ") && text.contains(&cgroup.path.display().to_string()),
        "{text}"
    );
    assert!(!node.options.bpffs.join("nodemesh").exists(), "nothing of the failed start is left");
}

#[test]
fn a_missing_capability_is_named() {
    let node = Node::without_programs();
    for (dropped, named) in [(39, "CAP_BPF"), (12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON")] {
        let error = node.netns.run(|| {
            drop_capabilities(&[dropped, 21]);
            Redirect::start(&node.options).unwrap_err()
        });
        assert!(matches!(error, RedirectError::Capability { missing } if missing == named), "{error}");
    }
}

#[test]
fn a_wrong_cgroup_or_bpffs_is_named() {
    let mut node = Node::without_programs();
    node.options.cgroup = Some("/proc".into());
    let error = node.netns.run(|| Redirect::start(&node.options)).unwrap_err();
    assert!(matches!(error, RedirectError::NotCgroup2 { .. }), "{error}");
    let elsewhere = Cgroup::new();
    node.options.cgroup = Some(elsewhere.path.clone());
    let error = node.netns.run(|| Redirect::start(&node.options)).unwrap_err();
    assert!(matches!(error, RedirectError::NotInCgroup { .. }), "{error}");
    assert!(!node.options.bpffs.join("nodemesh").exists(), "nothing of the failed start is left");
    node.options.cgroup = None;
    let good = std::mem::replace(&mut node.options.bpffs, "/proc/no-bpffs-here".into());
    let error = node.netns.run(|| Redirect::start(&node.options)).unwrap_err();
    assert!(matches!(error, RedirectError::Bpffs { .. }), "{error}");
    node.options.bpffs = good;
}

#[test]
fn the_nodes_own_netns_is_no_pod() {
    let node = Node::new();
    let entry = PodEntry { cookie: node.netns.cookie, addresses: Vec::new(), hbone_listener: -1, plain_listener: -1 };
    let error = node.redirect().enroll(&entry, node.netns.file.as_fd()).unwrap_err();
    assert!(matches!(error, RedirectError::HostNetwork { .. }), "{error}");
}

#[test]
fn one_pod_has_more_connections_than_ephemeral_ports() {
    let mut node = Node::new();
    let (client, server) = (node.enrolled_pod(), node.pod());
    client.netns.run(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40099").unwrap());
    for to in [server.v4_port(PORT), server.v6_port(PORT)] {
        for _ in 0..500 {
            let reply = client.call(to).unwrap();
            assert!(reply.text.starts_with(&format!("agent {to} ")), "{reply:?}");
        }
    }
}

#[test]
fn thousands_of_connections_find_their_destination() {
    const CLIENTS: u16 = 4;
    const EACH: u16 = 2500;
    let mut node = Node::new();
    let (client, server) = (node.enrolled_pod(), node.pod());
    let start = Instant::now();
    thread::scope(|scope| {
        for n in 0..CLIENTS {
            let (client, server) = (&client, &server);
            scope.spawn(move || {
                client.netns.run(|| {
                    for i in 0..EACH {
                        let to = server.v4_port(1 + n * EACH + i);
                        let reply = call(socket_for(to), to).unwrap();
                        assert!(reply.text.starts_with(&format!("agent {to} ")), "{reply:?}");
                    }
                });
            });
        }
    });
    let total = u64::from(CLIENTS * EACH);
    println!("{total} connections in {:?}", start.elapsed());
    assert_eq!(node.counter("redirected", "v4"), total);
    assert_eq!(node.counter("orig_dst_missing", "agent"), 0);
    assert_eq!(node.counter("map_full", "orig_dst"), 0);
    assert_eq!(map_keys(&node, mesh_common::map::ORIG_DST), 0, "nothing is left over");
}

#[test]
fn thirty_thousand_connections_at_once() {
    const THREADS: usize = 2;
    const EACH: usize = 15_000;
    let mut node = Node::new();
    let (mut client, server) = (node.enrolled_pod(), node.pod());
    let (redirect, cookie) = (node.redirect().clone(), client.netns.cookie);
    let found = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&found);
    let to = server.v4_port(PORT);
    client.agent.as_mut().unwrap().outbound.keep(EACH, THREADS, move |local, peer| {
        let right = redirect.original_dst(cookie, local, peer) == Some(to);
        counted.fetch_add(usize::from(right), Ordering::Relaxed);
    });
    let connected = Barrier::new(THREADS + 1);
    let checked = Barrier::new(THREADS + 1);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                client.netns.run(|| {
                    own_file_table();
                    let connect = |n| {
                        let socket = socket_for(to);
                        socket.connect(&to.into()).unwrap_or_else(|error| panic!("connection {n}: {error}"));
                        socket
                    };
                    let sockets: Vec<_> = (0..EACH).map(connect).collect();
                    connected.wait();
                    checked.wait();
                    drop(sockets);
                });
            });
        }
        connected.wait();
        wait_for("all to be accepted", || found.load(Ordering::Relaxed) == THREADS * EACH);
        checked.wait();
    });
    assert_eq!(node.counter("redirected", "v4"), (THREADS * EACH) as u64);
    assert_eq!(node.counter("orig_dst_missing", "agent"), 0);
}

#[test]
fn the_agent_reaches_the_app_with_the_clients_address() {
    let mut node = Node::new();
    let (pod, client) = (node.enrolled_pod(), node.pod());
    let _app = pod.serve(PORT);
    // As enrolment sets it up: answers to the client's address come back to the pod itself.
    pod.netns.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1").unwrap());
    for family in ["-4", "-6"] {
        let any = if family == "-4" { "0.0.0.0/0" } else { "::/0" };
        pod.netns.ip(&format!("{family} rule add fwmark 0x111/0xfff lookup 100"));
        pod.netns.ip(&format!("{family} route add local {any} dev lo table 100"));
    }
    for (to, from) in [(pod.v4_port(PORT), client.v4), (pod.v6_port(PORT), client.v6)] {
        let connect = |tagged: bool| {
            pod.netns.run(|| {
                let socket = socket_for(to);
                if tagged {
                    node.redirect().tag_own(socket.as_fd()).unwrap();
                }
                socket.set_mark(0x111).unwrap();
                set_transparent(&socket, to);
                socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
                call(socket, to).unwrap()
            })
        };
        let reply = connect(true);
        assert_eq!(reply.text, format!("app {to} {}", reply.local));
        assert_eq!(reply.local.ip(), from);
        // An app that does the same is not the agent: its connection is judged.
        assert!(connect(false).text.starts_with(&format!("plain {to} ")), "not tagged");
    }
    assert_eq!(node.counter("attested", "agent"), 2);
    assert_eq!(node.counter("passed", "attested"), 2);
    wait_for("the entries to go with their sockets", || map_keys(&node, mesh_common::map::ATTESTED) == 0);
}

/// What tracing writes, for all tests of this process.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_kernel_programs_log_when_asked_to() {
    let written = Written::default();
    let writer = written.clone();
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
    let mut node = Node::without_programs();
    node.options.kernel_log = true;
    node.start();
    let pod = node.enrolled_pod();
    pod.call(pod.v4_port(15001)).unwrap_err();
    wait_for("the line", || {
        String::from_utf8_lossy(&written.0.lock().unwrap()).contains("kernel: connect denied, reason")
    });
}
