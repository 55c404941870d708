// SPDX-License-Identifier: Apache-2.0
//! Where and when something was measured.

use std::process::Command;

use serde::Serialize;

#[derive(Clone, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cpus: usize,
    pub kernel: String,
    pub date: String,
    /// Runnable threads in the last five minutes: what else the machine had to do shows here.
    pub load: f64,
}

impl Machine {
    pub fn look() -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let date = Command::new("date").args(["--utc", "+%Y-%m-%d %H:%M UTC"]).output();
        Machine {
            cpu: model.map_or_else(|| "unknown CPU".into(), |(_, model)| model.to_owned()),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            date: date
                .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
                .unwrap_or_default(),
            load: read("/proc/loadavg").split(' ').nth(1).and_then(|load| load.parse().ok()).unwrap_or(0.0),
        }
    }

    pub fn words(&self) -> String {
        let Machine { cpu, cpus, kernel, date, load } = self;
        format!("{cpu}, {cpus} CPUs, Linux {kernel}, {date}, load average {load}")
    }
}
