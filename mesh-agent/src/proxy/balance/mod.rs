//! Which endpoint gets a new connection. Pure: health, load, chance and locality come in as values.

use crate::model::{Endpoint, Locality, ServicePort};

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

/// Chooses an endpoint of `port` for a client; `open` says how many connections an endpoint has, `random` gives a
/// number below its argument. `except` are endpoints that were tried and failed. `None`: no endpoint is fit.
pub fn choose<'a>(
    _port: &'a ServicePort,
    _algorithm: crate::model::Algorithm,
    _scope: crate::model::Scope,
    _client: &Client<'_>,
    _state: &mut State,
    _open: impl Fn(&Endpoint) -> u32,
    _random: impl FnMut(usize) -> usize,
    _except: &[std::net::SocketAddr],
) -> Option<&'a Endpoint> {
    unimplemented!()
}
