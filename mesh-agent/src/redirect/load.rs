//! The embedded object: its maps, globals and programs. In: options and the machine. Out: an `Ebpf` whose maps are the pinned ones, whoever made them.

use std::borrow::Cow;
use std::error::Error;
use std::sync::{Mutex, PoisonError};

use aya::programs::ProgramError;
use aya::{Ebpf, EbpfLoader};
use mesh_common::{ENROLLED_ENTRIES, global, map};

use super::host;
use super::pins::Pins;
use super::{Options, RedirectError};

pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// aya-log's level for "everything".
const LOG_ALL: u8 = 5;

/// Values of the read-only globals: part of what makes one loaded program another than the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Globals {
    pub node_netns: u64,
    pub kernel_log: bool,
}

/// Names the combination of object, globals and the cgroup it is attached to. Not for security: FNV-1a.
pub fn fingerprint(globals: &Globals, cgroup: u64) -> u64 {
    let values = [globals.node_netns, u64::from(globals.kernel_log), cgroup];
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    OBJECT
        .iter()
        .copied()
        .chain(bytes)
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// One that was made beforehand.
static READY: Mutex<Option<EbpfLoader<'static>>> = Mutex::new(None);

/// aya reads all the kernel's types for a new loader, which takes 15 MB for a moment: better while little else is kept. The
/// next `Loader` is made of it.
pub fn read_kernel_types() {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    *READY.lock().unwrap_or_else(PoisonError::into_inner) = Some(loader);
}

/// Prepares the object, once for the cgroup and once for each pod.
#[derive(Debug)]
pub struct Loader {
    /// One for all: a new one reads the whole kernel's type information, which takes longer than all else.
    inner: EbpfLoader<'static>,
}

/// What POD_INDEX is set from: the loader borrows its values.
static INDICES: [u32; ENROLLED_ENTRIES as usize] = {
    let mut indices = [0; ENROLLED_ENTRIES as usize];
    let mut i = 0;
    while i < indices.len() {
        indices[i] = i as u32;
        i += 1;
    }
    indices
};

static LOG_LEVELS: [u8; 2] = [0, LOG_ALL];

impl Loader {
    pub fn new(options: &Options, pins: &Pins, globals: &Globals) -> Self {
        // Leaked, a few bytes for each start of an agent: the loader borrows them for as long as it lives.
        let globals: &'static Globals = Box::leak(Box::new(*globals));
        let ready = READY.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut inner = ready.unwrap_or_default();
        inner
            // The programs use no type of the kernel's.
            .btf(None)
            .override_global(global::NODE_NETNS, &globals.node_netns, true)
            .override_global(global::LOG_LEVEL, &LOG_LEVELS[usize::from(globals.kernel_log)], true)
            .map_max_entries(map::ORIG_DST, options.original_dst_entries);
        for name in map::ALL {
            inner.map_pin_path(name, Cow::Owned(pins.map(name)));
        }
        Self { inner }
    }

    /// The object with one pod's index, on the pinned maps; makes and pins those that are not there. No program is in
    /// the kernel yet.
    pub fn prepare(&mut self, pod_index: u32) -> Result<Ebpf, RedirectError> {
        let index = INDICES.get(pod_index as usize).ok_or(RedirectError::TooManyPods { limit: ENROLLED_ENTRIES })?;
        let loader = self.inner.override_global(global::POD_INDEX, index, true);
        loader.load(OBJECT).map_err(|error| RedirectError::Object { reason: chain(&error) })
    }
}

/// A program that the kernel does not take. The verifier's word on it is in the last lines of its log.
pub fn refused(program: &str, error: &ProgramError) -> RedirectError {
    let reason = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            tracing::debug!(program, "the verifier says:\n{log}");
            // After the reason come statistics.
            let statistics = ["processed ", "stack depth ", "verification time "];
            let is_reason = |line: &&str| !line.is_empty() && !statistics.iter().any(|start| line.starts_with(start));
            let last = log.lines().rev().find(is_reason);
            format!("{io_error}{}", last.map(|line| format!(" ({line})")).unwrap_or_default())
        }
        other => chain(other),
    };
    RedirectError::Load { program: program.to_owned(), kernel: host::kernel_release(), reason }
}

/// An error with its sources, in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_makes_another_fingerprint() {
        let base = Globals { node_netns: 1, kernel_log: false };
        let all = [
            fingerprint(&base, 3),
            fingerprint(&base, 4),
            fingerprint(&Globals { node_netns: 2, ..base }, 3),
            fingerprint(&Globals { kernel_log: true, ..base }, 3),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|other| other != one), "{i}");
        }
        assert_eq!(fingerprint(&base, 3), all[0]);
    }
}
