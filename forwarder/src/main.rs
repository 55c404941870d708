// SPDX-License-Identifier: Apache-2.0
//! The forwarder, see the library of the same name.

fn main() -> std::process::ExitCode {
    forwarder::main()
}
