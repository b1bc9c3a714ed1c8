"""The style guide as tests: who may import whom, sizes, state, names, and documents that keep up with the code.

Each test is one rule and answers with every place that breaks it. Nothing here runs the code, but for what it imports.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("daemon", "handlers", "models", "storage")
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
HEAVY = ("torch", "torchvision", "transformers", "diffusers", "onnxruntime", "openvino")
KEPT_APART = {
    **dict.fromkeys(HEAVY, "models/"),
    **dict.fromkeys(("asyncpg", "boto3", "botocore", "supabase", "postgrest", "realtime", "redis"), "storage/"),
    "aiohttp": ("daemon/server.py", "daemon/session_routes.py"),
}
ADAPTERS = (
    "client",
    "client_rpc",
    "rpc",
    "embedded",
    "files",
    "memory",
    "notify",
    "postgres",
    "r2",
    "realtime",
    "redis",
    "supabase",
)
TOGETHER = ("daemon/main.py", "daemon/stores.py", "daemon/commands/")
NOT_KINDS = ("__init__", "base", "registry")
MUTABLE_CALLS = ("list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter")
# Tests that may wait for time to pass, and why no signal would do. A file without a reason has no place here.
SLEEPERS = {
    "tests/support/postgrest.py": "a server that is slow is one of its faults",
    "tests/support/realtime_server.py": "the server listens some time after it said SUBSCRIBED, which is what is tested",
    "tests/support/daemons.py": "another process cannot signal us: what it does is polled, with a ceiling",
    "tests/bench/idle.py": "traffic over time is what is measured",
    "tests/bench/realtime.py": "faults last for a time, and rows come all the while",
    "tests/bench/fleet.py": "rows that other processes do are looked for, and a stream of inserts has a pace",
    "tests/bench/gpu.py": "rows are looked for until none is left, some of them not yet claimed",
    "tests/bench/pickup.py": "the idle pause between samples is what is measured",
}


def test_handlers_import_models_base_and_each_others_shared_parts_only() -> None:
    shared = re.compile(r"handlers$|handlers\.(base|registry|_\w+)(\.|$)|models\.base(\.|$)")
    no([where for where, name in ours("handlers") if not shared.match(name)])


def test_models_and_storage_import_nothing_of_ours_outside_themselves() -> None:
    strangers = [where for package in ("models", "storage") for where, name in ours(package) if name.split(".")[0] != package]
    no(strangers)


def test_nobody_imports_the_daemon() -> None:
    no([where for package in PACKAGES[1:] for where, name in ours(package) if name.split(".")[0] == "daemon"])


def test_concrete_adapters_are_named_where_the_daemon_is_put_together_and_in_commands() -> None:
    adapter = re.compile(rf"storage\.({'|'.join(ADAPTERS)})(\.|$)")
    parts = [(where, name) for where, name in ours("daemon") if not where.startswith(TOGETHER)]
    no([where for where, name in parts if adapter.match(name)])


def test_outside_libraries_are_imported_in_their_one_place_only() -> None:
    everywhere = [found for package in PACKAGES for found in imports(package)]
    astray = [f"{where} imports {name}" for where, name in everywhere if not where.startswith(home_of(name))]
    no(astray)


def test_only_config_reads_the_environment_and_systemd_its_two_names() -> None:
    readers = [
        place(file, node)
        for file in sources()
        if relative(file) not in ("daemon/config.py", "daemon/systemd.py")
        for node in ast.walk(tree(file))
        if name_of(node) in ("environ", "environb", "getenv")
    ]
    no(readers)


def test_only_sessions_checkups_and_names_of_files_know_what_time_it_is() -> None:
    """Claims, leases and tombstones run by the database's clock: that of the host may be wrong."""
    may = ("daemon/session", "daemon/tickets", "daemon/checkup", "daemon/commands/migrate", "storage/export")
    wall = re.compile(r"\btime\.(time|time_ns|gmtime|localtime|ctime)\b|\bfrom time import|\bdatetime\b")
    no(
        [
            f"{relative(file)} asks the clock on the wall"
            for file in sources()
            if not relative(file).startswith(may) and wall.search(file.read_text())
        ]
    )


def test_systemd_reads_no_name_but_those_of_the_service_manager() -> None:
    file = ROOT / "daemon/systemd.py"
    names = set(re.findall(r"environ[^\n]*?[\"'](\w+)[\"']", file.read_text())) if file.exists() else set()
    assert names <= {"NOTIFY_SOCKET", "WATCHDOG_USEC"}


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {relative(file): len(file.read_text().splitlines()) for file in [*sources(), *files_of_tests()]}
    no(f"{name}: {lines} lines" for name, lines in lengths.items() if lines > FILE_LINES_MAX)


def test_no_function_is_longer_than_70_lines() -> None:
    long = [
        f"{place(file, node)} {node.name}"
        for file in [*sources(), *files_of_tests()]
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    no(long)


def test_every_module_has_a_docstring() -> None:
    no([relative(file) for file in [*sources(), *files_of_tests()] if not ast.get_docstring(tree(file))])


def test_an_init_file_holds_a_docstring_and_nothing_else() -> None:
    no([relative(file) for file in sources() if file.name == "__init__.py" and len(tree(file).body) != 1])


def test_tests_hold_no_init_file() -> None:
    no([relative(file) for file in files_of_tests() if file.name == "__init__.py"])


def test_no_module_is_called_utils_or_types() -> None:
    vague = ("utils.py", "util.py", "types.py", "helpers.py", "common.py", "misc.py")
    no([relative(file) for file in sources() if file.name in vague])


def test_no_module_keeps_mutable_state_but_metrics() -> None:
    state = [
        f"{place(file, node)} {name}"
        for file in sources()
        if relative(file) != "daemon/metrics.py"
        for node in tree(file).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and is_mutable(node.value)
        for name in assigned(node)
        if not name.isupper() and not name.startswith("__")
    ]
    no(state)


def test_nothing_rebinds_a_global() -> None:
    no([place(file, node) for file in sources() for node in ast.walk(tree(file)) if isinstance(node, ast.Global)])


def test_no_task_is_started_outside_a_task_group() -> None:
    bare = [
        place(file, node)
        for file in sources()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and name_of(node.func) in ("create_task", "ensure_future")
    ]
    no(bare)


def test_kinds_are_the_handler_files_and_the_rows_of_maskd_kinds() -> None:
    kinds = {file.stem for file in sources() if file.parent == ROOT / "handlers" and file.stem[0] != "_"} - set(NOT_KINDS)
    assert kinds == kinds_in_migrations()


def test_every_setting_is_documented_in_the_readme() -> None:
    documented = read("README.md")
    no([name for name in settings() if not re.search(rf"\b{name}\b", documented)])


def test_the_readme_names_no_setting_that_does_not_exist() -> None:
    named = set(re.findall(r"\bMASKD_[A-Z0-9_]*[A-Z0-9]\b", read("README.md")))
    no({name for name in named if not name.startswith("MASKD_TEST_")} - settings())


def test_architecture_names_every_file() -> None:
    text = read("ARCHITECTURE.md")
    no([relative(file) for file in sources() if file.name != "__init__.py" and not is_named(file, text)])


def test_architecture_names_no_file_that_does_not_exist() -> None:
    named = re.findall(rf"\b(?:{'|'.join(PACKAGES)})/[\w/]+\.(?:py|sql)\b", read("ARCHITECTURE.md"))
    no([name for name in named if not (ROOT / name).exists()])


def test_every_metric_is_documented() -> None:
    documents = "".join(file.read_text() for file in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if file.exists())
    no([name for name in metrics() if not re.search(rf"\b{name}\b", documents)])


def test_importing_us_loads_no_neural_network_library() -> None:
    modules = [name for name in ("daemon.main", "handlers.registry", "handlers", "storage") if exists(name)]
    program = f"import sys, {', '.join(modules)}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_other_distribution_owns_our_package_names() -> None:
    owners = importlib.metadata.packages_distributions()
    no(f"{name} of {owners[name]}" for name in PACKAGES if set(owners.get(name, ())) - {"maskd"})


def test_tests_wait_for_signals_never_for_time() -> None:
    sleepers = {relative(file) for file in files_of_tests() if sleeps(file)}
    assert sleepers == set(SLEEPERS), "a test that waits for time needs a reason in SLEEPERS, and a reason needs such a test"


def no(offences: Iterable[object]) -> None:
    """The rule holds when there are no offences; else all of them are shown, which pytest would shorten."""
    found = sorted(str(offence) for offence in offences)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def sources() -> list[Path]:
    """The Python files of the four packages."""
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def files_of_tests() -> list[Path]:
    """The Python files of the tests."""
    return sorted((ROOT / "tests").rglob("*.py"))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def place(file: Path, node: ast.AST) -> str:
    return f"{relative(file)}:{getattr(node, 'lineno', 0)}"


def read(document: str) -> str:
    """A document's text; without it the rules about it fail, unless there is nothing yet that it could document."""
    file = ROOT / document
    return file.read_text() if file.exists() else ""


def imports(package: str) -> Iterator[tuple[str, str]]:
    """(place, dotted module) of every import in a package, those inside functions included."""
    for file in sources():
        if not relative(file).startswith(f"{package}/"):
            continue
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Import):
                yield from ((place(file, node), alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{place(file, node)} is a relative import"
                # In `from storage import postgres` the name is the module.
                yield from ((place(file, node), f"{node.module}.{alias.name}") for alias in node.names)


def ours(package: str) -> list[tuple[str, str]]:
    """(place, dotted module) of every import in a package that names one of the four packages."""
    return [(where, name) for where, name in imports(package) if name.split(".")[0] in PACKAGES]


def home_of(name: str) -> str | tuple[str, ...]:
    """Where a library may be imported: beginnings of paths, empty when anywhere."""
    parts = name.split(".")
    return KEPT_APART.get(parts[0], "")


def name_of(node: ast.AST) -> str | None:
    """The last part of a dotted name: `environ` of `os.environ`; None of anything else."""
    if isinstance(node, ast.alias):
        return node.name
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def is_mutable(value: ast.expr) -> bool:
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    return isinstance(value, displays) or (isinstance(value, ast.Call) and name_of(value.func) in MUTABLE_CALLS)


def assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def strings(file: Path, pattern: str) -> set[str]:
    """The string constants of a file that match the whole pattern; none when there is no such file."""
    if not file.exists():
        return set()
    constants = (node.value for node in ast.walk(tree(file)) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and re.fullmatch(pattern, value)}


def settings() -> set[str]:
    """The environment variables that the configuration knows."""
    return strings(ROOT / "daemon/config.py", r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")


def metrics() -> set[str]:
    return strings(ROOT / "daemon/metrics.py", r"maskd_[a-z0-9_]+")


def kinds_in_migrations() -> set[str]:
    """The first value of every row that the migrations insert into maskd.kinds."""
    sql = "\n".join(file.read_text() for file in sorted((ROOT / "migrations").glob("*.sql")))
    inserts = re.findall(r"insert\s+into\s+maskd\.kinds\s*\(\s*kind\b[^)]*\)\s*values(.*?)(?:on\s+conflict|;)", sql, re.S | re.I)
    return {kind for rows in inserts for kind in re.findall(r"\(\s*'(\w+)'", rows)}


def is_named(file: Path, text: str) -> bool:
    """Whether the text holds `package/path.py`, or the path alone where a heading or a column may name the package."""
    inside = file.relative_to(ROOT / file.relative_to(ROOT).parts[0]).as_posix()
    return re.search(rf"(?<![\w/]){re.escape(inside)}\b", text) is not None or relative(file) in text


def exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def sleeps(file: Path) -> bool:
    """Whether a file calls a sleep by its module's name, also in the text of a child process's program."""
    return (
        re.search(r"\b(time|asyncio|anyio|trio)\.sleep\(|from (time|asyncio|anyio) import .*\bsleep\b", file.read_text())
        is not None
    )
