// SPDX-License-Identifier: Apache-2.0
//! Which container a process belongs to, and the labels that rules ask for.
//!
//! ```text
//!   /proc/PID/cgroup ──▶ labels file ──▶ what was told before ──▶ a task asks the runtimes ──▶ Told
//!                        (ROUTER_LABELS)                           (CRI, Docker, Podman)
//! ```
//!
//! Nobody waits for a runtime: a container that none has told of yet is shown by the end of its cgroup's path, without
//! labels, and its connections are looked at again when one has. It is asked about once, because a runtime fixes the
//! labels of a container when it makes it, and no two have the same id: there is nothing that would have to be followed.
//! How Kubernetes labels a running pod anew no runtime is told: that is known from the API server ([`Pods`]).

mod cgroup;
mod cri;
mod docker;
mod labels_file;
mod runtimes;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

pub use cgroup::ContainerId;
pub use labels_file::LabelsFile;
pub use runtimes::{Runtimes, WorkloadSettings};

use crate::cluster::Pods;
use labels_file::LabelError;
use runtimes::Answer;

/// The most containers that are remembered, and about which runtimes are asked at once.
const MAX_KNOWN: usize = 4096;
const MAX_ASKED: usize = 256;
/// How long a container stays unknown that no runtime knows: another program's, such as nerdctl's.
const NOWHERE: Duration = Duration::from_secs(30);
/// And one of which a runtime that does not answer may know: shorter than what lies between two looks at the connections
/// of unknown containers, and not zero, or an answer that fails at once would be asked for again at once.
const UNREACHABLE: Duration = Duration::from_secs(1);
/// The longest label that is kept, name and value, bytes: one of Kubernetes has up to 380. A container of Docker has
/// those of its image too, and most that are longer are texts for people.
const MAX_LABEL: usize = 512;
const MAX_LABELS: usize = 256;

/// What kubelet adds to a pod's own labels when it has a runtime make it.
const POD_UID: &str = "io.kubernetes.pod.uid";
const KUBELETS: [&str; 3] = ["io.kubernetes.pod.name", "io.kubernetes.pod.namespace", POD_UID];

/// A container, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// `namespace/pod/container` as the runtime has it, or the end of the cgroup's path.
    pub name: String,
    pub pod_labels: BTreeMap<String, String>,
    pub container_labels: BTreeMap<String, String>,
    /// Until a runtime has told its labels: the container and those around it, the innermost first.
    pub unknown: Vec<ContainerId>,
}

/// What the runtimes have said of a container.
pub struct Told {
    container: ContainerId,
    answer: Answer,
}

/// Who knows the containers of this host.
pub struct Workloads {
    file: LabelsFile,
    runtimes: Arc<Runtimes>,
    pods: Pods,
    known: HashMap<ContainerId, Known>,
    told: mpsc::Sender<Told>,
}

enum Known {
    Asked,
    Is(Workload),
    UnknownUntil(Instant),
}

impl Workloads {
    /// What runtimes say comes to the receiver, and is to be given to [`Workloads::learn`].
    pub fn open(
        labels: Option<&Path>,
        runtimes: Runtimes,
        pods: Pods,
    ) -> Result<(Workloads, mpsc::Receiver<Told>), LabelError> {
        let file = labels.map(LabelsFile::load).transpose()?.unwrap_or_default();
        runtimes.tell_of_missing();
        // Room for all that are asked: nobody waits to give an answer.
        let (told, receiver) = mpsc::channel(MAX_ASKED);
        Ok((Workloads { file, runtimes: Arc::new(runtimes), pods, known: HashMap::new(), told }, receiver))
    }

    /// The container of a process of this host. A process that has ended belongs to none.
    pub fn of_process(&mut self, tgid: u32) -> io::Result<Workload> {
        let cgroups = match std::fs::read_to_string(format!("/proc/{tgid}/cgroup")) {
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ESRCH)) => {
                String::new()
            }
            cgroups => cgroups?,
        };
        let paths = cgroup::paths(&cgroups);
        if let Some(workload) = self.file.find(&paths) {
            return Ok(workload);
        }
        let unknown = if self.runtimes.are_none() { Vec::new() } else { cgroup::containers(&cgroups) };
        let untold = Workload { name: end_of_path(&paths), unknown, ..Workload::default() };
        Ok(self.renewed(&untold).unwrap_or(untold))
    }

    /// The same container, if more is known of it now, or if its pod is labelled otherwise. Of one that is not known the
    /// runtimes are asked.
    pub fn renewed(&mut self, workload: &Workload) -> Option<Workload> {
        let Some(container) = workload.unknown.first() else { return self.relabelled(workload) };
        match self.known.get(container) {
            Some(Known::Is(known)) => return Some(self.relabelled(known).unwrap_or_else(|| known.clone())),
            Some(Known::Asked) => return None,
            Some(Known::UnknownUntil(time)) if Instant::now() < *time => return None,
            Some(Known::UnknownUntil(_)) | None => {}
        }
        let asked = self.known.values().filter(|known| matches!(known, Known::Asked)).count();
        if asked < MAX_ASKED {
            if self.known.len() >= MAX_KNOWN {
                self.known.retain(|_, known| matches!(known, Known::Asked));
            }
            self.known.insert(container.clone(), Known::Asked);
            self.ask(workload.unknown.clone());
        }
        None
    }

    /// With the labels that its pod has now, if they are others.
    fn relabelled(&self, workload: &Workload) -> Option<Workload> {
        let labels = self.pods.labels_of(workload.pod_labels.get(POD_UID)?)?;
        let added = workload.pod_labels.iter().filter(|(name, _)| KUBELETS.contains(&name.as_str()));
        let all = added.chain(labels.iter()).map(|(name, value)| (name.clone(), value.clone()));
        let pod_labels = kept(all.collect());
        (pod_labels != workload.pod_labels).then(|| Workload { pod_labels, ..workload.clone() })
    }

    fn ask(&self, containers: Vec<ContainerId>) {
        let (runtimes, told) = (Arc::clone(&self.runtimes), self.told.clone());
        tokio::spawn(async move {
            let answer = runtimes.find(&containers).await;
            if let Some(container) = containers.into_iter().next() {
                // Nobody hears it where the router has stopped.
                let _ = told.send(Told { container, answer }).await;
            }
        });
    }

    pub fn learn(&mut self, Told { container, answer }: Told) {
        let known = match answer {
            Answer::Is(workload) => {
                log::debug!("container {} is {}", container.short(), workload.name);
                Known::Is(workload)
            }
            Answer::Nowhere => {
                log::debug!("container {} is known to no runtime", container.short());
                Known::UnknownUntil(Instant::now() + NOWHERE)
            }
            Answer::Unreachable => Known::UnknownUntil(Instant::now() + UNREACHABLE),
        };
        self.known.insert(container, known);
    }
}

/// A container that has no other name.
fn end_of_path(paths: &[&str]) -> String {
    let path = paths.iter().find(|path| path.len() > 1).copied().unwrap_or_default();
    let mut names: Vec<&str> = path.rsplit('/').filter(|name| !name.is_empty()).take(2).collect();
    names.reverse();
    names.join("/")
}

/// What is kept of a container's labels.
fn kept(labels: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let is_short = |(name, value): &(String, String)| name.len() + value.len() <= MAX_LABEL;
    labels.into_iter().filter(is_short).take(MAX_LABELS).collect()
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use runtimes::RuntimeSetting;

    #[tokio::test]
    async fn a_runtime_that_does_not_answer_is_not_asked_again_at_once() {
        let nobody = RuntimeSetting::Socket("/nonexistent/runtime.sock".into());
        let (mut workloads, mut told) =
            Workloads::open(None, Runtimes::new(&nobody).unwrap(), Pods::default()).unwrap();
        let unknown = cgroup::containers(&format!("0::/docker/{}\n", "7".repeat(64)));
        let untold = Workload { unknown, ..Workload::default() };
        assert_eq!(workloads.renewed(&untold), None);
        workloads.learn(told.recv().await.unwrap());
        assert_eq!(workloads.renewed(&untold), None);
        assert!(timeout(UNREACHABLE / 4, told.recv()).await.is_err(), "it was asked again");
        tokio::time::sleep(UNREACHABLE).await;
        assert_eq!(workloads.renewed(&untold), None);
        assert!(told.recv().await.is_some());
    }

    #[test]
    fn an_unknown_container_is_named_after_the_end_of_its_cgroup_path() {
        assert_eq!(end_of_path(&["/kubepods/burstable/pod7/db"]), "pod7/db");
        assert_eq!(end_of_path(&["/", "/docker/7"]), "docker/7");
        assert_eq!(end_of_path(&["/"]), "");
    }

    #[test]
    fn texts_for_people_are_not_kept_as_labels() {
        let labels = [("app", "shop"), ("licence", &"x".repeat(600))];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(kept(labels.into()).into_keys().collect::<Vec<_>>(), ["app"]);
    }
}
