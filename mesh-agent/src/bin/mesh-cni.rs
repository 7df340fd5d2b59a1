//! The CNI plugin, which the agent copies to its node.

fn main() -> std::process::ExitCode {
    mesh_agent::cni::plugin::run()
}
