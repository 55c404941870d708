// SPDX-License-Identifier: Apache-2.0
//! What is shipped: image, manifests and package. `test/run.sh --deploy` runs these; `init.sh deploy` installs what
//! they need.

mod image;
mod overlays;
mod package;

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use lab::manifest::documents;
use serde_yaml::Value;

/// Cargo runs tests in the package's directory.
const DEPLOY: &str = "../../deploy";

fn manifest() -> Result<Vec<Value>> {
    let path = Path::new(DEPLOY).join("simple-ds.yaml");
    documents(&std::fs::read_to_string(&path).with_context(|| path.display().to_string())?)
}

/// Runs it to its end, which must be a success, and returns what it printed.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command:?}: {}\n{said}{complained}", output.status);
    Ok(said.into_owned())
}
