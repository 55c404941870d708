// SPDX-License-Identifier: Apache-2.0
use std::hash::{BuildHasher, Hasher, RandomState};

use anyhow::Result;

use crate::{
    Lab, Pod, RouterOptions,
    workload::{Stream, StreamOptions},
};

/// What most tests begin with: a pod on each host.
pub struct Scene {
    pub client: Pod,
    pub server: Pod,
    pub lab: Lab,
}

impl Scene {
    /// Nothing runs on the hosts.
    pub fn without_routers(test: &str) -> Result<Scene> {
        let lab = Lab::new(test)?;
        Ok(Scene { client: lab.h1.pod("client")?, server: lab.h2.pod("server")?, lab })
    }

    /// Forwarder and router on both hosts, with a rule for all pods.
    pub fn with_routers(test: &str) -> Result<Scene> {
        let scene = Scene::without_routers(test)?;
        scene.lab.start_everything(&RouterOptions::default())?;
        Ok(scene)
    }

    /// A stream from client to server, its command line (for both) given.
    pub fn stream(&self, port: u16, arguments: &str) -> Result<Stream> {
        self.stream_with(port, &StreamOptions::both(arguments))
    }

    pub fn stream_with(&self, port: u16, options: &StreamOptions) -> Result<Stream> {
        Stream::start(&self.client, &self.server, port, options)
    }

    /// A stream that both routers show on the host network.
    pub fn swapped_stream(&self, port: u16, arguments: &str) -> Result<Stream> {
        let stream = self.stream(port, arguments)?;
        self.wait_until_on_host(port)?;
        Ok(stream)
    }

    pub fn wait_until_on_host(&self, port: u16) -> Result<()> {
        self.lab.hosts().into_iter().try_for_each(|host| host.wait_until_on_host(port).map(drop))
    }

    /// Moves the connections of this port to and fro, at random, until `done`, which is told how many moves succeeded.
    pub fn move_about(&self, port: u16, mut done: impl FnMut(u32) -> Result<bool>) -> Result<u32> {
        let mut moves = 0;
        while !done(moves)? {
            // The standard library's only source of chance.
            let chance = RandomState::new().build_hasher().finish() as usize;
            let host = self.lab.hosts()[chance % 2];
            let flows: Vec<_> = host.flows()?.into_iter().filter(|flow| flow.has_port(port)).collect();
            let Some(flow) = flows.get(chance / 2 % flows.len().max(1)) else { continue };
            let Some(conn) = &flow.conn else { continue };
            // Refused in passing, or closed a moment ago: another will do.
            let moved = if flow.on_host() { host.swap_back(conn) } else { host.swap(conn) };
            moves += u32::from(moved.is_ok());
        }
        Ok(moves)
    }

    pub fn wait_until_on_overlay(&self, port: u16) -> Result<()> {
        self.lab.hosts().into_iter().try_for_each(|host| host.wait_until_on_overlay(port).map(drop))
    }
}
