//! Links: programs to the cgroup, and one sk_lookup to each pod's netns. In: a prepared object. Out: pinned links, which
//! stay when the agent goes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{CgroupAttachMode, CgroupSockAddr, Program, ProgramError, SkLookup, SockOps, loaded_programs};
use mesh_common::program;

use super::host::Cgroup;
use super::load::refused;
use super::{RedirectError, sys};

/// Loads a program of [`program::CGROUP`], attaches it and pins the link.
pub fn to_cgroup(object: &mut Ebpf, name: &'static str, cgroup: &Cgroup, pin: &Path) -> Result<(), RedirectError> {
    let found = object.program_mut(name).ok_or_else(|| missing(name))?;
    let link: FdLink = match found {
        Program::CgroupSockAddr(sock_addr) => {
            sock_addr.load().map_err(|error| refused(name, &error))?;
            sock_addr_link(sock_addr, cgroup).map_err(|error| not_attached(name, cgroup, &error))?
        }
        Program::SockOps(sockops) => {
            sockops.load().map_err(|error| refused(name, &error))?;
            sockops_link(sockops, cgroup).map_err(|error| not_attached(name, cgroup, &error))?
        }
        _ => return Err(missing(name)),
    };
    pin_link(link, pin)
}

// `Single` means "no flags": links are always shared. aya's `AllowMultiple` would be refused with EINVAL.
fn sock_addr_link(program: &mut CgroupSockAddr, cgroup: &Cgroup) -> Result<FdLink, ProgramError> {
    let id = program.attach(&cgroup.file, CgroupAttachMode::Single)?;
    let link = program.take_link(id)?;
    link.try_into().map_err(|_| ProgramError::NotAttached)
}

fn sockops_link(program: &mut SockOps, cgroup: &Cgroup) -> Result<FdLink, ProgramError> {
    let id = program.attach(&cgroup.file, CgroupAttachMode::Single)?;
    let link = program.take_link(id)?;
    link.try_into().map_err(|_| ProgramError::NotAttached)
}

/// Loads `sk_lookup`, attaches it to a pod's netns and pins the link.
pub fn to_netns(object: &mut Ebpf, netns: BorrowedFd<'_>, pin: &Path) -> Result<(), RedirectError> {
    let name = program::SK_LOOKUP;
    let found = object.program_mut(name).ok_or_else(|| missing(name))?;
    let sk_lookup: &mut SkLookup = found.try_into().map_err(|_| missing(name))?;
    sk_lookup.load().map_err(|error| refused(name, &error))?;
    let attached = sk_lookup.attach(netns).and_then(|id| sk_lookup.take_link(id));
    let link = attached.map_err(|error| RedirectError::Attach {
        program: name,
        target: "the pod's network namespace".into(),
        source: os_error(&error),
    })?;
    pin_link(link.into(), pin)
}

/// Is there a link pinned that still opens?
pub fn is_pinned(pin: &Path) -> bool {
    PinnedLink::from_pin(pin).is_ok()
}

fn pin_link(link: FdLink, pin: &Path) -> Result<(), RedirectError> {
    let failed = |source| RedirectError::Pin { path: pin.to_owned(), source };
    link.pin(pin).map(drop).map_err(|error| failed(io::Error::other(error)))
}

fn missing(name: &str) -> RedirectError {
    RedirectError::Object { reason: format!("it has no program {name} of the right kind") }
}

/// EPERM has one cause here, capabilities having been checked: somebody holds this hook exclusively.
fn not_attached(name: &'static str, cgroup: &Cgroup, error: &ProgramError) -> RedirectError {
    let source = os_error(error);
    if source.raw_os_error() == Some(libc::EPERM)
        && let Some((path, foreign)) = exclusive_holder(name, cgroup)
    {
        return RedirectError::ForeignExclusive { program: name, cgroup: path, foreign };
    }
    RedirectError::Attach { program: name, target: cgroup.path.display().to_string(), source }
}

/// The kernel's number of the hook.
pub(super) fn attach_type(name: &str) -> Option<u32> {
    Some(match name {
        program::SOCKOPS => 3,
        program::CONNECT4 => 10,
        program::CONNECT6 => 11,
        program::PEERNAME4 => 29,
        program::PEERNAME6 => 30,
        program::SOCKNAME4 => 31,
        program::SOCKNAME6 => 32,
        _ => return None,
    })
}

/// The program that is attached without BPF_F_ALLOW_MULTI at the cgroup or above, by name and id.
fn exclusive_holder(name: &str, cgroup: &Cgroup) -> Option<(std::path::PathBuf, String)> {
    const ALLOW_MULTI: u32 = 2;
    let kind = attach_type(name)?;
    for path in cgroup.path.ancestors() {
        let attached = File::open(path).and_then(|file| sys::attached(file.as_fd(), kind)).ok()?;
        if attached.flags & ALLOW_MULTI == 0
            && let Some(id) = attached.programs.first()
        {
            return Some((path.to_owned(), program_name(*id)));
        }
    }
    None
}

pub(super) fn program_name(id: u32) -> String {
    let info = loaded_programs().filter_map(Result::ok).find(|info| info.id() == id);
    match info.as_ref().and_then(|info| info.name_as_str()).filter(|name| !name.is_empty()) {
        Some(name) => format!("{name} (id {id})"),
        None => format!("with id {id}"),
    }
}

/// The errno somewhere inside of aya's error.
fn os_error(error: &ProgramError) -> io::Error {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = source {
        if let Some(code) = inner.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return io::Error::from_raw_os_error(code);
        }
        if let Some(syscall) = inner.downcast_ref::<aya::sys::SyscallError>()
            && let Some(code) = syscall.io_error.raw_os_error()
        {
            return io::Error::from_raw_os_error(code);
        }
        source = inner.source();
    }
    io::Error::other(error.to_string())
}
