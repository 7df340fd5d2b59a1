//! What this machine's kernel can do, found by trying: maps are made and programs loaded, none is pinned or attached, and all
//! of it is gone when this returns. In: where things are to be. Out: what was seen, for `meshctl check` to judge.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use aya::EbpfLoader;
use aya::programs::Program;
use mesh_common::{map, program};
use serde::{Deserialize, Serialize};

use super::attach::{attach_type, program_name};
use super::host::{self, Cgroup};
use super::load::{OBJECT, chain, refused};
use super::{Options, sys};

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KernelFacts {
    pub release: String,
    /// What the kernel took.
    pub maps: usize,
    pub programs: Vec<String>,
    /// What it did not, or what this process may not try: a sentence each.
    pub refused: Vec<String>,
    /// Why programs cannot be attached at the cgroup; `None`: they can.
    pub cgroup: Option<String>,
    /// Why nothing can be pinned; `None`: it can.
    pub bpffs: Option<String>,
    /// Programs of others at the hooks that the mesh uses, or that change where a socket sends to.
    pub attached: Vec<ForeignProgram>,
}

/// A program of somebody else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignProgram {
    /// As bpftool has it: `connect4`.
    pub hook: String,
    /// Its name with its id.
    pub program: String,
    /// It lets no other attach beside it.
    pub exclusive: bool,
}

/// Hooks that the mesh has no program at, but which matter to whoever looks for a socket's true destination.
const OTHERS: [(&str, u32); 2] = [("sendmsg4", 14), ("sendmsg6", 15)];
/// What the kernel calls our programs.
const OURS: &str = "mesh_";
/// Enough to see that such a map can be made.
const FEW: u32 = 16;

/// Looks at everything; what is missing does not keep the rest from being looked at.
pub fn look(options: &Options) -> KernelFacts {
    let mut facts = KernelFacts { release: host::kernel_release(), ..KernelFacts::default() };
    match host::check_capabilities() {
        Ok(()) => load(&mut facts),
        Err(error) => facts.refused.push(error.to_string()),
    }
    match Cgroup::for_programs(options.cgroup.as_deref()) {
        Ok(cgroup) if !cgroup.holds_this_process() => {
            facts.cgroup =
                Some("the agent's pod is not in it, so the kernel could not tell its connections".to_owned());
        }
        Ok(cgroup) => facts.attached = others(&cgroup),
        Err(error) => facts.cgroup = Some(error.to_string()),
    }
    facts.bpffs = pinnable(&options.bpffs).err();
    facts
}

fn load(facts: &mut KernelFacts) {
    let mut loader = EbpfLoader::new();
    loader.btf(None).map_max_entries(map::ORIG_DST, FEW).map_max_entries(map::ATTESTED, FEW);
    let mut object = match loader.load(OBJECT) {
        Ok(object) => object,
        Err(error) => return facts.refused.push(format!("its maps cannot be made: {}", chain(&error))),
    };
    facts.maps = map::ALL.len();
    for name in program::CGROUP.into_iter().chain([program::SK_LOOKUP]) {
        let loaded = match object.program_mut(name) {
            Some(Program::CgroupSockAddr(program)) => program.load(),
            Some(Program::SockOps(program)) => program.load(),
            Some(Program::SkLookup(program)) => program.load(),
            _ => continue,
        };
        match loaded {
            Ok(()) => facts.programs.push(name.to_owned()),
            Err(error) => facts.refused.push(refused(name, &error).to_string()),
        }
    }
}

/// At the cgroup and above it, as far as can be seen from here.
fn others(cgroup: &Cgroup) -> Vec<ForeignProgram> {
    const ALLOW_MULTI: u32 = 2;
    let hook = |name: &'static str| Some((name.trim_start_matches(OURS), attach_type(name)?));
    let mut found = Vec::new();
    for (hook, kind) in program::CGROUP.into_iter().filter_map(hook).chain(OTHERS) {
        for path in cgroup.path.ancestors() {
            let Ok(attached) = File::open(path).and_then(|file| sys::attached(file.as_fd(), kind)) else { break };
            for program in attached.programs.into_iter().map(program_name).filter(|name| !name.starts_with(OURS)) {
                let exclusive = attached.flags & ALLOW_MULTI == 0;
                found.push(ForeignProgram { hook: hook.to_owned(), program, exclusive });
            }
        }
    }
    found
}

/// Makes a folder and takes it away again, as pins need one.
fn pinnable(bpffs: &Path) -> Result<(), String> {
    if !host::is_bpffs(bpffs) {
        return Err("no bpffs is mounted there".to_owned());
    }
    let folder = bpffs.join(format!("nodemesh-try-{}", std::process::id()));
    fs::create_dir(&folder).and_then(|()| fs::remove_dir(&folder)).map_err(|e| format!("it cannot be written to: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_no_bpffs_is_not_written_to() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(pinnable(folder.path()), Err("no bpffs is mounted there".to_owned()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_cannot_be_looked_at_does_not_hide_the_rest() {
        let options = Options { cgroup: Some("/proc".into()), bpffs: "/proc".into(), ..Options::new("n1") };
        let facts = look(&options);
        assert!(facts.cgroup.is_some_and(|why| why.contains("not in a cgroup2 hierarchy")));
        assert!(facts.bpffs.is_some() && !facts.release.is_empty());
    }

    #[test]
    fn what_an_older_agent_does_not_tell_is_empty() {
        assert_eq!(serde_json::from_str::<KernelFacts>("{}").unwrap(), KernelFacts::default());
    }
}
