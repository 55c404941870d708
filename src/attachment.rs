// SPDX-License-Identifier: Apache-2.0
//! Whose network a container's is attached to: the host's, or another container's, which may filter what goes through
//! it and would be bypassed.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, TryStreamExt};
use nix::errno::Errno;
use rtnetlink::{
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        link::LinkAttribute,
        nsid::{NsidAttribute, NsidMessage},
    },
};

/// How long a list of this host's interfaces is believed.
const FRESH: Duration = Duration::from_secs(2);

pub struct Attachments {
    netlink: rtnetlink::Handle,
    /// The namespaces at the other ends of this host's interfaces, and when they were listed.
    neighbours: HashSet<i32>,
    listed: Option<Instant>,
    /// Processes whose network was found to be attached since: one may have thousands of connections.
    attached: HashSet<u32>,
}

impl Attachments {
    pub fn new(netlink: rtnetlink::Handle) -> Attachments {
        Attachments { netlink, neighbours: HashSet::new(), listed: None, attached: HashSet::new() }
    }

    /// Does an interface of this host lead straight into the network namespace that process `tgid` is in? Yes for a
    /// process that has ended: whoever has its sockets now may be anywhere.
    pub async fn is_attached(&mut self, tgid: u32) -> Result<bool, rtnetlink::Error> {
        if self.listed.is_none_or(|when| when.elapsed() > FRESH) {
            // First: listing gives a number to every namespace at the other end of an interface.
            self.list().await?;
        }
        if self.attached.contains(&tgid) || self.leads_to(tgid).await? {
            self.attached.insert(tgid);
            return Ok(true);
        }
        // A container that was started since.
        self.list().await?;
        self.leads_to(tgid).await
    }

    /// IFLA_LINK_NETNSID of veth, netkit and the like: where the other end is.
    async fn list(&mut self) -> Result<(), rtnetlink::Error> {
        let mut neighbours = HashSet::new();
        let mut links = self.netlink.link().get().execute();
        while let Some(link) = links.try_next().await? {
            neighbours.extend(link.attributes.iter().filter_map(|attribute| match attribute {
                LinkAttribute::LinkNetNsId(number) if *number >= 0 => Some(*number),
                _ => None,
            }));
        }
        self.neighbours = neighbours;
        self.attached.clear();
        self.listed = Some(Instant::now());
        Ok(())
    }

    async fn leads_to(&self, tgid: u32) -> Result<bool, rtnetlink::Error> {
        let mut question = NsidMessage::default();
        question.attributes.push(NsidAttribute::Pid(tgid));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(question));
        request.header.flags = NLM_F_REQUEST;
        let mut answers = self.netlink.clone().request(request)?;
        let answer = answers.next().await.map(|answer| answer.payload);
        Ok(match answer {
            Some(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer))) => {
                // -1 where nobody has asked for one.
                let is_ours = |attribute: &NsidAttribute| matches!(attribute, NsidAttribute::Id(number) if self.neighbours.contains(number));
                answer.attributes.iter().any(is_ours)
            }
            Some(NetlinkPayload::Error(error))
                if error.to_io().raw_os_error() == Some(Errno::ESRCH as i32) =>
            {
                true
            }
            Some(NetlinkPayload::Error(error)) => return Err(rtnetlink::Error::NetlinkError(error)),
            _ => false,
        })
    }
}
