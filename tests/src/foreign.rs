//! Somebody else's eBPF program at a cgroup, beside that of the agent.
#![expect(unsafe_code, reason = "bpf(2) has no safe interface for a program of a few instructions")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// As `bpftool` and messages call it.
pub const FOREIGN_NAME: &str = "foreign_conn";

/// How a foreign program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    /// As nobody does it any more: no other may be there.
    Exclusive,
    /// BPF_F_ALLOW_MULTI: beside others.
    Multi,
}

/// Attaches a connect4 program [`FOREIGN_NAME`] that refuses one port and lets all else pass. The cgroup takes it along
/// when it goes.
pub fn attach_foreign(cgroup: &Path, attachment: Attachment, refused_port: u16) -> io::Result<()> {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u64; 2],
        version_flags: u64,
        name: [u8; 16],
        ifindex: u32,
        attach_type: u32,
    }
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        attach_type: u32,
        flags: u32,
    }
    const PROG_LOAD: u32 = 5;
    const PROG_ATTACH: u32 = 8;
    const SOCK_ADDR: u32 = 18;
    const CONNECT4: u32 = 10;
    const ALLOW_MULTI: u32 = 2;
    let port = u64::from(refused_port.to_be());
    let instructions: [u64; 6] = [
        0x0018_1261,              // r2 = ctx->user_port
        port << 32 | 0x0002_0215, // if r2 == port goto +2
        0x0000_0001_0000_00b7,    // r0 = 1
        0x95,                     // exit
        0x0000_0000_0000_00b7,    // r0 = 0
        0x95,                     // exit
    ];
    let mut load = Load {
        kind: SOCK_ADDR,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        attach_type: CONNECT4,
        ..Load::default()
    };
    load.name[..FOREIGN_NAME.len()].copy_from_slice(FOREIGN_NAME.as_bytes());
    // SAFETY: a `repr(C)` prefix of the attributes of this command, its pointers valid.
    let program = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw mut load, size_of::<Load>()) };
    if program < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else has it.
    let program = unsafe { OwnedFd::from_raw_fd(program as i32) };
    let target = File::open(cgroup)?;
    let flags = if attachment == Attachment::Multi { ALLOW_MULTI } else { 0 };
    let mut attach =
        Attach { target: target.as_raw_fd() as u32, program: program.as_raw_fd() as u32, attach_type: CONNECT4, flags };
    // SAFETY: as above.
    match unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw mut attach, size_of::<Attach>()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
