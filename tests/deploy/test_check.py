"""What deploy/check does around the engine; the study in containers is marked exhaustive."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from crafts_client.audit_record import weakness

DEPLOY = Path(__file__).parents[2] / "deploy"
CHECK = DEPLOY / "check"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("deploy_check", str(CHECK))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", str(CHECK), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_without_an_engine_it_says_so_in_one_line() -> None:
    done = run(PATH="")
    assert (done.returncode, done.stderr) == (77, "")
    assert done.stdout == ("deploy/check: neither podman nor docker is here; nothing was checked\n")


def test_two_bases_are_wrong_use() -> None:
    assert run("--base", "x", "--base-from-debian", PATH="").returncode == 2


def test_pip_installs_in_a_build_as_it_does_here(check, tmp_path: Path) -> None:
    """Mirror, certificate and folders; what the environment says comes last and counts."""
    (tmp_path / "simple").mkdir()
    certificate = tmp_path / "ca.crt"
    certificate.touch()
    listed = (
        f":env:.cert='{certificate}'\n"
        "global.index-url='https://packages.example.org/simple'\n"
        f"global.extra-index-url='\\nfile://{tmp_path}/simple /nowhere/simple'\n"
        "global.timeout='5'\n:env:.timeout='60'\n"
    )
    text, folders = check.pip_settings(listed)
    assert text == (
        f"[global]\ncert = {certificate}\n"
        "index-url = https://packages.example.org/simple\n"
        f"extra-index-url = file://{tmp_path}/simple /nowhere/simple\n"
        "timeout = 60\n"
    )
    assert folders == [str(certificate), str(tmp_path)]


def test_containers_may_as_little_as_in_the_compose_file(check) -> None:
    compose = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    hardened = compose["x-hardened"]
    assert hardened["read_only"] is True
    assert set(check.HARDENED) == {
        "--read-only",
        *(f"--cap-drop={name}" for name in hardened["cap_drop"]),
        *(f"--security-opt={name.removesuffix(':true')}" for name in hardened["security_opt"]),
        *(f"--tmpfs={path}" for path in hardened["tmpfs"]),
    }


def test_only_the_missing_audit_may_be_in_doubt(check) -> None:
    never = f"engine: {weakness(None, None, '')}"  # type: ignore[arg-type]  # looks at no site then
    check.check_report("north", json.dumps({"unsubstantiated": []}))
    check.check_report("north", json.dumps({"unsubstantiated": [never]}))
    with pytest.raises(check.CheckError, match=r"^north's .* stand: noise: NOT PRIVATE$"):
        check.check_report("north", json.dumps({"unsubstantiated": [never, "noise: NOT PRIVATE"]}))


def engine_that(check, folder: Path, does: str):
    program = folder / "engine"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    return check.Engine(str(program), folder)


def test_a_no_is_an_answer_whatever_is_on_stderr(check, tmp_path: Path) -> None:
    engine = engine_that(check, tmp_path, "echo warning >&2; echo '{}'; exit 1")
    assert engine("exec", says_no_by=1) == "{}\n"
    with pytest.raises(check.CheckError, match="warning"):
        engine("exec")


def test_a_failure_without_an_answer_stays_one(check, tmp_path: Path) -> None:
    engine = engine_that(check, tmp_path, "echo no ledger >&2; exit 1")
    with pytest.raises(check.CheckError, match="no ledger"):
        engine("exec", says_no_by=1)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_a_study_runs_in_containers() -> None:
    """With the options that ``make containers CHECK=...`` takes, by the same variable."""
    words = os.environ.get("CHECK", "").split()
    done = run(*words, **os.environ)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
