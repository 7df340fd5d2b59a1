//! What is to be done with a request, judged by the rules of its destination. Pure: rules and a request in, a decision out;
//! chance comes in as a value.
//!
//! `matching` finds the rule, `split` the backend among its shares; `rewrite` and `edits` say what the request becomes,
//! `cors`, `fault` and `retry` what is done beside.

pub mod cors;
mod edits;
pub mod fault;
mod matching;
pub mod retry;
mod rewrite;
mod split;

pub use edits::apply;
pub use matching::{Client, Found, Request, find, normal_path};
pub use rewrite::{location, path_of};
pub use split::{falls_in, pick};
