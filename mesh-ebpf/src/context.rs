//! Field by field access to the kernel's contexts.
//!
//! Reads and writes are volatile: LLVM merges neighbouring words into one 8-byte access, which the verifier refuses.

use core::ffi::c_void;

use aya_ebpf::bindings::BPF_SK_STORAGE_GET_F_CREATE;
use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get};
use mesh_common::{Addr, Ip};

/// Reads one field of a context.
macro_rules! field {
    ($ptr:expr, $($path:tt)+) => {
        // SAFETY: the kernel hands a valid context; the verifier checks offset and size.
        unsafe { core::ptr::read_volatile(&raw const (*$ptr).$($path)+) }
    };
}
pub(crate) use field;

/// Reads the four words of an IPv6 address in a context.
macro_rules! field_ip6 {
    ($ptr:expr, $name:ident) => {
        Ip([
            crate::context::field!($ptr, $name[0]),
            crate::context::field!($ptr, $name[1]),
            crate::context::field!($ptr, $name[2]),
            crate::context::field!($ptr, $name[3]),
        ])
    };
}
pub(crate) use field_ip6;

/// The address in a sock_addr context, v4 hooks.
#[inline(always)]
pub fn user_addr4(ctx: *mut bpf_sock_addr) -> Addr {
    Addr::new(Ip::v4(field!(ctx, user_ip4)), user_port(ctx))
}

/// The address in a sock_addr context, v6 hooks.
#[inline(always)]
pub fn user_addr6(ctx: *mut bpf_sock_addr) -> Addr {
    Addr::new(field_ip6!(ctx, user_ip6), user_port(ctx))
}

#[inline(always)]
fn user_port(ctx: *mut bpf_sock_addr) -> u16 {
    u16::from_be(field!(ctx, user_port) as u16)
}

#[inline(always)]
pub fn set_user_ip4(ctx: *mut bpf_sock_addr, ip: &Ip) {
    // SAFETY: a writable field, written whole.
    unsafe { core::ptr::write_volatile(&raw mut (*ctx).user_ip4, ip.0[3]) };
}

#[inline(always)]
pub fn set_user_ip6(ctx: *mut bpf_sock_addr, ip: &Ip) {
    // SAFETY: writable fields, written word by word.
    unsafe {
        core::ptr::write_volatile(&raw mut (*ctx).user_ip6[0], ip.0[0]);
        core::ptr::write_volatile(&raw mut (*ctx).user_ip6[1], ip.0[1]);
        core::ptr::write_volatile(&raw mut (*ctx).user_ip6[2], ip.0[2]);
        core::ptr::write_volatile(&raw mut (*ctx).user_ip6[3], ip.0[3]);
    }
}

#[inline(always)]
pub fn set_user_port(ctx: *mut bpf_sock_addr, port: u16) {
    // SAFETY: a writable field, written whole.
    unsafe { core::ptr::write_volatile(&raw mut (*ctx).user_port, u32::from(port.to_be())) };
}

/// The socket of a sock_addr context.
#[inline(always)]
pub fn socket(ctx: *mut bpf_sock_addr) -> *mut bpf_sock {
    // SAFETY: the verifier makes it a trusted, non-null socket pointer.
    unsafe { core::ptr::read_volatile(&raw const (*ctx).__bindgen_anon_1.sk) }
}

/// A socket's storage in `map`, if it has one. aya-ebpf's own accessor serves sock_addr programs only.
#[inline(always)]
pub fn storage<T, M>(map: &'static M, sk: *mut bpf_sock) -> Option<&'static mut T> {
    // SAFETY: `map` is a socket storage map with values T; the kernel keeps the storage while the socket is locked.
    unsafe { bpf_sk_storage_get(map_ptr(map), sk.cast(), core::ptr::null_mut(), 0).cast::<T>().as_mut() }
}

/// A socket's storage in `map`, made with `value` if it had none. `None`: no memory.
#[inline(always)]
pub fn storage_or_insert<T, M>(map: &'static M, sk: *mut bpf_sock, value: &mut T) -> Option<&'static mut T> {
    let flags = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
    // SAFETY: as in `storage`; `value` lives on the stack, initialised.
    unsafe {
        bpf_sk_storage_get(map_ptr(map), sk.cast(), core::ptr::from_mut(value).cast(), flags).cast::<T>().as_mut()
    }
}

#[inline(always)]
pub fn drop_storage<M>(map: &'static M, sk: *mut bpf_sock) {
    // SAFETY: as in `storage`. A socket without storage is no error.
    unsafe { bpf_sk_storage_delete(map_ptr(map), sk.cast()) };
}

#[inline(always)]
fn map_ptr<M>(map: &'static M) -> *mut c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}
