//! The data path, in the order a connection takes it.

pub mod balance;
pub mod connections;
pub mod policy;
