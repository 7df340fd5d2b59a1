//! One address family for all: a 16-byte IP, IPv4 written as `::ffff:a.b.c.d`, in words as they lie in the kernel's
//! contexts (network byte order in memory).

#![cfg_attr(
    feature = "user",
    expect(unsafe_code, reason = "the types of the maps are plain bytes: `aya::Pod` is an unsafe trait")
)]

/// `::ffff:0:0/96` as the third word.
const MAPPED: u32 = 0xffff_u32.to_be();

/// An IPv6 or v4-mapped address. Words are in network byte order.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Ip(pub [u32; 4]);

impl Ip {
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// From an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(be: u32) -> Self {
        Self([0, 0, MAPPED, be])
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        (self.0[0] ^ other.0[0]) | (self.0[1] ^ other.0[1]) | (self.0[2] ^ other.0[2]) | (self.0[3] ^ other.0[3]) == 0
    }
}

impl From<core::net::IpAddr> for Ip {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(v4) => Self::v4(u32::from_ne_bytes(v4.octets())),
            core::net::IpAddr::V6(v6) => {
                let b = v6.octets();
                let word = |i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
                Self([word(0), word(4), word(8), word(12)])
            }
        }
    }
}

impl From<Ip> for core::net::IpAddr {
    /// A v4-mapped address comes out as IPv4.
    fn from(ip: Ip) -> Self {
        let mut octets = [0u8; 16];
        for (i, word) in ip.0.iter().enumerate() {
            octets[i * 4..i * 4 + 4].copy_from_slice(&word.to_ne_bytes());
        }
        core::net::IpAddr::V6(octets.into()).to_canonical()
    }
}

/// An IP and a port (host byte order).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Addr {
    pub ip: Ip,
    pub port: u16,
    pub pad: u16,
}

impl Addr {
    #[inline(always)]
    pub const fn new(ip: Ip, port: u16) -> Self {
        Self { ip, port, pad: 0 }
    }

    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.ip.same(&other.ip) && self.port == other.port
    }
}

impl From<core::net::SocketAddr> for Addr {
    fn from(addr: core::net::SocketAddr) -> Self {
        Self::new(addr.ip().into(), addr.port())
    }
}

impl From<Addr> for core::net::SocketAddr {
    fn from(addr: Addr) -> Self {
        Self::new(addr.ip.into(), addr.port)
    }
}

/// A connection as its client's socket has it. Ports are in host byte order.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SockTuple {
    pub netns: u64,
    pub local_ip: Ip,
    pub remote_ip: Ip,
    pub local_port: u16,
    pub remote_port: u16,
    pub pad: u32,
}

impl SockTuple {
    #[inline(always)]
    pub const fn new(netns: u64, local: Addr, remote: Addr) -> Self {
        Self {
            netns,
            local_ip: local.ip,
            remote_ip: remote.ip,
            local_port: local.port,
            remote_port: remote.port,
            pad: 0,
        }
    }
}

const _: () = assert!(size_of::<Ip>() == 16 && align_of::<Ip>() == 4);
const _: () = assert!(size_of::<Addr>() == 20 && align_of::<Addr>() == 4);
const _: () = assert!(size_of::<SockTuple>() == 48 && align_of::<SockTuple>() == 8);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, integers only, no implicit padding (sizes asserted above).
    unsafe impl aya::Pod for super::Ip {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Addr {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::SockTuple {}
}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, SocketAddr};

    use super::*;

    #[test]
    fn both_families_round_trip() {
        for text in ["10.1.2.3:80", "[fd00::1]:65535", "[::]:0", "0.0.0.0:1"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(SocketAddr::from(Addr::from(addr)), addr);
        }
    }

    #[test]
    fn a_v4_mapped_address_is_the_v4_address() {
        let mapped: IpAddr = "::ffff:10.1.2.3".parse().unwrap();
        let v4: IpAddr = "10.1.2.3".parse().unwrap();
        assert_eq!(Ip::from(mapped), Ip::from(v4));
        assert!(Ip::from(mapped).is_v4());
        assert!(!Ip::from("::1".parse::<IpAddr>().unwrap()).is_v4());
    }

    #[test]
    fn words_lie_in_network_order() {
        let ip = Ip::from("1.2.3.4".parse::<IpAddr>().unwrap());
        assert_eq!(ip.0[3].to_ne_bytes(), [1, 2, 3, 4]);
        assert_eq!(ip.0[2].to_ne_bytes(), [0, 0, 0xff, 0xff]);
    }
}
