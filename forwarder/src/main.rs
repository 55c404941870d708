// SPDX-License-Identifier: Apache-2.0
//! The forwarder, see the library of the same name.

#[global_allocator]
static HEAP: forwarder::Heap = forwarder::Heap;

fn main() -> std::process::ExitCode {
    forwarder::main()
}
