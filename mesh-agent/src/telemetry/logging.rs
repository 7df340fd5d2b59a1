//! The agent's own log: tracing to stderr, text or JSON, with a filter that can be changed while it runs.

use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use super::LogFormat;

/// Reads and changes the filter. Cheap to clone.
#[derive(Clone)]
pub struct LogLevel {
    reload: Arc<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>,
    present: Arc<Mutex<String>>,
}

/// Installs the process's log. The error is a sentence: a filter that cannot be read, or a log that is there already.
pub fn init(filter: &str, format: LogFormat) -> Result<LogLevel, String> {
    let (filtered, level) = LogLevel::new(filter)?;
    let registry = tracing_subscriber::registry().with(filtered);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => {
            use std::io::IsTerminal;
            registry.with(layer.with_ansi(std::io::stderr().is_terminal())).try_init()
        }
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    }
    .map_err(|e| e.to_string())?;
    Ok(level)
}

impl LogLevel {
    pub(crate) fn new(filter: &str) -> Result<(reload::Layer<EnvFilter, Registry>, Self), String> {
        let (layer, handle) = reload::Layer::new(parse(filter)?);
        let reload = move |filter| handle.reload(filter).map_err(|e| e.to_string());
        Ok((layer, Self { reload: Arc::new(reload), present: Arc::new(Mutex::new(filter.to_owned())) }))
    }

    pub fn get(&self) -> String {
        self.present.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `debug`, or `target=level,...`. The error is a sentence.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        // Under the lock, so that what `get` says is in force even when two change it at once.
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        (self.reload)(parse(filter)?)?;
        filter.clone_into(&mut present);
        Ok(())
    }
}

/// A filter as `--log` and `meshctl log` take it. EnvFilter alone would take a misspelt level for a target.
pub fn parse(filter: &str) -> Result<EnvFilter, String> {
    let bad = || format!("`{filter}` is no log filter; write error, warn, info, debug, trace, off or target=level,...");
    let level = |text: &str| !text.is_empty() && text.parse::<tracing_subscriber::filter::LevelFilter>().is_ok();
    let good = |part: &str| match part.rsplit_once('=') {
        Some((target, name)) => !target.is_empty() && level(name),
        None => level(part),
    };
    if !filter.split(',').all(good) {
        return Err(bad());
    }
    // Each failure of theirs is an error to us, which is said once and in words; they say it at each try.
    let quiet: String =
        CHATTY.iter().filter(|name| !filter.contains(*name)).map(|name| format!(",{name}=off")).collect();
    format!("{filter}{quiet}").parse().map_err(|_| bad())
}

/// Crates whose log repeats what ours says.
const CHATTY: [&str; 2] = ["kube_client", "kube_runtime"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_changes_while_it_runs_and_a_bad_one_changes_nothing() {
        let (layer, level) = LogLevel::new("warn").unwrap();
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            assert!(!tracing::enabled!(tracing::Level::DEBUG));
            level.set("info,mesh_agent=debug").unwrap();
            assert!(tracing::enabled!(target: "mesh_agent", tracing::Level::DEBUG));
            assert_eq!(level.get(), "info,mesh_agent=debug");
            for bad in ["", "loud", "mesh_agent=loud", "=info", "info,,warn"] {
                let error = level.set(bad).unwrap_err();
                assert!(error.starts_with(&format!("`{bad}` is no log filter")), "{error}");
            }
            assert_eq!(level.get(), "info,mesh_agent=debug");
            assert!(tracing::enabled!(target: "mesh_agent", tracing::Level::DEBUG));
            assert!(!tracing::enabled!(target: "kube_client", tracing::Level::ERROR));
            level.set("info,kube_client=warn").unwrap();
            assert!(tracing::enabled!(target: "kube_client", tracing::Level::ERROR));
        });
    }
}
