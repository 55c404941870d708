// SPDX-License-Identifier: Apache-2.0
//! Containers from a file that an operator wrote.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::Workload;

#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    #[error("ROUTER_LABELS={path}: cannot be read: {source}; give the path of a file that gives containers labels", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}; expected a list `containers` of entries with cgroup, pod, container, podLabels and containerLabels", path = path.display())]
    Malformed { path: PathBuf, source: serde_yaml::Error },
    #[error("{path}: entry {number} has an empty cgroup: expected the end of a cgroup's path, such as pod1234/web", path = path.display())]
    NoCgroup { path: PathBuf, number: usize },
}

/// Without a file, it knows none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelsFile {
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

impl LabelsFile {
    pub fn load(path: &Path) -> Result<LabelsFile, LabelError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| LabelError::Unreadable { path: path.to_owned(), source })?;
        let loaded: LabelsFile = serde_yaml::from_str(&text)
            .map_err(|source| LabelError::Malformed { path: path.to_owned(), source })?;
        match loaded.containers.iter().position(|entry| entry.cgroup.trim_matches('/').is_empty()) {
            Some(index) => Err(LabelError::NoCgroup { path: path.to_owned(), number: index + 1 }),
            None => Ok(loaded),
        }
    }

    /// The container whose cgroups have these paths.
    pub fn find(&self, paths: &[&str]) -> Option<Workload> {
        let paths: Vec<String> = paths.iter().map(|path| format!("/{}/", path.trim_matches('/'))).collect();
        let entry = self.containers.iter().find(|entry| {
            let wanted = format!("/{}/", entry.cgroup.trim_matches('/'));
            paths.iter().any(|path| path.contains(&wanted))
        })?;
        Some(Workload {
            name: format!("{}/{}", entry.pod, entry.container).trim_matches('/').to_owned(),
            pod_labels: entry.pod_labels.clone(),
            container_labels: entry.container_labels.clone(),
            unknown: Vec::new(),
        })
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

    fn find(path: &str) -> Option<Workload> {
        serde_yaml::from_str::<LabelsFile>(FILE).unwrap().find(&["/", path])
    }

    #[test]
    fn a_container_is_found_by_a_part_of_its_cgroup_path() {
        let found = find("/kubepods/burstable/pod1/web/init.scope").unwrap();
        assert_eq!((found.name.as_str(), found.pod_labels["app"].as_str()), ("shop/web", "shop"));
        assert_eq!(find("/pod1/web").unwrap().container_labels["tier"], "web");
    }

    #[test]
    fn part_of_a_directory_name_does_not_match() {
        assert_eq!((find("/pod1/web2"), find("/xpod1/web")), (None, None));
    }

    #[test]
    fn an_unknown_word_in_the_file_is_named() {
        let text = "containers: [{ cgroup: a, podLables: { app: x } }]";
        let error = serde_yaml::from_str::<LabelsFile>(text).unwrap_err().to_string();
        assert!(error.contains("podLables"), "{error}");
    }
}
