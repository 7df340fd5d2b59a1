//! Who may write the node's files. An agent whose place another has taken puts its pen down: what it still hears must not
//! come after what the other one writes.

use std::sync::{Arc, Mutex, PoisonError};

/// Cheap to clone; all clones are one pen.
#[derive(Debug, Clone, Default)]
pub struct Pen(Arc<Mutex<bool>>);

impl Pen {
    /// Does `write`, unless the pen was put down. Waits for others that write with it.
    pub fn write<T>(&self, write: impl FnOnce() -> T) -> Option<T> {
        let is_down = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (!*is_down).then(write)
    }

    /// When this returns nothing is being written, and nothing will be.
    pub fn put_down(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_pen_that_is_down_writes_nothing_and_waits_for_what_is_being_written() {
        let pen = Pen::default();
        assert_eq!(pen.write(|| 1), Some(1));
        let (begun, has_begun) = mpsc::channel();
        let (go_on, may_go_on) = mpsc::channel::<()>();
        let writing = std::thread::spawn({
            let pen = pen.clone();
            move || {
                pen.write(|| {
                    begun.send(()).unwrap();
                    may_go_on.recv().unwrap();
                })
            }
        });
        has_begun.recv().unwrap();
        let putting_down = std::thread::spawn({
            let pen = pen.clone();
            move || pen.put_down()
        });
        assert!(!putting_down.is_finished());
        go_on.send(()).unwrap();
        putting_down.join().unwrap();
        assert_eq!(writing.join().unwrap(), Some(()));
        assert_eq!(pen.write(|| 2), None);
    }
}
