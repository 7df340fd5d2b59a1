//! Before anything is measured: the mode does what it claims. Else the figures would be those of a bypass.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::Pod;

use crate::certs::{Ca, Certificate};
use crate::envoy;
use crate::plan::{Mode, name};
use crate::run;
use crate::up::{BODY, Up};

/// What curl saw.
struct Answer {
    status: String,
    bytes: usize,
    error: String,
}

impl Answer {
    fn is_whole(&self) -> bool {
        self.status == "200" && self.bytes == BODY
    }
}

pub fn check(up: &Up<'_>) -> Result<()> {
    run::check()?;
    let checked = match up.mode {
        Mode::NoMesh => answers(up),
        Mode::EnvoyC1 | Mode::EnvoyC2 => envoys(up),
        Mode::Ours => ours(up),
    };
    run::check()?;
    checked.with_context(|| format!("mode {} does not do what it claims, so nothing is measured", name(up.mode)))
}

/// Every client reaches the server.
fn answers(up: &Up<'_>) -> Result<()> {
    for client in &up.clients {
        let got = curl(client, &up.url(), None)?;
        ensure!(
            got.is_whole(),
            "{} gets no answer from the server (status {}, {} bytes): {}",
            client.name(),
            got.status,
            got.bytes,
            got.error
        );
        run::check()?;
    }
    Ok(())
}

fn refuses_plaintext(up: &Up<'_>) -> Result<()> {
    let got = curl(&up.outsider, &up.url(), None)?;
    ensure!(got.status == "000", "a pod outside of the mesh got status {} from the server in plaintext", got.status);
    Ok(())
}

/// The server's end of TLS turns down a certificate of a CA that is not its own, by an alert: a handshake that fails for
/// another reason proves nothing.
fn refuses_foreign_ca(up: &Up<'_>, port: u16) -> Result<()> {
    let foreign = Ca::make(up.mesh.dir(), "foreign")?.issue("client", &up.client.spiffe_id())?;
    // s_client only reads: a client that wrote could meet a reset in place of the alert.
    let output = up
        .outsider
        .command("timeout")
        .args(["10", "openssl", "s_client", "-ign_eof", "-connect", &format!("{}:{port}", up.server.v4())])
        .arg("-cert")
        .arg(&foreign.chain)
        .arg("-key")
        .arg(&foreign.key)
        .stdin(Stdio::null())
        .output()
        .context("cannot run openssl; `cargo xtask setup` installs it")?;
    let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
    ensure!(
        said.contains("alert"),
        "the server did not turn down a certificate of a foreign CA by an alert; openssl said: {}",
        run::last_line(&said)
    );
    Ok(())
}

fn envoys(up: &Up<'_>) -> Result<()> {
    const COUNTERS: [&str; 3] = ["listener.inbound.ssl.handshake", "bench.rbac.allowed", "bench.rbac.denied"];
    let ca = up.ca.as_ref().context("Envoy's mode has a CA")?;
    let counters = || COUNTERS.iter().map(|name| envoy::counter(&up.server, name)).collect::<Result<Vec<u64>>>();
    let client_tls = || envoy::counter(&up.client, "cluster.outbound.ssl.handshake");
    let (before, client_before) = (counters()?, client_tls()?);
    answers(up)?;
    refuses_plaintext(up)?;
    // The same request by hand: with the client's certificate it must succeed, or the refusals below show nothing.
    let url = format!("https://{}/", up.http());
    let known = ca.issue("by-hand", &up.client.spiffe_id())?;
    let got = curl(&up.outsider, &url, Some(&known))?;
    ensure!(got.is_whole(), "the client's own certificate is refused: {}", got.error);
    let stranger = ca.issue("stranger", &up.stranger.spiffe_id())?;
    let got = curl(&up.outsider, &url, Some(&stranger))?;
    ensure!(got.status == "000", "an identity that no rule allows got status {}", got.status);
    refuses_foreign_ca(up, up.http().port())?;
    let (after, client_after) = (counters()?, client_tls()?);
    for ((name, before), after) in COUNTERS.iter().zip(before).zip(after) {
        ensure!(after > before, "Envoy's counter {name} stands still at {after}");
    }
    ensure!(client_after > client_before, "the client's Envoy made no TLS handshake");
    Ok(())
}

fn ours(up: &Up<'_>) -> Result<()> {
    const HBONE: u16 = 15008;
    let ours = up.ours().context("our mode has agents")?;
    let before = ours.mutual_tls()?;
    answers(up)?;
    refuses_plaintext(up)?;
    let got = curl(&up.stranger, &up.url(), None)?;
    ensure!(got.status == "000", "an identity that no rule allows got status {}", got.status);
    refuses_foreign_ca(up, HBONE)?;
    let after = ours.mutual_tls()?;
    if after <= before {
        bail!("the server's agent counts no connection with mutual TLS ({before} before, {after} after)");
    }
    Ok(())
}

fn curl(pod: &Pod, url: &str, certificate: Option<&Certificate>) -> Result<Answer> {
    let mut command = pod.command("curl");
    command.args(["-sS", "--http1.1", "--noproxy", "*", "--max-time", "10", "-o", "/dev/null"]);
    command.args(["-w", "%{http_code} %{size_download}"]);
    if let Some(certificate) = certificate {
        let path = |path: &Path| path.display().to_string();
        command.args(["--insecure", "--cert", &path(&certificate.chain), "--key", &path(&certificate.key)]);
    }
    let output = command.arg(url).output().context("cannot run curl; `cargo xtask setup` installs it")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (status, bytes) = text.trim().split_once(' ').unwrap_or(("000", "0"));
    Ok(Answer {
        status: status.to_owned(),
        bytes: bytes.parse().unwrap_or(0),
        error: run::last_line(&String::from_utf8_lossy(&output.stderr)).to_owned(),
    })
}
