// SPDX-License-Identifier: Apache-2.0
//! What the router costs those that it does not serve: it runs, but its rules match nobody.

use anyhow::{Context, Result};
use lab::programs::{command, compile};

use super::{Key, Part, Quantity, Rules, Setting, Way, figure::Target, iperf3, rate};

pub static KEY: Key = Key {
    name: "cost",
    title: "what a router costs those whose connections no rule matches",
    rules: Rules::ForNobody,
    rounds: 7,
    most_rounds: 21,
    parts,
    live: None,
};

static GETPID: Quantity = Quantity::less("an unrelated system call", "ns");
static CONNECT: Quantity = Quantity::less("connect and close, no rule matches", "µs");
static THROUGHPUT: Quantity =
    Quantity::more("throughput, no rule matches", "Gbit/s").target(Target::OfOverlay(0.995));
static NEW: Quantity = Quantity::more("requests with a new connection each, no rule matches", "1/s")
    .target(Target::OfOverlay(0.995));

const WITH_AND_WITHOUT: &[Way] = &[Way::Overlay, Way::Router];
const PORT: u16 = 7200;

fn parts(setting: &Setting) -> Result<Vec<Part>> {
    let calls = compile(&setting.lab, "cc", "calls")?.display().to_string();
    let root = rate::root(setting)?;
    let (in_pod, on_host) = (calls.clone(), calls.clone());
    let parts = [
        Part::new("getpid in a pod", move |run| {
            let ns = number(&run.client(&format!("{in_pod} getpid {}", run.seconds.div_ceil(2)))?)?;
            Ok(vec![GETPID.of("getpid, in a pod", ns)])
        }),
        Part::new("getpid on the host", move |run| {
            let words = format!("{on_host} getpid {}", run.seconds.div_ceil(2));
            let host = run.setting.lab.h1.place();
            let ns = number(&run.finish(host.spawn("getpid", &mut command(&words))?)?)?;
            Ok(vec![GETPID.of("getpid, on the host", ns)])
        }),
        Part::new("connect", move |run| {
            let _server = run.serve(&format!("{calls} serve {PORT}"), PORT)?;
            let words = format!("{calls} connect {} {PORT} {}", run.address, run.seconds);
            Ok(vec![CONNECT.of("one after the other", number(&run.client(&words)?)? / 1000.0)])
        }),
        iperf3::unmatched(&THROUGHPUT),
        Part::new("new connections", move |run| {
            Ok(vec![NEW.of("nginx, wrk", rate::once(run, &root, rate::Connections::New)?.requests_per_s)])
        }),
    ];
    Ok(parts.map(|part| part.by(WITH_AND_WITHOUT)).into())
}

fn number(output: &str) -> Result<f64> {
    output.trim().parse().with_context(|| format!("a number expected, printed was {output}"))
}
