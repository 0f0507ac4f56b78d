"""What README and docs print must run as printed: Python, commands, options and links.

Python blocks of a page run in order in one namespace, in a folder of their own. A block that cannot run here says why
in a comment before it: `<!-- not run: REASON -->`. Every `ttrouting` command in a `sh` block must parse; after
`<!-- run -->` it runs, too.
"""

import dataclasses
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import ttrouting as ttr
from ttrouting import errors
from ttrouting.cli.entry import app
from ttrouting.cli.settings import make_strategies

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
LANGUAGES = {"python", "sh", "text", "toml", "json"}
FENCE = re.compile(
    r"(?:<!--(?P<mark>[^\n]*?)-->\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
NOT_RUN = re.compile(r" not run: \S+ \S.* ")  # a reason has two words at least


@dataclass(frozen=True)
class Block:
    """A fenced block; `mark` is the comment on the line before it."""

    page: str
    line: int
    language: str
    code: str
    mark: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(page):
    text = (ROOT / page).read_text()
    return [
        Block(page, text.count("\n", 0, f.start("code")) + 1, f["language"], f["code"], f["mark"] or "")
        for f in FENCE.finditer(text)
    ]


EVERY = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in EVERY if block.language == "sh"]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_and_every_skip_a_reason(page):
    assert (ROOT / page).read_text().count("\n```") == 2 * len(blocks(page))
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if "run" in block.mark:
            assert block.mark == " run " or NOT_RUN.fullmatch(block.mark), block


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))])
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": f"page_{Path(page).stem}"}
    monkeypatch.setitem(sys.modules, names["__name__"], type(sys)(names["__name__"]))  # dataclasses look it up
    for block in blocks(page):
        if block.language == "python" and not block.mark.startswith(" not run"):
            code = "\n" * (block.line - 1) + block.code  # so that a traceback has the page's lines
            exec(compile(code, ROOT / page, "exec"), names)


# --- commands -----------------------------------------------------------------------------------------


def commands(block):
    """The simple commands of a block as lists of words, without comments, redirections and what a pipe joins."""
    code = re.sub(r"(^|\s)# .*$", "", block.code.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(code, posix=True, punctuation_chars="|&;<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    found, redirected = [[]], False
    for word in lexer:
        if redirected:
            redirected = False
        elif word in ("<", ">"):
            redirected = True
        elif not word.strip("|&;\n"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def parsed(words):
    """Option values of a `ttrouting` command, by the parser of the command line itself."""
    command, rest = typer.main.get_command(app), words[1:]
    context = command.make_context("ttrouting", rest[:0], resilient_parsing=True)
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"no command {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
        extra = command.context_settings
        context = type(context)(command, parent=context, info_name=command.name, **extra)
    values, left, _ = command.make_parser(context).parse_args(list(rest))
    assert not left or context.allow_extra_args, f"left over: {left}"
    return values


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_parse(block):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(block):
        match words:
            case ["ttrouting", *_]:
                values = parsed(words)
                adapt, options = values.get("adapt") or [], values.get("settings") or values.get("options") or []
                kinds = [name for one in adapt for name in re.split(r"[+,]", one)]
                make_strategies(kinds, options if kinds else [])
            case ["make", target, *_]:
                assert target in targets
            case ["python", "-m", module, *_]:
                assert list(ROOT.glob(module.replace(".", "/") + "*")), module
            case ["python", script, *_]:
                assert (ROOT / script).is_file(), script
            case _:
                assert words[0] in ("pip", "curl", "accelerate"), words


@pytest.mark.parametrize("block", [b for b in SHELL if b.mark == " run "], ids=str)
def test_cheap_commands_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands(block):
        with pytest.raises(SystemExit) as ended:
            app(words[1:], prog_name="ttrouting")
        done = capsys.readouterr()
        assert not ended.value.code, done.err
        assert done.out


# --- what is named, and what is linked ------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", (ROOT / page).read_text()))
    for link in re.findall(r"\]\(([^)#: ]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("info", [i for i in ttr.list_strategies() if i.source == "ttrouting"], ids=lambda i: i.name)
def test_every_strategy_has_a_page_with_its_options(info):
    page = ROOT / "docs" / "strategies" / f"{info.name}.md"
    text = (page if page.exists() else ROOT / "docs" / f"{info.name}.md").read_text()
    for heading in ("Cost", "When it helps, and when not", "Options"):
        assert f"\n## {heading}\n" in text
    fields = dataclasses.fields(info.cls)
    if not page.exists():  # its table gives several options a line
        assert all(f"`{field.name}`" in text for field in fields)
        return
    printed = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))
    needs = {"expert_mask": {"mask": None}}.get(info.name)
    usual = {f.name: f.default for f in fields} if needs else vars(info.cls())
    assert printed == {field.name: repr(usual[field.name]) for field in fields}
    nav = (ROOT / "mkdocs.yml").read_text()
    assert f"strategies/{info.name}.md" in nav


def test_every_error_has_a_section():
    text = (ROOT / "docs" / "errors.md").read_text()
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.TTRoutingError):
            assert f"\n## `{name}`\n" in text


def test_the_reference_has_the_public_api():
    text = (ROOT / "docs" / "reference.md").read_text() + (ROOT / "docs" / "errors.md").read_text()
    assert [name for name in ttr.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_diagrams_read_in_both_themes_and_without_a_network():
    files = list((ROOT / "docs" / "diagrams").glob("*.svg"))
    assert len(files) == 2
    for file in files:
        text = file.read_text()
        assert "currentColor" in text
        assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]
