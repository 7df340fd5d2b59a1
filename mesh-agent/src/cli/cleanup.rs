//! `mesh-agent node --cleanup` and `meshctl uninstall`: takes everything of this node's agent out of the kernel.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::exit::Failure;
use crate::cni;
use crate::config::Cleanup;
use crate::enrollment;
use crate::redirect::{Options, Redirect};

/// Says on `out` what was removed, a line each.
pub(super) fn cleanup(config: &Cleanup, out: &mut impl Write) -> anyhow::Result<()> {
    let Cleanup { node_name, bpffs, cgroup, admin_socket, state_dir, cni, logging: _ } = config;
    // Under a running agent it would open a hole: its pods' traffic would go on past the mesh, in plaintext.
    if UnixStream::connect(admin_socket).is_ok() {
        return Err(Failure::unavailable(format!(
            "an agent still answers on {}; stop it before its programs are removed",
            admin_socket.display()
        ))
        .into());
    }
    let options = Options { bpffs: bpffs.clone(), cgroup: cgroup.clone(), ..Options::new(node_name) };
    let mut restored = Vec::new();
    let mut removed = Redirect::cleanup_with(&options, |pods| restored = enrollment::restore_all(pods))?;
    removed.append(&mut restored);
    if let Some(cni) = cni {
        removed.append(&mut cni::uninstall(&cni.conf_dir, &cni.bin_dir)?);
        for file in [&cni.socket, &state_dir.join(cni::MEMBERS_FILE)] {
            if fs::remove_file(file).is_ok() {
                removed.push(format!("removed {}", file.display()));
            }
        }
    }
    for line in &removed {
        writeln!(out, "{line}")?;
    }
    if fs::remove_file(admin_socket).is_ok() {
        writeln!(out, "removed {}", admin_socket.display())?;
    } else if removed.is_empty() {
        writeln!(out, "nothing of node {node_name} is left")?;
    }
    // The agent mounts it where there is none, and others may have come to use it since.
    if bpffs != Path::new("/sys/fs/bpf") && Redirect::is_bpffs(bpffs) {
        writeln!(out, "left: the bpffs at {path}; if nothing else uses it: umount {path}", path = bpffs.display())?;
    }
    Ok(())
}

/// Folders that are the agent's alone, with all that is in them.
pub(super) fn remove_folders(folders: &[PathBuf], out: &mut impl Write) -> anyhow::Result<()> {
    for folder in folders {
        match fs::remove_dir_all(folder) {
            Ok(()) => writeln!(out, "removed {}", folder.display())?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => {
                let why = format!("cannot remove {}: {e}; remove it on the node by hand", folder.display());
                return Err(Failure::unavailable(why).into());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_go_with_all_that_is_in_them_and_may_be_gone() {
        let above = tempfile::tempdir().unwrap();
        let (full, gone) = (above.path().join("full"), above.path().join("gone"));
        fs::create_dir_all(full.join("deep")).unwrap();
        fs::write(full.join("deep/file"), "").unwrap();
        let mut said = Vec::new();
        remove_folders(&[full.clone(), gone], &mut said).unwrap();
        assert!(!full.exists());
        assert_eq!(String::from_utf8(said).unwrap(), format!("removed {}\n", full.display()));
        let file = above.path().join("file");
        fs::write(&file, "").unwrap();
        let error = remove_folders(std::slice::from_ref(&file), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains(&file.display().to_string()), "{error}");
    }
}
