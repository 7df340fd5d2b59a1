//! Buffers for bytes on their way, taken when bytes are there and given back when they are gone: an idle connection
//! holds none, and a busy worker allocates none.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Four TLS records of full size: large enough to fill the pipe, small enough to stay in the second-level cache.
pub const SIZE: usize = 4 * 16 * 1024;

/// More than this many free buffers a worker gives back to the allocator.
const KEEP: usize = 64;

thread_local! {
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of `SIZE` bytes; its content is whatever its last user left.
pub struct Buffer(Box<[u8]>);

impl Buffer {
    pub fn take() -> Self {
        let free = FREE.with_borrow_mut(Vec::pop);
        Self(free.unwrap_or_else(|| vec![0; SIZE].into_boxed_slice()))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // `try_with`: the worker may be ending, its pool with it.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEEP {
                free.push(buffer);
            }
        });
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
