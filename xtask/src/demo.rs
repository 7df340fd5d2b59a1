//! placeholder
pub fn run(_keep: bool) -> anyhow::Result<()> {
    Ok(())
}
