// SPDX-License-Identifier: Apache-2.0
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything that is not meant to take long, on a machine that is busy.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Looks again and again until there is something, and says after `limit` what did not come.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("waited {limit:?} for {what}, which did not come");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
