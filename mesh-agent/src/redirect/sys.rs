//! bpf(2), where aya has no call for it, or one that takes a lock or `&mut`. In: plain values. Out: `io::Result`.
//!
//! All `unsafe` of the map accesses is here: the callers' key and value types are checked against the map when it is
//! opened (`maps::open`).
#![expect(unsafe_code, reason = "bpf(2), which aya does not offer for these calls")]

use std::ffi::{CString, c_long};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_UPDATE_ELEM: u32 = 2;
const MAP_DELETE_ELEM: u32 = 3;
const MAP_GET_NEXT_KEY: u32 = 4;
const OBJ_GET: u32 = 7;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const PROG_QUERY: u32 = 16;
const MAP_LOOKUP_AND_DELETE_ELEM: u32 = 21;
const LINK_DETACH: u32 = 34;

/// Attachments of a cgroup, its ancestors' left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub programs: Vec<u32>,
    /// 0: exclusive.
    pub flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct MapElem {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoByFd {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgQuery {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct MapInfo {
    pub map_type: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
}

fn bpf<T>(command: u32, attr: &mut T) -> io::Result<c_long> {
    // SAFETY: `attr` is a `repr(C)` prefix of `union bpf_attr` for this command, its length is told, and every pointer in
    // it is to memory that the caller borrows for the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

fn elem(map: BorrowedFd<'_>) -> MapElem {
    MapElem { map_fd: map.as_raw_fd() as u32, ..MapElem::default() }
}

pub fn lookup<K, V: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    take(MAP_LOOKUP_ELEM, map, key)
}

pub fn lookup_and_delete<K, V: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    take(MAP_LOOKUP_AND_DELETE_ELEM, map, key)
}

fn take<K, V: aya::Pod>(command: u32, map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attr = MapElem { key: address(key), value: value.as_mut_ptr() as u64, ..elem(map) };
    match bpf(command, &mut attr) {
        // SAFETY: the kernel has written a whole value, and any bytes are a valid `Pod`.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// One u64 per possible CPU, summed.
pub fn lookup_per_cpu(map: BorrowedFd<'_>, key: u32, cpus: usize) -> io::Result<u64> {
    let mut values = vec![0u64; cpus];
    let mut attr = MapElem { key: address(&key), value: values.as_mut_ptr() as u64, ..elem(map) };
    bpf(MAP_LOOKUP_ELEM, &mut attr)?;
    Ok(values.iter().sum())
}

pub fn update<K, V>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = MapElem { key: address(key), value: address(value), ..elem(map) };
    bpf(MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// True where there was something to delete.
pub fn delete<K>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = MapElem { key: address(key), ..elem(map) };
    match bpf(MAP_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        // A sock map says EINVAL for an empty slot.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(false),
        Err(error) => Err(error),
    }
}

pub fn keys<K: aya::Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<K>> {
    let mut all = Vec::new();
    let mut last: Option<K> = None;
    loop {
        let mut next = MaybeUninit::<K>::uninit();
        let key = last.as_ref().map_or(0, address);
        let mut attr = MapElem { key, value: next.as_mut_ptr() as u64, ..elem(map) };
        match bpf(MAP_GET_NEXT_KEY, &mut attr) {
            Ok(_) => {
                // SAFETY: the kernel has written a whole key, and any bytes are a valid `Pod`.
                let key = unsafe { next.assume_init() };
                all.push(key);
                last = Some(key);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(all),
            Err(error) => return Err(error),
        }
    }
}

pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjGet { pathname: path.as_ptr() as u64, ..ObjGet::default() };
    let fd = bpf(OBJ_GET, &mut attr)?;
    // SAFETY: a new descriptor that nobody else owns (close-on-exec is the kernel's default for bpf objects).
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Detaches a link's program now. Removing the last pin does it too, but some time later.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Detach {
        link_fd: u32,
    }
    bpf(LINK_DETACH, &mut Detach { link_fd: link.as_raw_fd() as u32 }).map(drop)
}

pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    let mut attr = InfoByFd {
        bpf_fd: map.as_raw_fd() as u32,
        info_len: size_of::<MapInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// What is attached at exactly this cgroup for an attach type.
pub fn attached(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Attached> {
    let mut ids = [0u32; 64];
    let mut attr = ProgQuery {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: ids.len() as u32,
        ..ProgQuery::default()
    };
    bpf(PROG_QUERY, &mut attr)?;
    let count = (attr.prog_cnt as usize).min(ids.len());
    Ok(Attached { programs: ids[..count].to_vec(), flags: attr.attach_flags })
}

/// The cookie of the network namespace that the calling thread is in.
pub fn current_netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length are of the size that the option has.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
