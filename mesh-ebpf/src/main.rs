#![no_std]
#![no_main]
//! Nodemesh in the kernel. The modules stand in the order in which a connection meets the hooks; `mesh-agent/src/redirect`
//! loads and attaches them. In: sockets of every process on the node. Out: sockets of enrolled pods, pointed at the agent;
//! all others untouched.

#[expect(clippy::mut_from_ref, reason = "a map hands out its value; the kernel keeps it alive, and races are meant")]
mod context;
mod enrolled;
mod maps;

mod connect;
mod names;
mod sk_lookup;
mod sockops;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program that can get here.
    loop {}
}

/// sk_lookup and the socket helpers are for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
