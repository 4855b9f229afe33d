"""Write the bytecode of what a role's programs import, as their file system will be read-only.

Bytecode of everything would be a third of the image.
"""

import importlib
import pkgutil
import sys

from crafts_core.foundation import load
from crafts_core.foundation_manifest import embedded_path


def import_all(package: str) -> None:
    """Import a package's modules; those of another role's extra are not needed here."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                print(f"{module.name}: {error}")


if __name__ == "__main__":
    for name in ("crafts", "crafts_core", "crafts_privacy", f"crafts_{sys.argv[1]}"):
        import_all(name)
    load(embedded_path(), device="cpu")
