// SPDX-License-Identifier: Apache-2.0
//! Which containers a process is in, by the paths of its cgroups. Pure.
//!
//! | made by | directory |
//! |---|---|
//! | containerd, cgroupfs driver | `/kubepods/burstable/podUID/ID` |
//! | containerd, systemd driver | `/kubepods.slice/…/kubepods-burstable-podUID.slice/cri-containerd-ID.scope` |
//! | containerd, of which kubelet and runtime disagree about the driver | `/…/kubepods-burstable-podUID.slice:cri-containerd:ID` |
//! | CRI-O | `crio-ID.scope`, or `crio-ID` |
//! | Docker | `/docker/ID`, or `/system.slice/docker-ID.scope` |
//! | Podman | `/machine.slice/libpod-ID.scope`, or `/libpod_parent/libpod-ID` |
//!
//! Below it a container may make cgroups of its own (`init.scope`), or run containers of its own, as `kind` does. On a
//! host with version 1 beside version 2 a container may be in the hierarchies of one only.

use serde::{Deserialize, Serialize};

/// What the runtime calls a container: 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContainerId(String);

impl ContainerId {
    /// Of the name of a cgroup's directory.
    fn of_directory(name: &str) -> Option<ContainerId> {
        let (whose, id) = match name.strip_suffix(".scope").unwrap_or(name).rsplit_once(['-', ':']) {
            Some((whose, id)) => (whose, id),
            None => ("", name),
        };
        let is_id = id.len() == 64 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        // conmon watches a container from outside.
        (is_id && !whose.ends_with("conmon")).then(|| ContainerId(id.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As far as people read it.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

/// The paths in the text of `/proc/PID/cgroup`, one of each hierarchy; that of version 2 first.
pub fn paths(cgroups: &str) -> Vec<&str> {
    let is_v1 = |line: &&str| !line.starts_with("0::");
    let (v1, v2): (Vec<&str>, Vec<&str>) = cgroups.lines().partition(is_v1);
    v2.into_iter().chain(v1).filter_map(|line| line.splitn(3, ':').nth(2)).collect()
}

/// The containers around a process of which this is the text of `/proc/PID/cgroup`, the innermost first.
pub fn containers(cgroups: &str) -> Vec<ContainerId> {
    let of_path = |path: &str| path.rsplit('/').filter_map(ContainerId::of_directory).collect::<Vec<_>>();
    let all = paths(cgroups).into_iter().map(of_path);
    all.reduce(|most, other| if other.len() > most.len() { other } else { most }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "0aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "1bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    /// `{A}` and `{B}` stand for ids.
    fn check(cgroups: &str, expected: &[&str]) {
        let cgroups = cgroups.replace("{A}", A).replace("{B}", B);
        let found = containers(&cgroups);
        assert_eq!(found.iter().map(ContainerId::as_str).collect::<Vec<_>>(), expected, "{cgroups}");
    }

    #[test]
    fn each_runtime_and_driver_has_its_own_names() {
        check("0::/kubepods/burstable/pod7e1c/{A}\n", &[A]);
        check("0::/kubepods/pod7e1c/{A}\n", &[A]);
        check(
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7e1c.slice/cri-containerd-{A}.scope\n",
            &[A],
        );
        check("0::/system.slice/containerd.service/kubepods-pod7e1c.slice:cri-containerd:{A}\n", &[A]);
        check("0::/kubepods.slice/kubepods-pod7e1c.slice/crio-{A}.scope\n", &[A]);
        check("0::/kubepods/besteffort/pod7e1c/crio-{A}\n", &[A]);
        check("0::/docker/{A}\n", &[A]);
        check("0::/system.slice/docker-{A}.scope\n", &[A]);
        check("0::/machine.slice/libpod-{A}.scope/container\n", &[A]);
        check("0::/libpod_parent/libpod-{A}\n", &[A]);
    }

    #[test]
    fn cgroups_that_a_container_makes_for_itself_are_in_the_container() {
        check("0::/kubepods/burstable/pod7e1c/{A}/init.scope\n", &[A]);
        check("0::/docker/{A}/system.slice/nginx.service\n", &[A]);
    }

    #[test]
    fn a_reader_in_a_cgroup_namespace_of_its_own_sees_paths_from_there() {
        check("0::/../../pod7e1c/{A}\n", &[A]);
        check("0::/../../../system.slice/docker-{A}.scope\n", &[A]);
    }

    #[test]
    fn the_container_within_another_comes_first() {
        check("0::/docker/{B}/kubelet/kubepods/besteffort/pod7e1c/{A}\n", &[A, B]);
        check(
            "0::/system.slice/docker-{B}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod7.slice/cri-containerd-{A}.scope\n",
            &[A, B],
        );
    }

    #[test]
    fn on_a_hybrid_host_any_hierarchy_may_tell() {
        check("4:memory:/docker/{A}\n1:name=systemd:/docker/{A}\n0::/\n", &[A]);
        check("4:memory:/user.slice\n0::/docker/{A}\n", &[A]);
        check("9:cpu,cpuacct:/docker/{B}/kubepods/pod7/{A}\n0::/docker/{B}\n", &[A, B]);
    }

    #[test]
    fn what_only_looks_like_a_container_is_none() {
        check("0::/system.slice/ssh.service\n", &[]);
        check("0::/machine.slice/libpod-conmon-{A}.scope\n", &[]);
        check("0::/docker/{A}0\n", &[]);
        check("0::/kubepods/burstable/pod7e1c/web\n", &[]);
        check("", &[]);
    }

    #[test]
    fn a_colon_in_a_path_belongs_to_the_path() {
        assert_eq!(paths("4:memory:/a:b\n0::/c\n"), ["/c", "/a:b"]);
    }
}
