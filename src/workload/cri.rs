// SPDX-License-Identifier: Apache-2.0
//! What a runtime knows of a container over Kubernetes' container runtime interface. Rules' podLabels are held against
//! the sandbox's labels, containerLabels against the container's (kubelet puts `io.kubernetes.container.name` there).

use cri::{
    Client, Code, Container, Error, Filter, ListContainersRequest, ListPodSandboxRequest, PodSandbox,
    VersionRequest,
};

use super::{Workload, cgroup::ContainerId, kept};

/// The name of the runtime and its version.
pub async fn version(client: &Client) -> Result<String, Error> {
    match client.ask(VersionRequest {}).await {
        Err(error) if speaks_no_cri(&error) => Ok("a runtime without CRI".into()),
        answer => answer.map(|answer| format!("{} {}", answer.runtime_name, answer.runtime_version)),
    }
}

/// Asked by id: the list of all containers of a host may be longer than a gRPC message.
pub async fn find(client: &Client, id: &ContainerId) -> Result<Option<Workload>, Error> {
    match ask(client, id.as_str()).await {
        Err(error) if speaks_no_cri(&error) => Ok(None),
        answer => answer,
    }
}

/// As containerd where Docker runs it.
fn speaks_no_cri(error: &Error) -> bool {
    error.code() == Code::Unimplemented
}

async fn ask(client: &Client, id: &str) -> Result<Option<Workload>, Error> {
    let filter = |id: &str| Some(Filter { id: id.to_owned() });
    let containers = client.ask(ListContainersRequest { filter: filter(id) }).await?.containers;
    let container = containers.into_iter().find(|container| container.id == id);
    // What has a sandbox's own id is its first process, which does nothing.
    let sandbox_id = container.as_ref().map_or(id, |container| &container.pod_sandbox_id);
    let sandboxes = client.ask(ListPodSandboxRequest { filter: filter(sandbox_id) }).await?.items;
    let sandbox = sandboxes.into_iter().find(|sandbox| sandbox.id == sandbox_id);
    Ok(sandbox.map(|sandbox| workload(sandbox, container)))
}

fn workload(sandbox: PodSandbox, container: Option<Container>) -> Workload {
    let pod = sandbox.metadata.unwrap_or_default();
    let (name, container_labels) = match container {
        Some(container) => (container.metadata.unwrap_or_default().name, container.labels),
        None => ("pause".to_owned(), Default::default()),
    };
    Workload {
        name: format!("{}/{}/{name}", pod.namespace, pod.name),
        pod_labels: kept(sandbox.labels),
        container_labels: kept(container_labels),
        unknown: Vec::new(),
    }
}
