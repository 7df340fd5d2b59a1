//! Which endpoint gets a new connection. Pure: health, load, chance and locality come in as values.
//!
//! Comes in: one port of a service and where the client is. First the fit endpoints are told from the unfit (ready, or
//! still serving where none is ready), then the nearest circle that has any is taken, then the algorithm chooses one
//! within it. Nothing is allocated: the circle is counted in one walk and chosen from in a second.

use std::net::{IpAddr, SocketAddr};

use crate::model::{Algorithm, Endpoint, Locality, Scope, ServicePort};

/// Where the client is.
#[derive(Debug, Clone)]
pub struct Client<'a> {
    pub locality: &'a Locality,
    pub node: &'a str,
}

/// What a worker remembers of one service port between two choices.
#[derive(Debug, Default)]
pub struct State {
    pub next: usize,
}

/// How far away the chosen endpoints may be, from near to far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Circle {
    Node,
    Zone,
    Region,
    Anywhere,
}

/// Chooses an endpoint of `port` for a client; `open` says how many connections an endpoint has, `random` gives a
/// number below its argument. `except` are endpoints that were tried and failed. `None`: no endpoint is fit.
#[expect(clippy::too_many_arguments, reason = "each is another kind of fact; a struct would only rename the list")]
pub fn choose<'a>(
    port: &'a ServicePort,
    algorithm: Algorithm,
    scope: Scope,
    client: &Client<'_>,
    state: &mut State,
    open: impl Fn(&Endpoint) -> u32,
    random: impl FnMut(usize) -> usize,
    except: &[SocketAddr],
) -> Option<&'a Endpoint> {
    choose_from(&port.endpoints, algorithm, scope, client, state, open, random, |e| !except.contains(&e.address))
}

/// Whether `choose_like` would find another endpoint than those.
pub fn has_another(destination: IpAddr, port: &ServicePort, except: &[SocketAddr]) -> bool {
    let usable = usable_like(destination, port);
    port.endpoints.iter().any(|e| usable(e) && !except.contains(&e.address))
}

/// The endpoints of the destination's family that take connections; all that do where there is none of it.
fn usable_like(destination: IpAddr, port: &ServicePort) -> impl Fn(&Endpoint) -> bool {
    let v4 = destination.to_canonical().is_ipv4();
    let any_ready = port.endpoints.iter().any(|e| e.ready);
    let takes = move |e: &Endpoint| if any_ready { e.ready } else { e.serving };
    let any_alike = port.endpoints.iter().any(|e| e.address.is_ipv4() == v4 && takes(e));
    move |e| takes(e) && (!any_alike || e.address.is_ipv4() == v4)
}

/// As `choose`, among the endpoints of the address family that the client asked for: a pod that dialled an IPv4 address
/// may have no IPv6 route at all. Only where the service has no endpoint of that family are the others taken.
#[expect(clippy::too_many_arguments, reason = "each is another kind of fact; a struct would only rename the list")]
pub fn choose_like<'a>(
    destination: IpAddr,
    port: &'a ServicePort,
    algorithm: Algorithm,
    scope: Scope,
    client: &Client<'_>,
    state: &mut State,
    open: impl Fn(&Endpoint) -> u32,
    random: impl FnMut(usize) -> usize,
    except: &[SocketAddr],
) -> Option<&'a Endpoint> {
    let usable = usable_like(destination, port);
    choose_from(&port.endpoints, algorithm, scope, client, state, open, random, |e| {
        usable(e) && !except.contains(&e.address)
    })
}

#[expect(clippy::too_many_arguments, reason = "each is another kind of fact; a struct would only rename the list")]
fn choose_from<'a>(
    endpoints: &'a [Endpoint],
    algorithm: Algorithm,
    scope: Scope,
    client: &Client<'_>,
    state: &mut State,
    open: impl Fn(&Endpoint) -> u32,
    mut random: impl FnMut(usize) -> usize,
    usable: impl Fn(&Endpoint) -> bool,
) -> Option<&'a Endpoint> {
    // As kube-proxy: terminating endpoints that still serve are used only where no endpoint at all is ready. What was
    // tried and failed does not make others fit: `any_ready` counts it.
    let any_ready = endpoints.iter().any(|e| e.ready);
    let fit = |e: &Endpoint| usable(e) && if any_ready { e.ready } else { e.serving };
    let (circle, count) = circles(scope).iter().find_map(|&circle| {
        let count = endpoints.iter().filter(|e| fit(e) && within(e, circle, client)).count();
        (count > 0).then_some((circle, count))
    })?;
    let mut candidates = endpoints.iter().filter(|e| fit(e) && within(e, circle, client));
    match algorithm {
        Algorithm::RoundRobin => {
            let turn = state.next % count;
            state.next = state.next.wrapping_add(1);
            candidates.nth(turn)
        }
        Algorithm::Random => candidates.nth(random(count) % count),
        Algorithm::LeastConnections => {
            // Among equals by chance, or every worker would send its first connection to the same endpoint.
            let mut best: Option<(&Endpoint, u32)> = None;
            let mut equals = 0;
            for endpoint in candidates {
                let load = open(endpoint);
                match best {
                    Some((_, least)) if load > least => continue,
                    Some((_, least)) if load == least => {
                        equals += 1;
                        if random(equals) != 0 {
                            continue;
                        }
                    }
                    _ => equals = 1,
                }
                best = Some((endpoint, load));
            }
            best.map(|(endpoint, _)| endpoint)
        }
    }
}

fn circles(scope: Scope) -> &'static [Circle] {
    match scope {
        Scope::Anywhere => &[Circle::Anywhere],
        Scope::SameZone => &[Circle::Zone, Circle::Region, Circle::Anywhere],
        Scope::SameNode => &[Circle::Node, Circle::Zone, Circle::Region, Circle::Anywhere],
    }
}

/// An unknown zone, region or node is near to nothing, also not to another unknown one.
fn within(endpoint: &Endpoint, circle: Circle, client: &Client<'_>) -> bool {
    let same = |a: &str, b: &str| !a.is_empty() && a == b;
    let (here, there) = (client.locality, &endpoint.locality);
    match circle {
        Circle::Node => endpoint.node.as_deref().is_some_and(|n| same(n, client.node)),
        // Two regions may name their zones alike.
        Circle::Zone => same(&there.zone, &here.zone) && there.region == here.region,
        Circle::Region => same(&there.region, &here.region),
        Circle::Anywhere => true,
    }
}

#[cfg(test)]
mod tests;
