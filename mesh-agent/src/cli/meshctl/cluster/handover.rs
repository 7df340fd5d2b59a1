//! Before agents are replaced: whether those that run can hand over to those that come. Where they cannot, each node is without
//! an agent for a moment, and that is the user's to decide.

use std::io::Write;

use futures_util::StreamExt;
use serde_json::Value;

use super::objects::AGENT;
use super::ready::{is_ready, node_of, pods};
use super::{Access, check};
use crate::api_server::{ApiServer, Kind};
use crate::cli::exit::Failure;
use crate::cli::facts::Handover;
use crate::cli::meshctl::layout::wrap;

const AT_ONCE: usize = 16;

/// `objects` are those that are to be applied. Fails, before anything was changed, where the new image does not run on a node,
/// or connections would be cut and nobody has said yes.
pub(super) async fn judge(
    server: &ApiServer,
    access: &Access,
    objects: &[Value],
    yes: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let mesh = access.namespace.as_str();
    let Some(there) = server.get(&Kind::DAEMON_SET, mesh, AGENT).await? else { return Ok(()) };
    let Some(new) = objects.iter().find(|o| o["kind"] == *Kind::DAEMON_SET.kind) else { return Ok(()) };
    if image(&there) == image(new) {
        return Ok(());
    }
    let all = pods(server, mesh, AGENT).await?;
    let running: Vec<&Value> = all.iter().filter(|pod| is_ready(pod)).collect();
    let Some(first) = running.first() else { return Ok(()) };
    let node = node_of(first);
    // What the image says of itself counts, whatever it is called.
    let coming = match check::try_out(server, mesh, &new["spec"]["template"], node).await? {
        Ok(facts) => facts.handover,
        Err(why) => {
            let text = format!(
                "nothing was changed, since the new image does not run on node {node}: {why}; mend that, then run this again"
            );
            return Err(Failure::unavailable(text).into());
        }
    };
    let asked = running.iter().map(|pod| async move {
        let facts = check::facts_of(server, pod).await.ok();
        (node_of(pod).to_owned(), facts.map(|facts| facts.handover))
    });
    let running: Vec<_> = futures_util::stream::iter(asked).buffered(AT_ONCE).collect().await;
    match gap(&running, coming) {
        None => writeln!(out, "  tried     the new image on node {node}: the agents can hand over to it")?,
        Some(why) if yes => writeln!(out, "{}", wrap(&format!("  warning   {why}"), 80, 12))?,
        Some(why) => return Err(Failure::usage(format!("nothing was changed: {why}; add --yes to go on")).into()),
    }
    Ok(())
}

fn image(daemon_set: &Value) -> &Value {
    &daemon_set["spec"]["template"]["spec"]["containers"][0]["image"]
}

/// What a node goes through where its agent cannot hand over.
fn gap(running: &[(String, Option<Handover>)], coming: Handover) -> Option<String> {
    let cannot: Vec<&str> =
        running.iter().filter(|(_, is)| *is != Some(coming)).map(|(node, _)| node.as_str()).collect();
    let (_, first) = running.iter().find(|(_, is)| *is != Some(coming))?;
    let nodes = match &cannot[..] {
        all if all.len() == running.len() => "no node can hand over".to_owned(),
        [one] => format!("the agent of node {one} cannot hand over"),
        [one, rest @ ..] => format!("the agents of node {one} and {} more cannot hand over", rest.len()),
        [] => return None,
    };
    let Handover { protocol, schema } = coming;
    let of_them = match first {
        Some(Handover { protocol, schema }) => format!("of hand-over {protocol} and schema {schema}"),
        None => "of a version that does not say how it hands over".to_owned(),
    };
    Some(format!(
        "{nodes} to this version (hand-over {protocol}, schema {schema}), being {of_them}: there, open connections of the \
         mesh are cut and new ones refused until the new agent serves, for some seconds"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_that_differ_in_anything_cannot_hand_over() {
        let is = |protocol, schema| Some(Handover { protocol, schema });
        let on = |all: &[Option<Handover>]| -> Vec<(String, Option<Handover>)> {
            all.iter().enumerate().map(|(i, is)| (format!("n{i}"), *is)).collect()
        };
        let coming = Handover { protocol: 1, schema: 2 };
        assert_eq!(gap(&on(&[is(1, 2), is(1, 2)]), coming), None);
        assert_eq!(gap(&[], coming), None);
        let schema = gap(&on(&[is(1, 1), is(1, 1)]), coming).unwrap();
        assert!(schema.starts_with("no node can hand over") && schema.contains("schema 1"), "{schema}");
        let protocol = gap(&on(&[is(1, 2), is(2, 2)]), coming).unwrap();
        assert!(protocol.starts_with("the agent of node n1 cannot"), "{protocol}");
        let silent = gap(&on(&[is(1, 2), None]), coming).unwrap();
        assert!(silent.contains("does not say"), "{silent}");
    }
}
