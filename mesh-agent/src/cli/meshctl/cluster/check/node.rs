//! Judges what a node has told of itself. Pure: facts and times come in, findings go out.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::finding::{Finding, fine, warning, wrong};
use crate::cli::facts::Facts;
use crate::cni::{CniFacts, PLUGIN};
use crate::identity::Validity;
use crate::redirect::{ForeignProgram, KernelFacts};

/// What a node has told, and between which times, by the API server's clock, it did so.
#[derive(Debug, Clone)]
pub(super) struct Told {
    pub(super) facts: Facts,
    pub(super) between: Option<(SystemTime, SystemTime)>,
}

/// Where the node's folders are, as the node has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) cgroup: String,
    pub(super) bpffs: String,
    pub(super) cni_conf: String,
    pub(super) cni_bin: String,
}

/// Nobody's clock is right to the second.
const CLOCK_WARNING: Duration = Duration::from_secs(10);
/// Certificates count from five minutes before they are made.
const CLOCK_LIMIT: Duration = Duration::from_secs(300);

/// `installed`: the mesh is, so that its plugin must be there.
pub(super) fn judge(told: &Told, places: &Places, installed: bool, roots: &[Validity]) -> Vec<Finding> {
    let Facts { node, version: _, handover: _, now, kernel, cni } = &told.facts;
    let mut found = of_kernel(kernel, places);
    found.extend(others(&kernel.attached));
    match cni {
        Some(cni) => found.extend(of_cni(cni, places, installed)),
        None => found.push(fine("the CNI plugin is switched off: pods start before they are in the mesh")),
    }
    let now = UNIX_EPOCH + Duration::from_millis(*now);
    found.extend(told.between.map(|between| of_clock(now, between)));
    found.extend(of_roots(now, roots));
    found.into_iter().map(|finding| finding.on(node)).collect()
}

fn of_kernel(kernel: &KernelFacts, places: &Places) -> Vec<Finding> {
    let Places { cgroup, bpffs, .. } = places;
    let mut found: Vec<Finding> = kernel.refused.iter().map(wrong).collect();
    if found.is_empty() {
        let (release, programs, maps) = (&kernel.release, kernel.programs.len(), kernel.maps);
        found.push(fine(format!("kernel {release} takes all {programs} programs and {maps} maps")));
    }
    if let Some(why) = &kernel.cgroup {
        let why = why.split(';').next().unwrap_or_default().replace(MOUNTED, cgroup);
        found.push(wrong(format!(
            "programs cannot be attached at {cgroup}: {why}; set agent.cgroup to where the node has cgroup2, which \
             is in its /proc/mounts"
        )));
    }
    if let Some(why) = &kernel.bpffs {
        found.push(wrong(format!("nothing can be pinned at {bpffs}: {why}; on the node: mount -t bpf bpf {bpffs}")));
    }
    if kernel.cgroup.is_none() && kernel.bpffs.is_none() {
        found.push(fine(format!("cgroup2 at {cgroup} and a bpffs at {bpffs}, both to be written to")));
    }
    found
}

/// Where the chart mounts the node's cgroup2.
const MOUNTED: &str = "/host/cgroup";

/// Programs of others at our hooks.
fn others(attached: &[ForeignProgram]) -> Vec<Finding> {
    let mut found = Vec::new();
    let named = |p: &ForeignProgram| format!("{} at {}", p.program, p.hook);
    // sendmsg is of no interest to us but beside the others.
    let ours = |p: &&ForeignProgram| !p.hook.starts_with("sendmsg");
    for program in attached.iter().filter(ours).filter(|p| p.exclusive) {
        found.push(wrong(format!(
            "{} lets no other program attach beside it; stop its owner, or let it attach with BPF_F_ALLOW_MULTI",
            named(program)
        )));
    }
    let beside: Vec<String> = attached.iter().filter(|p| !p.exclusive).map(named).collect();
    if attached.iter().filter(|p| !p.exclusive).any(|p| p.hook.starts_with("connect")) {
        found.push(warning(format!(
            "other programs see pods' connections too: {}; where they choose a Service's endpoint, the mesh sees that in \
             its place: let them leave pods alone (Cilium: socketLB.hostNamespaceOnly)",
            beside.join(", ")
        )));
    } else if !beside.is_empty() {
        found.push(fine(format!("other programs are attached, none of which is in the way: {}", beside.join(", "))));
    }
    found
}

/// Plugins that send pods' traffic to another mesh.
const MESHES: [(&str, &str); 3] = [("istio-cni", "Istio"), ("linkerd-cni", "Linkerd"), ("kuma-cni", "Kuma")];

fn of_cni(cni: &CniFacts, places: &Places, installed: bool) -> Vec<Finding> {
    let Places { cni_conf, cni_bin, .. } = places;
    if cni.problem.is_some() {
        return vec![wrong(format!(
            "the CNI folder {cni_conf} cannot be read; set cni.confDir to where the node's container runtime looks"
        ))];
    }
    let Some(first) = cni.configurations.first() else {
        return vec![warning(format!(
            "there is no CNI configuration in {cni_conf}; install the cluster's network, or set cni.confDir"
        ))];
    };
    let file = format!("{cni_conf}/{}", first.file);
    let mut found = Vec::new();
    if let Some(why) = &first.problem {
        let why = why.split(';').next().unwrap_or_default();
        return vec![wrong(format!(
            "the CNI configuration {file}, the first and so the one that counts: {why}; mend it"
        ))];
    }
    let is_last = first.plugins.last().is_some_and(|last| last == PLUGIN);
    let is_there = cni.configurations.iter().any(|c| c.plugins.iter().any(|plugin| plugin == PLUGIN));
    found.push(match (installed, is_last, is_there || cni.plugin) {
        (true, true, _) if cni.plugin => fine(format!("CNI: {PLUGIN} is the last plugin in {file}")),
        (true, true, _) => wrong(format!(
            "CNI: {file} names {PLUGIN}, which is missing in {cni_bin}, so no pod starts; see the agent's log"
        )),
        (true, false, _) => wrong(format!(
            "CNI: {PLUGIN} is not the last plugin in {file}, so new pods do not wait for the mesh; see the agent's log"
        )),
        (false, _, true) => warning(format!(
            "CNI: {PLUGIN} is left in {cni_conf} or {cni_bin} of an earlier mesh; install it again, or uninstall it"
        )),
        (false, _, false) => fine(format!("CNI: {} in {file}", first.plugins.join(", "))),
    });
    if let [_, others @ ..] = &cni.configurations[..]
        && !others.is_empty()
    {
        let others: Vec<&str> = others.iter().map(|c| c.file.as_str()).collect();
        found.push(warning(format!(
            "CNI: {} configurations in {cni_conf}; {} counts, the first by name, and not {}: remove what is old",
            cni.configurations.len(),
            first.file,
            others.join(", ")
        )));
    }
    for (plugin, mesh) in MESHES {
        if first.plugins.iter().any(|there| there == plugin) {
            found.push(warning(format!(
                "CNI: {plugin} of {mesh} is in {file} too; keep each namespace in one mesh only"
            )));
        }
    }
    found
}

fn of_clock(now: SystemTime, (earliest, latest): (SystemTime, SystemTime)) -> Finding {
    let (off, word) = match (earliest.duration_since(now), now.duration_since(latest)) {
        (Ok(behind), _) => (behind, "behind"),
        (_, Ok(ahead)) => (ahead, "ahead of"),
        _ => (Duration::ZERO, "with"),
    };
    let text = format!("the clock is {} s {word} the API server's", off.as_secs());
    if off > CLOCK_LIMIT {
        wrong(format!("{text}, so that certificates do not count; set it, and keep it with NTP"))
    } else if off > CLOCK_WARNING {
        warning(format!("{text}; keep it with NTP: from 300 s on certificates do not count"))
    } else {
        fine("the clock goes with the API server's")
    }
}

fn of_roots(now: SystemTime, roots: &[Validity]) -> Option<Finding> {
    // What has expired for all is said once, of the root.
    let early = roots.iter().any(|root| now < root.not_before);
    early.then(|| wrong("by its clock the mesh's root certificate is not valid yet; set the clock"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;
    use crate::cni::Configuration;

    fn places() -> Places {
        Places {
            cgroup: "/sys/fs/cgroup".to_owned(),
            bpffs: "/sys/fs/bpf".to_owned(),
            cni_conf: "/etc/cni/net.d".to_owned(),
            cni_bin: "/opt/cni/bin".to_owned(),
        }
    }

    fn file(file: &str, plugins: &[&str]) -> Configuration {
        Configuration {
            file: file.to_owned(),
            plugins: plugins.iter().map(|p| (*p).to_owned()).collect(),
            problem: None,
        }
    }

    fn cni(files: &[Configuration], plugin: bool) -> CniFacts {
        CniFacts { problem: None, configurations: files.to_vec(), plugin }
    }

    fn foreign(hook: &str, exclusive: bool) -> ForeignProgram {
        ForeignProgram { hook: hook.to_owned(), program: "cil_sock4 (id 7)".to_owned(), exclusive }
    }

    #[track_caller]
    fn is(found: &[Finding], level: Level, words: &[&str]) {
        let fits = |f: &Finding| f.level == level && words.iter().all(|word| f.text.contains(word));
        assert!(found.iter().any(fits), "{level:?} {words:?} is not in {found:#?}");
    }

    #[test]
    fn our_plugin_must_be_the_last_of_the_file_that_counts() {
        let judged = |cni: CniFacts, installed| of_cni(&cni, &places(), installed);
        let ours = file("10-net.conflist", &["bridge", "mesh-cni"]);
        is(&judged(cni(std::slice::from_ref(&ours), true), true), Level::Fine, &["last plugin", "10-net.conflist"]);
        is(&judged(cni(std::slice::from_ref(&ours), false), true), Level::Wrong, &["missing in /opt/cni/bin"]);
        is(&judged(cni(std::slice::from_ref(&ours), true), false), Level::Warning, &["earlier mesh"]);
        let after = file("10-net.conflist", &["bridge", "mesh-cni", "portmap"]);
        is(&judged(cni(&[after], true), true), Level::Wrong, &["not the last"]);
        let two = judged(cni(&[file("00-old.conf", &["ptp"]), ours], true), true);
        is(&two, Level::Wrong, &["not the last", "00-old.conf"]);
        is(&two, Level::Warning, &["2 configurations", "00-old.conf counts", "not 10-net.conflist"]);
        let before = judged(cni(&[file("10-net.conflist", &["bridge"])], false), false);
        assert_eq!((before.len(), before[0].level), (1, Level::Fine));
        is(&judged(cni(&[], false), false), Level::Warning, &["no CNI configuration in /etc/cni/net.d"]);
        is(&judged(CniFacts { problem: Some("x".to_owned()), ..cni(&[], true) }, true), Level::Wrong, &["cni.confDir"]);
        let broken = Configuration { problem: Some("it is no JSON: x".to_owned()), ..file("a.conflist", &[]) };
        is(&judged(cni(&[broken], true), true), Level::Wrong, &["a.conflist", "no JSON", "mend it"]);
        let istio = file("10-net.conflist", &["bridge", "istio-cni", "mesh-cni"]);
        is(&judged(cni(&[istio], true), true), Level::Warning, &["istio-cni of Istio"]);
    }

    #[test]
    fn programs_of_others_count_by_their_hook() {
        is(
            &others(&[foreign("connect4", false), foreign("sendmsg4", false)]),
            Level::Warning,
            &["cil_sock4", "sendmsg4"],
        );
        is(&others(&[foreign("connect4", true)]), Level::Wrong, &["BPF_F_ALLOW_MULTI"]);
        is(&others(&[foreign("sockops", false)]), Level::Fine, &["none of which is in the way"]);
        assert_eq!(others(&[foreign("sendmsg4", true)]), [], "where the mesh attaches nothing, nobody is in its way");
        assert_eq!(others(&[]), []);
    }

    #[test]
    fn what_the_kernel_refuses_is_told_with_the_way_out() {
        let bad = KernelFacts {
            refused: vec!["the kernel 5.4 refuses the program x".to_owned()],
            cgroup: Some("/host/cgroup is not in a cgroup2 hierarchy; name a folder".to_owned()),
            bpffs: Some("no bpffs is mounted there".to_owned()),
            ..KernelFacts::default()
        };
        let found = of_kernel(&bad, &places());
        is(&found, Level::Wrong, &["refuses the program x"]);
        is(&found, Level::Wrong, &["/sys/fs/cgroup is not in a cgroup2 hierarchy; set agent.cgroup"]);
        is(&found, Level::Wrong, &["mount -t bpf bpf /sys/fs/bpf"]);
        assert!(found.iter().all(|f| f.level == Level::Wrong), "{found:#?}");
        let good = of_kernel(&KernelFacts::default(), &places());
        assert!(good.iter().all(|f| f.level == Level::Fine), "{good:#?}");
    }

    #[test]
    fn a_clock_is_judged_by_what_is_sure() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let judged = |now| of_clock(at(now), (at(1000), at(1003)));
        assert_eq!(judged(1002).level, Level::Fine);
        assert_eq!(judged(993).level, Level::Fine);
        is(&[judged(980)], Level::Warning, &["20 s behind"]);
        is(&[judged(1403)], Level::Wrong, &["400 s ahead of"]);
        let root = Validity { not_before: at(1000), not_after: at(2000) };
        assert!(of_roots(at(999), &[root]).is_some());
        assert_eq!(of_roots(at(1000), &[root]), None);
    }
}
