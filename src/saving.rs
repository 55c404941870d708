// SPDX-License-Identifier: Apache-2.0
//! What the host path saves. Pure, and no more than can be counted.

/// What VXLAN adds to a packet: outer Ethernet, IPv4, UDP and its own header, bytes.
const VXLAN_BYTES: u64 = 14 + 20 + 8 + 8;
/// Most that a packet carries on an overlay of MTU 1450: less IPv4 and TCP headers, with timestamps, bytes.
const PAYLOAD_BYTES: u64 = 1450 - 20 - 20 - 12;

/// Encapsulation that so many bytes would have needed on a VXLAN overlay, bytes: at least, because a packet that is not
/// full needs as much as one that is, and acknowledgements are not counted.
pub fn encapsulation_bytes(payload_bytes: u64) -> u64 {
    payload_bytes.div_ceil(PAYLOAD_BYTES) * VXLAN_BYTES
}

#[cfg(test)]
mod tests {
    use super::encapsulation_bytes;

    #[test]
    fn each_packet_saves_its_encapsulation() {
        assert_eq!((encapsulation_bytes(0), encapsulation_bytes(1), encapsulation_bytes(1398)), (0, 50, 50));
        assert_eq!(encapsulation_bytes(1399), 100);
    }
}
