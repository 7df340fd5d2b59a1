//! The agent of a node, and the controller.

fn main() -> std::process::ExitCode {
    mesh_agent::cli::mesh_agent()
}
