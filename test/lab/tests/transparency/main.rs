// SPDX-License-Identifier: Apache-2.0
//! No application can tell: a row of test/TRANSPARENCY.md for each behaviour, and a test for each row.
//!
//! A test brings a connection into a state, moves it between overlay and host network while it is there, and checks
//! that both programs saw what they would have seen without that. All tests share one lab: they differ in ports.

mod addresses;
mod calls;
mod matrix;
mod namespaces;
mod processes;
mod readiness;
mod sharing;
mod state;
