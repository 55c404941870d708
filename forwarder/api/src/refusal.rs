// SPDX-License-Identifier: Apache-2.0
use serde::{Deserialize, Serialize};

/// Why a connection stays where it is. A refusal is a choice, not a failure: the connection works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Refusal {
    // Decided by the routers.
    NoRuleMatches,
    PeerSaysNo,
    HostAddress,
    NoPeerHost,
    PeerUnreachable,
    PeerUnknown,
    PeerGone,
    HostPathFailed,
    HostPathStalled,
    HostAddressNotCertified,
    ForwarderGone,
    Stopping,
    SwappedBack,
    SameNetwork,
    // Found by the forwarder before anything is stopped.
    NotEstablished,
    ForeignNamespace,
    UnseenReference,
    HolderBusy,
    HolderTraced,
    HolderStopped,
    Holder32Bit,
    SharedMemory,
    NoInjectionRoom,
    TooManyDescriptors,
    IoUring,
    KernelTls,
    Mptcp,
    TcpSignature,
    SocketFilter,
    PeekOffset,
    SignalDriven,
    UnknownOption,
    NotParked,
    // Found while frozen: aborted, nothing was changed.
    FreezeBudget,
    NotSettled,
    NotTheSameConnection,
    HalfClosed,
    UrgentData,
    TooManyUnreadBytes,
    OneShotFired,
    EpollUnreachable,
    NoFreeDescriptor,
    HolderVanished,
    InjectionFailed,
    PeerAborted,
    UnfinishedCall,
    // Whatever was under way.
    Exhausted,
}

impl Refusal {
    /// Every variant, in the order of the enum.
    pub const ALL: [Refusal; 47] = {
        use Refusal::*;
        [
            NoRuleMatches,
            PeerSaysNo,
            HostAddress,
            NoPeerHost,
            PeerUnreachable,
            PeerUnknown,
            PeerGone,
            HostPathFailed,
            HostPathStalled,
            HostAddressNotCertified,
            ForwarderGone,
            Stopping,
            SwappedBack,
            SameNetwork,
            NotEstablished,
            ForeignNamespace,
            UnseenReference,
            HolderBusy,
            HolderTraced,
            HolderStopped,
            Holder32Bit,
            SharedMemory,
            NoInjectionRoom,
            TooManyDescriptors,
            IoUring,
            KernelTls,
            Mptcp,
            TcpSignature,
            SocketFilter,
            PeekOffset,
            SignalDriven,
            UnknownOption,
            NotParked,
            FreezeBudget,
            NotSettled,
            NotTheSameConnection,
            HalfClosed,
            UrgentData,
            TooManyUnreadBytes,
            OneShotFired,
            EpollUnreachable,
            NoFreeDescriptor,
            HolderVanished,
            InjectionFailed,
            PeerAborted,
            UnfinishedCall,
            Exhausted,
        ]
    };

    /// A short name for tables, JSON and metrics.
    pub fn label(self) -> &'static str {
        self.words().0
    }

    /// One sentence for a person.
    pub fn sentence(self) -> &'static str {
        self.words().1
    }

    /// May another attempt, a moment later, succeed without anything being changed?
    pub fn is_passing(self) -> bool {
        use Refusal::*;
        matches!(
            self,
            HolderBusy
                | PeerGone
                | PeerUnreachable
                | ForwarderGone
                | FreezeBudget
                | NotSettled
                | TooManyUnreadBytes
                | OneShotFired
                | EpollUnreachable
                | HolderVanished
                | PeerAborted
                | UnfinishedCall
                | UnseenReference
                | HostPathFailed
                | HostPathStalled
                | HolderTraced
                | HolderStopped
                | UrgentData
                | Exhausted
        )
    }

    fn words(self) -> (&'static str, &'static str) {
        use Refusal::*;
        match self {
            NoRuleMatches => ("no_rule_matches", "no rule asks for this connection to be swapped"),
            PeerSaysNo => {
                ("peer_says_no", "no rule at the other host asks for this connection to be swapped")
            }
            HostAddress => ("host_address", "one of the addresses is loopback or belongs to a host"),
            NoPeerHost => ("no_peer_host", "no host is known that holds the other end"),
            PeerUnreachable => ("peer_unreachable", "the other host's router does not answer"),
            PeerUnknown => (
                "peer_unknown",
                "the other host's router does not know this connection, or its server has not accepted it yet",
            ),
            PeerGone => ("peer_gone", "the other host's router went away while the swap was being agreed"),
            HostPathFailed => {
                ("host_path_failed", "the connection between the hosts could not be made or was lost")
            }
            HostPathStalled => ("host_path_stalled", "the host network stopped carrying this connection"),
            HostAddressNotCertified => (
                "host_address_not_certified",
                "the other host's certificate does not hold the address that it offered for the host connection",
            ),
            ForwarderGone => ("forwarder_gone", "the forwarder of this host does not answer"),
            Stopping => ("stopping", "the router is stopping"),
            SwappedBack => ("swapped_back", "it was sent back to the overlay by command"),
            SameNetwork => {
                ("same_network", "both ends are in one container's network: there is nothing to gain")
            }
            NotEstablished => ("not_established", "the connection is not established any more"),
            ForeignNamespace => {
                ("foreign_namespace", "the socket does not belong to the container's own network")
            }
            UnseenReference => (
                "unseen_reference",
                "something that cannot be seen holds the socket, such as a descriptor in flight or io_uring",
            ),
            HolderBusy => {
                ("holder_busy", "a process that holds the socket is in another swap at this moment")
            }
            HolderTraced => {
                ("holder_traced", "a process that holds the socket is being traced by another program")
            }
            HolderStopped => ("holder_stopped", "a process that holds the socket is stopped by job control"),
            Holder32Bit => ("holder_32bit", "a process that holds the socket is not a 64-bit x86 process"),
            SharedMemory => {
                ("shared_memory", "two processes that hold the socket share one memory, and are no threads")
            }
            NoInjectionRoom => {
                ("no_injection_room", "a process that holds the socket has no room at the end of its vDSO")
            }
            TooManyDescriptors => (
                "too_many_descriptors",
                "a process has the socket under more descriptors or in more epoll sets than can be changed at once",
            ),
            IoUring => ("io_uring", "the socket is used through io_uring"),
            KernelTls => ("ulp", "an upper layer protocol such as kernel TLS is attached to the socket"),
            Mptcp => ("mptcp", "the socket is MPTCP"),
            TcpSignature => ("tcp_signature", "the socket uses TCP-MD5 or TCP-AO"),
            SocketFilter => ("socket_filter", "a filter is attached to the socket"),
            PeekOffset => ("peek_offset", "the socket uses SO_PEEK_OFF"),
            SignalDriven => ("signal_driven", "the socket raises signals (O_ASYNC)"),
            UnknownOption => {
                ("unknown_option", "the socket has an option that the host socket could not be given")
            }
            NotParked => ("not_parked", "the overlay socket is not parked any more, so there is no way back"),
            FreezeBudget => ("freeze_budget", "the processes could not be stopped within the time allowed"),
            NotSettled => ("not_settled", "data was still in flight when the time allowed was over"),
            NotTheSameConnection => (
                "not_the_same_connection",
                "the sequence numbers say that the two sockets are not the ends of one connection",
            ),
            HalfClosed => ("half_closed", "one side has closed its direction"),
            UrgentData => ("urgent_data", "urgent data is on its way"),
            TooManyUnreadBytes => {
                ("too_many_unread_bytes", "the application left more bytes unread than can be carried over")
            }
            OneShotFired => (
                "oneshot_fired",
                "a one-shot epoll registration has fired and the application is handling it",
            ),
            EpollUnreachable => (
                "epoll_unreachable",
                "the socket is registered in an epoll set that no holder of it can change",
            ),
            NoFreeDescriptor => {
                ("no_free_descriptor", "a process that holds the socket has no free descriptors")
            }
            HolderVanished => {
                ("holder_vanished", "a process that holds the socket ended or changed its descriptors")
            }
            InjectionFailed => ("injection_failed", "the sockets could not be put into a process"),
            PeerAborted => ("peer_aborted", "the other end gave the swap up"),
            UnfinishedCall => {
                ("unfinished_call", "a thread is in the middle of a call that cannot be continued later")
            }
            Exhausted => {
                ("exhausted", "the forwarder of one of the hosts has run out of descriptors or threads")
            }
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.sentence())
    }
}

#[cfg(test)]
mod tests {
    use super::Refusal;

    #[test]
    fn every_refusal_has_a_label_of_its_own() {
        let labels: std::collections::BTreeSet<_> =
            Refusal::ALL.iter().map(|refusal| refusal.label()).collect();
        assert_eq!(labels.len(), Refusal::ALL.len());
    }
}
