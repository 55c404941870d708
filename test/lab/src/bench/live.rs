// SPDX-License-Identifier: Apache-2.0
//! iperf3 first, the routers three seconds later.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;
use lab::{
    measure::{IPERF3_PORT, RunningIperf3, gbps_each_second},
    wait_for,
};

use super::Setting;

const SECONDS: u32 = 10;
const ROUTERS_AFTER: Duration = Duration::from_secs(3);

pub struct Live {
    /// As iperf3 reported it, one value a second.
    pub gbps: Vec<f64>,
    /// From iperf3's start.
    pub swapped_at_s: Option<f64>,
    pub pause_us: Option<f64>,
}

pub fn measure(setting: &Setting, log: &Path) -> Result<Live> {
    let (client, server) = (setting.client.place(), setting.server.place());
    let seconds = SECONDS.to_string();
    let running =
        RunningIperf3::start(client, server, setting.server.v4.into(), &["-t", &seconds, "-f", "g"])?;
    let started = Instant::now();
    // This is no wait for something to happen: it is the experiment.
    std::thread::sleep(ROUTERS_AFTER);
    setting.lab.start_routers(&setting.routers)?;
    let left = Duration::from_secs(u64::from(SECONDS) - 1).saturating_sub(started.elapsed());
    // iperf3's control connection sends next to nothing.
    let swapped = wait_for("the swap of a connection older than the routers", left, || {
        let flows = setting.lab.h1.flows()?;
        let moved: Vec<_> =
            flows.iter().filter(|flow| flow.has_port(IPERF3_PORT) && flow.on_host()).collect();
        Ok((moved.len() >= 2)
            .then(|| (started.elapsed(), moved.iter().filter_map(|flow| flow.pause_us).max())))
    });
    let text = running.finish_text()?;
    std::fs::write(log, &text)?;
    setting.lab.stop_routers()?;
    let (swapped_at_s, pause_us) = match swapped {
        Ok((at, pause)) => (Some(at.as_secs_f64()), pause.map(|us| us as f64)),
        Err(error) => {
            eprintln!("{error:#}");
            (None, None)
        }
    };
    Ok(Live { gbps: gbps_each_second(&text), swapped_at_s, pause_us })
}
