// SPDX-License-Identifier: Apache-2.0
//! OpenMPI with a rank in each pod. mpirun starts the second by a script in the place of ssh.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use lab::Scene;

use crate::{load, loads, run, source};

/// Where each rank accepts connections for messages.
const PORT: u16 = 10_000;

/// The beginning of a command that runs a program in both pods.
fn mpirun(scene: &Scene) -> Result<String> {
    let (here, there) = (&scene.client, &scene.server);
    let place = there.place();
    let agent = scene.lab.directory().join("agent");
    // Called with the address and the command of the other daemon, as ssh would be.
    let script = format!(
        "#!/bin/sh -e\nshift\necho 0 >{}/cgroup.procs\nexport TMPDIR={}\nexec {} sh -c \"$*\"\n",
        place.cgroup.path().display(),
        place.directory.display(),
        place.line_to_enter()
    );
    std::fs::write(&agent, script)?;
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755))?;
    Ok(format!(
        "env TMPDIR={} mpirun --allow-run-as-root --bind-to none -np 2 -H {},{} --mca plm_rsh_agent {} \
         --mca btl tcp,self --mca btl_tcp_if_include eth0 --mca btl_tcp_port_min_v4 {PORT} \
         --mca oob_tcp_if_include eth0 --mca mpi_yield_when_idle 1",
        here.place().directory.display(),
        here.v4,
        there.v4,
        agent.display()
    ))
}

#[test]
fn mpi_ranks_receive_every_word() -> Result<()> {
    let scene = Scene::with_routers("mpi")?;
    let program = scene.lab.directory().join("exchange");
    let program = program.display();
    run(&scene, &format!("mpicc -O2 -o {program} {}", source("exchange.c").display()))?;
    let said = load(&scene, PORT, &format!("{} {program}", mpirun(&scene)?))?.last_json()?;
    ensure!(said["ranks"] == 2 && said["rounds"].as_u64() > Some(100), "{said}");
    Ok(())
}

#[test]
fn netpipe_finds_every_message_whole() -> Result<()> {
    let scene = Scene::with_routers("netpipe")?;
    let results = scene.lab.directory().join("np.out");
    let netpipe = format!("{} NPopenmpi -i -o {}", mpirun(&scene)?, results.display());
    for load in loads(&scene, PORT, &netpipe)? {
        // A line for each size, up to 8 MB.
        let checked: Vec<&str> = load.stderr.lines().filter(|line| line.contains(" bytes ")).collect();
        let whole = checked.iter().all(|line| line.ends_with("Integrity check passed"));
        ensure!(whole && checked.len() > 40, "{}", load.stderr);
    }
    Ok(())
}
