//! The pinned maps: the only reader and writer in user space. In: model-free values of `mesh-common`. Out: the same.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use mesh_common::{Addr, Attested, Ip, PodEntry, SockTuple, map};

use super::pins::Pins;
use super::{RedirectError, sys};

/// A map with keys K and values V.
#[derive(Debug)]
pub struct Map<K, V> {
    name: &'static str,
    fd: OwnedFd,
    types: PhantomData<fn(K) -> V>,
}

impl<K: aya::Pod, V: aya::Pod> Map<K, V> {
    /// Opens a pin, and makes sure that it holds what we think.
    fn open(pins: &Pins, name: &'static str) -> Result<Self, RedirectError> {
        let path = pins.map(name);
        let checked = |fd: OwnedFd| {
            let info = sys::map_info(fd.as_fd())?;
            if (info.key_size as usize, info.value_size as usize) != (size_of::<K>(), size_of::<V>()) {
                return Err(io::Error::other("the pinned map has another layout"));
            }
            Ok(fd)
        };
        let fd = sys::obj_get(&path).and_then(checked).map_err(|source| RedirectError::Pin { path, source })?;
        Ok(Self { name, fd, types: PhantomData })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn get(&self, key: &K) -> Result<Option<V>, RedirectError> {
        sys::lookup(self.fd(), key).map_err(|source| self.failed("read", source))
    }

    pub fn set(&self, key: &K, value: &V) -> Result<(), RedirectError> {
        sys::update(self.fd(), key, value).map_err(|source| self.failed("write", source))
    }

    pub fn remove(&self, key: &K) -> Result<bool, RedirectError> {
        sys::delete(self.fd(), key).map_err(|source| self.failed("delete from", source))
    }

    pub fn keys(&self) -> Result<Vec<K>, RedirectError> {
        sys::keys(self.fd()).map_err(|source| self.failed("list", source))
    }

    fn failed(&self, action: &'static str, source: io::Error) -> RedirectError {
        RedirectError::Map { map: self.name, action, source }
    }
}

/// All maps that the agent touches.
#[derive(Debug)]
pub struct Maps {
    pub enrolled: Map<u64, PodEntry>,
    pub pod_addrs: Map<Ip, u32>,
    pub orig_dst: Map<SockTuple, Addr>,
    pub attested: Map<SockTuple, Attested>,
    pub probe_cgroups: Map<u64, u32>,
    /// Keyed by a socket's file descriptor in this process.
    pub own: Map<RawFd, u32>,
    /// Values are file descriptors of listening sockets in this process.
    pub listeners: Map<u32, RawFd>,
    /// Values are per CPU.
    counts: Map<u32, u64>,
    cpus: usize,
}

impl Maps {
    pub fn open(pins: &Pins) -> Result<Self, RedirectError> {
        let cpus = aya::util::nr_cpus().map_err(|(path, source)| RedirectError::Pin { path: path.into(), source })?;
        Ok(Self {
            enrolled: Map::open(pins, map::ENROLLED)?,
            pod_addrs: Map::open(pins, map::POD_ADDRS)?,
            orig_dst: Map::open(pins, map::ORIG_DST)?,
            attested: Map::open(pins, map::ATTESTED)?,
            probe_cgroups: Map::open(pins, map::PROBE_CGROUPS)?,
            own: Map::open(pins, map::OWN)?,
            listeners: Map::open(pins, map::LISTENERS)?,
            counts: Map::open(pins, map::COUNTS)?,
            cpus,
        })
    }

    /// One of [`mesh_common::COUNTERS`], over all CPUs.
    pub fn count(&self, index: u32) -> Result<u64, RedirectError> {
        sys::lookup_per_cpu(self.counts.fd(), index, self.cpus).map_err(|source| self.counts.failed("read", source))
    }

    pub fn set_listener(&self, index: u32, socket: RawFd) -> Result<(), RedirectError> {
        self.listeners.set(&index, &socket)
    }

    /// Marks a socket as the agent's own. One system call.
    pub fn tag_own(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        sys::update(self.own.fd(), &socket.as_raw_fd(), &1u32)
    }
}
