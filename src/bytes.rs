// SPDX-License-Identifier: Apache-2.0
//! Between the plain C structures of `bpf/*.h` and Rust. The router has no other unsafe code.

use std::net::IpAddr;

/// A C structure of `bpf/*.h`, as the skeleton declares it.
///
/// # Safety
/// Every byte of the type is initialised whatever its value, and every pattern of bytes is a value: integers and
/// arrays of them only, padding explicit.
pub unsafe trait Plain: Copy {}

/// The bytes of `value`.
pub fn as_bytes<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: the pointer and the length are those of a live value, and `Plain` says that no byte is uninitialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The structure at the start of `bytes`, unless they are too few.
pub fn from_bytes<T: Plain>(bytes: &[u8]) -> Option<T> {
    // SAFETY: enough bytes are there, the read may be unaligned, and `Plain` says that any bytes are a value.
    (bytes.len() >= size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// The form in which all addresses cross: 16 bytes, IPv4 as v4-mapped.
pub fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Back again.
pub fn unmapped(address: [u8; 16]) -> IpAddr {
    IpAddr::from(address).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::{mapped, unmapped};

    #[test]
    fn addresses_cross_as_sixteen_bytes_in_network_order() {
        let expected = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 244, 1, 9];
        assert_eq!(mapped("10.244.1.9".parse().unwrap()), expected);
        assert_eq!(mapped("::1".parse().unwrap())[15], 1);
        assert_eq!(unmapped(expected).to_string(), "10.244.1.9");
    }
}
