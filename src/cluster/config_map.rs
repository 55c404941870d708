// SPDX-License-Identifier: Apache-2.0
//! The rules in the ConfigMap `ebpf-router-rules`. That a rule is broken is written into an Event beside it, once for each
//! change: its name holds the change's, so that of many routers the first writes it.

use std::pin::pin;

use futures_util::StreamExt;
use k8s_openapi::{
    api::core::v1::{ConfigMap, Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::PostParams,
    runtime::{
        WatchStreamExt,
        watcher::{self, watcher},
    },
};
use tokio::sync::mpsc;

use super::{
    Reach,
    reach::{Patience, in_one_line},
};
use crate::rules::{Origin, Reading, RuleError, RuleSet};

pub const CONFIG_MAP: &str = "ebpf-router-rules";
/// What the API server takes, in bytes.
const MAX_MESSAGE: usize = 1024;
const CONFLICT: u16 = 409;

/// Watches it, for ever.
pub async fn watch(client: Client, namespace: &str, readings: &mpsc::Sender<Reading>, reach: &Reach) {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    let mut events = pin!(watcher(api, config).backoff(Patience::default()));
    let (mut complained, mut is_there) = (None, false);
    while let Some(event) = events.next().await {
        let rules = match event {
            Ok(watcher::Event::Init) => {
                is_there = false;
                continue;
            }
            Ok(watcher::Event::InitApply(map) | watcher::Event::Apply(map)) => {
                (is_there, complained) = (true, None);
                let rules = rules(namespace, &map);
                if let Err(error) = &rules {
                    complain(&client, &map, error).await;
                }
                rules
            }
            Ok(watcher::Event::InitDone) if is_there => continue,
            Ok(watcher::Event::InitDone | watcher::Event::Delete(_)) => {
                Err(RuleError::NoConfigMap { namespace: namespace.to_owned(), name: CONFIG_MAP })
            }
            Err(error) => {
                reach.failed("ConfigMap", &error, &mut complained);
                continue;
            }
        };
        if readings.send(Reading { origin: Origin::ConfigMap, rules }).await.is_err() {
            return;
        }
    }
}

fn rules(namespace: &str, map: &ConfigMap) -> Result<RuleSet, RuleError> {
    let data = map.data.iter().flatten().map(|(key, text)| (key.as_str(), text.as_str()));
    RuleSet::of_config_map(&format!("ConfigMap {namespace}/{CONFIG_MAP}"), data)
}

async fn complain(client: &Client, map: &ConfigMap, error: &RuleError) {
    let event = event(map, error, Timestamp::now());
    let api: Api<Event> =
        Api::namespaced(client.clone(), event.metadata.namespace.as_deref().unwrap_or_default());
    match api.create(&PostParams::default(), &event).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == CONFLICT => {}
        Err(error) => log::warn!("no Event tells of the broken rule: {}", in_one_line(&error)),
    }
}

fn event(map: &ConfigMap, error: &RuleError, now: Timestamp) -> Event {
    let ObjectMeta { namespace, uid, resource_version, .. } = map.metadata.clone();
    let mut message = format!("the last good rules stay in force: {error}");
    let end = (0..=MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at));
    message.truncate(end.unwrap_or_default());
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{CONFIG_MAP}.{}", resource_version.as_deref().unwrap_or_default())),
            namespace: namespace.clone(),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("ConfigMap".into()),
            name: Some(CONFIG_MAP.into()),
            namespace,
            uid,
            resource_version,
            field_path: None,
        },
        type_: Some("Warning".into()),
        reason: Some("BrokenRule".into()),
        message: Some(message),
        source: Some(EventSource { component: Some("ebpf-router".into()), host: host_name() }),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        count: Some(1),
        ..Event::default()
    }
}

fn host_name() -> Option<String> {
    nix::unistd::gethostname().ok().map(|name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> ConfigMap {
        let metadata = ObjectMeta {
            namespace: Some("kube-system".into()),
            resource_version: Some("77".into()),
            ..ObjectMeta::default()
        };
        ConfigMap { data: Some([("pods".into(), text.into())].into()), metadata, ..ConfigMap::default() }
    }

    #[test]
    fn each_key_is_a_rule() {
        assert_eq!(rules("kube-system", &map("type=cidr\nfrom=10.0.0.0/8\n")).unwrap().len(), 1);
        assert_eq!(rules("kube-system", &ConfigMap::default()).unwrap().len(), 0);
    }

    #[test]
    fn a_broken_rule_is_named_with_config_map_key_and_line() {
        let error = rules("kube-system", &map("type=cidr\nfrom=10.0.0.0/99\n")).unwrap_err().to_string();
        assert!(
            error.starts_with("ConfigMap kube-system/ebpf-router-rules, key pods:2: rule pods: from="),
            "{error}"
        );
    }

    #[test]
    fn the_event_of_a_change_has_a_name_of_its_own_and_a_message_that_fits() {
        let map = map(&format!("type=cidr\nfrom={}\n", "ä".repeat(2000)));
        let event = event(&map, &rules("kube-system", &map).unwrap_err(), Timestamp::UNIX_EPOCH);
        assert_eq!(event.metadata.name.as_deref(), Some("ebpf-router-rules.77"));
        assert!(
            event
                .message
                .is_some_and(|message| message.len() <= MAX_MESSAGE && message.contains("key pods:2"))
        );
    }
}
