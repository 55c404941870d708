# SPDX-License-Identifier: Apache-2.0
"""Helm, as far as the tests need it; `init.sh kubernetes` installs the library that it is in.

    helm.py lint CHART
    helm.py install RELEASE CHART VALUES    prints the manifests
    helm.py upgrade RELEASE CHART VALUES
    helm.py uninstall RELEASE

VALUES is JSON. The namespace is kube-system, the cluster that of KUBECONFIG. With --wait it returns when
everything is ready, as Helm's own does."""

import asyncio
import json
import sys

from helm_sdkpy import Configuration, HelmError, Install, Lint, Uninstall, Upgrade

INFO = 1


async def main(wait, command, *arguments):
    config = Configuration(namespace="kube-system")
    if command == "lint":
        result = await Lint(config).run(*arguments)
        found = [message for message in result["Messages"] if message["Severity"] > INFO]
        if found or result["Errors"]:
            raise HelmError(f"{result}")
    elif command == "uninstall":
        await Uninstall(config).run(*arguments, wait=wait)
    else:
        release, chart, values = arguments
        action = {"install": Install, "upgrade": Upgrade}[command](config)
        result = await action.run(release, chart, json.loads(values), wait=wait)
        print(result["manifest"])


words = sys.argv[1:]
try:
    asyncio.run(main("--wait" in words, *(word for word in words if word != "--wait")))
except HelmError as error:
    sys.exit(f"error: {error}")
