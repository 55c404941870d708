// SPDX-License-Identifier: Apache-2.0
//! The router, see the library of the same name.

fn main() -> std::process::ExitCode {
    ebpf_router::main()
}
