//! The agent's own settings.
