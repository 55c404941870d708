// SPDX-License-Identifier: Apache-2.0
//! Which host each pod is on, by its status. Of all that the API server tells of a pod, two addresses are kept.

use std::{
    collections::HashMap,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    net::IpAddr,
    pin::pin,
    sync::{Arc, PoisonError, RwLock},
};

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{ApiResource, Object},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use serde::Deserialize;

use super::{Reach, reach::Patience};

/// The part of a pod that matters here. The rest is not even read.
type LeanPod = Object<Spec, Status>;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default)]
    host_network: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    phase: Option<String>,
    #[serde(rename = "hostIP")]
    host_ip: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs", default)]
    pod_ips: Vec<PodIp>,
}

#[derive(Clone, Debug, Deserialize)]
struct PodIp {
    ip: Option<String>,
}

/// Shared between the watch, which writes, and all who ask.
#[derive(Clone, Default)]
pub struct PodHosts(Arc<RwLock<Table>>);

impl PodHosts {
    pub fn host_of(&self, pod: IpAddr) -> Option<IpAddr> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        table.hosts.get(&pod).map(|entry| entry.host)
    }

    /// Differs whenever something else may be known than before.
    pub fn version(&self) -> u64 {
        self.0.read().unwrap_or_else(PoisonError::into_inner).version
    }

    fn take(&self, event: Event<LeanPod>) {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init => table.listing = Some(HashMap::new()),
            Event::InitApply(pod) | Event::Apply(pod) => table.put(&Placed::of(&pod)),
            Event::Delete(pod) => table.remove(&Placed::of(&pod)),
            Event::InitDone => table.finish_listing(),
        }
    }
}

/// Watches all pods, for ever.
pub async fn watch(client: Client, pods: &PodHosts, reach: &Reach) {
    let api: Api<LeanPod> = Api::all_with(client, &ApiResource::erase::<Pod>(&()));
    let mut events = pin!(watcher(api, watcher::Config::default()).backoff(Patience::default()));
    let mut complained = None;
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                complained = None;
                pods.take(event);
            }
            Err(error) => reach.failed("pods", &error, &mut complained),
        }
    }
}

/// A pod, and where it is, if it has addresses of its own there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Placed {
    /// Of the uid.
    pod: u64,
    host: Option<IpAddr>,
    addresses: Vec<IpAddr>,
}

impl Placed {
    fn of(pod: &LeanPod) -> Placed {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let status = pod.status.clone().unwrap_or_default();
        // What has ended keeps its addresses in its status, but others may have them by now.
        let has_ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let parse = |text: &String| text.parse().ok();
        let ips = status.pod_ips.iter().filter_map(|pod_ip| pod_ip.ip.as_ref()).chain(&status.pod_ip);
        Placed {
            pod: BuildHasherDefault::<DefaultHasher>::default().hash_one(uid),
            host: status.host_ip.as_ref().and_then(parse).filter(|_| !has_ended && !pod.spec.host_network),
            addresses: ips.filter_map(parse).collect(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    host: IpAddr,
    pod: u64,
}

#[derive(Debug, Default)]
struct Table {
    hosts: HashMap<IpAddr, Entry>,
    /// What a list that is under way has shown.
    listing: Option<HashMap<IpAddr, Entry>>,
    version: u64,
}

impl Table {
    fn put(&mut self, placed: &Placed) {
        let Some(host) = placed.host else { return self.remove(placed) };
        for address in &placed.addresses {
            let entry = Entry { host, pod: placed.pod };
            let known = self.listing.as_mut().unwrap_or(&mut self.hosts).insert(*address, entry);
            self.version += u64::from(known != Some(entry));
        }
    }

    /// Its addresses may be another's by now.
    fn remove(&mut self, placed: &Placed) {
        let hosts = self.listing.as_mut().unwrap_or(&mut self.hosts);
        for address in &placed.addresses {
            if hosts.get(address).is_some_and(|entry| entry.pod == placed.pod) {
                hosts.remove(address);
                self.version += 1;
            }
        }
    }

    fn finish_listing(&mut self) {
        if let Some(listing) = self.listing.take() {
            self.hosts = listing;
            self.version += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, phase: &str, host_network: bool, ips: &[&str]) -> LeanPod {
        let ips: Vec<_> = ips.iter().map(|ip| serde_json::json!({ "ip": ip })).collect();
        serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "uid": uid, "name": uid },
            "spec": { "hostNetwork": host_network, "containers": [] },
            "status": { "phase": phase, "hostIP": "192.0.2.2", "podIP": ips.first().map(|ip| &ip["ip"]), "podIPs": ips },
        }))
        .unwrap()
    }

    fn check(events: Vec<Event<LeanPod>>, address: &str, known: bool) {
        let pods = PodHosts::default();
        events.into_iter().for_each(|event| pods.take(event));
        let expected = known.then(|| "192.0.2.2".parse().unwrap());
        assert_eq!(pods.host_of(address.parse().unwrap()), expected, "{address}");
    }

    #[test]
    fn a_pod_is_found_by_each_of_its_addresses() {
        let dual = || vec![Event::Apply(pod("a", "Running", false, &["10.0.0.9", "fd00::9"]))];
        check(dual(), "10.0.0.9", true);
        check(dual(), "fd00::9", true);
        check(dual(), "10.0.0.8", false);
    }

    #[test]
    fn a_pod_of_the_hosts_network_and_one_that_has_ended_are_left_out() {
        check(vec![Event::Apply(pod("a", "Running", true, &["192.0.2.2"]))], "192.0.2.2", false);
        check(vec![Event::Apply(pod("a", "Succeeded", false, &["10.0.0.9"]))], "10.0.0.9", false);
        let ends = ["Running", "Failed"].map(|phase| Event::Apply(pod("a", phase, false, &["10.0.0.9"])));
        check(ends.into(), "10.0.0.9", false);
    }

    #[test]
    fn a_pod_that_is_gone_takes_its_address_along_but_not_its_successors() {
        let old = || pod("old", "Running", false, &["10.0.0.9"]);
        check(vec![Event::Apply(old()), Event::Delete(old())], "10.0.0.9", false);
        let successor = Event::Apply(pod("new", "Running", false, &["10.0.0.9"]));
        check(vec![Event::Apply(old()), successor, Event::Delete(old())], "10.0.0.9", true);
    }

    #[test]
    fn a_new_list_takes_the_place_of_the_old_one_when_it_is_complete() {
        let events = |last| {
            let old = Event::Apply(pod("old", "Running", false, &["10.0.0.9"]));
            let new = Event::InitApply(pod("new", "Running", false, &["10.0.0.8"]));
            [old, Event::Init, new].into_iter().chain(last).collect()
        };
        check(events(None), "10.0.0.9", true);
        check(events(Some(Event::InitDone)), "10.0.0.9", false);
        check(events(Some(Event::InitDone)), "10.0.0.8", true);
    }

    #[test]
    fn the_version_changes_with_what_is_known_and_not_with_the_rest_of_a_status() {
        let pods = PodHosts::default();
        pods.take(Event::Apply(pod("a", "Pending", false, &["10.0.0.9"])));
        let version = pods.version();
        pods.take(Event::Apply(pod("a", "Running", false, &["10.0.0.9"])));
        assert_eq!(pods.version(), version);
        pods.take(Event::Apply(pod("b", "Running", false, &["10.0.0.8"])));
        assert_ne!(pods.version(), version);
    }
}
