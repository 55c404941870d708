// SPDX-License-Identifier: Apache-2.0
//! Everything that knows registers or machine code. One file an architecture.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the forwarder knows the registers and system calls of x86_64 only");
