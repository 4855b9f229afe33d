"""What deploy/ refers to exists: commands, options, ports, metrics. No container runs here."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from crafts_client.cli import app as client_app
from crafts_core import __version__
from crafts_server.cli import app as server_app
from crafts_server.home import HomeConfig
from crafts_server.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
PORTS = {
    HomeConfig.model_fields[f"{name}_port"].default for name in ("fleet", "enrolment", "registrar")
}
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PROGRAMS = {"crafts-server": server_app, "crafts-client": client_app}


def check_command(program: str, words: list[str]) -> None:
    command = typer.main.get_command(PROGRAMS[program]).commands[words[0]]
    known = {option for each in command.params for option in each.opts}
    assert {word.split("=")[0] for word in words[1:]} <= known, (program, words)


def test_every_command_of_the_compose_file_exists() -> None:
    ours = {
        name: service
        for name, service in COMPOSE["services"].items()
        if service.get("image", "").startswith("crafts-")
    }
    assert set(ours) >= {"coordinator", "coordinator-init", "site-north", "site-south", "site-east"}
    for service in ours.values():
        check_command(service["image"], service["command"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_registrys_password_is_on_no_command_line() -> None:
    """It comes by the variable that ``init`` reads."""
    init = typer.main.get_command(server_app).commands["init"]
    variables = {option.envvar for option in init.params if getattr(option, "envvar", None)}
    assert "CRAFTS_REGISTRY" in variables
    service = COMPOSE["services"]["coordinator-init"]
    assert "POSTGRES_PASSWORD" in service["environment"]["CRAFTS_REGISTRY"]
    chart = (DEPLOY / "helm/crafts-server/templates/statefulset.yaml").read_text()
    assert "- name: CRAFTS_REGISTRY" in chart
    assert not any("--registry" in word for word in (chart, *service["command"]))


def test_the_compose_file_opens_three_ports_and_grafana_on_loopback() -> None:
    published = [p for s in COMPOSE["services"].values() for p in s.get("ports", [])]
    assert {int(port.split(":")[0]) for port in published if port.count(":") == 1} == PORTS
    assert [port for port in published if port.count(":") == 2] == ["127.0.0.1:3000:3000"]
    assert COMPOSE["networks"]["store"] == {"internal": True}


def test_prometheus_listens_where_grafana_is_and_no_site() -> None:
    """By a name that the coordinator's network, which it shares, has on that network alone."""
    services = COMPOSE["services"]
    assert services["prometheus"]["network_mode"] == "service:coordinator"
    (told,) = (word for word in services["prometheus"]["command"] if "listen-address" in word)
    address = told.partition("=")[2]
    name = address.partition(":")[0]
    networks = services["coordinator"]["networks"]
    assert [net for net, at in networks.items() if name in at.get("aliases", ())] == ["watch"]
    assert name != "coordinator", "that is its name on every network"
    on_watch = {each for each, at in services.items() if "watch" in at.get("networks", ())}
    assert on_watch == {"coordinator", "grafana"}
    sources = DEPLOY / "compose/grafana/provisioning/datasources/prometheus.yml"
    assert yaml.safe_load(sources.read_text())["datasources"][0]["url"] == f"http://{address}"


def test_files_and_volumes_of_the_compose_file_exist() -> None:
    for service in COMPOSE["services"].values():
        for mount in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", mount).split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / "compose" / source).exists(), source
            else:
                assert source in COMPOSE["volumes"]
        if "build" in service:
            assert (DEPLOY.parent / service["build"]["dockerfile"]).is_file()


def test_what_the_readme_reads_in_a_container_is_mounted_there() -> None:
    text = (DEPLOY / "README.md").read_text().replace("\\\n", " ")
    lines = [line.partition(" #")[0] for line in text.splitlines()]
    commands = [line for line in lines if line.startswith("docker compose")]
    assert len(commands) > 8
    for command in commands:
        mounted = set(re.findall(r"--volume \S+:(/\w+)", command))
        if " site-" in command:
            mounted.add("/slides")
        named = set(re.findall(r" (/\w+)/\S+", re.sub(r"--volume \S+", "", command)))
        assert named <= mounted, command


def test_the_dashboard_of_a_container_is_published_on_loopback_alone() -> None:
    found = re.findall(
        r"docker compose run --rm --publish (\S+) (\S+) (dashboard) (--listen) 0\.0\.0\.0$",
        (DEPLOY / "README.md").read_text(),
        re.MULTILINE,
    )
    ((published, service, *words),) = found
    assert service == "coordinator"
    check_command("crafts-server", words)
    options = typer.main.get_command(server_app).commands["dashboard"].params
    (port,) = (option.default for option in options if option.name == "port")
    assert published == f"127.0.0.1:{port}:{port}"


def test_the_container_recipe_copies_what_the_package_is_made_of() -> None:
    recipe = (DEPLOY / "containers" / "Containerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", recipe, re.MULTILINE)
    for names in copied:
        for name in names.split():
            assert (DEPLOY.parent / name).exists(), name
    assert re.search(r"^USER 10001:10001$", recipe, re.MULTILINE)


def site_in_compose(
    folder: Path, ends: str, *words: str, begins: str = "", stop: bool = False, last: str = ""
) -> tuple[int | None, str]:
    """site.sh with a ``crafts-client`` that a test plays: exit status, None while it waits.

    ``last`` is of what it says before it waits, from when on an end would come at once.
    """
    program = folder / "crafts-client"
    program.write_text(f'#!/bin/sh\n{begins}\necho began "$@"\n{ends}\n')
    program.chmod(0o755)
    site = subprocess.Popen(
        ["sh", str(DEPLOY / "compose" / "site.sh"), *words],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert site.stdout is not None
    said = ""
    try:
        if stop:
            said = site.stdout.readline()
            assert said == "began join\n"
            site.terminate()
        while last not in said:
            line = site.stdout.readline()
            assert line, f"it ended without a word of {last!r}: {said}"
            said += line
        return site.wait(0.5 if last else 3), said + site.communicate()[0]
    except subprocess.TimeoutExpired:
        site.terminate()
        assert site.wait(10) == 0, "docker stop need not kill it"
        return None, said + site.communicate()[0]


@pytest.mark.parametrize(
    ("ends", "words", "status"),
    [
        ("exit 0", ["join"], 0),
        ("exit 1", ["join"], 1),
        ("kill -9 $$", ["join"], 137),
        ("exit 3", ["ledger", "verify"], 3),
    ],
)
def test_a_site_in_compose_ends_as_its_program_does(
    tmp_path: Path, ends: str, words: list[str], status: int
) -> None:
    assert site_in_compose(tmp_path, ends, *words)[0] == status
    assert not (tmp_path / "revoked").exists()


def test_a_revoked_site_in_compose_waits_and_is_unhealthy(tmp_path: Path) -> None:
    status, said = site_in_compose(tmp_path, "exit 3", "join", last="revoked this site")
    assert status is None, "an end would be a new start"
    assert said.count("began join") == 1
    assert "revoked this site" in said
    service = COMPOSE["services"]["site-north"]
    assert service["entrypoint"] == ["sh", "/opt/site.sh"]
    assert "./site.sh:/opt/site.sh:ro" in service["volumes"]
    assert service["healthcheck"]["test"] == ["CMD", "test", "!", "-e", "/tmp/revoked"]
    assert (tmp_path / "revoked").exists()


def test_a_site_in_compose_is_told_to_stop_and_may_finish(tmp_path: Path) -> None:
    """The shell passes the signal on and waits for what the program does then."""
    begins = "trap 'sleep 0.5; echo finished; exit 7' TERM"
    ends = "while :; do sleep 0.1; done"
    status, said = site_in_compose(tmp_path, ends, "join", begins=begins, stop=True)
    assert status == 7
    assert "finished" in said


def known_metrics() -> set[str]:
    names = set()
    for family in Metrics()._registry.collect():
        names |= {family.name, f"{family.name}_total"}
    return names


@pytest.mark.parametrize("file", ["alerts.yml", "grafana/dashboards/study.json"])
def test_every_metric_that_is_looked_at_exists(file: str) -> None:
    text = (DEPLOY / "compose" / file).read_text()
    looked_at = set(re.findall(r"\bcrafts_[a-z_]+", text)) - {"crafts_study"}
    assert looked_at
    assert looked_at <= known_metrics()


def test_prometheus_asks_the_port_of_the_metrics() -> None:
    scraped = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    (target,) = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"127.0.0.1:{HomeConfig.model_fields['metrics_port'].default}"
    dashboard = json.loads((DEPLOY / "compose/grafana/dashboards/study.json").read_text())
    sources = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    provisioned = DEPLOY / "compose/grafana/provisioning/datasources/prometheus.yml"
    assert sources == {yaml.safe_load(provisioned.read_text())["datasources"][0]["uid"]}


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_units_start_what_exists_and_give_up_what_they_can(unit: Path) -> None:
    text = unit.read_text()
    program, *words = re.search(r"^ExecStart=\S*/(crafts-\S+) (.+)$", text, re.MULTILINE).groups()
    check_command(program, words)
    assert "NoNewPrivileges=yes" in text
    assert "Restart=always" in text
    variable = {"crafts-server": "CRAFTS_SERVER_HOME", "crafts-client": "CRAFTS_SITE_HOME"}[program]
    assert variable in text


def starting(unit: Path, program: str) -> str:
    """The unit's text with a program that is on every machine."""
    return re.sub(r"^ExecStart=.+", f"ExecStart={program}", unit.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_itself_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    (tmp_path / unit.name).write_text(starting(unit, "/bin/true"))
    whose = ["--user"] if "user" in unit.stem else []
    done = subprocess.run(
        ["systemd-analyze", *whose, "verify", str(tmp_path / unit.name)],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    ours = [line for line in done.stderr.splitlines() if unit.name in line]
    assert (done.returncode, ours) == (0, [])


def systemctl(*words: str) -> str:
    command = ["systemctl", "--user", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def test_a_user_session_runs_the_user_unit() -> None:
    if shutil.which("systemctl") is None or systemctl("is-system-running") not in {
        "running",
        "degraded",
    }:
        pytest.skip("no systemd that runs for this user")
    (unit,) = (unit for unit in UNITS if "user" in unit.stem)
    folder = Path(os.environ["XDG_RUNTIME_DIR"]) / "systemd" / "user"
    folder.mkdir(parents=True, exist_ok=True)
    placed = folder / "crafts-client-test.service"
    placed.write_text(starting(unit, "/bin/sleep 60"))
    try:
        systemctl("daemon-reload")
        systemctl("start", placed.name)
        assert systemctl("is-active", placed.name) == "active"
        assert systemctl("show", "--property=NoNewPrivileges", placed.name).endswith("=yes")
    finally:
        systemctl("stop", placed.name)
        placed.unlink()
        systemctl("daemon-reload")


def test_compose_itself_accepts_the_file() -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed")
    folder = DEPLOY / "compose"
    command = [program, "--env-file", ".env.example", "-f", "compose.yaml", "config"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CHART = DEPLOY / "helm" / "crafts-server"
TEMPLATES = sorted((CHART / "templates").glob("*.yaml"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_every_value_of_the_chart_exists_and_blocks_are_closed(template: Path) -> None:
    text, values = template.read_text(), yaml.safe_load((CHART / "values.yaml").read_text())
    for path in re.findall(r"\.Values\.([A-Za-z.]+)", text):
        found = values
        for key in path.split("."):
            assert key in found, path
            found = found[key]
    opened = len(re.findall(r"\{\{-? if ", text))
    assert opened == len(re.findall(r"\{\{-? end ", text))


def test_the_chart_is_of_this_version_and_opens_the_same_ports() -> None:
    """The coordinator tells sites its own ports: another one outside would not be found."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["appVersion"] == values["image"]["tag"] == __version__
    text = (CHART / "templates" / "statefulset.yaml").read_text()
    assert set(map(int, re.findall(r"containerPort: (\d+)", text))) == PORTS
    service = (CHART / "templates" / "service.yaml").read_text()
    offered = re.findall(r"name: (\w+), port: (\d+), targetPort: (\w+)", service)
    assert {int(port) for _, port, _ in offered} == PORTS
    for name, port, target in offered:
        assert name == target
        assert f"{{name: {name}, containerPort: {port}}}" in text
    for args in re.findall(r'args: (\["(?:init|serve)".*\])', text):
        words = yaml.safe_load(re.sub(r"\{\{.*?\}\}", "x", args))
        check_command("crafts-server", words)


def test_the_chart_has_the_alerts_of_compose() -> None:
    assert (CHART / "alerts.yml").read_bytes() == (DEPLOY / "compose/alerts.yml").read_bytes()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prometheus": {"enabled": False}},
        {"prometheus": {"alertmanagers": ["alertmanager.monitoring:9093"]}},
    ],
    ids=["all", "bare", "told"],
)
def test_helm_and_kubernetes_accept_the_chart(values: dict[str, dict[str, object]]) -> None:
    """Helm's own linter and renderer, and the schemas of Kubernetes' newest API."""
    helm = pytest.importorskip("helm_python")
    kubernetes = pytest.importorskip("kubernetes_validate")
    report = helm.lint(str(CHART), values, strict=True)
    assert report["errors"] == []
    assert [m["error"] for m in report["messages"] if m["severity"] > 1] == []
    with helm.Chart.load(str(CHART)) as chart:
        rendered = [yaml.safe_load(text) for text in chart.render(values, name="study").values()]
    objects = [each for each in rendered if each is not None]
    assert {each["kind"] for each in objects} >= {"StatefulSet", "Service", "NetworkPolicy"}
    for each in objects:
        kubernetes.validate(each, kubernetes.latest_version(), strict=True)
    check_prometheus_of_the_chart(objects, values.get("prometheus", {}))


def check_prometheus_of_the_chart(objects: list[dict[str, Any]], wanted: dict[str, object]) -> None:
    """It evaluates the alerts of compose, their templates untouched, and tells who is named."""
    files = [each["data"] for each in objects if each["kind"] == "ConfigMap"]
    assert bool(files) == wanted.get("enabled", True)
    for each in files:
        config = yaml.safe_load(each["prometheus.yml"])
        assert config["rule_files"] == ["alerts.yml"]
        compose = DEPLOY / "compose"
        assert yaml.safe_load(each["alerts.yml"]) == yaml.safe_load(
            (compose / "alerts.yml").read_text()
        )
        scraped = yaml.safe_load((compose / "prometheus.yml").read_text())["scrape_configs"]
        assert config["scrape_configs"] == scraped
        told = config.get("alerting", {}).get("alertmanagers", [])
        assert [name for one in told for at in one["static_configs"] for name in at["targets"]] == (
            wanted.get("alertmanagers", [])
        )


def test_prometheus_itself_accepts_its_files(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    command = [promtool, "check", "config", "prometheus.yml"]
    done = subprocess.run(command, cwd=DEPLOY / "compose", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("series", "at", "alert"),
    [
        pytest.param(
            {"plans_queued": "1x720", 'rounds_total{run="r"}': "5x720"},
            "12h", "NoRoundForLong", id="rounds stopped",
        ),
        pytest.param({"plans_queued": "1x720"}, "12h", "NoRoundForLong", id="no round ever"),
        pytest.param(
            {"plans_queued": "1x720", 'rounds_total{run="r"}': "0+1x720"}, "12h", None,
            id="rounds go on",
        ),
        pytest.param({"plans_queued": "0x700 1x20"}, "12h", None, id="just queued"),
        pytest.param(
            {'updates_total{run="r",outcome="refused"}': "0x10 1x50"}, "30m", "UpdatesRefused",
            id="a first refusal",
        ),
    ],
)  # fmt: skip
def test_alerts_fire_when_they_should(
    tmp_path: Path, series: dict[str, str], at: str, alert: str | None
) -> None:
    """By Prometheus' own tool. The labels of job and instance are on what is scraped."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    scraped = 'job="crafts",instance="127.0.0.1:9464"'
    names = {
        name: f"crafts_{name[:-1]},{scraped}}}" if "{" in name else f"crafts_{name}{{{scraped}}}"
        for name in series
    }
    inputs = [{"series": names[name], "values": values} for name, values in series.items()]
    expression = "count by (alertname) (ALERTS{alertname=~'NoRoundForLong|UpdatesRefused'})"
    wanted = [] if alert is None else [{"labels": f'{{alertname="{alert}"}}', "value": 1}]
    tests = {
        "rule_files": [str(DEPLOY / "compose" / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": inputs,
                "promql_expr_test": [{"expr": expression, "eval_time": at, "exp_samples": wanted}],
            }
        ],
    }
    path = tmp_path / "alerts.test.yml"
    path.write_text(yaml.safe_dump(tests))
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
