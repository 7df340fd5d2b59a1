//! Where the processor's time went: the whole machine from /proc/stat, each process from /proc/<pid>/stat.
//!
//! The whole machine is what counts, for a kernel does much of a mesh's work in nobody's name. What neighbours took
//! meanwhile is known by process and taken off; kernel threads are never neighbours.

use std::collections::HashMap;
use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};

/// Ticks of /proc per second: USER_HZ, 100 in the ABI of every architecture that runs here.
const TICKS: f64 = 100.0;
const PF_KTHREAD: u64 = 0x0020_0000;

/// Which part of the run a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Server,
    Proxy,
    Spinner,
}

/// A moment.
#[derive(Debug)]
pub struct Snapshot {
    at: Instant,
    machine: Machine,
    processes: HashMap<u32, Stat>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Machine {
    busy: f64,
    softirq: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Stat {
    parent: u32,
    kernel: bool,
    user: f64,
    system: f64,
    /// Of children that have ended.
    reaped: f64,
}

/// Seconds of processor between two moments.
#[derive(Debug, Clone, Copy, Default)]
pub struct Used {
    pub wall: f64,
    /// All, without neighbours and spinner.
    pub all: f64,
    pub softirq: f64,
    pub neighbours: f64,
    pub client: f64,
    pub server: f64,
    pub proxy_user: f64,
    pub proxy_system: f64,
}

impl Snapshot {
    pub fn take() -> Result<Self> {
        let machine = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let mut processes = HashMap::new();
        for entry in fs::read_dir("/proc").context("cannot read /proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // A process may end between the listing and the reading.
            let Ok(text) = fs::read_to_string(entry.path().join("stat")) else { continue };
            processes.extend(parse_process(&text).map(|stat| (pid, stat)));
        }
        let machine = parse_machine(&machine).context("/proc/stat does not begin with the line `cpu`")?;
        Ok(Self { at: Instant::now(), machine, processes })
    }

    /// What was used since `before`, by this process `me` and those that it started, in the roles of `roles`; what its
    /// other children took until they ended is the load generator's.
    pub fn since(&self, before: &Snapshot, me: u32, roles: &[(u32, Role)]) -> Used {
        let own = |processes: &HashMap<u32, Stat>, pid| descends(processes, pid, me);
        let foreign = |snapshot: &Snapshot| -> f64 {
            let all = snapshot.processes.iter();
            let theirs = all.filter(|(pid, stat)| !stat.kernel && !own(&snapshot.processes, **pid));
            theirs.map(|(_, stat)| stat.user + stat.system + stat.reaped).sum()
        };
        let reaped = |snapshot: &Snapshot| snapshot.processes.get(&me).map_or(0.0, |stat| stat.reaped);
        let of = |role: Role, part: fn(&Stat) -> f64| -> f64 {
            let pids = roles.iter().filter(|(_, r)| *r == role).map(|(pid, _)| pid);
            let delta = |pid: &u32| {
                let (Some(now), Some(then)) = (self.processes.get(pid), before.processes.get(pid)) else { return 0.0 };
                part(now) - part(then)
            };
            pids.map(delta).sum()
        };
        let neighbours = (foreign(self) - foreign(before)).max(0.0);
        let busy = self.machine.busy - before.machine.busy;
        Used {
            wall: (self.at - before.at).as_secs_f64(),
            all: busy - neighbours - of(Role::Spinner, |s| s.user + s.system),
            softirq: self.machine.softirq - before.machine.softirq,
            neighbours,
            client: reaped(self) - reaped(before),
            server: of(Role::Server, |s| s.user + s.system),
            proxy_user: of(Role::Proxy, |s| s.user),
            proxy_system: of(Role::Proxy, |s| s.system),
        }
    }
}

fn descends(processes: &HashMap<u32, Stat>, mut pid: u32, ancestor: u32) -> bool {
    // Parents are older than children, so this ends; the bound is for ids that were reused between two readings.
    for _ in 0..64 {
        if pid == ancestor {
            return true;
        }
        match processes.get(&pid) {
            Some(stat) if stat.parent != 0 => pid = stat.parent,
            _ => return false,
        }
    }
    false
}

fn parse_machine(text: &str) -> Option<Machine> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<f64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is in user already. Steal is no work of ours.
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else { return None };
    Some(Machine { busy: (user + nice + system + irq + softirq) / TICKS, softirq: (irq + softirq) / TICKS })
}

fn parse_process(text: &str) -> Option<Stat> {
    // The name, in parentheses, may hold anything.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    #[expect(clippy::cast_precision_loss, reason = "ticks stay far below 2^52")]
    let seconds = |at: usize| number(at).map(|ticks| ticks as f64 / TICKS);
    Some(Stat {
        parent: u32::try_from(number(1)?).ok()?,
        kernel: number(6)? & PF_KTHREAD != 0,
        user: seconds(11)?,
        system: seconds(12)?,
        reaped: seconds(13)? + seconds(14)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_machine() {
        let got = parse_machine("cpu  100 10 50 900 7 1 39 5 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n").unwrap();
        assert!((got.busy - 2.0).abs() < 1e-9);
        assert!((got.softirq - 0.4).abs() < 1e-9);
    }

    #[test]
    fn reads_a_process_whose_name_holds_anything() {
        let text = "42 (a ) b) S 7 42 42 0 -1 4194304 1 2 3 4 250 50 30 20 20 0 1 0 5 6 7";
        let expected = Stat { parent: 7, kernel: false, user: 2.5, system: 0.5, reaped: 0.5 };
        assert_eq!(parse_process(text), Some(expected));
        assert_eq!(parse_process("42 (cut) S 7"), None);
    }

    fn stat(parent: u32, user: f64, reaped: f64) -> Stat {
        Stat { parent, kernel: false, user, system: 0.0, reaped }
    }

    #[test]
    fn splits_what_was_used() {
        let at = Instant::now();
        // 10 is us, 11 the server, 12 a proxy, 13 the spinner; 20 a neighbour; 2 a kernel thread.
        let moment = |busy, reaped, server, proxy, spinner, neighbour, kernel| Snapshot {
            at,
            machine: Machine { busy, softirq: 0.0 },
            processes: HashMap::from([
                (10, stat(1, 0.0, reaped)),
                (11, stat(10, server, 0.0)),
                (12, stat(10, proxy, 0.0)),
                (13, stat(10, spinner, 0.0)),
                (20, stat(1, neighbour, 0.0)),
                (2, Stat { kernel: true, ..stat(0, kernel, 0.0) }),
            ]),
        };
        let before = moment(100.0, 1.0, 1.0, 1.0, 1.0, 50.0, 1.0);
        let after = moment(110.0, 2.0, 3.0, 4.0, 2.0, 51.0, 3.0);
        let roles = [(11, Role::Server), (12, Role::Proxy), (13, Role::Spinner)];
        let used = after.since(&before, 10, &roles);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
        close(used.neighbours, 1.0);
        close(used.client, 1.0);
        close(used.server, 2.0);
        close(used.proxy_user, 3.0);
        close(used.all, 8.0);
    }

    #[test]
    fn this_machine_can_be_read() {
        let before = Snapshot::take().unwrap();
        let after = Snapshot::take().unwrap();
        assert!(after.since(&before, std::process::id(), &[]).wall >= 0.0);
    }
}
