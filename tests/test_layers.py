"""The order of the package: which room imports from which, how large they are, how they speak; and encodings."""

import argparse
import ast
import importlib
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "persona"

# The rooms of the package: its modules at the top, and its folders. A room imports from rooms above it in this list and
# from itself; a folder within a folder belongs to the same room.
ROOMS = (
    *("errors", "console", "files", "config", "records", "pages"),
    *("convert", "model", "engine", "speak", "train", "merge", "evaluate", "export"),
)
LEVEL = {name: level for level, name in enumerate(ROOMS)}
# What takes seconds to import: a wrong setting and --help have to answer before
HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "matplotlib", "tensorboard", "huggingface_hub"}
LIGHT = (
    *("errors", "config", "console", "files", "records", "pages", "convert"),
    *(
        "model.adapters",
        "model.dataset",
        "model.embedded",
        "model.folders",
        "model.render",
        "model.sources",
        "model.template",
    ),
    "model.token_cache",
    *("train.history", "train.curves", "train.verdict", "train.estimate.gpus"),
    *("speak.rounding", "evaluate.style", "evaluate.intervals", "evaluate.results", "evaluate.subject"),
    "evaluate.predictions",
)
LONGEST = 400  # lines of a module
MOST_NAMES = 14  # modules and folders in a folder
MOST_MODULES, MOST_UNTYPED = 118, 40
MOST_LINES = 23_500  # 21,324 before other architectures than Llama and Qwen came


def files():
    return {path.relative_to(ROOT).as_posix(): path for path in sorted([*ROOT.glob("*.py"), *PACKAGE.rglob("*.py")])}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in files().values()}
SCRIPTS = [name for name in files() if "/" not in name and name != "conftest.py"]


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


def room_of(name):
    """The room of a module's dotted name; None outside the package and for the package itself."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "persona" and rest else None


@pytest.mark.parametrize("file", [name for name in files() if name.startswith("persona/")])
def test_a_module_imports_from_its_own_room_or_above(file):
    name = module_name(files()[file])
    assert name == "persona" or room_of(name) in LEVEL, f"{name} is in no room; add it to ROOMS"
    for imported in imports(parse(files()[file])):
        assert imported not in MODULES or imported.startswith("persona"), f"{name} imports the script {imported}"
        if imported.startswith("persona."):
            assert imported in MODULES, f"{name} imports {imported}, which does not exist"
            assert LEVEL[room_of(imported)] <= LEVEL[room_of(name)], f"{name} imports {imported} from a later room"


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
    lines = len(files()[file].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{file} has {lines} lines; it is asking to be two"


def folders():
    return [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)]


def names_in(folder):
    """Its modules, folders and other files."""
    return {path.stem if path.suffix == ".py" else path.name for path in folder.iterdir()} - {"__init__", "__pycache__"}


@pytest.mark.parametrize("folder", folders(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_folder_is_taken_in_at_a_glance(folder):
    assert 0 < len(names_in(folder)) <= MOST_NAMES


def test_every_room_is_in_the_list_and_every_name_in_the_lists_is_there():
    assert names_in(PACKAGE) == set(ROOMS)
    assert {f"persona.{name}" for name in LIGHT} <= MODULES


def test_the_package_stays_small():
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")) <= MOST_LINES


def test_few_values_have_no_type():
    assert sum(path.read_text(encoding="utf-8").count("dict[str, Any]") for path in modules()) <= MOST_UNTYPED


# --- words ------------------------------------------------------------------------------------------------------------


def modules():
    return [path for name, path in files().items() if name.startswith("persona/")]


def documented(tree):
    """The module, its public classes and functions, and the public methods of these classes."""
    yield tree
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node
            inside = node.body if isinstance(node, ast.ClassDef) else []
            yield from (n for n in inside if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"))


def test_everything_public_says_what_it_is():
    nodes = [(path, node) for path in modules() for node in documented(parse(path))]
    assert len(nodes) > 500
    silent = [f"{path}: {getattr(node, 'name', '')}" for path, node in nodes if not ast.get_docstring(node)]
    assert not silent


def sayings(path):
    """Every docstring, of attributes too, and every comment of a module with its line, each from its first word on."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:  # the lines below it go on with the sentence
                yield token.start[0], token.string.lstrip("# -")
            last = token.start[0]


def test_a_docstring_or_comment_names_its_thing():
    every = [(path, line, text) for path in modules() for line, text in sayings(path)]
    assert len(every) > 1000
    riddles = [f"{path}:{line}: {text}" for path, line, text in every if re.match(r"(Of|What)\b", text)]
    assert not riddles, "\n".join(riddles)


def test_a_card_is_the_character_card():
    """Elsewhere the graphics card is the GPU, and what is saved with an adapter its persona."""
    words = re.compile(
        r"(?<!character )(?<!character's )(?<!model )(?<!character_)(?<!model_)(?<![a-z])cards?(?![a-z])", re.IGNORECASE
    )
    rooms = {path: room_of(module_name(path)) for path in modules()}
    lines = [(path, line) for path in rooms for line in path.read_text(encoding="utf-8").split("\n")]
    assert any(words.search(line) for path, line in lines if rooms[path] == "convert")
    others = [f"{p}: {line}" for p, line in lines if rooms[p] not in ("convert", "export") and words.search(line)]
    assert not others


class Stopped(Exception):
    """Raised where a script would read its command line."""


def options_of(script, monkeypatch):
    """The options of a script, those of its subcommands too."""
    parsers = []

    def stop(parser, *_):
        parsers.append(parser)
        raise Stopped

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr("sys.argv", [script])
    with pytest.raises(Stopped):
        importlib.import_module(script).main()
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                yield action


def test_a_help_text_begins_with_a_noun_or_a_verb(monkeypatch):
    options = [option for name in SCRIPTS for option in options_of(name.removesuffix(".py"), monkeypatch)]
    assert len(options) > 60
    riddles = [o for o in options if not o.help or re.match(r"(of|what|that|whether)\b", o.help, re.IGNORECASE)]
    assert not riddles, [(option.dest, option.help) for option in riddles]


# --- the table in CONTRIBUTING.md -------------------------------------------------------------------------------------

TABLE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- rooms: python tests/test_layers.py -->", "<!-- /rooms -->"


def rooms_table():
    """The rooms in their order: what each is, by its docstring, its modules, and which rooms it imports from."""
    lines = ["| room | what it is | modules | imports from |", "|---|---|---|---|"]
    for folder in [None, *folders()[1:]]:
        for room in ROOMS if folder is None else ():
            if (PACKAGE / f"{room}.py").is_file():
                lines.append(row(f"`{room}`", PACKAGE / f"{room}.py", ""))
        if folder is not None:
            modules = ", ".join(sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__"))
            lines.append(row(f"`{folder.relative_to(PACKAGE).as_posix()}/`", folder / "__init__.py", modules))
    return "\n".join([*lines[:2], *sorted(lines[2:], key=lambda line: LEVEL[line.split("`")[1].partition("/")[0]])])


def row(name, path, modules):
    sentence = (ast.get_docstring(parse(path)) or "").partition("\n")[0].rstrip(".")
    here = module_name(path)
    inside = [path] if path.name != "__init__.py" else sorted(path.parent.glob("*.py"))
    used = {box_of(imported) for module in inside for imported in imports(parse(module))} - {None, box_of(here)}
    order = sorted(used, key=lambda box: (LEVEL[box.partition("/")[0]], box))
    return f"| {name} | {sentence} | {modules} | {', '.join(order)} |"


def box_of(name):
    """The folder of a module, such as `convert/formats`, or the module itself at the top; None outside the package."""
    if name not in MODULES or not name.startswith("persona."):
        return None
    parts = name.split(".")[1:]
    is_folder = (PACKAGE.joinpath(*parts) / "__init__.py").is_file()
    return "/".join(parts if is_folder or len(parts) == 1 else parts[:-1])


def test_the_table_of_rooms_is_that_of_the_code():
    text = TABLE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == rooms_table(), "run python tests/test_layers.py"


def at_the_top(tree):
    """The first parts of the names that are imported when the module is, not inside functions."""
    return imports(ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], []))


def file_of(module):
    return next(file for file, path in files().items() if module_name(path) == module)


def is_light(file):
    name = module_name(files()[file]).removeprefix("persona.")
    return "/" not in file or any(name == light or name.startswith(f"{light}.") for light in LIGHT)


@pytest.mark.parametrize("file", [file for file in files() if is_light(file)])
def test_nothing_heavy_is_imported_before_it_is_needed(file):
    top = at_the_top(parse(files()[file]))
    # curves is itself imported when there is a run to draw
    heavy = HEAVY - {"matplotlib"} if file == "persona/train/curves.py" else HEAVY
    assert not {name.partition(".")[0] for name in top} & heavy
    assert {name for name in top if name in MODULES and not is_light(file_of(name))} == set()
    if "/" not in file:
        assert {name for name in top if name.startswith("persona")} <= {"persona.console", "persona.errors"}


@pytest.mark.parametrize("file", SCRIPTS)
def test_a_script_is_a_page(file):
    tree = parse(files()[file])
    lines = (ast.get_docstring(tree) or "").split("\n")
    assert [line for line in lines if line.strip().startswith(f"python {file}")], "its docstring shows no command"
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


if __name__ == "__main__":
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
    TABLE.write_text(f"{before}{BEGIN}\n{rooms_table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8", newline="\n")
