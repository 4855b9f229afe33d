"""The output folder of one run: what lies where, and whose it is.

::

    scenario.json         what was asked for; another scenario is refused
    hospitals/NAME/       slides and table of a synthetic hospital
    sites/NAME/           the site home: tiles, policy, ledger, outbox
    heldout/              tiles of patients that no site has
    coordinator/          keys, registry.db, checkpoints
    generator/            the shared generator, a stock diffusers directory
    adapter.safetensors   the same as a stock LoRA file
    samples/              images, as files
    evaluation.json       the measurement, once it is done
    leakage.json          attacks on the generator, once they are done
    steering.json         how far it follows its conditions, once that is measured
    report.json, report.html
"""

import json
from dataclasses import dataclass
from pathlib import Path

from crafts_core.durable import write_file
from crafts_simulations.errors import WorkspaceError


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths of one run."""

    path: Path

    @classmethod
    def claim(cls, path: Path, request: dict[str, object]) -> "Workspace":
        """Take an empty folder for this request, or come back to it.

        Raises:
            WorkspaceError: the folder holds something else.
        """
        marker = path / "scenario.json"
        text = json.dumps(request, indent=2, sort_keys=True) + "\n"
        if marker.exists():
            if marker.read_text(encoding="utf-8") != text:
                raise WorkspaceError(
                    f"{path} holds a run of another scenario, other options or other tiles; choose "
                    "another --out or remove it"
                )
            return cls(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise WorkspaceError(f"{path} is not an empty folder; choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        write_file(marker, text)
        return cls(path)

    def hospital(self, name: str) -> Path:
        return self.path / "hospitals" / name

    def site(self, name: str) -> Path:
        return self.path / "sites" / name

    @property
    def heldout(self) -> Path:
        return self.path / "heldout"

    @property
    def coordinator(self) -> Path:
        return self.path / "coordinator"

    @property
    def generator(self) -> Path:
        return self.path / "generator"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter.safetensors"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def leakage(self) -> Path:
        return self.path / "leakage.json"

    @property
    def steering(self) -> Path:
        return self.path / "steering.json"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    def seconds(self) -> float:
        """Working time of all earlier calls together."""
        try:
            return float((self.path / "seconds.txt").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0.0

    def set_seconds(self, seconds: float) -> None:
        write_file(self.path / "seconds.txt", f"{seconds:.3f}\n")
