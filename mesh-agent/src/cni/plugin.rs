//! The plugin: one call of the container runtime, from its environment and standard input to an answer on standard output.
//!
//! A pod that is not in the mesh is never held up: where no agent answers at all it starts at once, and an agent that takes
//! the question but says nothing gets `FIRST_WORD`. One that ends without an answer has handed over, and the next is asked,
//! which is there in a moment; within the same time. A pod that is in the mesh waits for the agent, also for one that comes
//! back meanwhile, up to the entry's `timeoutSeconds`; then ADD fails, and kubelet tries again by itself. STATUS is good
//! without an agent too: what is not would make the runtime refuse every pod of the node. CHECK fails only where an agent
//! says so, DEL and GC never: the agent also notices by itself what is gone.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use super::members::Members;
use super::protocol::{Answer, Attachment, Command, MAX_LINE, Request, Said, line};
use super::spec::{Environment, Fault, Network, Pod, versions};
use super::unjudged;

/// No configuration is larger.
const MAX_INPUT: u64 = 4 * 1024 * 1024;
/// How long an agent may take to say whether the pod is in the mesh; its own limits are shorter.
const FIRST_WORD: Duration = Duration::from_secs(2);
/// For what changes nothing for the pod.
const COURTESY: Duration = Duration::from_secs(1);
/// Between two tries to reach an agent.
const RETRY: Duration = Duration::from_millis(100);
/// The same where one has just handed over.
const NEXT: Duration = Duration::from_millis(20);
/// The agent is to say what hinders it before the plugin gives up.
const MARGIN: Duration = Duration::from_millis(500);

/// The binary `mesh-cni`.
pub fn run() -> ExitCode {
    let environment = Environment::read(|name| std::env::var(name).ok());
    let mut text = String::new();
    let read = io::stdin().take(MAX_INPUT).read_to_string(&mut text);
    let result = read
        .map_err(|e| {
            Fault::new(Fault::INPUT, format!("standard input cannot be read: {e}; it is to be the configuration"))
        })
        .and_then(|_| call(&environment, &text, FIRST_WORD));
    let (answer, code) = match result {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(fault) => (fault.in_json(&text).to_string(), ExitCode::FAILURE),
    };
    let mut out = io::stdout();
    match writeln!(out, "{answer}").and_then(|()| out.flush()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// What is to be printed.
fn call(environment: &Environment, text: &str, first_word: Duration) -> Result<String, Fault> {
    let command = environment.command.as_str();
    match command {
        "VERSION" => return Ok(versions(text).to_string()),
        "ADD" | "CHECK" | "DEL" | "GC" | "STATUS" => {}
        _ => {
            let message = format!("CNI_COMMAND is `{command}`; it is to be ADD, DEL, CHECK, GC, STATUS or VERSION");
            return Err(Fault::new(Fault::ENVIRONMENT, message));
        }
    }
    let network = Network::read(text)?;
    match command {
        "ADD" | "CHECK" => {
            environment.need("CNI_CONTAINERID", &environment.container)?;
            environment.need("CNI_NETNS", &environment.netns)?;
            environment.need("CNI_IFNAME", &environment.interface)?;
            let handed_on = network.prev_result(text)?;
            let Some(pod) = environment.pod() else { return Ok(result_of(command, handed_on)) };
            let attachment = attachment(environment, &network, &pod);
            match command {
                "ADD" => add(&network, &pod, attachment, first_word)?,
                _ => check(&network, attachment)?,
            }
            Ok(result_of(command, handed_on))
        }
        "DEL" => {
            environment.need("CNI_CONTAINERID", &environment.container)?;
            tell(&network.socket, Command::Del { container: environment.container.clone() });
            Ok(String::new())
        }
        "GC" => {
            // Without the list nothing is known to be gone.
            if let Some(containers) = network.valid_containers() {
                tell(&network.socket, Command::Gc { containers });
            }
            Ok(String::new())
        }
        _ => Ok(String::new()),
    }
}

/// ADD hands on what came before; CHECK has no result.
fn result_of(command: &str, handed_on: &str) -> String {
    if command == "ADD" { handed_on.to_owned() } else { String::new() }
}

fn attachment(environment: &Environment, network: &Network, pod: &Pod) -> Attachment {
    Attachment {
        container: environment.container.clone(),
        netns: environment.netns.clone().into(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        addresses: network.addresses(&environment.interface),
        wait: 0,
    }
}

fn add(network: &Network, pod: &Pod, mut attachment: Attachment, first_word: Duration) -> Result<(), Fault> {
    let start = Instant::now();
    let deadline = start + network.timeout();
    let mut known = Members::read(&network.members);
    let mut in_mesh = known.as_ref().is_some_and(|members| members.has(pod));
    let mut cut = false;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let first_word = (start + first_word).saturating_duration_since(Instant::now());
        attachment.wait = u64::try_from(left.saturating_sub(MARGIN).as_millis()).unwrap_or(u64::MAX);
        let first = if in_mesh { left } else { left.min(first_word) };
        let request = Request::new(Command::Add(attachment.clone()));
        let why = match ask(&network.socket, &request, first, deadline, &mut in_mesh) {
            Ok(Said::Failed { message }) => return Err(Fault::new(Fault::TRY_AGAIN_LATER, message)),
            Ok(Said::Unknown) => "it is of another version".to_owned(),
            Ok(Said::Outside | Said::Enrolled | Said::Waiting | Said::Done) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => "no answer".to_owned(),
            Err(e) => {
                use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
                cut |= matches!(e.kind(), UnexpectedEof | ConnectionReset | BrokenPipe);
                e.to_string()
            }
        };
        if !in_mesh && cut && !first_word.is_zero() {
            std::thread::sleep(NEXT.min(first_word));
            continue;
        }
        if !in_mesh && cut {
            // The one that has come may have written it meanwhile.
            known = Members::read(&network.members);
            in_mesh = known.as_ref().is_some_and(|members| members.has(pod));
        }
        if !in_mesh {
            if known.is_none() {
                start_unjudged(network, pod);
            }
            return Ok(());
        }
        if deadline.saturating_duration_since(Instant::now()) <= RETRY {
            let message = format!(
                "{pod} is in the mesh and waited {} s for the agent of this node, which does not answer on {} ({why}): see \
                 what keeps the nodemesh-agent pod of this node from running; kubelet tries again by itself",
                network.timeout().as_secs(),
                network.socket.display()
            );
            return Err(Fault::new(Fault::TRY_AGAIN_LATER, message));
        }
        std::thread::sleep(RETRY);
    }
}

/// Nobody can say whether the pod is in the mesh.
fn start_unjudged(network: &Network, pod: &Pod) {
    let noted = unjudged::note(&network.members, pod);
    let outcome = match noted {
        Ok(()) => "the agent tells of it when it is back".to_owned(),
        Err(e) => format!("that cannot be noted for the agent either: {e}"),
    };
    // Some runtimes log it.
    eprintln!(
        "{pod} starts without the mesh: no agent answers, and {} cannot be read; {outcome}",
        network.members.display()
    );
}

fn check(network: &Network, attachment: Attachment) -> Result<(), Fault> {
    let request = Request::new(Command::Check(attachment));
    match ask(&network.socket, &request, COURTESY, Instant::now() + COURTESY, &mut false) {
        Ok(Said::Failed { message }) => Err(Fault::new(Fault::TRY_AGAIN_LATER, message)),
        _ => Ok(()),
    }
}

/// What the agent need not hear.
fn tell(socket: &Path, command: Command) {
    let _ = ask(socket, &Request::new(command), COURTESY, Instant::now() + COURTESY, &mut false);
}

/// The last word of the agent. `first` is the time for its first; once that says that the pod is in the mesh, so does
/// `in_mesh`, and it has until `deadline`.
fn ask(socket: &Path, request: &Request, first: Duration, deadline: Instant, in_mesh: &mut bool) -> io::Result<Said> {
    let mut stream = connect(socket)?;
    let mut until = Instant::now() + first;
    stream.set_write_timeout(Some(COURTESY))?;
    stream.write_all(&line(request))?;
    let mut heard = Vec::new();
    loop {
        let Answer { said, .. } = serde_json::from_slice(&read_line(&mut stream, &mut heard, until)?)?;
        if said != Said::Waiting {
            return Ok(said);
        }
        (*in_mesh, until) = (true, deadline);
    }
}

/// An agent that hangs lets connections queue up, and with a full queue `connect` would wait for it.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)?;
    socket.set_nonblocking(false)?;
    Ok(UnixStream::from(std::os::fd::OwnedFd::from(socket)))
}

/// The next line; what was heard of those behind it stays in `heard`.
fn read_line(stream: &mut UnixStream, heard: &mut Vec<u8>, until: Instant) -> io::Result<Vec<u8>> {
    loop {
        if let Some(end) = heard.iter().position(|b| *b == b'\n') {
            return Ok(heard.drain(..=end).collect());
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended")),
            Ok(n) => heard.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if heard.len() as u64 > MAX_LINE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer without end"));
        }
    }
}

#[cfg(test)]
mod tests;
