//! All objects of one kind, and every change of them, for as long as somebody listens.

use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use kube::api::{Api, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::Value;

use super::{ApiError, ApiServer, Kind};

/// What has been heard of one kind.
#[derive(Debug)]
pub enum Change {
    /// A list begins: what is not in it by `Complete` is gone.
    Begin,
    /// Part of the list.
    Listed(Value),
    /// The list is whole.
    Complete,
    Applied(Value),
    Deleted(Value),
    /// It is tried again, slower and slower. What was known stays.
    Failed(ApiError),
}

/// A watch that goes on through every failure: it begins anew with a list where it has missed something. `fields` is a
/// field selector, such as `spec.nodeName=n1`, or empty.
pub fn watch(
    server: &ApiServer,
    kind: &Kind,
    namespace: Option<&str>,
    fields: &str,
) -> impl Stream<Item = Change> + Send + 'static {
    let resource = kind.resource();
    let api: Api<DynamicObject> = match namespace {
        Some(namespace) if kind.namespaced => Api::namespaced_with(server.client(), namespace, &resource),
        _ => Api::all_with(server.client(), &resource),
    };
    let mut config = watcher::Config::default().any_semantic().page_size(PAGE);
    if !fields.is_empty() {
        config = config.fields(fields);
    }
    let (url, what) = (server.url().to_owned(), format!("watch {}", kind.path(namespace.unwrap_or_default(), None)));
    let (api_version, kind) = (kind.api_version(), kind.kind.to_string());
    let value = move |mut object: DynamicObject| {
        // As large as all else together, and nobody reads it.
        object.metadata.managed_fields = None;
        let mut value = object.data;
        value["apiVersion"] = api_version.clone().into();
        value["kind"] = kind.clone().into();
        value["metadata"] = serde_json::to_value(object.metadata).expect("metadata is plain data");
        value
    };
    watcher(api, config).backoff(Retry::default()).map(move |event| match event {
        Ok(Event::Init) => Change::Begin,
        Ok(Event::InitApply(object)) => Change::Listed(value(object)),
        Ok(Event::InitDone) => Change::Complete,
        Ok(Event::Apply(object)) => Change::Applied(value(object)),
        Ok(Event::Delete(object)) => Change::Deleted(value(object)),
        Err(e) => Change::Failed(failure(&url, &what, e)),
    })
}

fn failure(url: &str, what: &str, error: watcher::Error) -> ApiError {
    match error {
        watcher::Error::InitialListFailed(e) | watcher::Error::WatchStartFailed(e) | watcher::Error::WatchFailed(e) => {
            ApiError::from_kube(url, what, e)
        }
        watcher::Error::WatchError(status) => ApiError::from_kube(url, what, kube::Error::Api(status)),
        e @ watcher::Error::NoResourceVersion => ApiError::Other { what: what.to_owned(), why: e.to_string() },
    }
}

/// Soon at first, and never later than a mesh may lag behind once the API server is back.
#[derive(Debug, Default)]
struct Retry {
    failures: u32,
    last: Option<Instant>,
}

/// Objects in one answer of a list: a page is read as a whole, and pods may be large.
const PAGE: u32 = 50;
const FIRST: Duration = Duration::from_millis(200);
const LAST: Duration = Duration::from_secs(5);
/// After so long without a failure the next one is a first one again.
const FORGOTTEN: Duration = Duration::from_secs(60);

impl Retry {
    fn after(&mut self, now: Instant) -> Duration {
        if self.last.is_some_and(|last| now.duration_since(last) > FORGOTTEN) {
            self.failures = 0;
        }
        self.last = Some(now);
        let wait = FIRST.saturating_mul(1 << self.failures.min(10)).min(LAST);
        self.failures = self.failures.saturating_add(1);
        wait
    }
}

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        // Thousands of nodes must not come back in step.
        Some(self.after(Instant::now()).mul_f64(rand::random_range(0.8..1.2)))
    }
}

impl kube::runtime::utils::Backoff for Retry {
    /// Not here: a watch that begins anew says so before it has asked anything, and this is called for it. An API server
    /// that refuses would be asked again and again without a pause.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use kube::runtime::utils::Backoff;

    use super::*;

    #[test]
    fn failures_in_a_row_wait_longer_also_when_each_try_begins_anew() {
        let (mut retry, start) = (Retry::default(), Instant::now());
        let mut at = |seconds| {
            retry.reset();
            retry.after(start + Duration::from_secs(seconds)).as_millis()
        };
        assert_eq!([0, 1, 2, 4, 8, 13, 18].map(&mut at), [200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(at(79), 200);
    }
}
