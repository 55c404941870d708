// SPDX-License-Identifier: Apache-2.0
//! iperf3 first, the routers three seconds later.

use std::time::{Duration, Instant};

use anyhow::Result;
use lab::{
    measure::{IPERF3_PORT, RunningIperf3, gbps_each_second},
    wait_for,
};
use serde_json::{Value, json};

use super::Setting;

const SECONDS: u32 = 10;
const ROUTERS_AFTER: Duration = Duration::from_secs(3);

pub struct Live {
    /// As iperf3 reported it, one value a second.
    pub gbps: Vec<f64>,
    /// From iperf3's start.
    pub swapped_at_s: f64,
    pub pause_us: Option<f64>,
}

pub fn measure(setting: &Setting) -> Result<Live> {
    let (client, server) = (setting.client.place(), setting.server.place());
    let seconds = SECONDS.to_string();
    let running =
        RunningIperf3::start(client, server, setting.server.v4.into(), &["-t", &seconds, "-f", "g"])?;
    let started = Instant::now();
    // This is no wait for something to happen: it is the experiment.
    std::thread::sleep(ROUTERS_AFTER);
    setting.start_routers()?;
    let left = Duration::from_secs(u64::from(SECONDS) - 1).saturating_sub(started.elapsed());
    // iperf3's control connection sends next to nothing.
    let (at, pause) = wait_for("the swap of a connection older than the routers", left, || {
        let flows = setting.lab.h1.flows()?;
        let moved: Vec<_> =
            flows.iter().filter(|flow| flow.has_port(IPERF3_PORT) && flow.on_host()).collect();
        Ok((moved.len() >= 2)
            .then(|| (started.elapsed(), moved.iter().filter_map(|flow| flow.pause_us).max())))
    })?;
    let text = running.finish_text()?;
    setting.log(&format!("== iperf3 first, the routers {ROUTERS_AFTER:?} later\n{text}"))?;
    setting.stop_routers()?;
    Ok(Live {
        gbps: gbps_each_second(&text),
        swapped_at_s: at.as_secs_f64(),
        pause_us: pause.map(|us| us as f64),
    })
}

impl Live {
    pub fn text(&self) -> String {
        let mut lines = vec!["\niperf3 first, the routers 3 s later; iperf3's own rates:".to_owned()];
        for (second, gbps) in self.gbps.iter().enumerate() {
            let swapped = self.swapped_at_s as usize == second;
            let pause = self.pause_us.map_or(String::new(), |us| format!(", pause {:.2} ms", us / 1000.0));
            let mark = if swapped { format!("  <- swapped{pause}") } else { String::new() };
            lines.push(format!("  {second:>2}-{:<2} s {gbps:>6.1} Gbit/s{mark}", second + 1));
        }
        lines.join("\n")
    }

    pub fn json(&self) -> Value {
        json!({
            "gbps_each_second": self.gbps,
            "swapped_at_s": self.swapped_at_s,
            "pause_us": self.pause_us,
        })
    }
}
