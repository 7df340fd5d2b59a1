#![no_std]
//! Types shared by kernel and user side.
