//! Who gets the connection, counted exactly where the algorithm is exact and within bounds where chance decides.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;

fn endpoint(n: u8, zone: &str, node: &str) -> Endpoint {
    Endpoint {
        address: SocketAddr::new([10, 0, 0, n].into(), 8080),
        ready: true,
        serving: true,
        locality: Locality { region: zone.split('-').next().unwrap().into(), zone: zone.into() }.into(),
        node: (!node.is_empty()).then(|| node.into()),
    }
}

fn port(endpoints: Vec<Endpoint>) -> ServicePort {
    ServicePort { port: 80, name: "http".into(), app_protocol: None, endpoints }
}

fn four() -> ServicePort {
    port((1..=4).map(|n| endpoint(n, "eu-a", "n1")).collect())
}

struct Test {
    locality: Locality,
    node: &'static str,
    state: State,
    rng: StdRng,
}

impl Test {
    fn at(zone: &str, node: &'static str) -> Self {
        let region = zone.split('-').next().unwrap().into();
        Self {
            locality: Locality { region, zone: zone.into() },
            node,
            state: State::default(),
            rng: StdRng::seed_from_u64(7),
        }
    }

    fn pick(
        &mut self,
        port: &ServicePort,
        algorithm: Algorithm,
        scope: Scope,
        open: impl Fn(&Endpoint) -> u32,
        except: &[SocketAddr],
    ) -> Option<u8> {
        let client = Client { locality: &self.locality, node: self.node };
        let random = |n| self.rng.random_range(0..n);
        choose(port, algorithm, scope, &client, &mut self.state, open, random, except).map(last_octet)
    }

    fn counts(&mut self, port: &ServicePort, algorithm: Algorithm, scope: Scope, times: u32) -> BTreeMap<u8, u32> {
        let mut counts = BTreeMap::new();
        for _ in 0..times {
            *counts.entry(self.pick(port, algorithm, scope, |_| 0, &[]).expect("one is fit")).or_default() += 1;
        }
        counts
    }

    fn reach(&mut self, port: &ServicePort, scope: Scope) -> Vec<u8> {
        self.counts(port, Algorithm::RoundRobin, scope, 24).into_keys().collect()
    }
}

fn last_octet(e: &Endpoint) -> u8 {
    match e.address.ip() {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => 100 + ip.octets()[15],
    }
}

const ALGORITHMS: [Algorithm; 3] = [Algorithm::RoundRobin, Algorithm::Random, Algorithm::LeastConnections];

#[test]
fn round_robin_gives_each_its_turn_for_every_count_and_start() {
    for n in 1..=16u8 {
        let port = port((1..=n).map(|i| endpoint(i, "eu-a", "n1")).collect());
        for start in 0..usize::from(n) {
            let mut t = Test::at("eu-a", "n1");
            t.state.next = start;
            let counts = t.counts(&port, Algorithm::RoundRobin, Scope::Anywhere, u32::from(n) * 3);
            assert_eq!(counts, (1..=n).map(|i| (i, 3)).collect(), "{n} endpoints from turn {start}");
        }
    }
}

#[test]
fn round_robin_survives_the_end_of_its_counter() {
    let mut t = Test::at("eu-a", "n1");
    t.state.next = usize::MAX;
    let picked: Vec<_> = (0..3).map(|_| t.pick(&four(), Algorithm::RoundRobin, Scope::Anywhere, |_| 0, &[])).collect();
    assert_eq!(picked, [Some(4), Some(1), Some(2)]);
}

#[test]
fn chance_is_even_within_bounds() {
    // 4000 draws over 4: the standard deviation is 27; 150 is more than five of them.
    for algorithm in [Algorithm::Random, Algorithm::LeastConnections] {
        let counts = Test::at("eu-a", "n1").counts(&four(), algorithm, Scope::Anywhere, 4000);
        assert_eq!(counts.len(), 4);
        for (endpoint, n) in counts {
            assert!(n.abs_diff(1000) < 150, "{algorithm:?}: {endpoint} got {n}");
        }
    }
}

#[test]
fn the_least_loaded_is_chosen() {
    let mut t = Test::at("eu-a", "n1");
    for quiet in 1..=4 {
        let open = |e: &Endpoint| if last_octet(e) == quiet { 2 } else { 3 };
        assert_eq!(t.pick(&four(), Algorithm::LeastConnections, Scope::Anywhere, open, &[]), Some(quiet));
    }
}

#[test]
fn least_connections_evens_out_an_uneven_start() {
    let mut t = Test::at("eu-a", "n1");
    let mut open = BTreeMap::from([(1u8, 30u32), (2, 0), (3, 10), (4, 0)]);
    for _ in 0..80 {
        let load = open.clone();
        let chosen = t
            .pick(&four(), Algorithm::LeastConnections, Scope::Anywhere, |e| load[&last_octet(e)], &[])
            .expect("one is fit");
        *open.get_mut(&chosen).unwrap() += 1;
    }
    assert_eq!(open, (1..=4).map(|n| (n, 30)).collect());
}

#[test]
fn the_nearest_circle_that_has_any_is_taken() {
    let port = |near: &[u8]| {
        let all = [
            endpoint(1, "eu-a", "n1"),
            endpoint(2, "eu-a", "n2"),
            endpoint(3, "eu-b", "n3"),
            endpoint(4, "us-a", "n4"),
        ];
        port(all.into_iter().filter(|e| near.contains(&last_octet(e))).collect())
    };
    for (scope, present, reached) in [
        (Scope::Anywhere, &[1u8, 2, 3, 4][..], &[1u8, 2, 3, 4][..]),
        (Scope::SameZone, &[1, 2, 3, 4], &[1, 2]),
        (Scope::SameZone, &[3, 4], &[3]),
        (Scope::SameZone, &[4], &[4]),
        (Scope::SameNode, &[1, 2, 3, 4], &[1]),
        (Scope::SameNode, &[2, 3, 4], &[2]),
        (Scope::SameNode, &[3, 4], &[3]),
        (Scope::SameNode, &[4], &[4]),
    ] {
        let mut t = Test::at("eu-a", "n1");
        assert_eq!(t.reach(&port(present), scope), reached, "{scope:?} of {present:?}");
    }
}

#[test]
fn equal_zone_names_of_two_regions_are_not_one_zone() {
    let mut far = endpoint(1, "eu-a", "n1");
    Arc::make_mut(&mut far.locality).region = "us".into();
    let port = port(vec![far, endpoint(2, "eu-b", "n2")]);
    assert_eq!(Test::at("eu-a", "n9").reach(&port, Scope::SameZone), [2]);
}

#[test]
fn an_unknown_place_is_near_to_nothing() {
    let port = port(vec![endpoint(1, "", ""), endpoint(2, "eu-a", "n2")]);
    assert_eq!(Test::at("", "").reach(&port, Scope::SameNode), [1, 2]);
    assert_eq!(Test::at("eu-a", "n1").reach(&port, Scope::SameZone), [2]);
}

#[test]
fn failover_skips_a_circle_whose_endpoints_are_not_ready() {
    let mut near = endpoint(1, "eu-a", "n1");
    (near.ready, near.serving) = (false, true);
    let port = port(vec![near, endpoint(2, "us-a", "n2")]);
    assert_eq!(Test::at("eu-a", "n1").reach(&port, Scope::SameNode), [2]);
}

#[test]
fn terminating_endpoints_serve_only_where_none_is_ready() {
    let mut terminating = endpoint(1, "eu-a", "n1");
    (terminating.ready, terminating.serving) = (false, true);
    let mut dead = endpoint(2, "eu-a", "n1");
    (dead.ready, dead.serving) = (false, false);
    let ready = endpoint(3, "eu-a", "n1");
    let mut t = Test::at("eu-a", "n1");
    assert_eq!(t.reach(&port(vec![terminating.clone(), dead.clone(), ready]), Scope::Anywhere), [3]);
    assert_eq!(t.reach(&port(vec![terminating, dead.clone()]), Scope::Anywhere), [1]);
    for algorithm in ALGORITHMS {
        assert_eq!(t.pick(&port(vec![dead.clone()]), algorithm, Scope::Anywhere, |_| 0, &[]), None);
        assert_eq!(t.pick(&port(vec![]), algorithm, Scope::Anywhere, |_| 0, &[]), None);
    }
}

#[test]
fn what_was_tried_is_not_tried_again() {
    for algorithm in ALGORITHMS {
        let mut t = Test::at("eu-a", "n1");
        let (port, mut tried) = (four(), Vec::new());
        for _ in 0..4 {
            let n = t.pick(&port, algorithm, Scope::SameNode, |_| 0, &tried).expect("one is left");
            tried.push(SocketAddr::new([10, 0, 0, n].into(), 8080));
        }
        tried.sort();
        tried.dedup();
        assert_eq!(tried.len(), 4);
        assert_eq!(t.pick(&port, algorithm, Scope::SameNode, |_| 0, &tried), None);
    }
}

#[test]
fn a_client_gets_endpoints_of_the_family_it_dialled() {
    let mut six = endpoint(2, "eu-a", "n1");
    six.address = "[fd00::2]:8080".parse().unwrap();
    let mut t = Test::at("eu-a", "n1");
    let mut pick = |port: &ServicePort, destination: &str| {
        let client = Client { locality: &t.locality, node: t.node };
        let algorithm = Algorithm::RoundRobin;
        let to = destination.parse().unwrap();
        choose_like(to, port, algorithm, Scope::Anywhere, &client, &mut t.state, |_| 0, |_| 0, &[]).map(last_octet)
    };
    let both = port(vec![endpoint(1, "eu-a", "n1"), six.clone()]);
    for _ in 0..3 {
        assert_eq!(pick(&both, "10.96.0.1"), Some(1));
        assert_eq!(pick(&both, "::ffff:10.96.0.1"), Some(1));
        assert_eq!(pick(&both, "fd00::10"), Some(102));
    }
    assert_eq!(pick(&port(vec![six.clone()]), "10.96.0.1"), Some(102));
    // The family counts among those that only serve, too, and an unfit endpoint does not stand for it.
    let health = |mut e: Endpoint, ready, serving| {
        (e.ready, e.serving) = (ready, serving);
        e
    };
    let four = endpoint(1, "eu-a", "n1");
    let going = port(vec![health(six.clone(), false, true), health(four.clone(), false, true)]);
    for _ in 0..3 {
        assert_eq!(pick(&going, "10.96.0.1"), Some(1));
        assert_eq!(pick(&port(vec![health(four.clone(), false, true), six.clone()]), "10.96.0.1"), Some(102));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_unfit_endpoint_is_never_chosen_and_a_fit_one_never_missed(
        kinds in prop::collection::vec((0..3u8, 0..3u8, any::<bool>()), 0..8),
        algorithm in prop::sample::select(&ALGORITHMS[..]),
        scope in prop::sample::select(&[Scope::Anywhere, Scope::SameZone, Scope::SameNode][..]),
        seed in any::<u64>(),
    ) {
        let mut except = Vec::new();
        let endpoints: Vec<_> = kinds.iter().enumerate().map(|(i, &(health, zone, tried))| {
            let mut e = endpoint(i as u8 + 1, ["eu-a", "eu-b", "us-a"][usize::from(zone)], "n1");
            (e.ready, e.serving) = [(true, true), (false, true), (false, false)][usize::from(health)];
            if tried { except.push(e.address) }
            e
        }).collect();
        let any_ready = endpoints.iter().any(|e| e.ready);
        let fit = |e: &Endpoint| !except.contains(&e.address) && if any_ready { e.ready } else { e.serving };
        let port = port(endpoints);
        let mut t = Test::at("eu-a", "n1");
        t.rng = StdRng::seed_from_u64(seed);
        let chosen = t.pick(&port, algorithm, scope, |_| 0, &except);
        prop_assert_eq!(chosen.is_some(), port.endpoints.iter().any(fit));
        if let Some(n) = chosen {
            prop_assert!(fit(&port.endpoints[usize::from(n) - 1]));
        }
    }
}
