// SPDX-License-Identifier: Apache-2.0
//! Which host each pod is on, by its status, and how those of this host are labelled now. Of all that the API server tells of
//! a pod, two addresses are kept, and of one of this host its labels.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    net::IpAddr,
    pin::pin,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
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
pub struct Pods(Arc<RwLock<Table>>);

/// Of a pod.
pub type Labels = Arc<BTreeMap<String, String>>;

impl Pods {
    /// `own`: the addresses of this host.
    pub fn of_host(own: Vec<IpAddr>) -> Pods {
        Pods(Arc::new(RwLock::new(Table { own, ..Table::default() })))
    }

    pub fn host_of(&self, pod: IpAddr) -> Option<IpAddr> {
        self.table().known.hosts.get(&pod).map(|entry| entry.host)
    }

    /// Differs whenever another host may be known of a pod than before.
    pub fn hosts_version(&self) -> u64 {
        self.table().hosts_version
    }

    /// Of a pod of this host, by its uid.
    pub fn labels_of(&self, uid: &str) -> Option<Labels> {
        self.table().known.labels.get(&PodId::of(uid)).cloned()
    }

    /// Differs whenever a pod of this host may be labelled otherwise than before.
    pub fn labels_version(&self) -> u64 {
        self.table().labels_version
    }

    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, event: Event<LeanPod>) {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init => table.listing = Some(Known::default()),
            Event::InitApply(pod) | Event::Apply(pod) => table.put(Placed::of(pod)),
            Event::Delete(pod) => table.remove(&Placed::of(pod)),
            Event::InitDone => table.finish_listing(),
        }
    }
}

/// Watches all pods, for ever.
pub async fn watch(client: Client, pods: &Pods, reach: &Reach) {
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

/// Made of the uid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct PodId(u64);

impl PodId {
    fn of(uid: &str) -> PodId {
        PodId(BuildHasherDefault::<DefaultHasher>::default().hash_one(uid))
    }
}

/// A pod, and where it is, if it has addresses of its own there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Placed {
    pod: PodId,
    host: Option<IpAddr>,
    addresses: Vec<IpAddr>,
    labels: BTreeMap<String, String>,
}

impl Placed {
    fn of(pod: LeanPod) -> Placed {
        let status = pod.status.unwrap_or_default();
        // What has ended keeps its addresses in its status, but others may have them by now.
        let has_ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let parse = |text: &String| text.parse().ok();
        let ips = status.pod_ips.iter().filter_map(|pod_ip| pod_ip.ip.as_ref()).chain(&status.pod_ip);
        Placed {
            pod: PodId::of(pod.metadata.uid.as_deref().unwrap_or_default()),
            host: status.host_ip.as_ref().and_then(parse).filter(|_| !has_ended && !pod.spec.host_network),
            addresses: ips.filter_map(parse).collect(),
            labels: pod.metadata.labels.unwrap_or_default(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    host: IpAddr,
    pod: PodId,
}

#[derive(Debug, Default)]
struct Known {
    hosts: HashMap<IpAddr, Entry>,
    /// Of the pods of this host.
    labels: HashMap<PodId, Labels>,
}

#[derive(Debug, Default)]
struct Table {
    /// Addresses of this host.
    own: Vec<IpAddr>,
    known: Known,
    /// What a list that is under way has shown.
    listing: Option<Known>,
    hosts_version: u64,
    labels_version: u64,
}

impl Table {
    fn put(&mut self, placed: Placed) {
        let Some(host) = placed.host else { return self.remove(&placed) };
        let known = self.listing.as_mut().unwrap_or(&mut self.known);
        for address in &placed.addresses {
            let entry = Entry { host, pod: placed.pod };
            let before = known.hosts.insert(*address, entry);
            self.hosts_version += u64::from(before != Some(entry));
        }
        if self.own.contains(&host) {
            let labels = Arc::new(placed.labels);
            let before = known.labels.insert(placed.pod, Arc::clone(&labels));
            self.labels_version += u64::from(before != Some(labels));
        }
    }

    /// Its addresses may be another's by now.
    fn remove(&mut self, placed: &Placed) {
        let known = self.listing.as_mut().unwrap_or(&mut self.known);
        for address in &placed.addresses {
            if known.hosts.get(address).is_some_and(|entry| entry.pod == placed.pod) {
                known.hosts.remove(address);
                self.hosts_version += 1;
            }
        }
        self.labels_version += u64::from(known.labels.remove(&placed.pod).is_some());
    }

    fn finish_listing(&mut self) {
        if let Some(listing) = self.listing.take() {
            self.known = listing;
            self.hosts_version += 1;
            self.labels_version += 1;
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
        let pods = Pods::default();
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
    fn the_version_of_the_hosts_changes_with_what_is_known_and_not_with_the_rest_of_a_status() {
        let pods = Pods::default();
        pods.take(Event::Apply(pod("a", "Pending", false, &["10.0.0.9"])));
        let version = pods.hosts_version();
        pods.take(Event::Apply(pod("a", "Running", false, &["10.0.0.9"])));
        assert_eq!(pods.hosts_version(), version);
        pods.take(Event::Apply(pod("b", "Running", false, &["10.0.0.8"])));
        assert_ne!(pods.hosts_version(), version);
    }

    fn labelled(uid: &str, host: &str, labels: serde_json::Value) -> LeanPod {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "uid": uid, "name": uid, "labels": labels },
            "spec": { "containers": [] }, "status": { "hostIP": host, "podIP": "10.0.0.9" },
        }))
        .unwrap()
    }

    #[test]
    fn the_labels_of_this_hosts_pods_are_known_as_they_are_now() {
        let pods = Pods::of_host(vec!["192.0.2.1".parse().unwrap()]);
        pods.take(Event::Apply(labelled("there", "192.0.2.2", serde_json::json!({ "app": "shop" }))));
        assert_eq!((pods.labels_of("there"), pods.labels_version()), (None, 0));
        let app = |uid: &str| pods.labels_of(uid).map(|labels| labels["app"].clone());
        for value in ["shop", "closed"] {
            let before = pods.labels_version();
            for _ in 0..2 {
                pods.take(Event::Apply(labelled("here", "192.0.2.1", serde_json::json!({ "app": value }))));
                assert_eq!(app("here").as_deref(), Some(value));
                assert_eq!(pods.labels_version(), before + 1);
            }
        }
        pods.take(Event::Init);
        assert_eq!(app("here").as_deref(), Some("closed"), "the new list is not complete");
        pods.take(Event::InitDone);
        assert_eq!(app("here"), None);
    }
}
