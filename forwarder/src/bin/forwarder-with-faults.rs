// SPDX-License-Identifier: Apache-2.0
//! The forwarder for tests of crashes: it dies at a chosen point of a move, see `src/fault.rs`.

#[global_allocator]
static HEAP: forwarder::Heap = forwarder::Heap;

fn main() -> std::process::ExitCode {
    forwarder::main()
}
