"""The files of cluster/ are right: commands that exist, pinned versions, YAML as Ray takes it, nothing left open."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli
from ruamel.yaml import YAML
from typer.main import get_command

from tuner.cli.commands import app
from tuner.spec.layout import Root

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cluster"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TUNER = get_command(app).commands  # type: ignore[attr-defined]


def load(name: str) -> dict[str, Any]:
    return YAML(typ="safe").load(FOLDER / name)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from strings(inner)


def lines_to_type(file: Path) -> list[str]:
    """What a file has run, or tells its reader to: values of YAML, lines of a script, indented comments, `code`."""
    text = re.sub(r"\\\n#?\s*", "", file.read_text())
    lines = re.findall(r"^#   +(\S.*?)(?:   +\(.*)?$", text, re.MULTILINE)
    if file.suffix == ".yaml":
        lines += strings(YAML(typ="safe").load(text))
    if file.suffix == ".sh":
        lines += [line for line in text.splitlines() if not line.startswith("#")]
    return lines + re.findall(r"`(.+?)`", text)


def calls(line: str) -> Iterator[list[str]]:
    """The commands of a line of shell, each as its words; quoted ones too."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    call: list[str] = []
    for word in lexer:
        if re.fullmatch(r"[;&|()<>]+|--", word):
            yield call
            call = []
        else:
            call.append(word)
            if " " in word:
                yield from calls(word)
    yield call


def calls_of(*programs: str) -> list[list[str]]:
    """What follows one of these programs, wherever it is called: after `env`, `exec` or `srun` too."""
    found = []
    for line in (line for file in FILES for line in lines_to_type(file)):
        for call in calls(line):
            at = next((place for place, word in enumerate(call) if word in programs), len(call))
            found.append(call[at + 1 :])
    return [arguments for arguments in found if arguments]


def test_every_call_of_tuner_is_one_that_the_command_line_takes():
    found = [words for words in calls_of("tuner", "cluster/slurm.sh") if words != ["$@"]]
    assert {words[0] for words in found} == {"run", "submit", "resume"}
    for name, *arguments in found:
        assert name in TUNER
        if arguments:  # none where prose names a command
            TUNER[name].make_context(name, arguments)  # raises for an option or argument that is not there


def test_every_call_of_ray_is_of_a_command_and_with_options_that_the_pinned_ray_has():
    found = calls_of("ray")
    assert {words[0] for words in found} >= {"start", "up", "dashboard", "down", "symmetric-run", "get-auth-token"}
    for name, *arguments in found:
        passed_on = ray_cli.commands["start"].params if name == "symmetric-run" else []
        options = {option for parameter in [*ray_cli.commands[name].params, *passed_on] for option in parameter.opts}
        asked = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert asked <= options, f"ray {name}"


def test_every_version_is_the_pinned_one():
    versions = {"tuner": PROJECT["version"], "python": PROJECT["requires-python"].removeprefix(">=") + "-slim"} | PINS
    for file in FILES:
        text = file.read_text()
        for name, version in re.findall(r"(?:image: |FROM |-t )(?:\S+/)?([\w-]+):(\S+)", text):
            assert versions.get(name, version) == version, f"{file.name}: {name}"
        for name, version in re.findall(r"([\w-]+)(?:\[\w+\])?[=~<>]=(\d[\w.]*)", text):
            assert PINS.get(name) == version, f"{file.name}: {name}"
    assert load("kuberay/cluster.yaml")["spec"]["rayVersion"] == PINS["ray"]
    assert load("kuberay/job.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]


def test_every_image_has_a_tag():
    for file in (path for path in FILES if path.suffix == ".yaml"):
        for image in re.findall(r"image: (\S+)", file.read_text()):
            assert re.search(r":(\d|RELEASE\.\d)", image), f"{file.name}: {image}"


def test_the_dockerfile_installs_the_pins_and_runs_as_a_user():
    text = (FOLDER / "Dockerfile").read_text()
    installs = re.findall(r"pip install .*", text)
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["tuner"]
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert set(re.findall(r"https?://([^/\s]+)", text)) <= {"download.pytorch.org"}
    assert "RAY_AUTH_MODE=token" in text
    extras = re.search(r'"\.\[([\w,]+)\]"', text)
    assert extras is not None
    assert set(extras[1].split(",")) == {"postgres", "s3"} <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_launcher_s_files_are_what_ray_up_takes(name):
    config = load(name)
    validate_config(prepare_config(load(name)))  # against Ray's schema, with its defaults, as `ray up` does
    head, worker = (config["available_node_types"][kind] for kind in ("head", "worker"))
    assert head["resources"]["CPU"] == 0
    assert worker["min_workers"] == config["max_workers"]  # a sweep uses the nodes that are there when it starts
    assert [spot(kind["node_config"]) for kind in (head, worker)] == [False, True]
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    assert any("mount -t nfs" in line and "/shared" in line for line in config["initialization_commands"])
    assert config["docker"]["run_options"] == ["--volume /shared:/shared"]
    assert not any("dashboard-host" in line for line in config["head_start_ray_commands"])


def spot(node: dict[str, Any]) -> bool:
    return node.get("InstanceMarketOptions") == {"MarketType": "spot"} or {"preemptible": True} in node.get(
        "scheduling", []
    )


@pytest.mark.parametrize("name", ["kuberay/cluster.yaml", "kuberay/job.yaml"])
def test_the_pods_ask_for_a_token_and_keep_nothing_in_themselves(name):
    document = load(name)
    assert document["apiVersion"] == "ray.io/v1"
    spec = document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    claim = load("kuberay/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (shared,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/shared"]
        assert volumes[shared]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"]


def test_the_job_s_cluster_is_removed_when_it_is_over():
    spec = load("kuberay/job.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["backoffLimit"] == 0


def test_compose_has_a_head_two_workers_a_database_and_an_object_store_and_asks_for_its_secrets():
    compose = load("docker-compose.yaml")
    services = compose["services"]
    assert set(services) == {"head", "worker", "postgres", "minio"}
    assert services["worker"]["deploy"]["replicas"] == 2
    assert "--address=head:6379" in services["worker"]["command"]
    for node in (services["head"], services["worker"]):
        assert node["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
        assert node["volumes"] == ["shared:/shared"]
        assert (FOLDER / node["build"]["context"] / node["build"]["dockerfile"]).is_file()
        assert Root.at(node["environment"]["TUNER_ROOT"]).url == "s3://tuner/runs"
        assert node["environment"]["AWS_ENDPOINT_URL"] == "http://minio:9000"
        assert node["environment"]["AWS_ACCESS_KEY_ID"] == services["minio"]["environment"]["MINIO_ROOT_USER"]
        assert node["environment"]["AWS_SECRET_ACCESS_KEY"] == services["minio"]["environment"]["MINIO_ROOT_PASSWORD"]
    assert "mkdir -p /data/tuner " in services["minio"]["entrypoint"]
    assert (
        services["head"]["environment"]["POSTGRES_PASSWORD"] == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    )
    assert "POSTGRES_PASSWORD" not in services["worker"]["environment"]
    for service in ("postgres", "minio"):
        assert services["head"]["depends_on"][service] == {"condition": "service_healthy"}
        secrets = [text for text in strings(services[service]["environment"]) if text != "tuner"]
        assert all(re.fullmatch(r"\$\{\w+:\?\}", text) for text in secrets)
    assert all(port.startswith("127.0.0.1:") for port in services["head"]["ports"])
    assert {volume.partition(":")[0] for service in services.values() for volume in service["volumes"]} == set(
        compose["volumes"]
    )


def test_the_slurm_script_is_bash_with_one_ray_per_node_and_a_token():
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)
    text = (FOLDER / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert "exclusive" in options
    assert re.search(r"^export RAY_AUTH_TOKEN RAY_AUTH_MODE=token", text, re.MULTILINE)


def test_every_file_is_in_the_table_and_every_link_leads_somewhere():
    links = set(re.findall(r"\]\(([^)]+)\)", (FOLDER / "README.md").read_text()))
    files = {str(file.relative_to(FOLDER)) for file in FILES if file.parent.name not in links}
    assert all((FOLDER / link).exists() for link in links)
    assert files - links == {"README.md", "kuberay/storage.yaml"}


def test_no_secret_and_no_private_host_is_in_them():
    for file in FILES:
        text = file.read_text()
        assert not re.search(r"/(home/(?!tuner)|root|work|Users)/", text), file
        assert not re.search(r"(?:TOKEN|PASSWORD)=(?!\$|token)\S", text), file
