use std::collections::BTreeMap;
use std::time::Duration;

use super::super::fixtures::{facts, foreign, outcome, service, snapshot, workload};
use super::super::{Reporter, ResponseFlag};
use super::*;

type Labels = BTreeMap<String, String>;

/// Reads the text format back: name -> samples. Strict: a line it does not understand is a failure.
fn parse(text: &str) -> BTreeMap<String, Vec<(Labels, f64)>> {
    let mut all: BTreeMap<String, Vec<(Labels, f64)>> = BTreeMap::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let labels = labels.strip_suffix('}').unwrap();
        let labels = labels
            .split(',')
            .filter(|l| !l.is_empty())
            .map(|l| l.split_once('=').unwrap())
            .map(|(name, value)| {
                let value = value.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
                (name.to_owned(), value.to_owned())
            })
            .collect();
        all.entry(name.to_owned()).or_default().push((labels, value.parse().unwrap()));
    }
    all
}

fn pairs(text: &str) -> Labels {
    text.split_whitespace().map(|p| p.split_once('=').unwrap()).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

#[test]
fn a_connection_shows_in_the_four_istio_metrics_with_all_labels() {
    let metrics = Metrics::new();
    let facts = facts(Reporter::Destination);
    let counters = metrics.opened(&facts);
    counters.sent.inc_by(100);
    counters.received.inc_by(2000);
    metrics.closed(&facts, &outcome(ResponseFlag::None));

    let all = parse(&metrics.text());
    let labels = pairs(
        "reporter=destination source_workload=web source_canonical_service=web source_canonical_revision=v1 \
         source_workload_namespace=shop source_principal=spiffe://cluster.local/ns/shop/sa/web source_app=web-app \
         source_version=v1 source_cluster=Kubernetes destination_service=cart.shop.svc.cluster.local \
         destination_service_namespace=shop destination_service_name=cart destination_workload=cart \
         destination_canonical_service=cart destination_canonical_revision=v1 destination_workload_namespace=shop \
         destination_principal=spiffe://cluster.local/ns/shop/sa/cart destination_app=cart-app destination_version=v1 \
         destination_cluster=Kubernetes request_protocol=tcp response_flags=- connection_security_policy=mutual_tls",
    );
    for (name, value) in [
        ("istio_tcp_connections_opened_total", 1.0),
        ("istio_tcp_connections_closed_total", 1.0),
        ("istio_tcp_sent_bytes_total", 100.0),
        ("istio_tcp_received_bytes_total", 2000.0),
    ] {
        assert_eq!(all[name], [(labels.clone(), value)], "{name}");
    }
    assert!(!all.contains_key("istio_tcp_connections_failed_total"));
}

#[test]
fn the_client_side_says_unknown_of_security_as_istio_specifies() {
    let metrics = Metrics::new();
    metrics.opened(&facts(Reporter::Source));
    let (labels, _) = &parse(&metrics.text())["istio_tcp_connections_opened_total"][0];
    assert_eq!((&*labels["reporter"], &*labels["connection_security_policy"]), ("source", "unknown"));
}

#[test]
fn what_is_missing_is_the_word_unknown() {
    let metrics = Metrics::new();
    metrics.failed(&foreign(), &outcome(ResponseFlag::Denied));
    let all = parse(&metrics.text());
    let (labels, value) = &all["istio_tcp_connections_failed_total"][0];
    assert_eq!(*value, 1.0);
    assert_eq!(labels.len(), 23);
    let known: Vec<_> = labels.iter().filter(|(_, v)| *v != "unknown").map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(known, ["reporter=destination", "request_protocol=tcp", "response_flags=DENY"]);
}

#[test]
fn each_flag_is_a_series_of_its_own() {
    let metrics = Metrics::new();
    for flag in ResponseFlag::ALL {
        assert_eq!(ResponseFlag::ALL[flag as usize], flag);
        metrics.failed(&facts(Reporter::Source), &outcome(flag));
    }
    let all = parse(&metrics.text());
    let mut flags: Vec<_> =
        all["istio_tcp_connections_failed_total"].iter().map(|(l, _)| l["response_flags"].clone()).collect();
    flags.sort();
    let mut expected = ResponseFlag::ALL.map(|f| f.as_str().to_owned());
    expected.sort();
    assert_eq!(flags, expected);
}

#[test]
fn the_gauge_of_open_sockets_goes_up_and_down() {
    let metrics = Metrics::new();
    let open = |metrics: &Metrics, reporter: &str| {
        let all = parse(&metrics.text());
        all["istio_tcp_sockets_open"].iter().find(|(l, _)| l["reporter"] == reporter).unwrap().1
    };
    metrics.opened(&facts(Reporter::Source));
    metrics.opened(&facts(Reporter::Source));
    assert_eq!((open(&metrics, "source"), open(&metrics, "destination")), (2.0, 0.0));
    metrics.closed(&facts(Reporter::Source), &outcome(ResponseFlag::None));
    assert_eq!(open(&metrics, "source"), 1.0);
}

#[test]
fn what_the_node_says_is_asked_at_each_scrape() {
    let metrics = Metrics::new();
    let generation = Arc::new(std::sync::atomic::AtomicU64::new(4));
    let asked = generation.clone();
    metrics.watch_node(move || NodeFacts {
        enrolled_pods: 3,
        refused_pods: 1,
        legacy_connections: 2,
        certificates: vec![("spiffe://cluster.local/ns/shop/sa/web".to_owned(), 1_800_000_000)],
        errors: 5,
        warnings: 6,
        snapshot_generation: asked.load(std::sync::atomic::Ordering::Relaxed),
        kernel: vec![("redirected", "v4", 12), ("denied", "map_full", 1)],
    });
    let nodemesh = |text: &str| -> Vec<String> {
        text.lines().filter(|l| l.starts_with("nodemesh_")).map(str::to_owned).collect()
    };
    assert_eq!(
        nodemesh(&metrics.text()),
        [
            "nodemesh_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/web\"} 1800000000",
            "nodemesh_enrolled_pods 3",
            "nodemesh_kernel_events_total{event=\"denied\",reason=\"map_full\"} 1",
            "nodemesh_kernel_events_total{event=\"redirected\",reason=\"v4\"} 12",
            "nodemesh_legacy_connections 2",
            "nodemesh_problems{severity=\"error\"} 5",
            "nodemesh_problems{severity=\"warning\"} 6",
            "nodemesh_refused_pods 1",
            "nodemesh_snapshot_generation 4",
        ]
    );
    generation.store(9, std::sync::atomic::Ordering::Relaxed);
    assert!(nodemesh(&metrics.text()).contains(&"nodemesh_snapshot_generation 9".to_owned()));
}

#[test]
fn version_and_process_are_there_and_adopted_counters_too() {
    let metrics = Metrics::new();
    let dropped = IntCounter::new("nodemesh_access_log_dropped_total", "Lines.").unwrap();
    metrics.adopt(&dropped);
    dropped.inc();
    let all = parse(&metrics.text());
    let (labels, value) = &all["istio_build"][0];
    assert_eq!((&*labels["component"], &*labels["tag"], *value), ("nodemesh", env!("CARGO_PKG_VERSION"), 1.0));
    assert_eq!(all["nodemesh_access_log_dropped_total"][0].1, 1.0);
    assert!(all["process_resident_memory_bytes"][0].1 > 0.0);
}

#[test]
fn label_sets_of_workloads_that_are_gone_are_forgotten_after_a_grace_time() {
    let metrics = Metrics::new();
    let start = Instant::now();
    let all = snapshot(
        vec![workload("shop", "web", "10.0.1.2"), workload("shop", "cart", "10.0.2.3")],
        vec![service("shop", "cart")],
    );
    let without_web = snapshot(vec![workload("shop", "cart", "10.0.2.3")], vec![service("shop", "cart")]);
    let facts = facts(Reporter::Source);
    metrics.opened(&facts);
    metrics.failed(&foreign(), &outcome(ResponseFlag::Denied));

    let much_later = start + Duration::from_secs(3600);
    metrics.sweep(&without_web, start);
    metrics.sweep(&without_web, much_later);
    assert_eq!(metrics.traffic.len(), 2, "an open connection keeps its series");

    metrics.closed(&facts, &outcome(ResponseFlag::None));
    metrics.sweep(&without_web, much_later);
    assert_eq!(metrics.traffic.len(), 2, "its last values can still be scraped");
    metrics.sweep(&all, much_later + Duration::from_secs(200));
    metrics.sweep(&without_web, much_later + Duration::from_secs(400));
    assert_eq!(metrics.traffic.len(), 2, "the grace time begins anew when the workload comes back");
    metrics.sweep(&without_web, much_later + Duration::from_secs(701));
    assert_eq!(metrics.traffic.len(), 1, "only what names no workload stays");
}

#[test]
fn pods_of_one_deployment_share_a_series() {
    let metrics = Metrics::new();
    for n in 0..100 {
        let mut facts = facts(Reporter::Source);
        let pod = Arc::make_mut(facts.source.workload.as_mut().unwrap());
        pod.uid = format!("pod-{n}").into();
        pod.name = format!("web-{n}").into();
        metrics.opened(&facts);
    }
    assert_eq!(metrics.traffic.len(), 1);
}

/// Not a benchmark: a bound far above what it takes (about a microsecond), so that a lock or an allocation per label
/// that creeps in is seen.
#[test]
fn opening_and_closing_is_cheap() {
    let metrics = Metrics::new();
    let (facts, outcome) = (facts(Reporter::Source), outcome(ResponseFlag::None));
    let start = Instant::now();
    for _ in 0..10_000 {
        metrics.opened(&facts);
        metrics.closed(&facts, &outcome);
    }
    let took = start.elapsed();
    assert!(took < Duration::from_millis(800), "20 000 calls took {took:?}");
}
