// SPDX-License-Identifier: Apache-2.0
fn main() -> anyhow::Result<()> {
    bpf_skeleton::build(&["connect", "identity", "process", "stall"])
}
