//! What an agent has alone on its node: the lock, and the sockets by which it is asked how it is.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use tokio::task::AbortHandle;

use super::take::Taken;
use super::{ADMIN, CNI, METRICS, READINESS};
use crate::admin::{AdminError, AdminSocket, bind, serve_health};
use crate::config;
use crate::lifecycle::{KeptFile, Liveness, PrivateSocket, Readiness};
use crate::redirect::{NodeLock, Options, Redirect, RedirectError};

/// All of it.
#[derive(Debug)]
pub struct Own {
    pub lock: NodeLock,
    pub metrics: TcpListener,
    pub readiness: TcpListener,
    pub admin: AdminSocket,
    /// Of the agent before. A first one is made only when it can be served: pods that start would wait at it.
    pub cni: Option<PrivateSocket>,
}

#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Redirect(#[from] RedirectError),
    #[error("a socket of the agent before cannot be used: {0}")]
    Socket(#[from] io::Error),
}

/// Of a socket that may be handed over: its name, where it listens, and itself.
pub type Named = (&'static str, String, OwnedFd);

impl Own {
    /// With no agent before. Whatever can fail on its own fails before the kernel is touched: ports, files, rights.
    pub fn bind(config: &config::Node, in_kernel: &Options) -> Result<Self, OwnError> {
        let metrics = bind(config.metrics_address, "metrics", "--metrics-address")?;
        let readiness = bind(config.readiness_address, "readiness", "--readiness-address")?;
        let admin = AdminSocket::bind(&config.admin_socket)?;
        Ok(Self { lock: Redirect::lock(in_kernel)?, metrics, readiness, admin, cni: None })
    }

    /// What the agent before has handed over; where the settings say another place, a socket of its own.
    pub(super) fn taken(
        taken: &mut Taken,
        lock: OwnedFd,
        config: &config::Node,
        in_kernel: &Options,
    ) -> Result<Self, OwnError> {
        let mut listen = |name, address: SocketAddr, purpose, flag| match taken.socket(name, &address.to_string()) {
            Some(fd) => Ok(TcpListener::from(fd)),
            None => bind(address, purpose, flag),
        };
        let metrics = listen(METRICS, config.metrics_address, "metrics", "--metrics-address")?;
        let readiness = listen(READINESS, config.readiness_address, "readiness", "--readiness-address")?;
        let admin = match taken.socket(ADMIN, &config.admin_socket.to_string_lossy()) {
            Some(fd) => AdminSocket::handed_over(&config.admin_socket, fd.into())?,
            None => AdminSocket::bind(&config.admin_socket)?,
        };
        let cni = config.cni.as_ref().and_then(|cni| {
            let fd = taken.socket(CNI, &cni.socket.to_string_lossy())?;
            // Where its file has gone, one is made anew.
            PrivateSocket::handed_over(&cni.socket, fd.into()).ok()
        });
        Ok(Self { lock: NodeLock::handed_over(in_kernel, lock)?, metrics, readiness, admin, cni })
    }

    /// Says on its socket how the agent is, until the task is aborted.
    pub fn serve_health(&self, readiness: &Readiness, liveness: &Liveness) -> io::Result<AbortHandle> {
        let serve = serve_health(self.readiness.try_clone()?, readiness.clone(), liveness.clone());
        Ok(tokio::spawn(serve).abort_handle())
    }

    /// Second descriptors of the sockets, to hand them over later.
    pub fn to_hand_over(&self, config: &config::Node) -> io::Result<(Vec<Named>, KeptFile)> {
        let sockets = vec![
            (METRICS, config.metrics_address.to_string(), self.metrics.try_clone()?.into()),
            (READINESS, config.readiness_address.to_string(), self.readiness.try_clone()?.into()),
            (ADMIN, config.admin_socket.to_string_lossy().into_owned(), self.admin.std().try_clone()?.into()),
        ];
        Ok((sockets, self.admin.kept()))
    }
}
