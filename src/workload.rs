// SPDX-License-Identifier: Apache-2.0
//! Which container a process belongs to, and the labels that rules ask for.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// A container, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// `pod/container`, or the end of the cgroup's path.
    pub name: String,
    pub pod_labels: BTreeMap<String, String>,
    pub container_labels: BTreeMap<String, String>,
}

/// Who knows containers: a static file here, a container runtime elsewhere.
pub trait WorkloadSource: Send + Sync {
    /// The container of the process whose cgroup is this path below the root of the v2 hierarchy.
    fn of_cgroup(&self, cgroup: &str) -> Workload;
}

/// The container of a process of this host. A process that has ended belongs to none.
pub fn of_process(source: &dyn WorkloadSource, tgid: u32) -> io::Result<Workload> {
    let cgroups = match std::fs::read_to_string(format!("/proc/{tgid}/cgroup")) {
        Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ESRCH)) => {
            String::new()
        }
        cgroups => cgroups?,
    };
    let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    Ok(source.of_cgroup(cgroup))
}

#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    #[error("{path}: cannot be read: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}; expected a list `containers` of entries with cgroup, pod, container, podLabels and containerLabels", path = path.display())]
    Malformed { path: PathBuf, source: serde_yaml::Error },
    #[error("{path}: entry {number} has an empty cgroup: expected the end of a cgroup's path, such as pod1234/web", path = path.display())]
    NoCgroup { path: PathBuf, number: usize },
}

/// Containers from a file that an operator wrote. Without a file, none has labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticWorkloads {
    containers: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    /// Directory names that follow each other somewhere in the path of the process's cgroup.
    cgroup: String,
    #[serde(default)]
    pod: String,
    #[serde(default)]
    container: String,
    #[serde(default)]
    pod_labels: BTreeMap<String, String>,
    #[serde(default)]
    container_labels: BTreeMap<String, String>,
}

impl StaticWorkloads {
    pub fn load(path: &Path) -> Result<StaticWorkloads, LabelError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| LabelError::Unreadable { path: path.to_owned(), source })?;
        let loaded: StaticWorkloads = serde_yaml::from_str(&text)
            .map_err(|source| LabelError::Malformed { path: path.to_owned(), source })?;
        match loaded.containers.iter().position(|entry| entry.cgroup.trim_matches('/').is_empty()) {
            Some(index) => Err(LabelError::NoCgroup { path: path.to_owned(), number: index + 1 }),
            None => Ok(loaded),
        }
    }
}

impl WorkloadSource for StaticWorkloads {
    fn of_cgroup(&self, cgroup: &str) -> Workload {
        let path = format!("/{}/", cgroup.trim_matches('/'));
        let of_entry = |entry: &&Entry| path.contains(&format!("/{}/", entry.cgroup.trim_matches('/')));
        match self.containers.iter().find(of_entry) {
            Some(entry) => Workload {
                name: format!("{}/{}", entry.pod, entry.container).trim_matches('/').to_owned(),
                pod_labels: entry.pod_labels.clone(),
                container_labels: entry.container_labels.clone(),
            },
            None => {
                let mut names: Vec<&str> = path.rsplit('/').filter(|name| !name.is_empty()).take(2).collect();
                names.reverse();
                Workload { name: names.join("/"), ..Workload::default() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "
containers:
  - cgroup: pod1/web
    pod: shop
    container: web
    podLabels: { app: shop }
    containerLabels: { tier: web }
";

    fn source() -> StaticWorkloads {
        serde_yaml::from_str(FILE).unwrap()
    }

    #[test]
    fn a_container_is_found_by_a_part_of_its_cgroup_path() {
        let found = source().of_cgroup("/kubepods/burstable/pod1/web/init.scope");
        assert_eq!((found.name.as_str(), found.pod_labels["app"].as_str()), ("shop/web", "shop"));
        assert_eq!(source().of_cgroup("/pod1/web").container_labels["tier"], "web");
    }

    #[test]
    fn part_of_a_directory_name_does_not_match() {
        assert!(source().of_cgroup("/pod1/web2").pod_labels.is_empty());
        assert!(source().of_cgroup("/xpod1/web").pod_labels.is_empty());
    }

    #[test]
    fn an_unknown_container_is_named_after_the_end_of_its_cgroup_path() {
        assert_eq!(source().of_cgroup("/kubepods/burstable/pod7/db").name, "pod7/db");
        assert_eq!(source().of_cgroup("/").name, "");
    }

    #[test]
    fn an_unknown_word_in_the_file_is_named() {
        let text = "containers: [{ cgroup: a, podLables: { app: x } }]";
        let error = serde_yaml::from_str::<StaticWorkloads>(text).unwrap_err().to_string();
        assert!(error.contains("podLables"), "{error}");
    }
}
