//! A route that hands on to another VirtualService: a request must be what both ask for, and what the other's route does not
//! say, this one's says.

use super::Route;
use crate::model::http::{HeaderEdits, HttpMatch, PathMatch, Rewrite, Timeouts, ValueMatch};

impl Route {
    /// This route, in the place of one that delegates to it. `None`: no request is what both ask for, or it cannot be told.
    pub fn below(&self, root: &Self) -> Option<Self> {
        let all = [(None, HttpMatch::default())];
        let of = |route: &Self| if route.matches.is_empty() { all.to_vec() } else { route.matches.clone() };
        let own = of(self);
        let mut matches = Vec::new();
        for (root_port, asked) in &of(root) {
            for (port, also) in &own {
                let port = match (root_port, port) {
                    (Some(a), Some(b)) if a != b => continue,
                    (a, b) => a.or(*b),
                };
                matches.extend(both(asked, also).map(|both| (port, both)));
            }
        }
        if matches.is_empty() {
            return None;
        }
        let mut made = self.clone();
        made.matches = matches;
        let (own, less) = (&mut made.template, &root.template);
        own.name = match (&less.name, &own.name) {
            (Some(root), Some(name)) => Some(format!("{root}-{name}").into()),
            (root, name) => name.clone().or_else(|| root.clone()),
        };
        if own.rewrite == Rewrite::default() {
            own.rewrite = less.rewrite.clone();
        }
        if own.timeouts == Timeouts::default() {
            own.timeouts = less.timeouts;
        }
        if own.fault.is_none() {
            own.fault = less.fault.clone();
        }
        if own.cors.is_none() {
            own.cors = less.cors.clone();
        }
        if own.request == HeaderEdits::default() && own.response == HeaderEdits::default() {
            (own.request, own.response) = (less.request.clone(), less.response.clone());
        }
        if !self.says_retries && root.says_retries {
            own.retry = less.retry.clone();
        }
        if made.mirrors.is_empty() {
            made.mirrors = root.mirrors.clone();
        }
        Some(made)
    }
}

/// What asks for both.
fn both(root: &HttpMatch, own: &HttpMatch) -> Option<HttpMatch> {
    let value = |a: &Option<ValueMatch>, b: &Option<ValueMatch>| match (a, b) {
        (Some(a), Some(b)) => (a == b).then(|| Some(a.clone())),
        (a, b) => Some(a.clone().or_else(|| b.clone())),
    };
    let namespace = match (&root.source.namespace, &own.source.namespace) {
        (Some(a), Some(b)) if a != b => return None,
        (a, b) => a.clone().or_else(|| b.clone()),
    };
    let (path, ignore_path_case) = match (&root.path, &own.path) {
        (Some(outer), Some(inner)) => {
            if !is_within(inner, outer, root.ignore_path_case) || root.ignore_path_case && !own.ignore_path_case {
                return None;
            }
            (Some(inner.clone()), own.ignore_path_case)
        }
        (Some(path), None) => (Some(path.clone()), root.ignore_path_case),
        (None, path) => (path.clone(), own.ignore_path_case),
    };
    let mut made = HttpMatch {
        path,
        ignore_path_case,
        method: value(&root.method, &own.method)?,
        scheme: value(&root.scheme, &own.scheme)?,
        authority: value(&root.authority, &own.authority)?,
        headers: [root.headers.as_slice(), &own.headers].concat(),
        without_headers: [root.without_headers.as_slice(), &own.without_headers].concat(),
        query: [root.query.as_slice(), &own.query].concat(),
        source: crate::model::http::SourceMatch {
            namespace,
            labels: [root.source.labels.as_slice(), &own.source.labels].concat(),
        },
    };
    made.source.labels.sort();
    made.source.labels.dedup();
    Some(made)
}

/// Whether each path that `inner` takes, `outer` takes too.
fn is_within(inner: &PathMatch, outer: &PathMatch, ignore_case: bool) -> bool {
    let begins = |text: &str, prefix: &str| match ignore_case {
        true => text.get(..prefix.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(prefix)),
        false => text.starts_with(prefix),
    };
    match (inner, outer) {
        (PathMatch::Exact(inner) | PathMatch::Prefix(inner), PathMatch::Prefix(outer)) => begins(inner, outer),
        (inner, outer) => inner == outer,
    }
}
