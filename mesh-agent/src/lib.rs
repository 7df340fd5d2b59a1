//! Nodemesh in user space. The modules stand in the order in which a connection meets them; who may import whom is
//! in ARCHITECTURE.md and checked by `cargo xtask lint`.

pub mod app;
pub mod config;

// Configuration comes in.
pub mod discovery;
pub mod model;
pub mod translate;

// Who is in the mesh.
pub mod cni;
pub mod enrollment;
pub mod handover;
pub mod pod_status;
pub mod redirect;

// The data path.
pub mod proxy;

// Through everything.
pub mod admin;
pub mod api_server;
pub mod cli;
pub mod controller;
pub mod identity;
pub mod lifecycle;
pub mod telemetry;
