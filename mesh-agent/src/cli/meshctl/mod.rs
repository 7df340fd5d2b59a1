//! `meshctl`: asks one or several agents and shows what they say, by their admin sockets or in a cluster; installs,
//! checks, upgrades and removes the mesh in a cluster.

mod analyze;
mod args;
mod chart;
mod client;
mod cluster;
mod cluster_args;
mod end;
mod layout;
mod lists;
mod status;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};

use futures_util::StreamExt;
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::args::{Output, Page, Place, Task, Wish};
use self::client::Client;
pub(super) use self::layout::wrap;
use self::layout::{Screen, Table};
use super::cleanup::cleanup;
use super::exit::Failure;
use crate::admin::views::{LoggingView, StatusView};
use crate::config::Machine;

pub(super) fn run(args: impl IntoIterator<Item = OsString>) -> anyhow::Result<()> {
    let wish = match args::parse(args, |name| std::env::var(name).ok(), &Machine::here())? {
        Ok(wish) => wish,
        Err(text) => return Ok(write!(io::stdout(), "{text}")?),
    };
    let screen = Screen {
        width: terminal_width(),
        wide: wish.output == Output::Wide,
        colour: io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(perform(wish, screen, &mut io::stdout().lock()))
}

/// Of the terminal, where there is one.
pub(super) fn terminal_width() -> usize {
    Table::terminal_width().unwrap_or(Screen::WIDTH).max(Screen::WIDTH)
}

/// What one agent said.
struct Answer<T> {
    /// Name of the node; only asked for where there are several.
    node: String,
    value: T,
}

async fn perform(wish: Wish, screen: Screen, out: &mut impl Write) -> anyhow::Result<()> {
    let Wish { task, output, namespace, sockets, place, access, node } = wish;
    match &task {
        Task::Cluster(task) => return cluster::perform(task, &access, output, screen, out).await,
        Task::Uninstall(config) => return cleanup(config, out),
        Task::Analyze(analysis) => return analyze::analyze(analysis, output, namespace.as_deref(), screen, out),
        Task::End => return end::end().await,
        Task::Show(_) | Task::Log(_) | Task::Ready => {}
    }
    let in_cluster = match place {
        Place::Here => false,
        Place::Cluster => true,
        Place::WhereItIs => {
            !sockets.iter().any(|path| path.exists()) && access.is_known(|name| std::env::var(name).ok())
        }
    };
    let (clients, missing) = match in_cluster {
        true => {
            let agents = cluster::remote::agents(&access, node.as_deref()).await?;
            (agents.into_iter().map(|pod| (pod.node.clone(), Client::Pod(Box::new(pod)))).collect(), None)
        }
        false => connect(&sockets).await?,
    };
    let asked = Asked { clients, output, screen, namespace, missing: RefCell::new(missing) };
    match task {
        Task::Show(page) => match page {
            Page::Workloads => asked.list("/workloads", lists::workloads, |v| &v.namespace, out).await?,
            Page::Services => asked.list("/services", lists::services, |v| &v.namespace, out).await?,
            Page::Policies => asked.list("/policies", lists::policies, |v| &v.namespace, out).await?,
            Page::Certificates => {
                asked.list("/certificates", lists::certificates, |v| lists::namespace_of(&v.identity), out).await?;
            }
            Page::Connections => {
                asked
                    .list("/connections", lists::connections, |v| v.pod.split('/').next().unwrap_or_default(), out)
                    .await?;
            }
            Page::Problems => asked.list("/problems", lists::problems, |v| &v.object.namespace, out).await?,
            Page::Status => {
                let answers: Vec<Answer<StatusView>> = asked.get("/status").await?;
                match output {
                    Output::Json => print_json(&answers, out)?,
                    Output::Table | Output::Wide => {
                        for (i, answer) in answers.iter().enumerate() {
                            if i > 0 {
                                writeln!(out)?;
                            }
                            out.write_all(status::render(&answer.value, screen).as_bytes())?;
                        }
                    }
                }
            }
            Page::ConfigDump => {
                let answers: Vec<Answer<serde_json::Value>> = asked.get("/config_dump").await?;
                print_json(&answers, out)?;
            }
        },
        Task::Ready => {
            let pod = std::env::var(crate::app::POD_NAME).ok();
            for Answer { value, .. } in asked.get::<StatusView>("/status").await? {
                is_ready(&value, pod.as_deref())?;
            }
        }
        Task::Log(None) => {
            let answers: Vec<Answer<LoggingView>> = asked.get("/logging").await?;
            asked.log_levels(&answers, "is", out)?;
        }
        Task::Log(Some(level)) => {
            let answers = asked.each(|client| client.set_log_level(&level)).await?;
            asked.log_levels(&answers, "is now", out)?;
        }
        Task::Analyze(_) | Task::Uninstall(_) | Task::Cluster(_) | Task::End => {}
    }
    out.flush()?;
    match asked.missing.into_inner() {
        Some(failure) => Err(failure.into()),
        None => Ok(()),
    }
}

/// Those that answer, with their nodes' names, and the failure of the first that does not; that one is told after the
/// others' answers. With one socket there is nothing else to show.
async fn connect(sockets: &[std::path::PathBuf]) -> anyhow::Result<(Vec<(String, Client)>, Option<Failure>)> {
    let (mut clients, mut missing) = (Vec::new(), None);
    for socket in sockets {
        let client = Client::new(socket);
        let name = match sockets.len() {
            1 => Ok(String::new()),
            _ => client.get::<StatusView>("/status").await.map(|status| status.node),
        };
        match name {
            Ok(name) => clients.push((name, client)),
            Err(failure) => missing = missing.or(Some(failure)),
        }
    }
    match (clients.is_empty(), missing) {
        (true, Some(failure)) => Err(failure.into()),
        (_, missing) => Ok((clients, missing)),
    }
}

/// While one agent of a node takes over from another, the one that is asked may be the other.
fn is_ready(status: &StatusView, pod: Option<&str>) -> Result<(), Failure> {
    match &status.pod {
        Some(serving) if pod.is_some_and(|pod| pod != serving) => {
            Err(Failure::unavailable(format!("the agent of pod {serving} still serves this node")))
        }
        _ if status.ready => Ok(()),
        _ => Err(Failure::unavailable(format!("the agent waits for {}", status.waiting_for.join(", ")))),
    }
}

struct Asked {
    clients: Vec<(String, Client)>,
    output: Output,
    screen: Screen,
    namespace: Option<String>,
    /// Of the first that does not answer; told after the others' answers.
    missing: RefCell<Option<Failure>>,
}

/// Agents that are asked at a time.
const AT_ONCE: usize = 16;

impl Asked {
    async fn get<T: DeserializeOwned>(&self, page: &str) -> Result<Vec<Answer<T>>, Failure> {
        self.each(|client| client.get(page)).await
    }

    /// One answer from each agent that gives one, in order. None at all is a failure.
    async fn each<'a, T, F>(&'a self, ask: impl Fn(&'a Client) -> F) -> Result<Vec<Answer<T>>, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let questions = self.clients.iter().map(|(node, client)| {
            let answer = ask(client);
            async move { (node, answer.await) }
        });
        let results: Vec<_> = futures_util::stream::iter(questions).buffered(AT_ONCE).collect().await;
        let mut answers = Vec::new();
        for (node, result) in results {
            match result {
                Ok(value) => answers.push(Answer { node: node.clone(), value }),
                Err(failure) => {
                    self.missing.borrow_mut().get_or_insert(failure);
                }
            }
        }
        match self.missing.take() {
            Some(failure) if answers.is_empty() => Err(failure),
            missing => {
                self.missing.replace(missing);
                Ok(answers)
            }
        }
    }

    /// Pages that are lists: of all nodes in one table, or as JSON.
    async fn list<T: DeserializeOwned + Serialize>(
        &self,
        page: &str,
        render: fn(&[Answer<Vec<T>>], Screen) -> String,
        namespace_of: fn(&T) -> &str,
        out: &mut impl Write,
    ) -> anyhow::Result<()> {
        let mut answers: Vec<Answer<Vec<T>>> = self.get(page).await?;
        if let Some(namespace) = &self.namespace {
            for answer in &mut answers {
                answer.value.retain(|item| namespace_of(item) == namespace);
            }
        }
        match self.output {
            Output::Json => print_json(&answers, out),
            Output::Table | Output::Wide => Ok(out.write_all(render(&answers, self.screen).as_bytes())?),
        }
    }

    fn log_levels(&self, answers: &[Answer<LoggingView>], verb: &str, out: &mut impl Write) -> anyhow::Result<()> {
        if self.output == Output::Json {
            return print_json(answers, out);
        }
        for Answer { node, value } in answers {
            let of = if node.is_empty() { String::new() } else { format!(" of node {node}") };
            writeln!(out, "log level{of} {verb} {}", value.level)?;
        }
        Ok(())
    }
}

/// Of one agent what it said; of several an object with their nodes' names.
fn print_json<T: Serialize>(answers: &[Answer<T>], out: &mut impl Write) -> anyhow::Result<()> {
    let text = match answers {
        [only] if only.node.is_empty() => serde_json::to_string_pretty(&only.value)?,
        all => {
            let by_node: BTreeMap<&str, &T> = all.iter().map(|a| (a.node.as_str(), &a.value)).collect();
            serde_json::to_string_pretty(&by_node)?
        }
    };
    Ok(writeln!(out, "{text}")?)
}

#[cfg(test)]
mod tests;
