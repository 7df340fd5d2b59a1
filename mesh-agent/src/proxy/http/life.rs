//! What a connection to an endpoint hangs on beside its bytes: its records, and what cuts it.

use std::rc::Rc;

use tokio_util::sync::CancellationToken;

use crate::proxy::connections::{Cut, Entry};
use crate::proxy::error::ConnError;

#[derive(Default)]
pub struct Life {
    /// Of the source's side, and of the destination's where both are on this node.
    pub entries: Vec<Entry>,
    pub cut: Rc<Cut>,
    /// The pods at its ends.
    pub gone: Vec<CancellationToken>,
}

impl Life {
    /// Done when policy no longer allows it, or a pod is gone.
    pub async fn stopped(&self) {
        let gone = self.gone.iter().map(|token| Box::pin(token.cancelled()));
        let gone = async {
            match self.gone.is_empty() {
                true => std::future::pending().await,
                false => drop(futures_util::future::select_all(gone).await),
            }
        };
        tokio::select! {
            () = self.cut.asked() => {}
            () = gone => {}
        }
    }

    pub fn end(self, result: &Result<(), ConnError>) {
        self.entries.into_iter().for_each(|entry| entry.end(result));
    }
}
