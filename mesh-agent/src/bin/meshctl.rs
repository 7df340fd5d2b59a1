//! The user's command line.

fn main() -> std::process::ExitCode {
    mesh_agent::cli::meshctl()
}
