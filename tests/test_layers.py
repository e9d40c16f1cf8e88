"""The order of the package: what may import what, how long a module is, and that every text file has an encoding."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "persona"

# A module imports from its own layer and from those above it in this list, never from below; docs of the design agree.
LAYERS = (
    ("errors", "foreign_names", "config", "strict_json", "records", "console", "history", "proportions")
    + ("verdict", "curves", "pages"),
    ("convert", "tokens", "render", "style", "copying"),
    ("folders", "hub", "sources", "offsets", "storage", "artifacts", "dataset", "plan")
    + ("attention", "packing", "fused", "loss", "modeling", "merging", "export"),
    ("devices", "launch", "sharing", "sharding", "optimizers", "checkpoints", "identity", "memory", "metrics")
    + ("run_folder", "signals", "samples", "training", "overview", "generation", "decoding", "replies", "chat")
    + ("evaluation", "run"),
)
SCRIPTS = len(LAYERS)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What takes seconds to import: a wrong setting and --help have to answer before
HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "matplotlib", "tensorboard", "huggingface_hub"}
LONGEST = 300
LONGER = {
    "config.py": 350,  # half of it is the list of the settings and their meanings
}


def files():
    return {path.relative_to(ROOT).as_posix(): path for path in sorted([*ROOT.glob("*.py"), *PACKAGE.rglob("*.py")])}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in files().values()}


def imports(tree):
    """The modules that `tree` imports anywhere, functions included; a submodule counts as itself."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inside}
    return names


def level_of(name):
    """The layer of a module's dotted name; that of the scripts for what is not in the package."""
    first, _, rest = name.partition(".")
    if first != "persona":
        return SCRIPTS
    return LEVEL.get(rest.partition(".")[0], -1) if rest else -1


@pytest.mark.parametrize("file", [name for name in files() if name.startswith("persona/")])
def test_a_module_imports_from_its_own_layer_or_above(file):
    name = module_name(files()[file])
    assert name == "persona" or level_of(name) >= 0, f"{name} stands in no layer; give it one in LAYERS and the design"
    for imported in imports(parse(files()[file])):
        assert imported not in MODULES or level_of(imported) != SCRIPTS, f"{name} imports the script {imported}"
        if imported.startswith("persona."):
            assert imported in MODULES, f"{name} imports {imported}, which does not exist"
            assert level_of(imported) <= level_of(name), f"{name} imports {imported} from a later layer"


def test_no_two_modules_need_each_other():
    graph = {}
    for path in files().values():
        name = module_name(path)
        found = {imported for imported in imports(parse(path)) if imported in MODULES}
        # a package's own modules import it by importing each other, and it may list them
        graph[name] = {imported for imported in found if not name.startswith(f"{imported}.")}
    done = set()

    def visit(name, path):
        assert name not in path, "a circle of imports: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_module_is_a_drawer():
    for path in files().values():
        assert path.stem not in {"utils", "util", "helpers", "helper", "common", "manager", "misc"}, path


@pytest.mark.parametrize("file", files())
def test_a_module_is_short(file):
    limit = LONGER.get(Path(file).name, LONGEST)
    lines = len(files()[file].read_text(encoding="utf-8").splitlines())
    assert limit is None or lines <= limit, f"{file} has {lines} lines; it is asking to be two"


def at_the_top(tree):
    """The first parts of the names that are imported when the module is, not inside functions."""
    return imports(ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], []))


@pytest.mark.parametrize(
    "file", [n for n in files() if "/" not in n or level_of(module_name(files()[n])) in (0, 1)]
)  # fmt: skip
def test_nothing_heavy_is_imported_before_it_is_needed(file):
    top = at_the_top(parse(files()[file]))
    allowed = {"matplotlib"} if file == "persona/curves.py" else set()  # itself imported when there is a run to draw
    assert not {name.partition(".")[0] for name in top} & HEAVY - allowed
    if "/" not in file:
        assert {name for name in top if name.startswith("persona")} <= {"persona.console", "persona.errors"}


@pytest.mark.parametrize("file", [name for name in files() if "/" not in name and name != "conftest.py"])
def test_a_script_is_a_page(file):
    tree = parse(files()[file])
    assert (ast.get_docstring(tree) or "").count("    python ") >= 1 or "python " in (ast.get_docstring(tree) or "")
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    assert len(files()[file].read_text(encoding="utf-8").splitlines()) <= 120


# --- encodings -------------------------------------------------------------------------------------------------------

SOURCES = sorted(
    path
    for folder in ("", "persona", "tests", "benchmarks", "docs")
    for path in ((ROOT / folder).rglob("*.py") if folder else ROOT.glob("*.py"))
)


def lacks_encoding(call):
    """Whether a call reads or writes text in whatever encoding the machine happens to have."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in keywords or "encoding" in keywords:
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    if name == "open":
        of_path = isinstance(call.func, ast.Attribute)
        if of_path and call.args and not (isinstance(call.args[0], ast.Constant) and len(str(call.args[0].value)) <= 3):
            return False  # os.open, ZipFile.open: the first argument is no mode
        mode = keywords.get("mode", next(iter(call.args[0 if of_path else 1 :]), None))
        return "b" not in str(mode.value if isinstance(mode, ast.Constant) else "")
    if name in {"read_text", "write_text"}:
        return len(call.args) < (1 if name == "read_text" else 2)
    return False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_has_an_encoding(path):
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    found = [f"{path}:{call.lineno}: {ast.unparse(call)}" for call in calls if lacks_encoding(call)]
    assert not found


@pytest.mark.parametrize("file", files())
def test_every_program_that_is_called_has_an_encoding(file):
    for call in [node for node in ast.walk(parse(files()[file])) if isinstance(node, ast.Call)]:
        names = {keyword.arg for keyword in call.keywords}
        assert not names & {"text", "universal_newlines"} or "encoding" in names, ast.unparse(call)


@pytest.mark.parametrize(
    ("code", "lacks"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, mode='rb')", False),
        ("open(p, 'rb')", False),
        ("open(p, encoding='utf-8')", False),
        ("p.open()", True),
        ("p.open('a')", True),
        ("p.open('ab')", False),
        ("zip.open(name)", False),
        ("p.read_text()", True),
        ("p.read_text('utf-8')", False),
        ("p.write_text(t)", True),
        ("p.write_text(t, encoding='utf-8')", False),
    ],
)
def test_the_check_of_encodings_finds_what_it_should(code, lacks):
    assert lacks_encoding(ast.parse(code, mode="eval").body) is lacks
