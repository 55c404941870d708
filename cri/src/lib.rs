// SPDX-License-Identifier: Apache-2.0
//! The part of Kubernetes' container runtime interface (CRI, runtime.v1) that routers and tests speak: gRPC on a unix
//! socket. The messages are written by hand, field numbers as in `cri-api/pkg/apis/runtime/v1/api.proto`; what nobody
//! here reads is left out, which protobuf allows.

mod messages;

use std::{path::Path, time::Duration};

use http::uri::PathAndQuery;
use tonic::{
    Request, Status,
    client::Grpc,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

pub use messages::*;
pub use tonic::{Code, Status as Error};

/// A question of the runtime service, and what answers it.
pub trait Question: prost::Message + 'static {
    type Answer: prost::Message + Default + 'static;
    const METHOD: &'static str;
}

/// A runtime's socket. It is connected to when something is asked, and again after it was lost. Clones share it.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// `time`: how long an answer may take. Must be called in a tokio runtime. An error: the path is not UTF-8.
    pub fn new(socket: &Path, time: Duration) -> Result<Client, Error> {
        let path =
            socket.to_str().ok_or_else(|| Status::invalid_argument("the socket's path is not UTF-8"))?;
        let endpoint = Endpoint::from_shared(format!("unix:{path}"))
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Client { channel: endpoint.timeout(time).connect_lazy() })
    }

    pub async fn ask<Q: Question>(&self, question: Q) -> Result<Q::Answer, Error> {
        let mut grpc = Grpc::new(self.channel.clone());
        let not_ready = |error: tonic::transport::Error| Status::unavailable(error.to_string());
        grpc.ready().await.map_err(not_ready)?;
        let codec = ProstCodec::<Q, Q::Answer>::default();
        let path = PathAndQuery::from_static(Q::METHOD);
        Ok(grpc.unary(Request::new(question), path, codec).await?.into_inner())
    }
}
