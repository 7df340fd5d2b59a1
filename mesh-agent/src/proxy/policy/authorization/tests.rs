//! Laws of the judgement, over random policies and connections drawn from a universe so small that they often meet.
//! Single cases are data: `tests/translate/verdicts/`, run by `translate`.

use std::net::IpAddr;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::model::{MtlsModes, Names, PortMatch, Rules, Transport, TrustDomain};

const NAMESPACES: &[&str] = &["shop", "pay"];
const ACCOUNTS: &[&str] = &["web", "db"];
const IPS: &[&str] = &["10.0.0.1", "10.0.1.1", "fd00::1"];
const PORTS: &[u16] = &[80, 443];

fn identity(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new(&TrustDomain::new("cluster.local").unwrap(), namespace, account).unwrap()
}

fn workload(policies: Vec<AuthorizationPolicy>, mode: MtlsMode) -> Workload {
    let text = |s: &str| -> Arc<str> { s.into() };
    Workload {
        uid: text("u"),
        name: text("app"),
        namespace: text("shop"),
        identity: identity("shop", "app"),
        addresses: ["10.0.0.9".parse().unwrap()].into(),
        node: text("n"),
        locality: Arc::default(),
        transport: Transport::Hbone,
        mode_is_said: true,
        netns: None,
        rules: Some(Arc::new(Rules {
            mtls: MtlsModes { default: mode, ..Default::default() },
            policies: policies.into_iter().map(Arc::new).collect(),
        })),
        labels: None,
        names: Arc::new(Names {
            workload: text("app"),
            app: text("app"),
            version: text("v1"),
            canonical_name: text("app"),
            canonical_revision: text("v1"),
        }),
        cluster: text("c"),
    }
}

#[derive(Debug, Clone)]
struct Arrival {
    identity: Option<SpiffeId>,
    source: SocketAddr,
    destination: SocketAddr,
}

impl Arrival {
    fn connection(&self) -> Connection<'_> {
        Connection { identity: self.identity.as_ref(), source: self.source, destination: self.destination }
    }
}

fn judge(policies: &[AuthorizationPolicy], arrival: &Arrival) -> Verdict {
    authorize(&workload(policies.to_vec(), MtlsMode::Permissive), &arrival.connection())
}

fn passes(policies: &[AuthorizationPolicy], arrival: &Arrival) -> bool {
    judge(policies, arrival).result.is_ok()
}

fn arrivals() -> impl Strategy<Value = Arrival> {
    let who = prop::option::of((select(NAMESPACES), select(ACCOUNTS)).prop_map(|(n, a)| identity(n, a)));
    (who, select(IPS), select(PORTS)).prop_map(|(identity, ip, port)| Arrival {
        identity,
        source: SocketAddr::new(ip.parse::<IpAddr>().unwrap(), 40000),
        destination: SocketAddr::new("10.0.0.9".parse().unwrap(), port),
    })
}

fn texts(of: &'static [&'static str]) -> impl Strategy<Value = Vec<StringMatch>> {
    vec(select(of).prop_map(StringMatch::parse), 0..3)
}

fn blocks() -> impl Strategy<Value = Vec<IpBlock>> {
    vec(
        select(&["10.0.0.0/24", "10.0.0.0/16", "fd00::/8", "10.0.1.1"][..]).prop_map(|b| IpBlock::parse(b).unwrap()),
        0..2,
    )
}

fn ports() -> impl Strategy<Value = Vec<PortMatch>> {
    vec(select(PORTS).prop_map(PortMatch), 0..2)
}

fn accounts() -> impl Strategy<Value = Vec<(Arc<str>, Arc<str>)>> {
    vec((select(NAMESPACES), select(ACCOUNTS)).prop_map(|(n, a)| (n.into(), a.into())), 0..2)
}

fn matches_() -> impl Strategy<Value = Match> {
    const PRINCIPALS: &[&str] = &["*", "cluster.local/ns/shop/sa/web", "cluster.local/ns/pay/*", "*/sa/db"];
    const NAMES: &[&str] = &["shop", "p*", "*op", "*"];
    let identities = (texts(PRINCIPALS), texts(PRINCIPALS), texts(NAMES), texts(NAMES), accounts(), accounts());
    let addresses = (blocks(), blocks(), blocks(), ports(), ports());
    (identities, addresses, any::<[u16; 3]>()).prop_map(|(i, a, keep)| {
        let keep = keep[0] & keep[1] & keep[2];
        // With every field set hardly anything would match: a random mask leaves some of them.
        let on = |bit: u16| keep & (1 << bit) != 0;
        Match {
            principals: if on(0) { i.0 } else { vec![] },
            not_principals: if on(1) { i.1 } else { vec![] },
            namespaces: if on(2) { i.2 } else { vec![] },
            not_namespaces: if on(3) { i.3 } else { vec![] },
            service_accounts: if on(4) { i.4 } else { vec![] },
            not_service_accounts: if on(5) { i.5 } else { vec![] },
            source_ips: if on(6) { a.0 } else { vec![] },
            not_source_ips: if on(7) { a.1 } else { vec![] },
            destination_ips: vec![],
            not_destination_ips: if on(8) { a.2 } else { vec![] },
            destination_ports: if on(9) { a.3 } else { vec![] },
            not_destination_ports: if on(10) { a.4 } else { vec![] },
        }
    })
}

fn rules() -> impl Strategy<Value = Vec<Rule>> {
    let rule = (vec(matches_(), 0..3), vec(matches_(), 0..2), vec(matches_(), 0..2));
    vec(rule.prop_map(|(from, to, when)| Rule { from, to, when }), 0..3)
}

fn policies_of(actions: &'static [Action]) -> impl Strategy<Value = Vec<AuthorizationPolicy>> {
    vec((select(actions), prop::bool::weighted(0.2), rules()), 0..4).prop_map(|list| {
        let named = |(i, (action, dry_run, rules)): (usize, _)| AuthorizationPolicy {
            name: format!("p{i}").into(),
            namespace: "shop".into(),
            action,
            dry_run,
            rules,
        };
        list.into_iter().enumerate().map(named).collect()
    })
}

const ALL: &[Action] = &[Action::Allow, Action::Deny, Action::Audit];

fn enforced(action: Action, rules: Vec<Rule>) -> AuthorizationPolicy {
    AuthorizationPolicy { name: "x".into(), namespace: "shop".into(), action, dry_run: false, rules }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, max_global_rejects: 100_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_deny_that_matches_wins_over_everything(mut policies in policies_of(ALL), rules in rules(), who in arrivals()) {
        let deny = enforced(Action::Deny, rules);
        prop_assume!(matches_policy(&deny, &who.connection()));
        policies.push(deny);
        prop_assert!(!passes(&policies, &who));
    }

    #[test]
    fn the_order_of_policies_decides_nothing(
        (policies, shuffled) in policies_of(ALL).prop_flat_map(|p| (Just(p.clone()), Just(p).prop_shuffle())),
        who in arrivals(),
    ) {
        let (a, b) = (judge(&policies, &who), judge(&shuffled, &who));
        prop_assert_eq!(a.result.is_ok(), b.result.is_ok());
        let sorted = |mut v: Vec<String>| { v.sort(); v };
        prop_assert_eq!(sorted(a.audited), sorted(b.audited));
    }

    #[test]
    fn one_more_allow_never_refuses_what_passed_an_allow(policies in policies_of(ALL), rules in rules(), who in arrivals()) {
        prop_assume!(policies.iter().any(|p| p.action == Action::Allow && !p.dry_run));
        prop_assume!(passes(&policies, &who));
        let mut more = policies;
        more.push(enforced(Action::Allow, rules));
        prop_assert!(passes(&more, &who));
    }

    #[test]
    fn without_an_allow_policy_only_a_deny_refuses(policies in policies_of(&[Action::Deny, Action::Audit]), who in arrivals()) {
        let denied = policies
            .iter()
            .any(|p| p.action == Action::Deny && !p.dry_run && matches_policy(p, &who.connection()));
        prop_assert_eq!(passes(&policies, &who), !denied);
    }

    #[test]
    fn an_allow_without_rules_allows_nobody(policies in policies_of(&[Action::Deny, Action::Audit]), who in arrivals()) {
        let mut closed = policies;
        closed.push(enforced(Action::Allow, vec![]));
        prop_assert!(!passes(&closed, &who));
    }

    #[test]
    fn dry_run_and_audit_change_no_result(policies in policies_of(ALL), who in arrivals()) {
        let real: Vec<_> =
            policies.iter().filter(|p| !p.dry_run && p.action != Action::Audit).cloned().collect();
        let (all, only) = (judge(&policies, &who), judge(&real, &who));
        prop_assert_eq!(all.result, only.result);
        prop_assert_eq!(all.audited.len(), policies.iter().filter(|p| {
            (p.dry_run || p.action == Action::Audit) && matches_policy(p, &who.connection())
        }).count());
        prop_assert!(only.audited.is_empty());
    }

    #[test]
    fn plaintext_never_satisfies_a_condition_on_identity(mut m in matches_(), mut who in arrivals(), which in 0..3) {
        who.identity = None;
        match which {
            0 => m.principals = vec![StringMatch::Present],
            1 => m.namespaces = vec![StringMatch::Present],
            _ => m.service_accounts = vec![("shop".into(), "web".into())],
        }
        prop_assert!(!matches(&m, &who.connection()));
    }

    #[test]
    fn a_negative_condition_on_identity_holds_for_plaintext(mut who in arrivals(), text in "[a-z*/]{0,6}") {
        who.identity = None;
        let m = Match {
            not_principals: vec![StringMatch::Present, StringMatch::parse(&text)],
            not_namespaces: vec![StringMatch::Present, StringMatch::parse(&text)],
            not_service_accounts: vec![("shop".into(), "web".into())],
            ..Match::default()
        };
        prop_assert!(matches(&m, &who.connection()));
    }

    #[test]
    fn strict_refuses_plaintext_whatever_the_policies(policies in policies_of(ALL), mut who in arrivals()) {
        who.identity = None;
        let verdict = authorize(&workload(policies, MtlsMode::Strict), &who.connection());
        prop_assert_eq!(verdict.result, Err(Denied::Plaintext));
    }

    #[test]
    fn a_principal_is_compared_as_its_whole_text(
        namespace in "[a-z]{1,4}", account in "[a-z]{1,4}", cut in 0..40usize, noise in "[a-z/*é]{0,5}",
    ) {
        let id = identity(&namespace, &account);
        let whole = id.principal();
        let at = cut % (whole.len() + 1);
        for text in [whole.clone(), whole[..at].to_owned(), whole[at..].to_owned(), format!("{whole}{noise}"), noise] {
            for pattern in [
                StringMatch::Exact(text.as_str().into()),
                StringMatch::Prefix(text.as_str().into()),
                StringMatch::Suffix(text.as_str().into()),
                StringMatch::Present,
            ] {
                prop_assert_eq!(matches_principal(&pattern, &id), pattern.matches(&whole), "{:?} on {}", pattern, whole);
            }
        }
    }
}

#[test]
fn a_port_of_its_own_mode_is_judged_by_it() {
    let mut w = workload(vec![], MtlsMode::Strict);
    Arc::make_mut(w.rules.as_mut().unwrap()).mtls.ports.insert(80, MtlsMode::Permissive);
    let to = |port| Connection {
        identity: None,
        source: "10.0.0.1:9".parse().unwrap(),
        destination: SocketAddr::new("10.0.0.9".parse().unwrap(), port),
    };
    assert!(authorize(&w, &to(80)).result.is_ok());
    assert_eq!(authorize(&w, &to(81)).result, Err(Denied::Plaintext));
}

#[test]
fn a_refusal_names_the_policy() {
    let deny = enforced(Action::Deny, vec![Rule::default()]);
    let w = workload(vec![deny], MtlsMode::Permissive);
    let c = Connection {
        identity: None,
        source: "10.0.0.1:9".parse().unwrap(),
        destination: "10.0.0.9:80".parse().unwrap(),
    };
    assert_eq!(authorize(&w, &c).result, Err(Denied::ByPolicy("shop/x".into())));
}
