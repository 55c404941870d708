// SPDX-License-Identifier: Apache-2.0
//! OpenMPI with a rank in each pod.

use anyhow::{Result, ensure};
use lab::{
    Scene,
    programs::{self, MPI_PORT, source},
};

use crate::{load, loads, run};

/// The beginning of a command that runs a program in both pods.
fn mpirun(scene: &Scene) -> Result<String> {
    let (here, there) = (&scene.client, &scene.server);
    programs::mpirun((here.place(), here.v4.into()), (there.place(), there.v4.into()), 1)
}

#[test]
fn mpi_ranks_receive_every_word() -> Result<()> {
    let scene = Scene::with_routers("mpi")?;
    let program = scene.lab.directory().join("exchange");
    let program = program.display();
    run(&scene, &format!("mpicc -O2 -o {program} {}", source("exchange.c").display()))?;
    let said = load(&scene, MPI_PORT, &format!("{} {program}", mpirun(&scene)?))?.last_json()?;
    ensure!(said["ranks"] == 2 && said["rounds"].as_u64() > Some(100), "{said}");
    Ok(())
}

#[test]
fn netpipe_finds_every_message_whole() -> Result<()> {
    let scene = Scene::with_routers("netpipe")?;
    let results = scene.lab.directory().join("np.out");
    let netpipe = format!("{} NPopenmpi -i -o {}", mpirun(&scene)?, results.display());
    for load in loads(&scene, MPI_PORT, &netpipe)? {
        // A line for each size, up to 8 MB.
        let checked: Vec<&str> = load.stderr.lines().filter(|line| line.contains(" bytes ")).collect();
        let whole = checked.iter().all(|line| line.ends_with("Integrity check passed"));
        ensure!(whole && checked.len() > 40, "{}", load.stderr);
    }
    Ok(())
}
